// Copies `count` 16-byte words; each thread moves COPY_WORDS of them. The bar that memory-bound kernels are held to, so
// its launches overlap as theirs do.
extern "C" __global__ void __launch_bounds__(256) copy(const uint4* __restrict__ x, int count, uint4* __restrict__ y) {
  unsigned block = blockIdx.x;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" : "+r"(block)::"memory");
#endif
  const int first = block * (256 * COPY_WORDS) + threadIdx.x;
  uint4 word[COPY_WORDS];
#pragma unroll
  for (int i = 0; i < COPY_WORDS; ++i)
    if (first + i * 256 < count) word[i] = x[first + i * 256];
#pragma unroll
  for (int i = 0; i < COPY_WORDS; ++i)
    if (first + i * 256 < count) y[first + i * 256] = word[i];
}
