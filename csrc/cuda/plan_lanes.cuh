// Which elements of a plan's value a thread walks, and where it finds their operands.
//
// A Lanes L of latents T:
//   kCount, kMasks                    elements; those that are kMasks apart share a mask's element
//   kChunk                            instructions whose loads are under way together
//   Operand, Mask                     what it holds of a tensor, as it lies in memory
//   load(p, i, held)                  tensor i, numbered as in p.step
//   widened(p, i, held, out)          the same in the working precision
//   coefficients(p, k, v)             of instruction k at lane v
//   paired()                          whether lanes 2i and 2i + 1 turn into each other
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
  __device__ __forceinline__ bool paired() const { return true; }
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
  __device__ __forceinline__ bool paired() const { return !alone; }
};

// A tensor on its way to a block's shared memory; strides in bytes.
struct PlanFetch {
  const char* data;
  int64_t sample, channel, frame;
  int32_t place;      // of its first row there, in bytes
  bool mask, shared;  // elements of Wide<T>; one row for all channels
};

// How a block of plan.cu's kernels cuts a sample. It takes `group` channels at a time, G of them a thread,
// times `vectors` vectors of 16 bytes of neighbours: threads (vectors, ⌈group / G⌉). In its shared memory a
// row is a channel's vectors of one tensor, for a mask, whose elements are wider, as many such rows as a
// vector has 16 bytes.
struct PlanTile {
  int32_t group, vectors, pitch;  // pitch: bytes of a row
  uint32_t groups, chunks;        // of a sample
  int32_t bytes;                  // of all rows
  int32_t full, fetches;          // behind the first `full` such as have one element a frame
  PlanFetch fetch[kMostPlanTensors];

  // Numbers what `p` reads by its place in shared memory, with 1 in the lowest bit where all channels share
  // the row. G: channels of a thread.
  template <typename T, int G>
  static PlanTile of(PlanParams<T>& p, std::integral_constant<int, G>) {
    PlanTile tile{};
    tile.groups = ceil_div<uint32_t>(p.channels, kMostGroup);
    tile.group = ceil_div<int32_t>(p.channels, tile.groups);
    tile.groups = ceil_div<uint32_t>(p.channels, tile.group);
    tile.vectors = kThreads / ceil_div(tile.group, G);
    tile.pitch = 16 * tile.vectors;
    const int64_t chunks = ceil_div<int64_t>(p.elements, tile.vectors * kPack<T>);
    STD_TORCH_CHECK(chunks * tile.groups * p.batch <= INT32_MAX,
                    "a plan: latents of this size take too many blocks");
    tile.chunks = static_cast<uint32_t>(chunks);

    uint32_t read = 1;  // the source
    for (int k = 0; k < p.steps; ++k) {
      if (p.step[k].operand >= 0) read |= 1u << p.step[k].operand;
      if (p.step[k].mask >= 0) read |= 1u << p.step[k].mask;
    }
    int32_t number[kMostPlanTensors];
    for (const bool single : {false, true}) {  // what is one element is waited for: last
      for (int i = 0; i < kMostPlanTensors; ++i) {
        const PlanTensor& x = p.tensor[i];
        if ((read >> i & 1) == 0 || (x.inner == 0) != single) continue;
        const bool mask = p.masks >> i & 1, shared = x.channel == 0;
        const auto size = static_cast<int64_t>(mask ? sizeof(Wide<T>) : sizeof(T));
        tile.fetch[tile.fetches++] = {static_cast<const char*>(x.data),
                                      size * x.sample,
                                      size * x.channel,
                                      size * x.frame,
                                      tile.bytes,
                                      mask,
                                      shared};
        number[i] = tile.bytes + shared;
        const int rows = shared ? 1 : ceil_div(tile.group, G) * G;
        tile.bytes += rows * static_cast<int32_t>(size / sizeof(T)) * tile.pitch;
      }
      if (!single) tile.full = tile.fetches;
    }
    p.source = number[0];
    for (int k = 0; k < p.steps; ++k) {
      if (p.step[k].operand >= 0) p.step[k].operand = number[p.step[k].operand];
      if (p.step[k].mask >= 0) p.step[k].mask = number[p.step[k].mask];
    }
    return tile;
  }

  static constexpr int kThreads = 128, kMostGroup = 16;
};

