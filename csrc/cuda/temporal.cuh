// temporal_loss: a sample's loss is first·Σ w1 ρ(d1)/Σ w1 + second·Σ w2 ρ(d2)/Σ w2 over the first and second
// differences in time of x = z − ref, with w1[t] = m[t]m[t+1] and w2[t] = m[t]m[t+1]m[t+2]; beside it its
// gradient in z. The specification is latentfast/reference/temporal.py.
//
// One cooperative launch. The latents are seen as (sample, row, frame, position): rows are what lies around
// the frames and is not the innermost run of positions (the channels of B C T H W). A warp takes 32·V
// neighbouring positions of one row and goes through the frames once, with the previous frame's x, mask and
// slope in registers, so that each input is read once and the gradient of a frame is written as soon as the
// last difference it takes part in is known. Loads run some frames ahead, in the narrow type; that is what
// keeps enough bytes in flight (16 to 24 warps a multiprocessor, 4 frames, 512 bytes or more each). V is 4:
// with 8 the window alone takes 64 registers and half of the warps are lost. Neighbouring warps take the same
// positions of neighbouring rows: a mask that channels share then comes from L1 for all but the first of
// them.
//
// The gradient needs Σ w before its first element. With a mask the kernel therefore has three phases, with
// the grid's barrier in between: sums of the weights; the pass; the losses. Without one Σ w is a count, and
// without a gradient the weights are summed in the pass itself: then two phases.
//
// Sums: a position's terms are added over the frames in the working type, from there on in double: 32
// positions (a granule) by a fixed tree, whatever V is; 8 granules make a unit, a 32nd of a sample's units a
// slice, added in order; the 32 slices by a tree. The order depends on the sample's shape alone: not on grid,
// batch, alignment or on which of the kernels ran.
#pragma once

#include <cooperative_groups.h>

#include "columns.cuh"

