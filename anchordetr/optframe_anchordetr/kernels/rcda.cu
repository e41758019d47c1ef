// Row-column decoupled attention (Anchor DETR, arXiv:2109.07107, section 3.4), its intermediate never materialised:
//   A_row = softmax(q_row k_row^T) over x,  A_col = softmax(q_col k_col^T) over y,
//   out[q] = sum_y A_col[q, y] * (sum_x A_row[q, x] * V[y, x]),  for each image and head.
//
// Arguments: q_row (N, L, C), q_col (N, L, C), k_row (N, w, C), k_col (N, h, C), v (N, h, w, C), [row mask (N, w)],
// [column mask (N, h)], int L, int h, int w, out (N, L, C). Heads are slices of RCDA_HEAD_SIZE channels. Masks are true
// where padded, and exist where RCDA_ROW_MASK, RCDA_COLUMN_MASK are 1; kernels/rcda.py sets every RCDA_ macro. A query
// whose keys are all masked gives NaN, as softmax does.
//
// Grid (blocks of queries, heads, images). Exponentials stay unnormalised, in [0, 1]; the two sums divide the result.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace {

using Type = RCDA_TYPE;

constexpr int kHeads = RCDA_HEADS;
constexpr int kHeadSize = RCDA_HEAD_SIZE;
constexpr int kPitch = kHeads * kHeadSize;  // elements from one position to the next
constexpr int kWarps = RCDA_WARPS;
constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

struct Problem {
  const Type *row_queries, *column_queries, *row_keys, *column_keys, *values;
  const bool *row_mask, *column_mask;  // null where there is none
  int queries, height, width;
  Type* out;
};

// An offset as one value, whose terms the general path does not see: the compiler would hoist a term's sums for several
// tensors in the order of a hash table of addresses, so that PTX differed from one compilation to the next.
__device__ __forceinline__ size_t one(size_t offset) {
#if !RCDA_TENSOR_CORES
  asm("" : "+l"(offset));
#endif
  return offset;
}

// The problem of one image and head.
__device__ __forceinline__ Problem head_of(Problem p) {
  const size_t image = blockIdx.z;
  const size_t head = blockIdx.y * kHeadSize;
  p.row_queries += image * p.queries * kPitch + head;
  p.column_queries += image * p.queries * kPitch + head;
  p.row_keys += image * p.width * kPitch + head;
  p.column_keys += image * p.height * kPitch + head;
  p.values += one(image * p.height * p.width * kPitch + head);
  p.out += one(image * p.queries * kPitch + head);
  if constexpr (RCDA_ROW_MASK) p.row_mask += image * p.width;
  if constexpr (RCDA_COLUMN_MASK) p.column_mask += image * p.height;
  return p;
}

template <bool Masked>
__device__ __forceinline__ bool counts(const bool* mask, int key, int keys) {
  return key < keys && !(Masked && mask[key]);
}

#if RCDA_TENSOR_CORES

// A warp owns RCDA_TILES tiles of 16 queries. Its row weights stay in registers as left operands of the tensor cores;
// V streams through shared memory, a row y at a time; each row's product is scaled by the column weights as it is
// added, in float32. (Both weights are rounded to 11 bits, or row weights to 8 in bfloat16.) Where Type is float, all
// factors are rounded to TF32, 11 bits too.

static_assert(kHeadSize == 32, "the tensor core path is laid out for heads of 32 channels");

constexpr int kTiles = RCDA_TILES;
constexpr int kGroups = RCDA_WIDTH_GROUPS;  // groups of 8 columns x: at least ceil(w / 8)
constexpr int kStages = RCDA_STAGES;        // rows of V in shared memory
constexpr int kThreads = kWarps * 32;
constexpr int kQueries = kWarps * kTiles * 16;  // a block
constexpr int kWeightPitch = kQueries / 2 + 4;  // pairs of column weights for a row y: no bank conflicts on writing
constexpr int kChunk = 16 / sizeof(Type);  // channels of 16 bytes
constexpr int kChunks = kHeadSize / kChunk;
constexpr int kRowBytes = kHeadSize * sizeof(Type);
constexpr int kColumns = kGroups * 8;
constexpr int kSlabBytes = kColumns * kRowBytes;

