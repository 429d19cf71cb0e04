// What the kernels of previews share: where the latents lie, the map to RGB, bytes on their way out. See
// preview.cu.
#pragma once

#include "columns.cuh"

namespace latentfast::cuda {

// Where latents lie, and the map of their channels to RGB; kPlanes: three channels that are RGB already.
template <typename T, bool kPlanes = false>
struct Source {
  using Element = T;
  using C = Wide<T>;

  const T* z;
  const C* weight;  // (channels, 3)
  const C* bias;
  int64_t plane, channel_stride;
  uint32_t frames;  // of one sample
  int channels, height, width;

  __device__ const T* frame(uint32_t index) const {
    const uint32_t sample = index / frames;
    return z + sample * channels * channel_stride + (index - sample * frames) * plane;
  }

  // A source of the kernel for factors, see enlarge.cuh.
  bool fours() const {
    return width % 4 == 0 && plane % 4 == 0 && reinterpret_cast<uintptr_t>(z) % (4 * sizeof(T)) == 0;
  }
  __device__ const T* rows(uint32_t index, int low) const {
    return frame(index) + static_cast<int64_t>(low) * width;
  }

  // x = bias + Σ_c weight[c]·z[c] at V neighbouring positions.
  template <int V>
  __device__ __forceinline__ void map(const T* rows, int64_t at, C (&rgb)[3][V]) const {
    const T* from = rows + at;
    if constexpr (kPlanes) {
#pragma unroll
      for (int k = 0; k < 3; ++k, from += channel_stride) take(from, rgb[k]);
      return;
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const C b = __ldg(bias + k);
#pragma unroll
      for (int v = 0; v < V; ++v) rgb[k][v] = b;
    }
    const C* w = weight;
#pragma unroll 8
    for (int c = 0; c < channels; ++c, from += channel_stride, w += 3) {
      C x[V];
      take(from, x);
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const C factor = __ldg(w + k);
#pragma unroll
        for (int v = 0; v < V; ++v) rgb[k][v] = fma(factor, x[v], rgb[k][v]);
      }
    }
  }

 private:
  template <int V>
  __device__ __forceinline__ static void take(const T* from, C (&x)[V]) {
    Raw<T, V> raw;
    load_raw(raw, from);
    widen_raw(raw, x);
  }
};

// Bytes are made from (x + 1)/2, whose range is that of a saturating instruction.
template <typename R, typename C>
__device__ __forceinline__ C scaled(C x) {
  return std::is_same_v<R, uint8_t> ? fma(x, C(0.5), C(0.5)) : x;
}

__device__ __forceinline__ float saturated(float x) { return __saturatef(x); }
__device__ __forceinline__ double saturated(double x) { return fmin(fmax(x, 0.0), 1.0); }

// From [0, 1] to a byte in the lowest bits, rounded to nearest, ties to even; the other bits are not 0.
__device__ __forceinline__ uint32_t byte_of(float x) { return __float_as_uint(fmaf(x, 255.0f, 8388608.0f)); }
__device__ __forceinline__ uint32_t byte_of(double x) {
  return static_cast<uint32_t>(__double2loint(fma(x, 255.0, 4503599627370496.0)));
}

__device__ __forceinline__ uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// V values on their way out; `to` is aligned to them.
template <typename R, int V, typename C>
__device__ __forceinline__ void store_values(R* to, const C (&x)[V]) {
  if constexpr (std::is_same_v<R, uint8_t>) {
    if constexpr (V == 1) {
      *to = static_cast<uint8_t>(byte_of(saturated(x[0])));
    } else {
      static_assert(V % 4 == 0);
#pragma unroll
      for (int v = 0; v < V; v += 4) {
        *reinterpret_cast<uint32_t*>(to + v) =
            pack_bytes(byte_of(saturated(x[v])), byte_of(saturated(x[v + 1])), byte_of(saturated(x[v + 2])),
                       byte_of(saturated(x[v + 3])));
      }
    }
  } else if constexpr (V % 4 == 0 && sizeof(R) == 4) {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      *reinterpret_cast<float4*>(to + v) = make_float4(x[v], x[v + 1], x[v + 2], x[v + 3]);
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = x[v];
  }
}

// The operator, for other files' operators too. `z` (B, C, T, H, W); out (B, T, H', W', 3).
void latent_to_rgb(const View& z, const View& weight, const View& bias, const View& out);

// What it does behind the map, bytes of planes (B, 3, T, H, W) of RGB in [-1, 1].
void enlarge_planes(const float* planes, int64_t batch, int64_t frames, int64_t height, int64_t width,
                    const View& out);

}  // namespace latentfast::cuda
