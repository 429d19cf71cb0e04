// Which elements of a plan's value a thread walks, and where it finds their operands.
//
// A Lanes L of latents T:
//   kCount, kMasks                    elements; those that are kMasks apart share a mask's element
//   kChunk                            instructions whose loads are under way together
//   Operand, Mask                     what it holds of a tensor, as it lies in memory
//   load(p, i, held)                  tensor i
//   widened(p, i, held, out)          the same in the working precision
//   coefficients(p, k, v)             of instruction k at lane v
//   partner(x, v)                     what a quarter turn of pairs brings to lane v
#pragma once

#include <cuda_pipeline.h>

#include "plan.cuh"

namespace latentfast::cuda {

// VectorLanes: V neighbours in a channel, in one frame, from memory.
template <typename T, int V>
struct VectorLanes {
  static constexpr int kCount = V, kMasks = V, kChunk = 4;
  using C = Wide<T>;
  template <typename M>
  using Held = Raw<M, V>;
  using Operand = Held<T>;
  using Mask = Held<C>;

  int64_t b, c, t, r;  // r: the first one's place in its frame

  // From element e of a channel on.
  __device__ VectorLanes(const PlanParams<T>& p, int64_t sample, int64_t channel, int64_t e)
      : b(sample), c(channel), t(0), r(e) {
    if (p.frame == p.elements) return;
    t = (e | p.frame) >> 32 == 0 ? static_cast<uint32_t>(e) / static_cast<uint32_t>(p.frame) : e / p.frame;
    r = e - t * p.frame;
  }
  template <typename M>
  __device__ __forceinline__ void load(const PlanParams<T>& p, int i, Held<M>& held) const {
    const PlanTensor& x = p.tensor[i];
    const M* const from = static_cast<const M*>(x.data) + (b * x.sample + c * x.channel + t * x.frame);
    load_row(held, from + r * x.inner, x.inner);
  }
  template <typename M>
  __device__ __forceinline__ void widened(const PlanParams<T>& p, int i, Held<M>& held, C (&out)[V]) const {
    fill_row(held, p.tensor[i].inner);
    widen_raw(held, out);
  }
  __device__ __forceinline__ PlanCoefficients<C> coefficients(const PlanParams<T>& p, int k, int) const {
    return p.coefficients[(k * p.batch + b) * p.channels + c];
  }
  // The element beside lane v in the quarter turn of pairs.
  __device__ __forceinline__ C partner(const C (&x)[V], int v) const {
    return v % 2 == 0 ? -x[v + 1] : x[v - 1];
  }
};

// PairLanes: the elements 2i and 2i + 1 of a sample, wherever its channels and frames begin; for what is no
// multiple of 16 bytes or not aligned.
template <typename T>
struct PairLanes {
  static constexpr int kCount = 2, kMasks = 2, kChunk = 4;
  using C = Wide<T>;
  template <typename M>
  struct Held {
    M value[2];
  };
  using Operand = Held<T>;
  using Mask = Held<C>;

  int64_t b, c[2], t[2], r[2];
  bool alone;  // the last of an odd number: the second lane then repeats the first

  __device__ PairLanes(const PlanParams<T>& p, int64_t sample, int64_t pair) : b(sample) {
    alone = 2 * pair + 1 == p.channels * p.elements;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int64_t e = 2 * pair + (alone ? 0 : v);
      c[v] = e / p.elements;
      const int64_t rest = e - c[v] * p.elements;
      t[v] = rest / p.frame;
      r[v] = rest - t[v] * p.frame;
    }
  }

  template <typename M>
  __device__ __forceinline__ void load(const PlanParams<T>& p, int i, Held<M>& held) const {
    const PlanTensor& x = p.tensor[i];
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      held.value[v] =
          static_cast<const M*>(x.data)[b * x.sample + c[v] * x.channel + t[v] * x.frame + r[v] * x.inner];
    }
  }
  template <typename M>
  __device__ __forceinline__ void widened(const PlanParams<T>&, int, Held<M>& held, C (&out)[2]) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) out[v] = static_cast<C>(widen(held.value[v]));
  }
  __device__ __forceinline__ PlanCoefficients<C> coefficients(const PlanParams<T>& p, int k, int v) const {
    return p.coefficients[(k * p.batch + b) * p.channels + c[v]];
  }
  __device__ __forceinline__ C partner(const C (&x)[2], int v) const {
    return alone ? C(0) : v == 0 ? -x[1] : x[0];
  }
};

// SlotLanes: 16 bytes of a channel, in one frame. All tensors are on their way to shared memory together, once
// each however many instructions read them, and a thread reads back nothing but its own; with them come the
// coefficients of the block's channel.
template <typename T, int kThreads>
struct SlotLanes {
  static constexpr int V = kPack<T>, kCount = V, kMasks = V, kChunk = 1;
  using C = Wide<T>;
  using Operand = Raw<T, V>;
  using Mask = Raw<C, V>;
  static_assert(sizeof(C) == sizeof(float) && kThreads >= kMostPlanInstructions);

  const PlanCoefficients<C>* own;
  uint4* slots;

  static int64_t room(const PlanParams<T>& p) {
    return p.steps * static_cast<int64_t>(sizeof(PlanCoefficients<C>)) + p.slots * int64_t{kThreads} * 16;
  }

