// What the CUDA kernels of `guide` share: the operands, and what is made of a sample's elements once its
// coefficients are known. See guidance.cu for the choice between the kernels.
#pragma once

#include "../common/guidance_coefficients.h"
#include "columns.cuh"
#include "vector_sums.cuh"

namespace latentfast::cuda {

// All tensors but the mask have the shape (samples, each).
template <typename T>
struct Guided {
  using C = Wide<T>;
  const T* cond;
  const T* uncond;
  const T* sample;   // or null: the prediction itself is wanted
  const void* mask;  // or null
  const T* known;    // with the mask
  void* momentum;    // or null
  T* out;
  T* x0;  // or null
  int64_t samples, each;
  Joined<1> mask_dims;  // of a sample
  int64_t mask_sample_stride;
  bool mask_is_float, momentum_is_float;
  bool mask_in_packs;  // the elements of a pack have neighbours of the mask, or one element for all
  C beta, sigma, dt;
  GuidanceOptions options;

  __host__ __device__ bool reads_predictions() const {
    return options.kind != static_cast<int>(Guidance::zero);
  }
  // Where the mask is, for element e of a sample.
  __device__ __forceinline__ int64_t mask_at(int64_t sample, int64_t e) const {
    int64_t at = sample * mask_sample_stride;
    for (int d = mask_dims.dims - 1; d > 0; --d) {
      const int64_t rest = quotient(e, mask_dims.size[d]);
      at += (e - rest * mask_dims.size[d]) * mask_dims.stride[0][d];
      e = rest;
    }
    return at + e * mask_dims.stride[0][0];
  }
};

// GuidanceCoefficients in the type that elements are computed in.
template <typename C>
struct GuidanceWeights {
  C c, d, m;

  __host__ __device__ static GuidanceWeights of(const GuidanceCoefficients& from) {
    return {static_cast<C>(from.c), static_cast<C>(from.d), static_cast<C>(from.m)};
  }
  __device__ __forceinline__ C operator()(C cond, C difference) const { return fma(d, difference, c * cond); }
};

template <typename C>
__device__ __forceinline__ C with_momentum(C difference, C beta, C momentum) {
  return fma(beta, momentum, difference);
}

// V elements of the momentum, which has either T or float32.
template <typename T, int V>
__device__ __forceinline__ void read_momentum(const Guided<T>& p, int64_t at, Wide<T> (&x)[V]) {
  const auto read = [&]<typename M>(const M* from) {
#pragma unroll
    for (int i = 0; i < V; i += kPack<M>) {
      constexpr int kEach = V < kPack<M> ? V : kPack<M>;
      Wide<M> wide[kEach];
      if constexpr (kEach == kPack<M>) {
        unpack<M>(*reinterpret_cast<const uint4*>(from + i), wide);
      } else {
        wide[0] = widen<M>(*from);
      }
#pragma unroll
      for (int v = 0; v < kEach; ++v) x[i + v] = wide[v];
    }
  };
  if (p.momentum_is_float) {
    read(static_cast<const float*>(p.momentum) + at);
  } else {
    read(static_cast<const T*>(p.momentum) + at);
  }
}

template <typename T, int V>
__device__ __forceinline__ void write_momentum(const Guided<T>& p, int64_t at, const Wide<T> (&x)[V]) {
  if (!p.momentum_is_float) return store_narrow(static_cast<T*>(p.momentum) + at, x);
  float narrowed[V];
#pragma unroll
  for (int v = 0; v < V; ++v) narrowed[v] = static_cast<float>(x[v]);
  store_narrow(static_cast<float*>(p.momentum) + at, narrowed);
}

// V elements of the mask for those of a sample from e on. kInPacks: it is known that `mask_in_packs`.
template <typename T, int V, bool kInPacks = false>
__device__ __forceinline__ void read_mask(const Guided<T>& p, int64_t sample, int64_t e, Wide<T> (&w)[V]) {
  const auto read = [&]<typename M>(const M* mask) {
    if (V == 1 || (!kInPacks && !p.mask_in_packs)) {
#pragma unroll
      for (int v = 0; v < V; ++v)
        w[v] = static_cast<Wide<T>>(widen<M>(__ldg(mask + p.mask_at(sample, e + v))));
      return;
    }
    if constexpr (V > 1) {
      const int64_t inner = p.mask_dims.stride[0][p.mask_dims.dims - 1];
      Raw<M, V> raw;
      load_row(raw, mask + p.mask_at(sample, e), inner);
      fill_row(raw, inner);
      widen_raw(raw, w);
    }
  };
  if (p.mask_is_float) {
    read(static_cast<const float*>(p.mask));
  } else {
    read(static_cast<const T*>(p.mask));
  }
}

// The results at V elements of a sample from e on, given the guided prediction there and, unless it is the
// result itself, the sample.
template <typename T, int V, bool kMaskInPacks = false>
__device__ __forceinline__ void write_guided(const Guided<T>& p, int64_t sample, int64_t e,
                                             const Wide<T> (&guided)[V], const Raw<T, V>& before) {
  using C = Wide<T>;
  const int64_t at = sample * p.each + e;
  if (p.sample == nullptr) return store_narrow(p.out + at, guided);
  C x[V], y[V];
  widen_raw(before, x);
  if (p.x0 != nullptr) {
#pragma unroll
    for (int v = 0; v < V; ++v) y[v] = fma(-p.sigma, guided[v], x[v]);
    store_narrow(p.x0 + at, y);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = fma(p.dt, guided[v], x[v]);
  if (p.mask == nullptr) return store_narrow(p.out + at, x);
  Raw<T, V> known, step;
  load_raw(known, p.known + at);
  C w[V];
  read_mask<T, V, kMaskInPacks>(p, sample, e, w);
  widen_raw(known, y);
  if constexpr (V == 1) {
    step.units[0] = narrow<T>(x[0]);
  } else {
    step.units[0] = pack<T>(x);
  }
#pragma unroll
  for (int v = 0; v < V; ++v) y[v] = fma(w[v], x[v] - y[v], y[v]);
  store_selected(p.out + at, known, step, w, y);
}

// Whether all operands start at 16 bytes, in every sample.
template <typename T>
bool in_packs(const Guided<T>& p) {
  const bool aligned = aligned16(p.cond) && aligned16(p.uncond) && aligned16(p.sample) &&
                       aligned16(p.known) && aligned16(p.momentum) && aligned16(p.out) && aligned16(p.x0);
  return aligned && p.each % kPack<T> == 0;
}

// Launches the streamed kernel, if it takes these operands: guidance_streamed.cu. For float32 and halves.
template <typename T>
bool guide_streamed(const Target& target, const Guided<T>& p);

}  // namespace latentfast::cuda
