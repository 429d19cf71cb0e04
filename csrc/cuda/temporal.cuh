// temporal_loss: a sample's loss is first·Σ w1 ρ(d1)/Σ w1 + second·Σ w2 ρ(d2)/Σ w2 over the first and second
// differences in time of x = z − ref, with w1[t] = m[t]m[t+1] and w2[t] = m[t]m[t+1]m[t+2]; beside it its
// gradient in z. The specification is latentfast/reference/temporal.py.
//
// One cooperative launch. The latents are seen as (sample, row, frame, position): rows are what lies around
// the frames and is not the innermost run of positions (the channels of B C T H W). A warp takes 32·V
// neighbouring positions of R rows and goes through the frames once, with the previous frame's x, mask and
// slope in registers, so that each input is read once and the gradient of a frame is written as soon as the
// last difference it takes part in is known. Loads run some frames ahead, in the narrow type; that is what
// keeps enough bytes in flight. R is 2 where neighbouring rows share the mask (channels do): it is loaded and
// widened, and its products are made, once for both. Neighbouring warps take the same positions of
// neighbouring rows: such a mask then comes from L1 for all but the first of them.
//
// The gradient needs Σ w before its first element. With a mask the kernel therefore has three phases, with
// the grid's barrier in between: sums of the weights; the pass; the losses. Without one Σ w is a count, and
// without a gradient the weights are summed in the pass itself: then two phases.
//
// How things are added up is in temporal_sums.cuh.
#pragma once

#include <cooperative_groups.h>

#include "temporal_sums.cuh"

namespace latentfast::cuda::temporal {

constexpr int kColumns = 4;  // positions a thread, where they can be loaded together

// Rows a thread, where they share the mask and the registers do.
template <typename T, bool kGrad, bool kSecond>
constexpr int kRows = sizeof(T) == 2 && !(kGrad && kSecond) ? 2 : 1;

// Frames whose loads are in flight: as many as the registers beside the window of frames allow.
template <typename T, typename M, bool kMask, bool kSecond>
constexpr int kAhead = kMask && (kSecond || sizeof(T) + sizeof(M) > 4) ? 3 : 4;

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

// One warp's columns: where they start in the first of its rows, and what is made of them.
struct Columns {
  int64_t sample, row, tile;
  int64_t place, mask_place;  // of the row's first position in frame 0
  int64_t mask_row;           // which of the mask's own rows it is
  bool weigh;                 // these rows stand for all that share their mask row
};

__device__ __forceinline__ Columns columns_of(const TemporalParams& p, int64_t item, int64_t tiles,
                                              int64_t groups) {
  Columns c;
  const int64_t rest = item / groups;
  c.row = (item - rest * groups) * (p.rows / groups);
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
template <typename T, typename M, int V, int R, bool kMask, bool kGrad, bool kSecond>
struct Pass {
  using C = Wide<T>;
  static constexpr int kDepth = kAhead<T, M, kMask, kSecond>;
  using MaskSlot = std::conditional_t<V == 1, C, Raw<M, V>>;

  const TemporalParams& p;
  const T* const z;
  const T* const ref;
  T* const grad;
  C sum1[R][V] = {}, sum2[R][V] = {}, weight1[V] = {}, weight2[V] = {};

  __device__ explicit Pass(const TemporalParams& params)
      : p(params),
        z(static_cast<const T*>(params.z)),
        ref(static_cast<const T*>(params.ref)),
        grad(static_cast<T*>(params.grad)) {}

  struct Slot {
    Raw<T, V> z[R], ref[R];
    MaskSlot mask;
  };

  __device__ __forceinline__ void load(Slot& slot, int64_t at, int64_t mask_at) const {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      load_raw<true>(slot.z[r], z + at + r * p.row_stride);
      if (ref != nullptr) load_raw<true>(slot.ref[r], ref + at + r * p.row_stride);
    }
    if constexpr (V == 1) {
      slot.mask = p.mask == nullptr ? C(1) : element_of<T>(p.mask, p.mask_is_float, mask_at);
    } else if constexpr (kMask) {
      load_row<false>(slot.mask, static_cast<const M*>(p.mask) + mask_at, p.mask_position_stride);
    }
  }

  // Through the frames of V columns in each row. `at`, `mask_at`: their first element; `scale`: what turns ρ'
  // into the gradient.
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
    C x_before[R][V] = {}, d_before[R][V] = {}, m_before[V] = {}, w_before[V] = {};
    // slopes that the gradients of the last frame and of the one before still wait with
    C last[R][V] = {}, earlier[R][V] = {};
    for (int base = 0; base < frames; base += kDepth) {
#pragma unroll
      for (int j = 0; j < kDepth; ++j) {
        const int t = base + j;
        if (t >= frames) break;
        C x[R][V], m[V], w1[V] = {}, w2[V] = {};
#pragma unroll
        for (int r = 0; r < R; ++r) {
          widen_raw(slots[j].z[r], x[r]);
          if (ref != nullptr) {
            C y[V];
            widen_raw(slots[j].ref[r], y);
#pragma unroll
            for (int v = 0; v < V; ++v) x[r][v] -= y[v];
          }
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
#pragma unroll
          for (int v = 0; v < V; ++v) {
            w1[v] = kMask ? multiply(m_before[v], m[v]) : C(1);
            if (kMask && !kGrad && weigh) weight1[v] += w1[v];
            if (kSecond && t > 1) {
              w2[v] = kMask ? multiply(w_before[v], m[v]) : C(1);
              if (kMask && !kGrad && weigh) weight2[v] += w2[v];
            }
          }
#pragma unroll
          for (int r = 0; r < R; ++r) {
            C d[V], e[V] = {}, f[V] = {};
#pragma unroll
            for (int v = 0; v < V; ++v) d[v] = x[r][v] - x_before[r][v];
            if (first) add_term<kMask, kGrad>(p.norm, eps, scale1, d, w1, sum1[r], e);
            if (kSecond && t > 1) {
              C dd[V];
#pragma unroll
              for (int v = 0; v < V; ++v) dd[v] = d[v] - d_before[r][v];
              if (second) add_term<kMask, kGrad>(p.norm, eps, scale2, dd, w2, sum2[r], f);
            }
            if constexpr (kGrad && kSecond) {
              // frame t−2 lacks only +f of its gradient, frame t−1 has −e and −2f to come, frame t begins
              // with e and f
              if (t > 1) {
                C g[V];
#pragma unroll
                for (int v = 0; v < V; ++v) g[v] = earlier[r][v] + f[v];
                store_narrow(out + r * p.row_stride, g);
              }
#pragma unroll
              for (int v = 0; v < V; ++v) {
                earlier[r][v] = last[r][v] - e[v] - 2 * f[v];
                last[r][v] = e[v] + f[v];
              }
            } else if constexpr (kGrad) {
              C g[V];
#pragma unroll
              for (int v = 0; v < V; ++v) {
                g[v] = last[r][v] - e[v];
                last[r][v] = e[v];
              }
              store_narrow(out + r * p.row_stride, g);
            }
            if constexpr (kSecond) {
#pragma unroll
              for (int v = 0; v < V; ++v) d_before[r][v] = d[v];
            }
          }
          if (kGrad && (!kSecond || t > 1)) out += p.frame_stride;
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int r = 0; r < R; ++r) x_before[r][v] = x[r][v];
          if (kMask) m_before[v] = m[v];
          if (kMask && kSecond) w_before[v] = w1[v];
        }
      }
    }
    if constexpr (kGrad) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        T* rest = out + r * p.row_stride;
        if (kSecond && frames > 1) {
          store_narrow(rest, earlier[r]);
          rest += p.frame_stride;
        }
        store_narrow(rest, last[r]);
      }
    }
  }
};

