// What temporal_loss adds up, and in which order.
//
// A position's terms are added over the frames in the working type, from there on in double: 256
// positions (a unit) by the tree of neighbours, whatever V is; the units of a slice, a 256th of a sample, in
// order; the slices by the tree of neighbours. The order depends on the sample's shape alone: not on grid,
// batch, alignment or on which of the kernels ran.
#pragma once

#include "columns.cuh"

namespace latentfast::cuda::temporal {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kGranule = 32;      // positions that make one sum in memory
constexpr int kUnitGranules = 8;  // granules that every row is padded to a multiple of
constexpr int kUnit = kGranule * kUnitGranules;
constexpr int kSlices = 256;

enum Norm : int { kL2, kL1, kCharbonnier };

struct TemporalParams {
  const void* z;
  const void* ref;   // or null
  const void* mask;  // or null
  void* grad;        // or null
  void* loss;
  double2* loss_sums;  // (batch, rows, granules): Σ w1 ρ(d1) and Σ w2 ρ(d2)
  // Σ w1 and Σ w2: (mask batch, mask rows, granules), with a gradient (mask batch, slices in use)
  double2* weight_sums;
  int64_t batch, rows, frames, positions;
  int64_t granules;  // of a row, padded
  int64_t sample_stride, frame_stride;
  int64_t row_stride;             // between neighbours along the last of row_dims
  int64_t mask_batch, mask_rows;  // without those along which the mask is broadcast
  int64_t mask_sample_stride, mask_frame_stride, mask_position_stride;
  int64_t frame_bytes, row_bytes,
      mask_frame_bytes;     // the same steps as bytes: the loop over frames adds nothing else
  Joined<2> row_dims;       // a row's place in z and in the mask
  Joined<1> mask_row_dims;  // the mask's own rows
  double first, second;     // 0 where there are too few frames
  double count_first,
      count_second;  // without a mask, Σ w1 and Σ w2; with one, how often each of its rows counts
  double eps, grad_scale;
  int norm;
  bool mask_is_float, loss_is_double, spread;
};

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }

__device__ __forceinline__ double2 operator+(double2 a, double2 b) { return {a.x + b.x, a.y + b.y}; }

__device__ __forceinline__ double2 shuffle_xor(double2 x, int lanes) {
  return {__shfl_xor_sync(~0u, x.x, lanes), __shfl_xor_sync(~0u, x.y, lanes)};
}

// The sum over groups of `lanes` neighbouring lanes, on all of them: one tree, the same bits on each.
__device__ __forceinline__ double2 tree(double2 x, int lanes) {
  for (int o = 1; o < lanes; o *= 2) x = x + shuffle_xor(x, o);
  return x;
}

// The same within a thread: the sum of V neighbours.
template <int V>
__device__ __forceinline__ double2 neighbours(double2 (&part)[V]) {
#pragma unroll
  for (int o = 1; o < V; o *= 2) {
#pragma unroll
    for (int v = 0; v < V; v += 2 * o) part[v] = part[v] + part[v + o];
  }
  return part[0];
}

// The sums of the granules that a warp's columns make, from two sums a column. The tree is that of 32
// positions whatever V.
template <int V, typename C>
__device__ __forceinline__ void store_granules(double2* sums, const C (&a)[V], const C (&b)[V], int lane) {
  double2 part[V];
#pragma unroll
  for (int v = 0; v < V; ++v) part[v] = {static_cast<double>(a[v]), static_cast<double>(b[v])};
  constexpr int kLanes = kGranule / V;
  const double2 total = tree(neighbours(part), kLanes);
  if (lane % kLanes == 0) sums[lane / kLanes] = total;
}

// The slices of a sample: how many units each has, and how many have any.
struct Slices {
  int64_t units, each, used;
  __host__ __device__ explicit Slices(int64_t count)
      : units(count),
        each((count + kSlices - 1) / kSlices),
        used(each == 0 ? 0 : (count + each - 1) / each) {}
  __device__ int64_t begin(int64_t slice) const { return min(units, slice * each); }
};

// The total of a sample's `count` units, valid in the first thread. What was written before the last grid
// barrier is read past L1.
inline __device__ double2 block_total(const double2* sums, int64_t count, double2* shared) {
  const Slices slices(count);
  double2 total = {0.0, 0.0};
#pragma unroll 2
  for (int64_t unit = slices.begin(threadIdx.x); unit < slices.begin(threadIdx.x + 1); ++unit) {
    double2 part[kUnitGranules];
#pragma unroll
    for (int i = 0; i < kUnitGranules; ++i) part[i] = __ldcg(sums + unit * kUnitGranules + i);
    total = total + neighbours(part);
  }
  total = tree(total, 32);
  __syncthreads();  // `shared` may still be read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = total;
  __syncthreads();
  double2 part[kWarps];
  for (int i = 0; i < kWarps; ++i) part[i] = shared[i];
  return neighbours(part);
}
static_assert(kSlices == kThreads);

