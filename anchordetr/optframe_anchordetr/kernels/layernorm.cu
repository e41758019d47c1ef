// Layer normalisation over the last axis: `layernorm`, and `skip_layernorm`, which first adds a residual.
//
// Arguments: x, [skip], [scale], [bias], int rows, y, [sum]. Those in brackets exist where LN_SKIP, LN_SCALE, LN_BIAS
// are 1; kernels/layernorm.py sets every LN_ macro. Outputs must not overlap inputs.
//
// A group of LN_LANES threads normalises a row and keeps it in registers: a warp or a part of one for short rows
// (shuffles, no shared memory), a block for longer ones. Where LN_LONG is 1 a block reads its row twice instead, the
// second time from the caches, which were told to keep it: with no row in registers more threads fit, and hide latency.
//
// LN_EARLY: whether parameters may be loaded with the row, before the statistics. LN_LARGE_ROWS: from how many rows on
// no cache holds the matrix.
//
// Statistics in float32, exact for large offsets: sums are of the distances to the mean of the first few elements
// (shifted data: Chan, Golub, LeVeque 1983, section 3), both in one reduction, which is what a small row waits for.
// Where those few lie far from the row's mean, as outliers do, a second pass starts from the mean found.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

using Type = LN_TYPE;
using Scale = LN_SCALE_TYPE;
using Bias = LN_BIAS_TYPE;

constexpr int kColumns = LN_COLUMNS;
constexpr int kVector = LN_VECTOR;  // elements an access; divides kColumns
constexpr int kLanes = LN_LANES;    // threads a row: a power of two up to 32, or a multiple of 32
constexpr int kGroups = LN_GROUPS;  // rows a block; 1 where kLanes > 32
constexpr int kWarps = kLanes > 32 ? kLanes / 32 : 1;  // a row
constexpr int kStride = kLanes * kVector;
constexpr int kSteps = (kColumns + kStride - 1) / kStride;

// Whether a lane's columns of a step lie in the row. The compiler knows where all do, and then loads without branches.
__device__ __forceinline__ bool inside(int step, int column) {
  return kColumns % kStride == 0 || (step + 1) * kStride <= kColumns || column < kColumns;
}

// A block and a thread of it. All addresses come from here, so that no access moves ahead of the wait.
struct Place {
  unsigned block, thread;
};

// How many blocks at the end of a grid call the next kernel. A call costs 1.2 ns, and a large grid of small blocks takes
// less than that for a block.
constexpr unsigned kLastBlocks = 1024;

// Lets the next kernel on the stream begin as soon as the last blocks of this one have begun and the others have ended, and
// waits for the one before, which may still run: "Programmatic Dependent Launch" in the CUDA C++ Programming Guide.
__device__ __forceinline__ Place take_place() {
  Place place = {blockIdx.x, threadIdx.x};
#if __CUDA_ARCH__ >= 900
  if (gridDim.x - place.block <= kLastBlocks) asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" : "+r"(place.block), "+r"(place.thread)::"memory");
#endif
  return place;
}

template <typename T>
struct alignas(sizeof(T) * kVector < 16 ? sizeof(T) * kVector : 16) Pack {
  T item[kVector];
};

// When bytes are needed again: what a load tells the caches.
enum class Reuse {
  kAny,   // some time
  kNone,  // never: they are given up first
  kSoon,  // by the same block: they are given up last
  kDone,  // no more, after kSoon
};

// The marks of both caches: without that of the second level, rows of 16 KB take 4 % longer.
#define LN_MARKED_LOAD(word, source, mark)                                                 \
  unsigned long long policy;                                                               \
  asm("createpolicy.fractional.L2::" mark ".b64 %0;" : "=l"(policy));                      \
  asm volatile("ld.global.L1::" mark ".L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"  \
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)                    \
               : "l"(source), "l"(policy))

template <Reuse Next>
__device__ __forceinline__ uint4 load_word(const uint4* source) {
  uint4 word;
  if constexpr (Next == Reuse::kAny) {
    word = *source;
  } else if constexpr (Next == Reuse::kNone) {
    word = __ldcs(source);
  } else if constexpr (Next == Reuse::kSoon) {
    LN_MARKED_LOAD(word, source, "evict_last");
  } else {
    LN_MARKED_LOAD(word, source, "evict_first");
  }
  return word;
}

