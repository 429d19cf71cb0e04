// V neighbouring elements of one dtype in a thread's registers: as they lie in memory (Raw), and widened.
//
// Loads are kept apart from their conversion, so that a kernel can have many of them in flight before the
// first use, at the registers' cost of the narrow type.
#pragma once

#include "launch.cuh"

namespace latentfast::cuda {

template <typename T, int V>
struct Raw {
  static constexpr int kBytes = V * static_cast<int>(sizeof(T));
  static_assert(V == 1 || kBytes % 8 == 0);
  // one element, two words, or some 16-byte quads
  using Unit = std::conditional_t<V == 1, T, std::conditional_t<kBytes % 16 == 0, uint4, uint2>>;
  static constexpr int kUnits = V == 1 ? 1 : kBytes / static_cast<int>(sizeof(Unit));
  Unit units[kUnits];
};

// 8 and 4 bytes of an input.
__device__ __forceinline__ uint2 load_8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

__device__ __forceinline__ uint32_t load_4(const void* p) {
  uint32_t v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// For inputs only: the loads go through the read-only path.
template <typename T, int V>
__device__ __forceinline__ void load_raw(Raw<T, V>& raw, const T* p) {
  using Unit = typename Raw<T, V>::Unit;
  const Unit* units = reinterpret_cast<const Unit*>(p);
#pragma unroll
  for (int i = 0; i < Raw<T, V>::kUnits; ++i) {
    if constexpr (V == 1) {
      raw.units[i] = *units;
    } else if constexpr (sizeof(Unit) == 16) {
      raw.units[i] = load(units + i);
    } else {
      raw.units[i] = load_8(units + i);
    }
  }
}

template <typename C, typename T, int V>
__device__ __forceinline__ void widen_raw(const Raw<T, V>& raw, C (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = static_cast<C>(widen(raw.units[0]));
  } else if constexpr (sizeof(typename Raw<T, V>::Unit) == 16) {
    constexpr int kEach = kPack<T>;
#pragma unroll
    for (int i = 0; i < V / kEach; ++i)
      unpack<T>(raw.units[i], reinterpret_cast<Wide<T>(&)[kEach]>(x[i * kEach]));
  } else {
    static_assert(sizeof(T) == 2);
    Wide<T> both[8];  // the upper half is not used, and not computed either
    unpack<T>(uint4{raw.units[0].x, raw.units[0].y, 0u, 0u}, both);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = both[v];
  }
}

// Round once and store elements that this kernel does not read back.
template <typename T, int V>
__device__ __forceinline__ void store_narrow(T* p, const Wide<T> (&x)[V]) {
  if constexpr (V == 1) {
    *p = narrow<T>(x[0]);
  } else if constexpr (V * sizeof(T) % 16 == 0) {
    constexpr int kEach = kPack<T>;
#pragma unroll
    for (int i = 0; i < V / kEach; ++i) {
      store_once(p + i * kEach, pack<T>(reinterpret_cast<const Wide<T>(&)[kEach]>(x[i * kEach])));
    }
  } else {
    Wide<T> both[8] = {x[0], x[1], x[2], x[3]};
    const uint4 words = pack<T>(both);
    __stcs(reinterpret_cast<uint2*>(p), uint2{words.x, words.y});
  }
}

// The mixed elements, but `x`'s bits where w is 0 and `y`'s where it is 1: no conversion touches those, not
// even a NaN's.
template <typename T, int V>
__device__ __forceinline__ void store_selected(T* p, const Raw<T, V>& x, const Raw<T, V>& y,
                                               const Wide<T> (&w)[V], const Wide<T> (&mixed)[V]) {
  if constexpr (V == 1) {
    *p = w[0] == 0 ? x.units[0] : w[0] == 1 ? y.units[0] : narrow<T>(mixed[0]);
  } else {
    static_assert(V == kPack<T>);
    const uint4 blended = pack<T>(mixed);
    uint32_t words[4] = {blended.x, blended.y, blended.z, blended.w};
    const uint32_t xs[4] = {x.units[0].x, x.units[0].y, x.units[0].z, x.units[0].w};
    const uint32_t ys[4] = {y.units[0].x, y.units[0].y, y.units[0].z, y.units[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      constexpr int kPerWord = V / 4;
      uint32_t keep_x = 0, keep_y = 0;
#pragma unroll
      for (int j = 0; j < kPerWord; ++j) {
        const uint32_t bits = kPerWord == 1 ? 0xffffffffu : 0xffffu << (16 * j);
        if (w[i * kPerWord + j] == 0) keep_x |= bits;
        if (w[i * kPerWord + j] == 1) keep_y |= bits;
      }
      words[i] = (xs[i] & keep_x) | (ys[i] & keep_y) | (words[i] & ~(keep_x | keep_y));
    }
    store_once(p, uint4{words[0], words[1], words[2], words[3]});
  }
}

// V elements from a row; where the operand does not change along the row (inner_stride 0), the one element,
// which `fill_row` repeats when it is needed: arithmetic beside the load would wait for it, and hold up the
// loads that follow.
template <typename T, int V>
__device__ __forceinline__ void load_row(Raw<T, V>& raw, const T* p, int64_t inner_stride) {
  if (V == 1 || inner_stride != 0) {
    load_raw(raw, p);
  } else if constexpr (V > 1 && sizeof(T) == 2) {
    raw.units[0].x = *reinterpret_cast<const uint16_t*>(p);
  } else if constexpr (V > 1) {
    raw.units[0].x = *reinterpret_cast<const uint32_t*>(p);
  }
}

template <typename T, int V>
__device__ __forceinline__ void fill_row(Raw<T, V>& raw, int64_t inner_stride) {
  if constexpr (V > 1) {
    if (inner_stride != 0) return;
    const uint32_t bits = raw.units[0].x * (sizeof(T) == 2 ? 0x00010001u : 1u);
#pragma unroll
    for (auto& unit : raw.units) {
      unit.x = unit.y = bits;
      if constexpr (sizeof(unit) == 16) unit.z = unit.w = bits;
    }
  }
}

// One element of a tensor that has either T or float32.
template <typename T>
__device__ __forceinline__ Wide<T> element_of(const void* p, bool is_float, int64_t index) {
  return is_float ? static_cast<Wide<T>>(static_cast<const float*>(p)[index])
                  : widen(static_cast<const T*>(p)[index]);
}

// Masks and flows have the latents' dtype or float32; this guards the raw operators.
template <typename X>
void check_companion(const X& x, const X& z, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == z.scalar_type(), name,
                  " must have the latents' dtype or float32");
}

// Call f.operator()<M>() with the type of a mask beside latents of T.
template <typename T, typename X, typename F>
void dispatch_mask(const std::optional<X>& mask, F&& f) {
  if (mask.has_value() && mask->scalar_type() == ScalarType::Float) {
    f.template operator()<float>();
  } else {
    f.template operator()<T>();
  }
}

}  // namespace latentfast::cuda
