// Copies `count` 16-byte words; each thread moves COPY_WORDS of them. The bar that memory-bound kernels are held to.
extern "C" __global__ void __launch_bounds__(256) copy(const uint4* __restrict__ x, int count, uint4* __restrict__ y) {
  const int first = blockIdx.x * (256 * COPY_WORDS) + threadIdx.x;
  uint4 word[COPY_WORDS];
#pragma unroll
  for (int i = 0; i < COPY_WORDS; ++i)
    if (first + i * 256 < count) word[i] = x[first + i * 256];
#pragma unroll
  for (int i = 0; i < COPY_WORDS; ++i)
    if (first + i * 256 < count) y[first + i * 256] = word[i];
}