template <bool Aligned, Reuse Next = Reuse::kAny, typename T>
__device__ __forceinline__ Pack<T> load(const T* source) {
  if constexpr (Aligned && sizeof(Pack<T>) == 16) {
    const uint4 word = load_word<Next>(reinterpret_cast<const uint4*>(source));
    return reinterpret_cast<const Pack<T>&>(word);
  } else if constexpr (Aligned) {
    return *reinterpret_cast<const Pack<T>*>(source);
  } else {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kVector; ++i) pack.item[i] = source[i];
    return pack;
  }
}

// Outputs are the first that the second-level cache gives up: a small matrix leaves sooner, and a large one would push
// out what is still to be read.
template <bool Aligned>
__device__ __forceinline__ void store(Type* target, const Pack<Type>& pack) {
  if constexpr (Aligned && sizeof(pack) == 16) {
    __stcs(reinterpret_cast<uint4*>(target), reinterpret_cast<const uint4&>(pack));
  } else if constexpr (Aligned) {
    *reinterpret_cast<Pack<Type>*>(target) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) target[i] = pack.item[i];
  }
}

__device__ __forceinline__ Type add(Type x, Type skip) {
  return static_cast<Type>(static_cast<float>(x) + static_cast<float>(skip));
}

// A row as its group's lanes see it.
template <bool Aligned>
struct Row {
  const Type *x, *skip;
  const Scale* scale;
  const Bias* bias;
  Type *y, *sum;

  // This row of a matrix that starts where the pointers point.
  __device__ __forceinline__ Row at(unsigned index) const {
    const size_t offset = static_cast<size_t>(index) * kColumns;
    return {x + offset, skip + offset, scale, bias, y + offset, sum + offset};
  }

  // kVector elements of x, or of x + skip rounded to their type, as the second output holds it.
  template <Reuse Next = Reuse::kAny>
  __device__ __forceinline__ Pack<Type> read(int column) const {
    Pack<Type> pack = load<Aligned, Next>(x + column);
    if constexpr (LN_SKIP) {
      const Pack<Type> other = load<Aligned, Next>(skip + column);
#pragma unroll
      for (int i = 0; i < kVector; ++i) pack.item[i] = add(pack.item[i], other.item[i]);
    }
    return pack;
  }

  // Roughly the mean: that of the first elements.
  __device__ __forceinline__ float guess() const {
    constexpr int kCount = kVector < 4 ? kVector : 4;
    const Pack<Type> pack = read(0);
    float half[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kCount; ++i) half[i % 2] += static_cast<float>(pack.item[i]);
    return (half[0] + half[1]) / kCount;
  }

  __device__ __forceinline__ void write(int column, const Pack<Type>& pack) const { store<Aligned>(y + column, pack); }
};

// Scale and bias of kVector columns.
struct Parameters {
  Pack<Scale> scale;
  Pack<Bias> bias;

  template <bool Aligned>
  __device__ __forceinline__ void read(const Row<Aligned>& row, int column) {
    if constexpr (LN_SCALE) scale = load<Aligned>(row.scale + column);
    if constexpr (LN_BIAS) bias = load<Aligned>(row.bias + column);
  }

  // (((x - shift) - mean) * factor) * scale + bias.
  template <typename T>
  __device__ __forceinline__ Pack<Type> apply(const Pack<T>& x, float shift, float mean, float factor) const {
    Pack<Type> pack;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float result = fmaf(static_cast<float>(x.item[i]) - shift, factor, -mean * factor);
      if constexpr (LN_SCALE) result *= static_cast<float>(scale.item[i]);
      if constexpr (LN_BIAS) result += static_cast<float>(bias.item[i]);
      pack.item[i] = static_cast<Type>(result);
    }
    return pack;
  }
};

// Sums of values and of their squares; two of each, since a sum waits for the one before.
struct Sums {
  float value[2] = {0, 0};
  float square[2] = {0, 0};

  __device__ __forceinline__ void add(float term, int i) {
    value[i % 2] += term;
    square[i % 2] = fmaf(term, term, square[i % 2]);
  }
};

