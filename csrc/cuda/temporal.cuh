// temporal_loss: a sample's loss is first·Σ w1 ρ(d1)/Σ w1 + second·Σ w2 ρ(d2)/Σ w2 over the first and second
// differences in time of x = z − ref, with w1[t] = m[t]m[t+1] and w2[t] = m[t]m[t+1]m[t+2]; beside it its
// gradient in z. The specification is latentfast/reference/temporal.py.
//
// One cooperative launch. The latents are seen as (sample, row, frame, position): rows are what lies around
// the frames and is not the innermost run of positions (the channels of B C T H W). A warp takes 32·V
// neighbouring positions of R rows and goes through the frames once, with the previous frame's x, mask and
// slope in registers, so that each input is read once and the gradient of a frame is written as soon as the
// last difference it takes part in is known. R is 2 where neighbouring rows share the mask (channels do): it
// is loaded and widened, and its products are made, once for both. How the frames come in is in
// temporal_frames.cuh.
//
// The gradient needs Σ w before its first element. With a mask the kernel therefore has three phases, with
// the grid's barrier in between: sums of the weights; the pass; the losses. Without one Σ w is a count, and
// without a gradient the weights are summed in the pass itself: then two phases.
//
// How things are added up is in temporal_sums.cuh.
#pragma once

#include <cooperative_groups.h>

#include "temporal_frames.cuh"

namespace latentfast::cuda::temporal {

constexpr int kColumns = 4;  // positions a thread, where they can be loaded together

// Rows a thread, where they share the mask.
template <typename T>
constexpr int kRows = sizeof(T) == 2 ? 2 : 1;

// sum += w·ρ(d), and slope = w·ρ'(d)·scale (scale/2 for l2). Where w is exactly 0 the element is left out,
// even a NaN. No product is contracted: the slopes must not depend on what the kernel does with them.
template <bool kMask, bool kGrad, bool kSquare, int R, int V, typename C>
__device__ __forceinline__ void add_term(int norm, C eps, C scale, C (&d)[R][V], const C (&w)[V],
                                         C (&sum)[R][V], C (&slope)[R][V]) {
  if constexpr (kSquare && kMask &&
                !kGrad) {  // a skipped addition is one instruction fewer than a selected 0
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (w[v] != 0) sum[r][v] = fma(multiply(w[v], d[r][v]), d[r][v], sum[r][v]);
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int v = 0; v < V; ++v) d[r][v] = kMask && w[v] == 0 ? C(0) : d[r][v];
    }
    if (kSquare || (V == 1 && norm == kL2)) {  // the general kernel has all of them
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const C weighted = kMask ? multiply(w[v], d[r][v]) : d[r][v];
          sum[r][v] = fma(weighted, d[r][v], sum[r][v]);
          if (kGrad) slope[r][v] = multiply(weighted, scale);
        }
      }
    } else {
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          C size, sign;
          if (norm == kL1) {
            size = fabs(d[r][v]);
            sign = d[r][v] > 0 ? C(1) : d[r][v] < 0 ? C(-1) : d[r][v];  // 0 stays 0 and NaN stays NaN
          } else {
            const C root = sqrt(fma(d[r][v], d[r][v], eps * eps));
            size = root - eps;
            sign = root == 0 ? C(0) : d[r][v] / root;
          }
          sum[r][v] = fma(kMask ? w[v] : C(1), size, sum[r][v]);
          if (kGrad) slope[r][v] = multiply(sign, kMask ? multiply(w[v], scale) : scale);
        }
      }
    }
  }
}

// What turns ρ' into a sample's gradient, and which terms have any weight.
template <typename C>
struct Scales {
  C first, second;
  bool has_first, has_second;
};

template <typename C>
__device__ __forceinline__ Scales<C> scales_of(const TemporalParams& p, double2 weight) {
  const double factor = p.norm == kL2 ? 2 * p.grad_scale : p.grad_scale;
  Scales<C> s;
  s.has_first = p.first != 0 && weight.x != 0;
  s.has_second = p.second != 0 && weight.y != 0;
  s.first = static_cast<C>(s.has_first ? factor * p.first / weight.x : 0);
  s.second = static_cast<C>(s.has_second ? factor * p.second / weight.y : 0);
  return s;
}