  // From element e of a channel on; all of the block's threads take part, also those beyond its end.
  __device__ SlotLanes(const PlanParams<T>& p, uint4* room, int64_t b, int64_t c, int64_t e)
      : own(reinterpret_cast<PlanCoefficients<C>*>(room)), slots(room + p.steps + threadIdx.x) {
    const int i = threadIdx.x;
    if (i < p.steps)
      __pipeline_memcpy_async(room + i, p.coefficients + (i * p.batch + b) * p.channels + c, 16);
    if (e < p.elements) {
      int64_t t = 0, r = e;
      if (p.frame != p.elements) {
        t = (e | p.frame) >> 32 == 0 ? static_cast<uint32_t>(e) / static_cast<uint32_t>(p.frame)
                                     : e / p.frame;
        r = e - t * p.frame;
      }
      for (const bool along : {true, false}) {  // what waits for its load comes last
#pragma unroll 1
        for (int i = 0; i < p.tensors; ++i) {
          const PlanTensor& x = p.tensor[i];
          if (x.slot < 0 || (x.inner != 0) != along) continue;
          const bool mask = p.masks >> i & 1;
          const int64_t at = b * x.sample + c * x.channel + t * x.frame + r * x.inner;
          mask ? fetch<C>(x, at) : fetch<T>(x, at);
        }
      }
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
  }
  template <typename M>
  __device__ __forceinline__ void fetch(const PlanTensor& x, int64_t at) const {
    const M* const from = static_cast<const M*>(x.data) + at;
    uint4* const to = slots + x.slot * kThreads;
    if (x.inner != 0) {
#pragma unroll
      for (int u = 0; u < Raw<M, V>::kUnits; ++u)
        __pipeline_memcpy_async(to + u * kThreads, reinterpret_cast<const uint4*>(from) + u, 16);
    } else {
      Raw<M, V> one;
      load_row(one, from, 0);
      fill_row(one, 0);
#pragma unroll
      for (int u = 0; u < Raw<M, V>::kUnits; ++u) to[u * kThreads] = one.units[u];
    }
  }
  template <typename M>
  __device__ __forceinline__ void load(const PlanParams<T>& p, int i, Raw<M, V>& held) const {
    const uint4* const from = slots + p.tensor[i].slot * kThreads;
#pragma unroll
    for (int u = 0; u < Raw<M, V>::kUnits; ++u) held.units[u] = from[u * kThreads];
  }
  template <typename M>
  __device__ __forceinline__ void widened(const PlanParams<T>&, int, Raw<M, V>& held, C (&out)[V]) const {
    widen_raw(held, out);
  }
  __device__ __forceinline__ PlanCoefficients<C> coefficients(const PlanParams<T>&, int k, int) const {
    return own[k];
  }
  __device__ __forceinline__ C partner(const C (&x)[V], int v) const {
    return v % 2 == 0 ? -x[v + 1] : x[v - 1];
  }
};

// Where a block finds a tensor: `data` at its sample, frame and row; the rest in elements.
struct PlanPlace {
  const void* data;
  int32_t channel, inner;
};

// What the threads of a block look up together. `coefficients`: of the block's sample, in shared memory or
// where they lie; `stride` from one instruction to the next.
template <typename C>
struct PlanDesk {
  const PlanPlace* place;
  const PlanCoefficients<C>* coefficients;
  int64_t stride;
};

// GroupLanes: V neighbours in each of G channels, from channel c on; what is beyond the last repeats it.
// Masks are the same for all channels. An instruction is looked up once for all of them.
template <typename T, int V, int G>
struct GroupLanes {
  static constexpr int kCount = V * G, kMasks = V, kChunk = 1;
  using C = Wide<T>;
  struct Operand {
    Raw<T, V> of[G];
  };
  using Mask = Raw<C, V>;

  PlanDesk<C> desk;
  int32_t c, last, at;

  __device__ __forceinline__ int32_t channel(int g) const { return min(c + g, last); }
  __device__ __forceinline__ void load(const PlanParams<T>&, int i, Operand& held) const {
    const PlanPlace x = desk.place[i];
    const T* const from = static_cast<const T*>(x.data) + at * x.inner;
#pragma unroll
    for (int g = 0; g < G; ++g) load_row(held.of[g], from + channel(g) * x.channel, x.inner);
  }
  __device__ __forceinline__ void load(const PlanParams<T>&, int i, Mask& held) const {
    const PlanPlace x = desk.place[i];
    load_row(held, static_cast<const C*>(x.data) + at * x.inner, x.inner);
  }
  __device__ __forceinline__ void widened(const PlanParams<T>&, int i, Operand& held, C (&out)[kCount]) const {
    const int32_t inner = desk.place[i].inner;
#pragma unroll
    for (int g = 0; g < G; ++g) {
      fill_row(held.of[g], inner);
      widen_raw(held.of[g], reinterpret_cast<C(&)[V]>(out[g * V]));
    }
  }
  __device__ __forceinline__ void widened(const PlanParams<T>&, int i, Mask& held, C (&out)[V]) const {
    fill_row(held, desk.place[i].inner);
    widen_raw(held, out);
  }
  __device__ __forceinline__ PlanCoefficients<C> coefficients(const PlanParams<T>&, int k, int v) const {
    return desk.coefficients[k * desk.stride + channel(v / V)];
  }
  __device__ __forceinline__ C partner(const C (&x)[kCount], int v) const {
    return v % 2 == 0 ? -x[v + 1] : x[v - 1];
  }
};

}  // namespace latentfast::cuda
