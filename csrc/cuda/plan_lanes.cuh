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

// How a block of plan.cu's kernels cuts a sample, and where its threads keep what they fetch. A block takes
// `group` channels at a time, G of them a thread, times `vectors` vectors of neighbours; a thread's number is
// (channels, vector). Slots: of 16 bytes for each thread.
struct PlanTile {
  int32_t group, vectors;
  uint32_t groups, chunks;  // of a sample
  int32_t units;            // slots of all tensors
  uint32_t shared;          // tensors, a bit each, that are the same for all channels
  int8_t slot[kMostPlanTensors];
  int8_t fetches, fetch[kMostPlanTensors];  // tensors that are read, in the order in which they are fetched

  // `threads`: of a block, `pack`: neighbours of a thread.
  template <typename T>
  PlanTile(const PlanParams<T>& p, int each, int threads, int pack) {
    groups = ceil_div<uint32_t>(p.channels, kMostGroup);
    group = ceil_div<int32_t>(p.channels, groups);
    groups = ceil_div<uint32_t>(p.channels, group);
    vectors = threads / ceil_div(group, each);
    const int64_t count = ceil_div<int64_t>(p.elements, vectors * pack);
    STD_TORCH_CHECK(count * groups * p.batch <= INT32_MAX,
                    "a plan: latents of this size take too many blocks");
    chunks = static_cast<uint32_t>(count);
    uint32_t read = 1;  // the source
    for (int k = 0; k < p.steps; ++k) {
      if (p.step[k].operand >= 0) read |= 1u << p.step[k].operand;
      if (p.step[k].mask >= 0) read |= 1u << p.step[k].mask;
    }
    units = fetches = 0;
    shared = 0;
    for (const bool single : {false, true}) {  // what is one element is waited for: last
      for (int i = 0; i < kMostPlanTensors; ++i) {
        const PlanTensor& x = p.tensor[i];
        if ((read >> i & 1) == 0 || (x.inner == 0) != single) continue;
        if (x.channel == 0) shared |= 1u << i;
        fetch[fetches++] = static_cast<int8_t>(i);
        slot[i] = static_cast<int8_t>(units);
        const int size = p.masks >> i & 1 ? sizeof(Wide<T>) : sizeof(T);
        units += pack * size / 16 * (x.channel == 0 ? 1 : each);
      }
    }
  }

  static constexpr int kMostGroup = 16;
};

// SlotLanes: 16 bytes in each of G channels. All tensors are on their way to shared memory together, once
// each however many instructions read them; a thread reads back what it fetched itself, and of a tensor that
// all channels share what the threads of the block's first channels did. With them come the coefficients of
// the block's channels. Channels beyond the last repeat it.
template <typename T, int G, int kThreads>
struct SlotLanes {
  static constexpr int V = kPack<T>, kCount = V * G, kMasks = V, kChunk = 1;
  using C = Wide<T>;
  struct Operand {
    Raw<T, V> of[G];
  };
  using Mask = Raw<C, V>;
  static_assert(sizeof(C) == sizeof(float));

  const PlanTile& tile;
  PlanCoefficients<C>* held;  // (steps, group)
  uint4* slots;
  int32_t column, rank;  // the thread's vector; its first channel in the group

  LATENTFAST_HD static int64_t room(const PlanParams<T>& p, const PlanTile& tile) {
    return (static_cast<int64_t>(p.steps) * tile.group + tile.units * int64_t{kThreads}) * 16;
  }

  __device__ SlotLanes(const PlanParams<T>& p, const PlanTile& tile, uint4* room)
      : tile(tile),
        held(reinterpret_cast<PlanCoefficients<C>*>(room)),
        slots(room + p.steps * tile.group + threadIdx.x) {
    const int32_t row = static_cast<int32_t>(threadIdx.x) / tile.vectors;
    column = static_cast<int32_t>(threadIdx.x) - row * tile.vectors;
    rank = row * G;
  }