// Keeps a value in its register: the compiler would rather compute it again and again in the main loop.
__device__ __forceinline__ unsigned keep(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Place of a thread's elements in the result of a product: rows `row()` and `row() + 8`, columns from `column()`.
__device__ __forceinline__ int row() { return threadIdx.x % 32 / 4; }
__device__ __forceinline__ int column() { return threadIdx.x % 4 * 2; }

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

__device__ __forceinline__ float quad_sum(float value) {
  value += __shfl_xor_sync(0xffffffffu, value, 1);
  return value + __shfl_xor_sync(0xffffffffu, value, 2);
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Byte offset of a chunk of a position in a slab, which holds one head of positions that follow each other. The exclusive
// or spreads what lanes read together over all banks: a chunk of 8 positions, or two of every other position.
__device__ __forceinline__ unsigned slab_offset(unsigned position, unsigned chunk) {
  const unsigned spread = position / 2 % 4;
  return position * kRowBytes + (chunk ^ (kChunks == 4 ? spread : spread * 2 + position % 2)) * 16;
}

// A thread's share of the copies into slabs: the same chunk of every kThreads / kChunks-th position.
struct Copier {
  int position = keep(threadIdx.x / kChunks);
  unsigned offset = keep(slab_offset(threadIdx.x / kChunks, threadIdx.x % kChunks));

  // What the thread copies first of a head's positions.
  __device__ __forceinline__ const Type* share_of(const Type* source) const {
    return source + position * kPitch + threadIdx.x % kChunks * kChunk;
  }

  // Starts copying `positions`, kColumns at most; `share` is share_of() their first.
  template <bool Aligned>
  __device__ __forceinline__ void fill(char* slab, const Type* share, int positions) const {
#pragma unroll
    for (int step = 0; step < kColumns; step += kThreads / kChunks) {  // by multiples of 8: the offset's bits agree
      const Type* from = share + step * kPitch;
      char* to = slab + offset + step * kRowBytes;
      if (position + step >= positions) continue;
      if constexpr (Aligned) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
      } else {
#pragma unroll
        for (int channel = 0; channel < kChunk; ++channel) reinterpret_cast<Type*>(to)[channel] = from[channel];
      }
    }
  }
};

__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last `Open` groups of copies are there, for every thread.
template <int Open>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Open) : "memory");
  __syncthreads();
}

// Streams the rows of V into slabs.
template <bool Aligned>
struct ValueStream {
  Copier copier;
  const Type* share;
  int y = 0;

  __device__ __forceinline__ explicit ValueStream(const Problem& p) : share(copier.share_of(p.values)) {}

  // Starts copying the next row and closes its group, which is empty past the last.
  __device__ __forceinline__ void advance(char* slab, const Problem& p) {
    if (y < p.height) copier.fill<Aligned>(slab, share, p.width);
    close_copies();
    share += static_cast<size_t>(p.width) * kPitch;
    ++y;
  }
};

#if RCDA_TF32

// Operands of mma.m16n8k8. Which column or channel stands where is free as long as both operands agree: so a lane holds
// the columns of its scores, and 8 channels of its queries, keys and results that follow each other.

__device__ __forceinline__ unsigned tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void load_chunk(float (&item)[4], unsigned address) {
  asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(item[0]), "=f"(item[1]), "=f"(item[2]), "=f"(item[3])
               : "r"(address)
               : "memory");
}

// The first of a lane's channels: 8 that follow each other.
__device__ __forceinline__ int channel() { return column() * 4; }

// 16 queries of 32 channels as four left operands; zeros past the last query.
struct QueryTile {
  unsigned a[4][4];