namespace latentfast::cuda::temporal {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kGranule = 32;      // positions that make one sum in memory
constexpr int kUnitGranules = 8;  // granules that every row is padded to a multiple of
constexpr int kSlices = 32;
constexpr int kColumns = 4;  // positions a thread, where they can be loaded together

// Frames whose loads are in flight: as many as the registers beside the window of frames allow.
template <typename T, typename M, bool kMask, bool kSecond>
constexpr int kAhead = kMask && kSecond && sizeof(T) + sizeof(M) > 4 ? 3 : 4;

enum Norm : int { kL2, kL1, kCharbonnier };

struct TemporalParams {
  const void* z;
  const void* ref;   // or null
  const void* mask;  // or null
  void* grad;        // or null
  void* loss;
  double2* loss_sums;  // (batch, rows, granules): Σ w1 ρ(d1) and Σ w2 ρ(d2)
  double2*
      weight_sums;  // Σ w1 and Σ w2: (mask batch, mask rows, granules), with a gradient (mask batch, slices)
  int64_t batch, rows, frames, positions;
  int64_t granules;  // of a row, padded
  int64_t sample_stride, frame_stride;
  int64_t mask_batch, mask_rows;  // without those along which the mask is broadcast
  int64_t mask_sample_stride, mask_frame_stride, mask_position_stride;
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

// The sums of the granules that a warp's columns make, from two sums a column. The tree is that of 32
// positions whatever V.
template <int V, typename C>
__device__ __forceinline__ void store_granules(double2* sums, const C (&a)[V], const C (&b)[V], int lane) {
  double2 part[V];
#pragma unroll
  for (int v = 0; v < V; ++v) part[v] = {static_cast<double>(a[v]), static_cast<double>(b[v])};
#pragma unroll
  for (int o = 1; o < V; o *= 2) {
#pragma unroll
    for (int v = 0; v < V; v += 2 * o) part[v] = part[v] + part[v + o];
  }
  constexpr int kLanes = kGranule / V;
  const double2 total = tree(part[0], kLanes);
  if (lane % kLanes == 0) sums[lane / kLanes] = total;
}

// How the units of a sample are shared out to slices.
struct Slice {
  int64_t begin, end;
  __device__ Slice(int64_t units, int slice) {
    const int64_t each = (units + kSlices - 1) / kSlices;
    begin = min(units, slice * each);
    end = min(units, begin + each);
  }
};

// The total of `units` units, valid in the first warp. What was written before the last grid barrier is read
// past L1.
inline __device__ double2 block_total(const double2* sums, int64_t units, double2* shared) {
  const Slice slice(units, threadIdx.x / kUnitGranules);
  double2 total = {0.0, 0.0};
#pragma unroll 4
  for (int64_t unit = slice.begin; unit < slice.end; ++unit) {
    total = total + __ldcg(sums + unit * kUnitGranules + threadIdx.x % kUnitGranules);
  }
  __syncthreads();  // `shared` may still be read
  shared[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x >= kSlices) return total;
  total = shared[threadIdx.x * kUnitGranules];
  for (int i = 1; i < kUnitGranules; ++i) total = total + shared[threadIdx.x * kUnitGranules + i];
  return tree(total, kSlices);
}
static_assert(kSlices * kUnitGranules == kThreads && kUnitGranules == kWarps && kSlices == 32);

// Phase 1: Σ w1 and Σ w2 of the mask, a block a slice, a thread a column of frames.
template <typename T>
__device__ void sum_weights(const TemporalParams& p, double2* shared) {
  using C = Wide<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row_units = p.granules / kUnitGranules;
  for (int64_t item = blockIdx.x; item < p.mask_batch * kSlices; item += gridDim.x) {
    const Slice slice(p.mask_rows * row_units, static_cast<int>(item % kSlices));
    double2 total = {0.0, 0.0};
    for (int64_t unit = slice.begin; unit < slice.end; ++unit) {
      const int64_t row = unit / row_units;
      const int64_t position = ((unit - row * row_units) * kUnitGranules + warp) * kGranule + lane;
      C sum1 = 0, sum2 = 0;
      if (position < p.positions) {
        int64_t place[1];
        p.mask_row_dims.offsets(row, place);
        const int64_t first =
            item / kSlices * p.mask_sample_stride + place[0] + position * p.mask_position_stride;
        C before = 0, pair_before = 0;
#pragma unroll 8
        for (int64_t t = 0; t < p.frames; ++t) {
          const C m = element_of<T>(p.mask, p.mask_is_float, first + t * p.mask_frame_stride);
          const C pair = multiply(before, m);
          if (t > 0) sum1 += pair;
          if (t > 1) sum2 += multiply(pair_before, m);
          before = m;
          pair_before = pair;
        }
      }
      total = total + tree({static_cast<double>(sum1), static_cast<double>(sum2)}, 32);
    }
    __syncthreads();  // `shared` may still be read
    if (lane == 0) shared[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < kWarps; ++i) total = total + shared[i];
      p.weight_sums[item] = total;
    }
  }
}

// Σ w1 and Σ w2 of a sample from its slices, on every lane of the warp.
__device__ __forceinline__ double2 weight_of(const TemporalParams& p, int64_t sample) {
  if (p.mask == nullptr) return {p.count_first, p.count_second};
  const int64_t row = p.mask_batch > 1 ? sample : 0;
  const double2 total = tree(__ldcg(p.weight_sums + row * kSlices + threadIdx.x % 32), kSlices);
  return {total.x * p.count_first, total.y * p.count_second};
}

// sum += w·ρ(d), and slope = w·ρ'(d)·scale (scale/2 for l2). Where w is exactly 0 the element is left out,
// even a NaN.
template <bool kMask, bool kGrad, int V, typename C>
__device__ __forceinline__ void add_term(int norm, C eps, C scale, const C (&difference)[V], const C (&w)[V],
                                         C (&sum)[V], C (&slope)[V]) {
  C d[V];
#pragma unroll
  for (int v = 0; v < V; ++v) d[v] = kMask && w[v] == 0 ? C(0) : difference[v];
  switch (norm) {
    case kL2:
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const C weighted = kMask ? w[v] * d[v] : d[v];
        sum[v] = fma(weighted, d[v], sum[v]);
        if (kGrad) slope[v] = weighted * scale;
      }
      break;
    case kL1:
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sum[v] = fma(kMask ? w[v] : C(1), fabs(d[v]), sum[v]);
        // 0 stays 0 and NaN stays NaN
        if (kGrad) slope[v] = (d[v] > 0 ? C(1) : d[v] < 0 ? C(-1) : d[v]) * (kMask ? w[v] * scale : scale);
      }
      break;
    default:
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const C root = sqrt(fma(d[v], d[v], eps * eps));
        sum[v] = fma(kMask ? w[v] : C(1), root - eps, sum[v]);
        if (kGrad) slope[v] = (root == 0 ? C(0) : d[v] / root) * (kMask ? w[v] * scale : scale);
      }
  }
}