struct Moments {
  float mean, variance;

  // Whether the mean is so far from zero that the variance lost more than two bits to it.
  __device__ __forceinline__ bool far() const { return mean * mean > 4 * variance; }
};

// The moments over all lanes; every lane gets the same bits. Calls that follow each other need different `Call`s, since
// each has shared memory of its own.
template <int Call>
__device__ __forceinline__ Moments moments(const Sums& sums) {
  float total[2] = {sums.value[0] + sums.value[1], sums.square[0] + sums.square[1]};
#pragma unroll
  for (int offset = (kLanes < 32 ? kLanes : 32) / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int i = 0; i < 2; ++i) total[i] += __shfl_xor_sync(0xffffffffu, total[i], offset);
  if constexpr (kLanes > 32) {
    __shared__ float partial[2][kWarps];
    if (threadIdx.x % 32 == 0) {
      partial[0][threadIdx.x / 32] = total[0];
      partial[1][threadIdx.x / 32] = total[1];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) total[i] += partial[i][warp];
    }
  }
  const float mean = total[0] / kColumns;
  const float variance = total[1] / kColumns - mean * mean;
  return {mean, variance < 0 ? 0 : variance};  // a NaN stays
}

#if LN_LONG

template <bool Aligned, int Call>
__device__ __forceinline__ Moments read_moments(const Row<Aligned>& row, unsigned thread, float shift) {
  Sums sums;
#pragma unroll 4
  for (int step = 0; step < kSteps; ++step) {
    const int column = thread * kVector + step * kStride;
    if (!inside(step, column)) continue;
    const Pack<Type> pack = row.template read<Reuse::kSoon>(column);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sums.add(static_cast<float>(pack.item[i]) - shift, i);
    if constexpr (LN_SKIP && Call == 0) store<Aligned>(row.sum + column, pack);
  }
  return moments<Call>(sums);
}

template <bool Aligned, bool Large>
__device__ __forceinline__ void normalise(const Type* __restrict__ x, const Type* __restrict__ skip,
                                          const Scale* __restrict__ scale, const Bias* __restrict__ bias, int rows,
                                          Type* __restrict__ y, Type* __restrict__ sum) {
  const auto [block, thread] = take_place();
  const Row<Aligned> row = Row<Aligned>{x, skip, scale, bias, y, sum}.at(block);
  float shift = row.guess();
  Moments found = read_moments<Aligned, 0>(row, thread, shift);
  if (found.far()) {
    shift += found.mean;
    found = read_moments<Aligned, 1>(row, thread, shift);
  }
  const float factor = rsqrtf(found.variance + LN_EPSILON);
#pragma unroll 4
  for (int step = 0; step < kSteps; ++step) {
    const int column = thread * kVector + step * kStride;
    if (!inside(step, column)) continue;
    const Pack<Type> pack = row.template read<Reuse::kDone>(column);
    Parameters parameters;
    parameters.read(row, column);
    row.write(column, parameters.apply(pack, shift, found.mean, factor));
  }
}

#else

// What a lane keeps of its row. The elements as they were read take the fewest registers, and a warp that needs few has
// company. All warps of a block wait for what comes after the statistics: so its lanes convert before.
template <bool Converted>
struct Choice {
  using Item = Type;
};
template <>
struct Choice<true> {
  using Item = float;
};
using Kept = Pack<Choice<(kLanes > 32)>::Item>;

// Keeps a pack in its registers up to here: the compiler would rather keep what it makes of it, in more of them.
__device__ __forceinline__ void keep(Kept& pack) {
  if constexpr (sizeof(pack) % 4 == 0)
#pragma unroll
    for (int i = 0; i < sizeof(pack) / 4; ++i) asm volatile("" : "+r"(reinterpret_cast<unsigned*>(&pack)[i]));
}

template <int Call>
__device__ __forceinline__ Moments kept_moments(const Kept (&row)[kSteps], int first, float shift) {
  Sums sums;
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    if (inside(step, first + step * kStride))
#pragma unroll
      for (int i = 0; i < kVector; ++i) sums.add(static_cast<float>(row[step].item[i]) - shift, i);
  return moments<Call>(sums);
}