// A lane's share of phase 1: the sums of w1 and w2 over the frames and over kUnit / 32 positions, those of
// them that there are. kTogether: all of them are there and can be loaded together.
template <typename T, typename M, bool kTogether, bool kSecond>
__device__ double2 weights_of(const TemporalParams& p, int64_t at, int64_t present) {
  using C = Wide<T>;
  constexpr int V = kUnit / 32, kDepth = kTogether ? (sizeof(M) == 2 ? 8 : 4) : 1;
  C before[V] = {}, pair_before[V] = {}, sum1[V] = {}, sum2[V] = {};
  for (int64_t base = 0; base < p.frames; base += kDepth) {
    [[maybe_unused]] Raw<M, kTogether ? V : 1> raw[kDepth];
    if constexpr (kTogether) {
#pragma unroll
      for (int j = 0; j < kDepth; ++j) {
        if (base + j < p.frames) {
          load_raw(raw[j], static_cast<const M*>(p.mask) + at + (base + j) * p.mask_frame_stride);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      const int64_t t = base + j;
      if (t >= p.frames) break;
      C m[V];
      if constexpr (kTogether) {
        widen_raw(raw[j], m);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          m[v] = v < present ? element_of<T>(p.mask, p.mask_is_float,
                                             at + t * p.mask_frame_stride + v * p.mask_position_stride)
                             : C(0);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const C pair = multiply(before[v], m[v]);
        if (t > 0) sum1[v] += pair;
        if constexpr (kSecond) {
          if (t > 1) sum2[v] += multiply(pair_before[v], m[v]);
          pair_before[v] = pair;
        }
        before[v] = m[v];
      }
    }
  }
  double2 part[V];
#pragma unroll
  for (int v = 0; v < V; ++v) part[v] = {static_cast<double>(sum1[v]), static_cast<double>(sum2[v])};
  return neighbours(part);
}

// Phase 1: Σ w1 and Σ w2 of the mask, a warp a slice. Not inlined: its registers are not the pass's.
template <typename T, typename M, int V, bool kSecond>
__device__ __noinline__ void sum_weights(const TemporalParams& p) {
  constexpr int kEach = kUnit / 32;
  const int lane = threadIdx.x % 32;
  const int64_t row_units = p.granules / kUnitGranules;
  const Slices slices(p.mask_rows * row_units);
  const bool together = V > 1 && p.mask_position_stride == 1 && p.positions % kEach == 0;
  // neighbouring slices on different multiprocessors
  for (int64_t item = threadIdx.x / 32 * static_cast<int64_t>(gridDim.x) + blockIdx.x;
       item < p.mask_batch * slices.used; item += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t sample = item / slices.used, slice = item - sample * slices.used;
    double2 total = {0.0, 0.0};
    for (int64_t unit = slices.begin(slice); unit < slices.begin(slice + 1); ++unit) {
      const int64_t row = unit / row_units;
      const int64_t position = ((unit - row * row_units) * 32 + lane) * kEach;
      double2 part = {0.0, 0.0};
      if (position < p.positions) {
        int64_t place[1];
        p.mask_row_dims.offsets(row, place);
        const int64_t at = sample * p.mask_sample_stride + place[0] + position * p.mask_position_stride;
        part = together ? weights_of<T, M, (V > 1), kSecond>(p, at, kEach)
                        : weights_of<T, M, false, kSecond>(p, at, p.positions - position);
      }
      total = total + tree(part, 32);
    }
    if (lane == 0) p.weight_sums[item] = total;
  }
}

// Σ w1 and Σ w2 of a sample from its slices, on every lane of the warp.
__device__ __forceinline__ double2 weight_of(const TemporalParams& p, int64_t sample) {
  if (p.mask == nullptr) return {p.count_first, p.count_second};
  const Slices slices(p.mask_rows * (p.granules / kUnitGranules));
  const double2* const sums = p.weight_sums + (p.mask_batch > 1 ? sample : 0) * slices.used;
  constexpr int kEach = kSlices / 32;
  double2 part[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int slice = static_cast<int>(threadIdx.x) % 32 * kEach + i;
    part[i] = slice < slices.used ? __ldcg(sums + slice) : double2{0.0, 0.0};
  }
  const double2 total = tree(neighbours(part), 32);
  return {total.x * p.count_first, total.y * p.count_second};
}

}  // namespace latentfast::cuda::temporal