// One warp's columns: where they start, and what is made of them.
struct Columns {
  int64_t sample, row, tile;
  int64_t place, mask_place;  // of the row's first position in frame 0
  int64_t mask_row;           // which of the mask's own rows it is
  bool weigh;                 // this row stands for all that share its mask row
};

__device__ __forceinline__ Columns columns_of(const TemporalParams& p, int64_t item, int64_t tiles) {
  Columns c;
  const int64_t rest = item / p.rows;
  c.row = item - rest * p.rows;
  c.sample = rest / tiles;
  c.tile = rest - c.sample * tiles;
  c.place = c.sample * p.sample_stride;
  c.mask_place = c.sample * p.mask_sample_stride;
  c.mask_row = 0;
  c.weigh = p.mask_sample_stride != 0 || c.sample == 0;
  int64_t index = c.row, radix = 1;
  for (int d = p.row_dims.dims - 1; d >= 0; --d) {
    const int64_t up = d > 0 ? index / p.row_dims.size[d] : 0, i = index - up * p.row_dims.size[d];
    c.place += i * p.row_dims.stride[0][d];
    c.mask_place += i * p.row_dims.stride[1][d];
    if (p.row_dims.stride[1][d] == 0) {
      c.weigh = c.weigh && i == 0;
    } else {
      c.mask_row += i * radix;
      radix *= p.row_dims.size[d];
    }
    index = up;
  }
  return c;
}

// Phase 2. The general kernel (V == 1) finds out at run time whether there is a mask and of which type.
template <typename T, typename M, int V, bool kMask, bool kGrad, bool kSecond>
struct Pass {
  using C = Wide<T>;
  static constexpr int kDepth = kAhead<T, M, kMask, kSecond>;
  using MaskSlot = std::conditional_t<V == 1, C, Raw<M, V>>;

  const TemporalParams& p;
  const T* const z;
  const T* const ref;
  T* const grad;
  C sum1[V] = {}, sum2[V] = {}, weight1[V] = {}, weight2[V] = {};

  __device__ explicit Pass(const TemporalParams& params)
      : p(params),
        z(static_cast<const T*>(params.z)),
        ref(static_cast<const T*>(params.ref)),
        grad(static_cast<T*>(params.grad)) {}

  struct Slot {
    Raw<T, V> z, ref;
    MaskSlot mask;
  };

  __device__ __forceinline__ void load(Slot& slot, int64_t at, int64_t mask_at) const {
    load_raw<true>(slot.z, z + at);
    if (ref != nullptr) load_raw<true>(slot.ref, ref + at);
    if constexpr (V == 1) {
      slot.mask = p.mask == nullptr ? C(1) : element_of<T>(p.mask, p.mask_is_float, mask_at);
    } else if constexpr (kMask) {
      load_row<false>(slot.mask, static_cast<const M*>(p.mask) + mask_at, p.mask_position_stride);
    }
  }