  template <bool Aligned>
  __device__ __forceinline__ void load(const Type* queries, int first, int count) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first + row() + half * 8;
      const Type* source = queries + static_cast<size_t>(query) * kPitch + channel();
      alignas(16) float item[8] = {};
      if (query < count) {
        if constexpr (Aligned) {
          reinterpret_cast<float4*>(item)[0] = reinterpret_cast<const float4*>(source)[0];
          reinterpret_cast<float4*>(item)[1] = reinterpret_cast<const float4*>(source)[1];
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) item[i] = source[i];
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i / 2][half + i % 2 * 2] = tf32(item[i]);
    }
  }

  // Scores against keys first .. first + 7 of a slab.
  __device__ __forceinline__ void score(float (&c)[4], const char* keys, int first) const {
    const unsigned slab = shared_address(keys) + first * kRowBytes;
    c[0] = c[1] = c[2] = c[3] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float key[4];
      load_chunk(key, slab + slab_offset(row(), column() + half));
      multiply(c, a[half * 2], tf32(key[0]), tf32(key[1]));
      multiply(c, a[half * 2 + 1], tf32(key[2]), tf32(key[3]));
    }
  }
};

// Weights of 16 queries for 8 columns x as a left operand.
struct Weights {
  unsigned a[4];

  Weights() = default;
  __device__ __forceinline__ explicit Weights(const float (&weight)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i / 2 + i % 2 * 2] = tf32(weight[i]);
  }

  __device__ __forceinline__ void add_to(float (&total)[4]) const { multiply(total, a, tf32(1.f), tf32(1.f)); }
};

// part = row weights x a row of V.
__device__ __forceinline__ void multiply_values(float (&part)[kTiles][4][4], const Weights (&weights)[kTiles][kGroups],
                                                unsigned slab) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float value[2][4];  // of columns column() and column() + 1, channels from row() * 4
#pragma unroll
    for (int i = 0; i < 2; ++i)
      load_chunk(value[i], slab + group * 8 * kRowBytes + slab_offset(column() + i, row()));
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const unsigned b[2] = {tf32(value[0][n]), tf32(value[1][n])};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) multiply(part[tile][n], weights[tile][group].a, b[0], b[1]);
    }
  }
}

// A row of results times a factor, from the lane's first channel on.
template <bool Aligned>
__device__ __forceinline__ void store_row(Type* target, const float (&total)[4][4], float factor, int half) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float item[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) item[n] = total[n][half * 2 + i] * factor;
    Type* place = target + i * 4;
    if constexpr (Aligned) {
      *reinterpret_cast<float4*>(place) = {item[0], item[1], item[2], item[3]};
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) place[n] = item[n];
    }
  }
}

#else

// Operands of mma.m16n8k16, or of k8 for an odd group of columns.

// The first of a lane's channels: 2 of each 8.
__device__ __forceinline__ int channel() { return column(); }

#if RCDA_BFLOAT16
#define RCDA_MMA_TYPES "f32.bf16.bf16.f32"
#else
#define RCDA_MMA_TYPES "f32.f16.f16.f32"
#endif

