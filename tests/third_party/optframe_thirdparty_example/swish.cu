// y = x * sigmoid(beta * x), element by element, in float32.
//
// Arguments: x, int count, y. SWISH_TYPE is the type of both, SWISH_BETA a float literal; swish.py sets them.

#include <cuda_fp16.h>

extern "C" __global__ void swish(const SWISH_TYPE* __restrict__ x, int count, SWISH_TYPE* __restrict__ y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const float value = static_cast<float>(x[i]);
  y[i] = static_cast<SWISH_TYPE>(value / (1.0f + expf(-(SWISH_BETA * value))));
}