// One line of 128 bytes into L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Blocks a multiprocessor that the registers have to do for.
template <typename T, typename M, int R, bool kMask, bool kGrad, bool kSecond>
constexpr int kBlocks = sizeof(T) + sizeof(M) == 4 && !kSecond && R == 1 && !(kMask && kGrad) ? 3 : 2;

template <typename T, typename M, int V, int R, bool kMask, bool kGrad, bool kSecond>
__global__ void __launch_bounds__(kThreads, kBlocks<T, M, R, kMask, kGrad, kSecond>)
    temporal_kernel(const __grid_constant__ TemporalParams p) {
  using C = Wide<T>;
  __shared__ double2 shared[kWarps];
  const auto grid = cooperative_groups::this_grid();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tiles = p.granules / V, groups = p.rows / R, items = p.batch * groups * tiles;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  // few items: one a warp at most, over as many blocks as there are
  const int64_t begin = p.spread ? warp * static_cast<int64_t>(gridDim.x) + blockIdx.x
                                 : blockIdx.x * static_cast<int64_t>(kWarps) + warp;

  if (kGrad && kMask && p.mask != nullptr) {
    if (p.spread &&
        begin < items) {  // what the pass will read can come from memory while the weights are summed
      const Columns c = columns_of(p, begin, tiles, groups);
      constexpr int kLine = 128 / sizeof(T), kLines = (32 * V + kLine - 1) / kLine;
      for (int64_t i = lane; i < p.frames * R * kLines; i += 32) {
        const int64_t row = i / kLines, t = row / R;
        const int64_t position = c.tile * 32 * V + (i - row * kLines) * kLine;
        if (position < p.positions) {
          const int64_t at = c.place + (row - t * R) * p.row_stride + t * p.frame_stride + position;
          prefetch(static_cast<const T*>(p.z) + at);
          if (p.ref != nullptr) prefetch(static_cast<const T*>(p.ref) + at);
        }
      }
    }
    if constexpr (kGrad && kMask) sum_weights<T, M, V, kSecond>(p);
    grid.sync();
  }

  for (int64_t item = begin; item < items; item += step) {
    const Columns c = columns_of(p, item, tiles, groups);
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
    Pass<T, M, V, R, kMask, kGrad, kSecond> pass(p);
    if (position < p.positions) {
      pass.run(c.place + position, c.mask_place + position * p.mask_position_stride, weight_sums != nullptr,
               first, second, scale1, scale2);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      store_granules(loss_sums + r * p.granules, pass.sum1[r], pass.sum2[r], lane);
    }
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