// Frames on their way that a thread holds in registers, 0 for the ring in shared memory. A loss without its
// gradient has the registers, and with a mask instructions are what it runs out of first: these are fewer.
template <typename T, typename M, int V, bool kMask, bool kGrad, bool kSecond, bool kSquare>
constexpr int kHeld =
    V > 1 && kSquare && !kGrad && sizeof(T) == 2 && (!kMask || sizeof(M) == 2) ? (kMask ? 3 : 7) : 0;

// Phase 2.
template <typename T, typename M, int V, int R, bool kMask, bool kGrad, bool kSecond, bool kSquare>
struct Pass {
  using C = Wide<T>;
  using Stream = Frames<T, M, V, R, kMask, kHeld<T, M, V, kMask, kGrad, kSecond, kSquare>>;

  C sum1[R][V] = {}, sum2[R][V] = {}, weight1[V] = {}, weight2[V] = {};

  __device__ __forceinline__ static void store(T* out, int64_t row_stride, const C (&g)[R][V], bool inside) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (inside) store_narrow(out + r * row_stride, g[r]);
    }
  }

  // Through the frames of V columns in each row. `out`: of the gradient's first element.
  __device__ __forceinline__ void run(const TemporalParams& p, Stream& stream, T* out, bool inside,
                                      const Scales<C>& scales) {
    const int frames = static_cast<int>(p.frames);
    const C eps = static_cast<C>(p.eps);
    C x_before[R][V] = {}, d_before[R][V] = {}, m_before[V] = {}, w_before[V] = {};
    // slopes that the gradients of the last frame and of the one before still wait with
    C last[R][V] = {}, earlier[R][V] = {};
    int base = 0, rest = frames;  // of the frames: those before this round, those from there on
    const auto walk = [&] {
#pragma unroll 1
      for (; rest > 0; base += Stream::kDepth, rest -= Stream::kDepth) {
#pragma unroll(kSquare ? Stream::kDepth : 1)  // the other norms are not worth the code
        for (int slot = 0; slot < Stream::kDepth; ++slot) {
          if (slot > 0 && slot >= rest) return;  // from both loops: the state needs no merging
          stream.advance(slot);
          const bool pairs = slot > 0 || base > 0,
                     triples = slot > 1 || base > 0;  // that end with this frame
          C x[R][V], m[V], w1[V] = {}, w2[V] = {};
          stream.take(slot, x, m);
          if (pairs) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              w1[v] = kMask ? multiply(m_before[v], m[v]) : C(1);
              if (kMask && !kGrad) weight1[v] += w1[v];
              if (kSecond && triples) {
                w2[v] = kMask ? multiply(w_before[v], m[v]) : C(1);
                if (kMask && !kGrad) weight2[v] += w2[v];
              }
            }
            C d[R][V], e[R][V] = {}, f[R][V] = {}, dd[R][V];
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
              for (int v = 0; v < V; ++v) {
                d[r][v] = x[r][v] - x_before[r][v];
                dd[r][v] = d[r][v] - d_before[r][v];
                d_before[r][v] = d[r][v];
              }
            }
            if (!kGrad || scales.has_first)
              add_term<kMask, kGrad, kSquare>(p.norm, eps, scales.first, d, w1, sum1, e);
            if (kSecond && triples && (!kGrad || scales.has_second))
              add_term<kMask, kGrad, kSquare>(p.norm, eps, scales.second, dd, w2, sum2, f);
            if constexpr (kGrad) {
              C g[R][V];
#pragma unroll
              for (int r = 0; r < R; ++r) {
#pragma unroll
                for (int v = 0; v < V; ++v) {
                  if constexpr (kSecond) {
                    // frame t−2 lacks only +f of its gradient, frame t−1 has −e and −2f to come, frame t
                    // begins with e and f
                    g[r][v] = earlier[r][v] + f[r][v];
                    earlier[r][v] = last[r][v] - e[r][v] - 2 * f[r][v];
                    last[r][v] = e[r][v] + f[r][v];
                  } else {
                    g[r][v] = last[r][v] - e[r][v];
                    last[r][v] = e[r][v];
                  }
                }
              }
              if (!kSecond || triples) {
                store(out, p.row_stride, g, inside);
                out += p.frame_stride;
              }
            }
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
    };
    walk();
    stream.finish(frames % Stream::kDepth);
    if constexpr (kGrad) {
      if (kSecond && frames > 1) {
        store(out, p.row_stride, earlier, inside);
        out += p.frame_stride;
      }
      store(out, p.row_stride, last, inside);
    }
    if (inside) return;
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int r = 0; r < R; ++r) sum1[r][v] = sum2[r][v] = 0;
      weight1[v] = weight2[v] = 0;
    }
  }
};