  // Through the frames of V columns. `at`, `mask_at`: their first element; `scale`: what turns ρ' into the
  // gradient.
  __device__ __forceinline__ void run(int64_t at, int64_t mask_at, bool weigh, bool first, bool second,
                                      C scale1, C scale2) {
    const int frames = static_cast<int>(p.frames);
    const C eps = static_cast<C>(p.eps);
    T* out = kGrad ? grad + at : nullptr;  // of the next frame whose gradient will be known
    Slot slots[kDepth];
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      if (j < frames) {
        load(slots[j], at, mask_at);
        at += p.frame_stride;
        mask_at += p.mask_frame_stride;
      }
    }
    C x_before[V] = {}, m_before[V] = {}, w_before[V] = {}, d_before[V] = {};
    // slopes that the gradients of the last frame and of the one before still wait with
    C last[V] = {}, earlier[V] = {};
    for (int base = 0; base < frames; base += kDepth) {
#pragma unroll
      for (int j = 0; j < kDepth; ++j) {
        const int t = base + j;
        if (t >= frames) break;
        C x[V], m[V], w1[V], d[V];
        widen_raw(slots[j].z, x);
        if (ref != nullptr) {
          C r[V];
          widen_raw(slots[j].ref, r);
#pragma unroll
          for (int v = 0; v < V; ++v) x[v] -= r[v];
        }
        if constexpr (V == 1) {
          m[0] = slots[j].mask;
        } else if constexpr (kMask) {
          fill_row(slots[j].mask, p.mask_position_stride);
          widen_raw(slots[j].mask, m);
        }
        if (t + kDepth < frames) {
          load(slots[j], at, mask_at);
          at += p.frame_stride;
          mask_at += p.mask_frame_stride;
        }
        if (t > 0) {
          C e[V] = {}, f[V] = {};
#pragma unroll
          for (int v = 0; v < V; ++v) {
            d[v] = x[v] - x_before[v];
            w1[v] = kMask ? multiply(m_before[v], m[v]) : C(1);
          }
          if (first) add_term<kMask, kGrad>(p.norm, eps, scale1, d, w1, sum1, e);
          if (kMask && !kGrad && weigh) {
#pragma unroll
            for (int v = 0; v < V; ++v) weight1[v] += w1[v];
          }
          if (kSecond && t > 1) {
            C w2[V], dd[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              dd[v] = d[v] - d_before[v];
              w2[v] = kMask ? multiply(w_before[v], m[v]) : C(1);
            }
            if (second) add_term<kMask, kGrad>(p.norm, eps, scale2, dd, w2, sum2, f);
            if (kMask && !kGrad && weigh) {
#pragma unroll
              for (int v = 0; v < V; ++v) weight2[v] += w2[v];
            }
          }
          if constexpr (kGrad && kSecond) {
            // frame t−2 lacks only +f of its gradient, frame t−1 has −e and −2f to come, frame t begins with
            // e and f
            if (t > 1) {
              C g[V];
#pragma unroll
              for (int v = 0; v < V; ++v) g[v] = earlier[v] + f[v];
              store_narrow(out, g);
              out += p.frame_stride;
            }
#pragma unroll
            for (int v = 0; v < V; ++v) {
              earlier[v] = last[v] - e[v] - 2 * f[v];
              last[v] = e[v] + f[v];
            }
          } else if constexpr (kGrad) {
            C g[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              g[v] = last[v] - e[v];
              last[v] = e[v];
            }
            store_narrow(out, g);
            out += p.frame_stride;
          }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          x_before[v] = x[v];
          if (kMask) m_before[v] = m[v];
          if (kSecond && t > 0) {
            d_before[v] = d[v];
            if (kMask) w_before[v] = w1[v];
          }
        }
      }
    }
    if constexpr (kGrad) {
      if (kSecond && frames > 1) {
        store_narrow(out, earlier);
        out += p.frame_stride;
      }
      store_narrow(out, last);
    }
  }
};

// One line of 128 bytes into L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Blocks a multiprocessor that the registers have to do for.
template <typename T, typename M, bool kSecond>
constexpr int kBlocks = sizeof(T) + sizeof(M) == 4 && !kSecond ? 3 : 2;