__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col." RCDA_MMA_TYPES " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned b0) {
  asm("mma.sync.aligned.m16n8k8.row.col." RCDA_MMA_TYPES " {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// Four 8x8 matrices, as they lie or transposed; the lanes give the addresses of their rows.
__device__ __forceinline__ void load_matrices(unsigned (&b)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_transposed(unsigned (&b)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ unsigned pack(Type low, Type high) {
  const Type pair[2] = {low, high};
  unsigned bits;
  memcpy(&bits, pair, sizeof bits);
  return bits;
}

template <bool Aligned>
__device__ __forceinline__ unsigned load_pair(const Type* source) {
  return Aligned ? *reinterpret_cast<const unsigned*>(source) : pack(source[0], source[1]);
}

// 16 queries of 32 channels as two left operands; zeros past the last query.
struct QueryTile {
  unsigned a[2][4];

  template <bool Aligned>
  __device__ __forceinline__ void load(const Type* queries, int first, int count) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int query = first + row() + i % 2 * 8;
      const Type* source = queries + static_cast<size_t>(query) * kPitch + i / 2 * 8 + channel();
      a[i / 4][i % 4] = query < count ? load_pair<Aligned>(source) : 0;
    }
  }

  // Scores against keys first .. first + 7 of a slab.
  __device__ __forceinline__ void score(float (&c)[4], const char* keys, int first) const {
    const int lane = threadIdx.x % 32;
    unsigned b[4];
    load_matrices(b, shared_address(keys) + first * kRowBytes + slab_offset(lane % 8, lane / 8));
    c[0] = c[1] = c[2] = c[3] = 0;
    multiply(c, a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1]);
    multiply(c, a[1][0], a[1][1], a[1][2], a[1][3], b[2], b[3]);
  }
};

// Weights of 16 queries for 8 columns x as half a left operand.
struct Weights {
  unsigned a[2];

  Weights() = default;
  __device__ __forceinline__ explicit Weights(const float (&weight)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      a[half] = pack(static_cast<Type>(weight[half * 2]), static_cast<Type>(weight[half * 2 + 1]));
  }

  __device__ __forceinline__ void add_to(float (&total)[4]) const {
    multiply(total, a[0], a[1], pack(static_cast<Type>(1.f), static_cast<Type>(1.f)));
  }
};

// part = row weights x a row of V.
__device__ __forceinline__ void multiply_values(float (&part)[kTiles][4][4], const Weights (&weights)[kTiles][kGroups],
                                                unsigned slab) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int group = 0; group + 1 < kGroups; group += 2) {
    unsigned b[2][4];
    load_transposed(b[0], slab + group * 8 * kRowBytes + slab_offset(lane % 16, lane / 16));
    load_transposed(b[1], slab + group * 8 * kRowBytes + slab_offset(lane % 16, lane / 16 + 2));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Weights &first = weights[tile][group], &second = weights[tile][group + 1];
#pragma unroll
      for (int n = 0; n < 4; ++n)
        multiply(part[tile][n], first.a[0], first.a[1], second.a[0], second.a[1], b[n / 2][n % 2 * 2],
                 b[n / 2][n % 2 * 2 + 1]);
    }
  }
  if constexpr (kGroups % 2 == 1) {
    unsigned b[4];
    load_transposed(b, slab + (kGroups - 1) * 8 * kRowBytes + slab_offset(lane % 8, lane / 8));
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const Weights& last = weights[tile][kGroups - 1];
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply(part[tile][n], last.a[0], last.a[1], b[n]);
    }
  }
}

// A row of results times a factor, from the lane's first channel on.
template <bool Aligned>
__device__ __forceinline__ void store_row(Type* target, const float (&total)[4][4], float factor, int half) {
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const Type low = static_cast<Type>(total[n][half * 2] * factor);
    const Type high = static_cast<Type>(total[n][half * 2 + 1] * factor);
    if constexpr (Aligned) {
      *reinterpret_cast<unsigned*>(target + n * 8) = pack(low, high);
    } else {
      target[n * 8] = low;
      target[n * 8 + 1] = high;
    }
  }
}

#endif

// Scores of a tile against keys first .. first + 7 of a slab; -infinity for those that are masked or past the last.
template <bool Masked>
__device__ __forceinline__ void masked_score(float (&c)[4], const QueryTile& tile, const char* keys, int first,
                                             const bool* mask, int count) {
  tile.score(c, keys, first);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (!counts<Masked>(mask, first + column() + i, count)) c[i] = c[i + 2] = -infinity();
}

// exp(score - top) with scores times log2(e): NaN where every score is -infinity, as softmax has it.
__device__ __forceinline__ float weight(float score, float scaled_top) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fmaf(score, kLog2E, -scaled_top)));
  return power;
}

// Row weights of a tile as left operands, 8 columns x each; their sums for rows row() and row() + 8.
__device__ __forceinline__ void row_weights(Weights (&operand)[kGroups], float (&sum)[2], const Problem& p,
                                            const QueryTile& tile, const char* keys) {
  float score[kGroups][4];
  float top[2] = {-infinity(), -infinity()};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    masked_score<RCDA_ROW_MASK>(score[group], tile, keys, group * 8, p.row_mask, p.width);
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], score[group][i]);
  }
  top[0] = quad_max(top[0]) * kLog2E;
  top[1] = quad_max(top[1]) * kLog2E;
  // The sums are of the rounded weights, so that what is multiplied adds up to 1: a product with ones.
  float total[4] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) score[group][i] = weight(score[group][i], top[i / 2]);
    operand[group] = Weights(score[group]);
    operand[group].add_to(total);
  }
  sum[0] = total[0];
  sum[1] = total[2];
}