// All that a warp will read of an item: it can come from memory while the weights are summed.
template <typename T, int V, int R>
__device__ __forceinline__ void prefetch_item(const TemporalParams& p, const Items& items, uint32_t item) {
  const Columns c = columns_of<R>(p, items, item);
  constexpr int kLine = 128 / sizeof(T), kLines = (32 * V + kLine - 1) / kLine;
  for (int64_t i = threadIdx.x % 32; i < p.frames * R * kLines; i += 32) {
    const int64_t row = i / kLines, t = row / R;
    const int64_t position = c.tile * int64_t{32} * V + (i - row * kLines) * kLine;
    if (position < p.positions) {
      const int64_t at = c.place + (row - t * R) * p.row_stride + t * p.frame_stride + position;
      prefetch(static_cast<const T*>(p.z) + at);
      if (p.ref != nullptr) prefetch(static_cast<const T*>(p.ref) + at);
    }
  }
}

constexpr int kKnownScales = 64;  // samples whose scales a block keeps

// Blocks a multiprocessor that the registers have to do for.
template <typename T, typename M, bool kMask>
constexpr int kBlocks = sizeof(T) + sizeof(M) == 4 && !kMask ? 3 : 2;

template <typename T, typename M, int V, int R, bool kMask, bool kGrad, bool kSecond, bool kSquare>
__global__ void __launch_bounds__(kThreads, kBlocks<T, M, kMask>)
    temporal_kernel(const __grid_constant__ TemporalParams p) {
  using C = Wide<T>;
  using Stream = Frames<T, M, V, R, kMask, kHeld<T, M, V, kMask, kGrad, kSecond, kSquare>>;
  __shared__ double2 shared[kWarps];
  __shared__ Scales<C> known[kGrad && kMask ? kKnownScales : 1];
  __shared__ alignas(16) unsigned char rings[kWarps * sizeof(typename Stream::Ring)];
  const auto grid = cooperative_groups::this_grid();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t tiles = static_cast<uint32_t>(p.granules / V), groups = static_cast<uint32_t>(p.rows / R);
  const Items items{static_cast<uint32_t>(p.batch) * groups * tiles, tiles, groups};
  const uint32_t step = gridDim.x * kWarps;
  // few items: one a warp at most, over as many blocks as there are
  const uint32_t begin = p.spread ? warp * gridDim.x + blockIdx.x : blockIdx.x * kWarps + warp;
  Stream stream(p, items, reinterpret_cast<typename Stream::Ring*>(rings)[warp], begin, step);
  stream.start();

  const bool normalise = kGrad && kMask && p.mask != nullptr;  // by weights that have to be summed first
  if constexpr (kGrad && kMask) {
    if (normalise) {
      if (p.spread && begin < items.count) prefetch_item<T, V, R>(p, items, begin);
      sum_weights<T, M, V, kSecond>(p);
      grid.sync();
      for (int sample = warp; sample < min(p.mask_batch, int64_t{kKnownScales}); sample += kWarps) {
        const double2 weight = weight_of(p, sample);
        if (lane == 0) known[sample] = scales_of<C>(p, weight);
      }
      __syncthreads();
    }
  }

  for (uint32_t item = begin; item < items.count; item += step) {
    const Columns c = columns_of<R>(p, items, item);
    stream.begin(item, c.mask_place);
    const int64_t position = (c.tile * int64_t{32} + lane) * V;
    const uint32_t mask_sample = p.mask_batch > 1 ? c.sample : 0;
    Scales<C> scales{0, 0, p.first != 0, p.second != 0};
    if constexpr (kGrad) {
      scales = normalise && mask_sample < kKnownScales ? known[mask_sample]
                                                       : scales_of<C>(p, weight_of(p, c.sample));
    }
    double2* const loss_sums = p.loss_sums + (c.sample * p.rows + c.row) * p.granules + c.tile * V;
    double2* const weight_sums =
        kMask && !kGrad && p.mask != nullptr && c.weigh
            ? p.weight_sums + (c.sample * p.mask_rows + c.mask_row) * p.granules + c.tile * V
            : nullptr;
    Pass<T, M, V, R, kMask, kGrad, kSecond, kSquare> pass;
    pass.run(p, stream, kGrad ? static_cast<T*>(p.grad) + c.place + position : nullptr,
             position < p.positions, scales);
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