template <typename T, typename M, int V, bool kMask, bool kGrad, bool kSecond>
__global__ void __launch_bounds__(kThreads, kBlocks<T, M, kSecond>)
    temporal_kernel(const __grid_constant__ TemporalParams p) {
  using C = Wide<T>;
  __shared__ double2 shared[kThreads];
  const auto grid = cooperative_groups::this_grid();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tiles = p.granules / V, items = p.batch * p.rows * tiles;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  // few items: one a warp at most, over as many blocks as there are
  const int64_t begin = p.spread ? warp * static_cast<int64_t>(gridDim.x) + blockIdx.x
                                 : blockIdx.x * static_cast<int64_t>(kWarps) + warp;

  if (kGrad && p.mask != nullptr) {
    if (p.spread &&
        begin < items) {  // what the pass will read can come from memory while the weights are summed
      const Columns c = columns_of(p, begin, tiles);
      constexpr int kLine = 128 / sizeof(T), kLines = (32 * V + kLine - 1) / kLine;
      for (int64_t i = lane; i < p.frames * kLines; i += 32) {
        const int64_t t = i / kLines, position = c.tile * 32 * V + (i - t * kLines) * kLine;
        if (position < p.positions) {
          const int64_t at = c.place + t * p.frame_stride + position;
          prefetch(static_cast<const T*>(p.z) + at);
          if (p.ref != nullptr) prefetch(static_cast<const T*>(p.ref) + at);
        }
      }
    }
    sum_weights<T>(p, shared);
    grid.sync();
  }

  for (int64_t item = begin; item < items; item += step) {
    const Columns c = columns_of(p, item, tiles);
    const int64_t position = (c.tile * 32 + lane) * V;
    bool first = p.first != 0, second = p.second != 0;
    C scale1 = 0, scale2 = 0;
    if constexpr (kGrad) {
      const double2 weight = weight_of(p, c.sample);
      first = first && weight.x != 0;
      second = second && weight.y != 0;
      const double factor = p.norm == kL2 ? 2 * p.grad_scale : p.grad_scale;
      scale1 = static_cast<C>(first ? factor * p.first / weight.x : 0);
      scale2 = static_cast<C>(second ? factor * p.second / weight.y : 0);
    }
    double2* const loss_sums = p.loss_sums + (c.sample * p.rows + c.row) * p.granules + c.tile * V;
    double2* const weight_sums =
        kMask && !kGrad && p.mask != nullptr && c.weigh
            ? p.weight_sums + (c.sample * p.mask_rows + c.mask_row) * p.granules + c.tile * V
            : nullptr;
    Pass<T, M, V, kMask, kGrad, kSecond> pass(p);
    if (position < p.positions) {
      pass.run(c.place + position, c.mask_place + position * p.mask_position_stride, weight_sums != nullptr,
               first, second, scale1, scale2);
    }
    store_granules(loss_sums, pass.sum1, pass.sum2, lane);
    if (weight_sums != nullptr) store_granules(weight_sums, pass.weight1, pass.weight2, lane);
  }
  grid.sync();

  const int64_t row_units = p.granules / kUnitGranules;
  for (int64_t sample = blockIdx.x; sample < p.batch; sample += gridDim.x) {
    const double2 sum = block_total(p.loss_sums + sample * p.rows * p.granules, p.rows * row_units, shared);
    double2 weight;
    if (kGrad || p.mask == nullptr) {
      weight = weight_of(p, sample);
    } else {
      const int64_t own = p.mask_batch > 1 ? sample : 0;
      weight = block_total(p.weight_sums + own * p.mask_rows * p.granules, p.mask_rows * row_units, shared);
      weight = {weight.x * p.count_first, weight.y * p.count_second};
    }
    if (threadIdx.x == 0) {
      double loss = 0;
      if (p.first != 0 && weight.x != 0) loss += p.first * (sum.x / weight.x);
      if (p.second != 0 && weight.y != 0) loss += p.second * (sum.y / weight.y);
      if (p.loss_is_double) {
        static_cast<double*>(p.loss)[sample] = loss;
      } else {
        static_cast<float*>(p.loss)[sample] = static_cast<float>(loss);
      }
    }
  }
}

}  // namespace latentfast::cuda::temporal