// Column weights of a tile into shared memory, pairs of rows row() and row() + 8 for each y; their sums.
__device__ __forceinline__ void column_weights(__half2* weights, float (&sum)[2], const Problem& p,
                                               const QueryTile& tile, const char* keys) {
  float score[4];
  float top[2] = {-infinity(), -infinity()};
#pragma unroll 2
  for (int y = 0; y < p.height; y += 8) {
    masked_score<RCDA_COLUMN_MASK>(score, tile, keys, y, p.column_mask, p.height);
#pragma unroll
    for (int i = 0; i < 4; ++i) top[i / 2] = fmaxf(top[i / 2], score[i]);
  }
  top[0] = quad_max(top[0]) * kLog2E;
  top[1] = quad_max(top[1]) * kLog2E;
  sum[0] = sum[1] = 0;
#pragma unroll 2
  for (int y = 0; y < p.height; y += 8) {  // the last 8 may reach past the height
    masked_score<RCDA_COLUMN_MASK>(score, tile, keys, y, p.column_mask, p.height);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __half2 pair = __floats2half2_rn(weight(score[i], top[0]), weight(score[i + 2], top[1]));
      weights[(y + column() + i) * kWeightPitch + row()] = pair;
      sum[0] += __low2float(pair);
      sum[1] += __high2float(pair);
    }
  }
  sum[0] = quad_sum(sum[0]);
  sum[1] = quad_sum(sum[1]);
}

__device__ __forceinline__ void clear(char* first, int words) {
  for (int i = threadIdx.x; i < words; i += kThreads) reinterpret_cast<unsigned*>(first)[i] = 0;
}

// The columns past the width are never copied: zeros, since 0 times what lies there could be NaN.
__device__ __forceinline__ void clear_padding(char* slabs, int width) {
  const int words = (kColumns - width) * (kRowBytes / 4);
  for (int slab = 0; slab < kStages; ++slab) clear(slabs + slab * kSlabBytes + width * kRowBytes, words);
}

// total += column weight of y * (row weights x row y of V).
__device__ __forceinline__ void add_slab(float (&total)[kTiles][4][4], const Weights (&weights)[kTiles][kGroups],
                                         unsigned slab, const __half2* column_weights) {
  float part[kTiles][4][4] = {};
  multiply_values(part, weights, slab);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const float2 pair = __half22float2(column_weights[tile * 8 + row()]);
    const float factor[2] = {pair.x, pair.y};
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[tile][n][i] = fmaf(factor[i / 2], part[tile][n][i], total[tile][n][i]);
  }
}

template <bool Aligned>
__device__ __forceinline__ void store_tile(const float (&total)[4][4], const float (&factor)[2], const Problem& p,
                                           int first) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = first + row() + half * 8;
    if (query >= p.queries) continue;
    store_row<Aligned>(p.out + static_cast<size_t>(query) * kPitch + channel(), total, factor[half], half);
  }
}