template <bool Aligned, bool Large>
__device__ __forceinline__ void normalise(const Type* __restrict__ x, const Type* __restrict__ skip,
                                          const Scale* __restrict__ scale, const Bias* __restrict__ bias, int rows,
                                          Type* __restrict__ y, Type* __restrict__ sum) {
  // Parameters loaded with the row shorten the wait. Blocks of large 16-bit matrices are 0.5 % faster without.
  constexpr bool kEarly = LN_EARLY && Aligned && !(Large && kLanes > 32 && sizeof(Type) == 2);
  constexpr Reuse kNext = Large ? Reuse::kNone : Reuse::kAny;
  const auto [block, thread] = take_place();
  const int first = thread % kLanes * kVector;
  // All lanes take part in the shuffles: groups past the end write the last row again, the same values.
  const unsigned index = block * kGroups + thread / kLanes;
  const unsigned last = rows - 1;
  const Row<Aligned> row = Row<Aligned>{x, skip, scale, bias, y, sum}.at(min(index, last));
  Kept kept[kSteps];
  Parameters parameters[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = first + step * kStride;
    if (!inside(step, column)) continue;
    const Pack<Type> pack = row.template read<kNext>(column);
    if constexpr (LN_SKIP) store<Aligned>(row.sum + column, pack);
#pragma unroll
    for (int i = 0; i < kVector; ++i) kept[step].item[i] = pack.item[i];
    if constexpr (kEarly) parameters[step].read(row, column);
  }
  float shift = row.guess();
  Moments found = kept_moments<0>(kept, first, shift);
  // Rows of one warp may differ in this. All its lanes go the same way, since they shuffle together, but only far rows
  // take what comes of it: a result depends on no other row.
  const bool far = found.far();
  if (kLanes < 32 ? __any_sync(0xffffffffu, far) : far) {
    const float nearer = shift + found.mean;
    const Moments again = kept_moments<1>(kept, first, nearer);
    if (far) {
      shift = nearer;
      found = again;
    }
  }
  const float factor = rsqrtf(found.variance + LN_EPSILON);
  if constexpr (!kEarly) asm volatile("" ::: "memory");  // or the compiler loads them early nevertheless
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = first + step * kStride;
    if (!inside(step, column)) continue;
    if constexpr (!kEarly) parameters[step].read(row, column);
    keep(kept[step]);
    row.write(column, parameters[step].apply(kept[step], shift, found.mean, factor));
  }
}

#endif

}  // namespace

#if LN_SKIP
#define LN_ENTRY skip_layernorm
#else
#define LN_ENTRY layernorm
#endif

// LN_BLOCKS blocks, at least, fit a multiprocessor: so many registers a thread may take.
extern "C" __global__ void __launch_bounds__(kLanes* kGroups, LN_BLOCKS)
    LN_ENTRY(const Type* __restrict__ x,
#if LN_SKIP
             const Type* __restrict__ skip,
#endif
#if LN_SCALE
             const Scale* __restrict__ scale,
#endif
#if LN_BIAS
             const Bias* __restrict__ bias,
#endif
             int rows,
#if LN_SKIP
             Type* __restrict__ y, Type* __restrict__ sum
#else
             Type* __restrict__ y
#endif
) {
#if !LN_SKIP
  const Type* skip = nullptr;
  Type* sum = nullptr;
#endif
#if !LN_SCALE
  const Scale* scale = nullptr;
#endif
#if !LN_BIAS
  const Bias* bias = nullptr;
#endif
  const auto bits = reinterpret_cast<size_t>(x) | reinterpret_cast<size_t>(skip) | reinterpret_cast<size_t>(scale) |
                    reinterpret_cast<size_t>(bias) | reinterpret_cast<size_t>(y) | reinterpret_cast<size_t>(sum);
  // Where two matrices are read, marks slow it down; long rows have marks of their own.
  if (bits % 16 != 0)
    normalise<false, false>(x, skip, scale, bias, rows, y, sum);
  else if (LN_SKIP || LN_LONG || rows < LN_LARGE_ROWS)
    normalise<true, false>(x, skip, scale, bias, rows, y, sum);
  else
    normalise<true, true>(x, skip, scale, bias, rows, y, sum);
}