  // Elements e and behind, of the channels from `begin` on. All of the block's threads take part; those whose
  // elements are not there have `inside` false.
  __device__ __forceinline__ void fetch(const PlanParams<T>& p, uint32_t b, int32_t begin, int64_t e,
                                        bool inside) const {
    const int32_t last = static_cast<int32_t>(p.channels) - 1;
    if (inside) {
      int64_t t = 0, r = e;
      if (p.frame != p.elements) {
        t = (e | p.frame) >> 32 == 0 ? static_cast<uint32_t>(e) / static_cast<uint32_t>(p.frame)
                                     : e / p.frame;
        r = e - t * p.frame;
      }
#pragma unroll 1
      for (int f = 0; f < tile.fetches; ++f) {
        const int i = tile.fetch[f];
        const bool shared = tile.shared >> i & 1, mask = p.masks >> i & 1;
        if (shared && rank != 0) continue;
        const PlanTensor& x = p.tensor[i];
        const int64_t at = b * x.sample + t * x.frame + r * x.inner;
#pragma unroll
        for (int g = 0; g < G; ++g) {
          if (g > 0 && shared) break;
          const int64_t from = at + min(begin + rank + g, last) * x.channel;
          mask ? copy<C>(x, from, i, g) : copy<T>(x, from, i, g);
        }
      }
    }
    for (int i = threadIdx.x; i < p.steps * tile.group; i += blockDim.x) {
      const int k = i / tile.group, c = min(begin + i - k * tile.group, last);
      __pipeline_memcpy_async(held + i, p.coefficients + (k * p.batch + b) * p.channels + c, 16);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
  }
  template <typename M>
  __device__ __forceinline__ void copy(const PlanTensor& x, int64_t at, int i, int g) const {
    constexpr int kUnits = Raw<M, V>::kUnits;
    const M* const from = static_cast<const M*>(x.data) + at;
    uint4* const to = slots + (tile.slot[i] + g * kUnits) * kThreads;
    if (x.inner != 0) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        __pipeline_memcpy_async(to + u * kThreads, reinterpret_cast<const uint4*>(from) + u, 16);
    } else {
      Raw<M, V> one;
      load_row(one, from, 0);
      fill_row(one, 0);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) to[u * kThreads] = one.units[u];
    }
  }

  // A thread's own slots, or those of the first channels' thread, whose number is its column.
  __device__ __forceinline__ const uint4* slot_of(int i, bool shared) const {
    return slots + tile.slot[i] * kThreads - (shared ? rank / G * tile.vectors : 0);
  }
  __device__ __forceinline__ void load(const PlanParams<T>&, int i, Operand& held) const {
    const bool shared = tile.shared >> i & 1;
    const uint4* const from = slot_of(i, shared);
#pragma unroll
    for (int g = 0; g < G; ++g) held.of[g].units[0] = from[shared ? 0 : g * kThreads];
  }
  __device__ __forceinline__ void load(const PlanParams<T>&, int i, Mask& held) const {
    const uint4* const from = slot_of(i, tile.shared >> i & 1);
#pragma unroll
    for (int u = 0; u < Mask::kUnits; ++u) held.units[u] = from[u * kThreads];
  }
  __device__ __forceinline__ void widened(const PlanParams<T>&, int, Operand& held, C (&out)[kCount]) const {
#pragma unroll
    for (int g = 0; g < G; ++g) widen_raw(held.of[g], reinterpret_cast<C(&)[V]>(out[g * V]));
  }
  __device__ __forceinline__ void widened(const PlanParams<T>&, int, Mask& held, C (&out)[V]) const {
    widen_raw(held, out);
  }
  // Beyond the group there may be none of this instruction: of a channel whose result nobody takes.
  __device__ __forceinline__ PlanCoefficients<C> coefficients(const PlanParams<T>&, int k, int v) const {
    return held[k * tile.group + min(rank + v / V, tile.group - 1)];
  }
  __device__ __forceinline__ C partner(const C (&x)[kCount], int v) const {
    return v % 2 == 0 ? -x[v + 1] : x[v - 1];
  }
};

}  // namespace latentfast::cuda