// Shared memory: slabs of V, then column keys and column weights for whole groups of 8 rows y. The row keys lie in the
// last slab until V comes.
template <bool Aligned>
__device__ __forceinline__ void attend(const Problem& p) {
  extern __shared__ __align__(16) char slabs[];
  char* row_keys = slabs + (kStages - 1) * kSlabBytes;
  char* column_keys = slabs + kStages * kSlabBytes;
  const int warp_query = threadIdx.x / 32 * (kTiles * 16);
  const int first = blockIdx.x * kQueries + warp_query;
  __half2* columns = reinterpret_cast<__half2*>(column_keys + (p.height + 7) / 8 * 8 * kRowBytes) + warp_query / 2;

  ValueStream<Aligned> values(p);
  const Copier& copier = values.copier;
  copier.fill<Aligned>(row_keys, copier.share_of(p.row_keys), p.width);
  for (int y = 0; y < p.height; y += kColumns)
    copier.fill<Aligned>(column_keys + y * kRowBytes, copier.share_of(p.column_keys + y * kPitch),
                         min(p.height - y, kColumns));
  close_copies();
  for (int y = 0; y < kStages - 1; ++y) values.advance(slabs + y * kSlabBytes, p);
  QueryTile row_tile[kTiles], column_tile[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    row_tile[tile].load<Aligned>(p.row_queries, first + tile * 16, p.queries);
    column_tile[tile].load<Aligned>(p.column_queries, first + tile * 16, p.queries);
  }
  clear_padding(slabs, p.width);
#if RCDA_TF32  // scores read whole groups of keys, by plain loads
  clear(column_keys + p.height * kRowBytes, (-p.height & 7) * (kRowBytes / 4));
#endif
  await_copies<kStages - 1>();
  Weights weights[kTiles][kGroups];
  float factor[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float sum[2][2];
    row_weights(weights[tile], sum[0], p, row_tile[tile], row_keys);
    column_weights(columns + tile * 8, sum[1], p, column_tile[tile], column_keys);
    factor[tile][0] = 1 / (sum[0][0] * sum[1][0]);
    factor[tile][1] = 1 / (sum[0][1] * sum[1][1]);
  }

  float total[kTiles][4][4] = {};
  char* slab = slabs;
  char* left = row_keys;  // the slab before
  for (int y = 0; y < p.height; ++y) {
    await_copies<kStages - 2>();  // the row is there, and all have left the one before
    values.advance(left, p);
    add_slab(total, weights, shared_address(slab), columns + y * kWeightPitch);
    left = slab;
    slab = slab == row_keys ? slabs : slab + kSlabBytes;
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
    store_tile<Aligned>(total[tile], factor[tile], p, first + tile * 16);
}

#else

// Any head size, float32 throughout. A warp owns kQueries queries. Its lanes share the keys of both softmaxes; then each
// has some channels of some queries, so that a value and a weight from memory serve several products.

constexpr int kThreads = kWarps * 32;
constexpr int kQueries = RCDA_QUERIES;  // a warp
constexpr int kChannelLanes = 8;
constexpr int kLaneChannels = kHeadSize % 4 == 0 ? 4 : 1;
constexpr int kLaneQueries = kQueries / (32 / kChannelLanes);

template <typename T, int Count>
struct alignas(sizeof(T) * Count) Pack {
  T item[Count];
};

using Values = Pack<Type, kLaneChannels>;
using Weights = Pack<float, kLaneQueries>;

template <bool Aligned>
__device__ __forceinline__ Values load_values(const Type* source) {
  if constexpr (Aligned) return *reinterpret_cast<const Values*>(source);
  Values values;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) values.item[i] = source[i];
  return values;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Softmax over the keys of the warp's queries into shared memory, [key][query].
template <bool Aligned, bool Masked>
__device__ __forceinline__ void softmax(float* weights, const Type* queries, const Type* keys, const bool* mask,
                                        int first, int query_count, int key_count) {
  const int lane = threadIdx.x % 32;
  float top[kQueries], sum[kQueries] = {};
#pragma unroll
  for (int q = 0; q < kQueries; ++q) top[q] = -infinity();
  for (int key = lane; key < key_count; key += 32) {
    float score[kQueries] = {};
    for (int channel = 0; channel < kHeadSize; channel += kLaneChannels) {
      const Values values = load_values<Aligned>(keys + static_cast<size_t>(key) * kPitch + channel);
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const size_t query = min(first + q, query_count - 1);
        const Values asked = load_values<Aligned>(queries + query * kPitch + channel);
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i)
          score[q] = fmaf(static_cast<float>(values.item[i]), static_cast<float>(asked.item[i]), score[q]);
      }
    }
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      if (!counts<Masked>(mask, key, key_count)) score[q] = -infinity();
      weights[key * kQueries + q] = score[q];
      top[q] = fmaxf(top[q], score[q]);
    }
  }
#pragma unroll
  for (int q = 0; q < kQueries; ++q) top[q] = warp_max(top[q]);
  for (int key = lane; key < key_count; key += 32)
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      const float value = exp2f((weights[key * kQueries + q] - top[q]) * kLog2E);
      weights[key * kQueries + q] = value;
      sum[q] += value;
    }
#pragma unroll
  for (int q = 0; q < kQueries; ++q) sum[q] = 1 / warp_sum(sum[q]);
  for (int key = lane; key < key_count; key += 32)