// SlotLanes: 16 bytes in each of G channels. All tensors are on their way to shared memory together, once
// each however many instructions read them, and with them the coefficients of the block's channels. Channels
// beyond the last walk through what lies there, for nobody.
template <typename T, int G>
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
  char* column;               // the thread's vector in the first row
  int32_t rank;               // its first channel in the group

  static int64_t room(const PlanParams<T>& p, const PlanTile& tile) {
    return p.steps * tile.group * static_cast<int64_t>(sizeof(PlanCoefficients<C>)) + tile.bytes;
  }

  // `room`: behind what the caller keeps in shared memory.
  __device__ SlotLanes(const PlanParams<T>& p, const PlanTile& tile, uint4* room)
      : tile(tile),
        held(reinterpret_cast<PlanCoefficients<C>*>(room)),
        column(reinterpret_cast<char*>(held + p.steps * tile.group) + 16 * threadIdx.x),
        rank(threadIdx.y * G) {}

  // The tile's `count` channels from `begin` on; e: the thread's first element. All of the block's threads
  // take part.
  __device__ __forceinline__ void fetch(const PlanParams<T>& p, uint32_t b, int32_t begin, int32_t count,
                                        int64_t e) const {
    if (e < p.elements) {
      int64_t t = 0, r = e;
      if (p.frame != p.elements) {
        t = (e | p.frame) >> 32 == 0 ? static_cast<uint32_t>(e) / static_cast<uint32_t>(p.frame)
                                     : e / p.frame;
        r = e - t * p.frame;
      }
      const auto from = [&](const PlanFetch& x, int32_t channel) {
        return x.data + (b * x.sample + (begin + channel) * x.channel + t * x.frame);
      };
      // a tensor is its threads' of one row: what it takes to find it is done once for all channels
#pragma unroll 1
      for (int f = threadIdx.y; f < tile.full; f += blockDim.y) {
        const PlanFetch& x = tile.fetch[f];
        const int rows = x.shared ? 1 : count;
        x.mask ? copy<C>(x, from(x, 0) + r * sizeof(C), rows) : copy<T>(x, from(x, 0) + r * sizeof(T), rows);
      }
#pragma unroll 1
      for (int f = tile.full; f < tile.fetches; ++f) {
        const PlanFetch& x = tile.fetch[f];
        const int rows = x.shared ? rank == 0 : min(G, count - rank);
        x.mask ? fill<C>(x, from(x, rank), rows) : fill<T>(x, from(x, rank), rows);
      }
    }
    for (int k = threadIdx.y; k < p.steps; k += blockDim.y) {
      for (int c = threadIdx.x; c < count; c += blockDim.x) {
        __pipeline_memcpy_async(held + k * tile.group + c,
                                p.coefficients + ((k * p.batch + b) * p.channels + begin + c), 16);
      }
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
  }
  // Vectors of a tensor of M, of `rows` channels from `from` on.
  template <typename M>
  __device__ __forceinline__ void copy(const PlanFetch& x, const char* from, int rows) const {
    constexpr int kUnits = Raw<M, V>::kUnits;
    char* to = column + x.place;
#pragma unroll 4
    for (int row = 0; row < rows; ++row, from += x.channel, to += kUnits * tile.pitch) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) __pipeline_memcpy_async(to + u * tile.pitch, from + 16 * u, 16);
    }
  }
  // One element a channel, of the thread's own `rows` channels.
  template <typename M>
  __device__ __forceinline__ void fill(const PlanFetch& x, const char* from, int rows) const {
    Raw<M, V> one[G];
#pragma unroll
    for (int g = 0; g < G; ++g, from += x.channel) {
      if (g < rows) load_row(one[g], reinterpret_cast<const M*>(from), 0);
    }
    char* to = column + x.place + (x.shared ? 0 : rank * Raw<M, V>::kUnits * tile.pitch);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (g >= rows) break;
      fill_row(one[g], 0);
      for (const uint4 unit : one[g].units) {
        *reinterpret_cast<uint4*>(to) = unit;
        to += tile.pitch;
      }
    }
  }

  __device__ __forceinline__ void load(const PlanParams<T>&, int place, Operand& held) const {
    const bool shared = place & 1;
    const char* const from = column + (place - shared) + (shared ? 0 : rank * tile.pitch);
    const int pitch = shared ? 0 : tile.pitch;
#pragma unroll
    for (int g = 0; g < G; ++g) held.of[g].units[0] = *reinterpret_cast<const uint4*>(from + g * pitch);
  }
  __device__ __forceinline__ void load(const PlanParams<T>&, int place, Mask& held) const {
    const bool shared = place & 1;
    const char* const from = column + (place - shared) + (shared ? 0 : rank * Mask::kUnits * tile.pitch);
#pragma unroll
    for (int u = 0; u < Mask::kUnits; ++u)
      held.units[u] = *reinterpret_cast<const uint4*>(from + u * tile.pitch);
  }
  __device__ __forceinline__ void widened(const PlanParams<T>&, int, Operand& held, C (&out)[kCount]) const {
#pragma unroll
    for (int g = 0; g < G; ++g) widen_raw(held.of[g], reinterpret_cast<C(&)[V]>(out[g * V]));
  }
  __device__ __forceinline__ void widened(const PlanParams<T>&, int, Mask& held, C (&out)[V]) const {
    widen_raw(held, out);
  }
  __device__ __forceinline__ PlanCoefficients<C> coefficients(const PlanParams<T>&, int k, int v) const {
    return held[k * tile.group + rank + v / V];
  }
  __device__ __forceinline__ bool paired() const { return true; }
};

}  // namespace latentfast::cuda