#pragma unroll
    for (int q = 0; q < kQueries; ++q) weights[key * kQueries + q] *= sum[q];
}

// The lane's queries and channels: total[q] = sum_y columns[y][q] * sum_x rows[x][q] * value of (y, x).
template <bool Aligned>
__device__ __forceinline__ void attend_channels(float (&total)[kLaneQueries][kLaneChannels], const float* rows,
                                                const float* columns, const Problem& p, int channel) {
  const Type* value = p.values + channel;
  for (int y = 0; y < p.height; ++y) {
    float part[kLaneQueries][kLaneChannels] = {};
#pragma unroll 8
    for (int x = 0; x < p.width; ++x, value += kPitch) {
      const Values values = load_values<Aligned>(value);
      const Weights weights = *reinterpret_cast<const Weights*>(rows + x * kQueries);
#pragma unroll
      for (int q = 0; q < kLaneQueries; ++q)
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i)
          part[q][i] = fmaf(weights.item[q], static_cast<float>(values.item[i]), part[q][i]);
    }
    const Weights weights = *reinterpret_cast<const Weights*>(columns + y * kQueries);
#pragma unroll
    for (int q = 0; q < kLaneQueries; ++q)
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) total[q][i] = fmaf(weights.item[q], part[q][i], total[q][i]);
  }
}

template <bool Aligned>
__device__ __forceinline__ void attend(const Problem& p) {
  extern __shared__ __align__(16) float weights[];
  const int warp = threadIdx.x / 32;
  const int first = (blockIdx.x * kWarps + warp) * kQueries;
  if (first >= p.queries) return;
  float* rows = weights + warp * (p.width + p.height) * kQueries;
  float* columns = rows + p.width * kQueries;
  softmax<Aligned, RCDA_ROW_MASK>(rows, p.row_queries, p.row_keys, p.row_mask, first, p.queries, p.width);
  softmax<Aligned, RCDA_COLUMN_MASK>(columns, p.column_queries, p.column_keys, p.column_mask, first, p.queries, p.height);
  __syncwarp();
  const int lane_query = threadIdx.x % 32 / kChannelLanes * kLaneQueries;
  const int lane_channel = threadIdx.x % kChannelLanes * kLaneChannels;
  for (int channel = lane_channel; channel < kHeadSize; channel += kChannelLanes * kLaneChannels) {
    float total[kLaneQueries][kLaneChannels] = {};
    attend_channels<Aligned>(total, rows + lane_query, columns + lane_query, p, channel);
#pragma unroll
    for (int q = 0; q < kLaneQueries; ++q) {
      const int query = first + lane_query + q;
      if (query >= p.queries) continue;
      Type* target = p.out + static_cast<size_t>(query) * kPitch + channel;
#pragma unroll
      for (int i = 0; i < kLaneChannels; ++i) target[i] = static_cast<Type>(total[q][i]);
    }
  }
}

#endif

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    rcda(const Type* __restrict__ row_queries, const Type* __restrict__ column_queries,
         const Type* __restrict__ row_keys, const Type* __restrict__ column_keys, const Type* __restrict__ values,
#if RCDA_ROW_MASK
         const bool* __restrict__ row_mask,
#endif
#if RCDA_COLUMN_MASK
         const bool* __restrict__ column_mask,
#endif
         int queries, int height, int width, Type* __restrict__ out) {
#if !RCDA_ROW_MASK
  const bool* row_mask = nullptr;
#endif
#if !RCDA_COLUMN_MASK
  const bool* column_mask = nullptr;
#endif
  const auto bits = reinterpret_cast<size_t>(row_queries) | reinterpret_cast<size_t>(column_queries) |
                    reinterpret_cast<size_t>(row_keys) | reinterpret_cast<size_t>(column_keys) |
                    reinterpret_cast<size_t>(values) | reinterpret_cast<size_t>(out);
  const Problem problem = head_of(
      {row_queries, column_queries, row_keys, column_keys, values, row_mask, column_mask, queries, height, width, out});
  if (bits % 16 == 0)
    attend<true>(problem);
  else
    attend<false>(problem);
}
