// The frames that a warp of temporal_loss reads, on their way through shared memory.
//
// A warp takes its items (the columns of 32·V positions in R rows) one after the other and reads each of
// their frames once. Copies run ahead without registers to hold them: every lane copies what it will itself
// read into a ring of kDepth frames, so that nobody waits for anybody. The ring does not stop at an item's
// end: while its sums are added up and written, the first frames of the next item are under way.
//
// Where the registers suffice (kHeld frames), the loads go straight to them: the same order, in fewer
// instructions than by way of the ring.
#pragma once

#include <cuda_pipeline.h>

#include "temporal_sums.cuh"

namespace latentfast::cuda::temporal {

// Items are numbered with the tiles of a row fastest: what neighbouring warps read at a time is neighbouring
// memory.
struct Items {
  uint32_t count, tiles, groups;  // of all; 32·V positions; R rows
};

// One item: where it starts in the first of its rows, and what is made of it.
struct Columns {
  uint32_t sample, row, tile;
  int64_t place, mask_place;  // of the row's first position in frame 0
  int64_t mask_row;           // which of the mask's own rows it is
  bool weigh;                 // these rows stand for all that share their mask row
};

template <int R>
__device__ __forceinline__ Columns columns_of(const TemporalParams& p, const Items& items, uint32_t item) {
  Columns c;
  const uint32_t rest = item / items.tiles;
  c.tile = item - rest * items.tiles;
  c.sample = rest / items.groups;
  c.row = (rest - c.sample * items.groups) * R;
  c.place = c.sample * p.sample_stride;
  c.mask_place = c.sample * p.mask_sample_stride;
  c.mask_row = 0;
  c.weigh = p.mask_sample_stride != 0 || c.sample == 0;
  uint32_t index = c.row;
  int64_t radix = 1;
#pragma unroll 1
  for (int d = p.row_dims.dims - 1; d >= 0; --d) {
    const uint32_t size = static_cast<uint32_t>(p.row_dims.size[d]);
    const uint32_t up = d > 0 ? index / size : 0, i = index - up * size;
    c.place += i * p.row_dims.stride[0][d];
    c.mask_place += i * p.row_dims.stride[1][d];
    if (p.row_dims.stride[1][d] == 0) {
      c.weigh = c.weigh && i == 0;
    } else {
      c.mask_row += i * radix;
      radix *= size;
    }
    index = up;
  }
  return c;
}

constexpr int kDeepest = 6;  // frames in a ring
constexpr int kRingBytes =
    46 << 10;  // of a block: with what else it shares, below the 48 KiB that need no asking

// The general kernel (V == 1) finds out at run time whether there is a mask and of which type. It cannot copy
// single elements of two bytes past its registers, so it loads a ring's frames together whenever the ring is
// empty.
//
// Every item begins at the ring's first slot, so that the loop over frames, unrolled by the depth, knows its
// slots while it is compiled: an item's frames are counted up to a multiple of the depth.
template <typename T, typename M, int V, int R, bool kMask, int kHeld>
class Frames {
  using C = Wide<T>;
  struct Slot {
    Raw<T, V> z[R][32], ref[R][32];
    std::conditional_t<V == 1, C, Raw<M, V>> mask[kMask ? 32 : 1];
  };
  static_assert(V > 1 || R == 1);

 public:
  static constexpr int kDepth =
      kHeld > 0 ? kHeld : std::clamp<int>(kRingBytes / (kWarps * sizeof(Slot)), 2, kDeepest);
  struct Ring {
    Slot slots[kHeld > 0 ? 1 : kDepth];
  };

  // The items `first`, `first` + `step` and so on.
  __device__ __forceinline__ Frames(const TemporalParams& params, const Items& items, Ring& ring,
                                    uint32_t first, uint32_t step)
      : p_(params), items_(items), slots_(ring.slots), item_(first), step_(step) {}

  // The first copies.
  __device__ __forceinline__ void start() {
    if constexpr (kHeld > 0) {
      seek();
#pragma unroll
      for (int slot = 0; slot < kDepth; ++slot) load_next(held_[slot]);
    } else if constexpr (V > 1) {
      seek();
#pragma unroll
      for (int slot = 0; slot < kDepth - 1; ++slot) copy_next(slots_[slot]);
    }
  }

  // Before the frames of `item` are taken; `mask_place`: of its mask's first element.
  __device__ __forceinline__ void begin(uint32_t item, int64_t mask_place) {
    if constexpr (V == 1) {
      item_ = item;
      seek();
    } else if constexpr (kMask) {
      constant_mask_ = static_cast<const M*>(p_.mask) + mask_place;
    }
  }

  // Has to be called for every slot in turn, then `take` unless the item has no such frame.
  __device__ __forceinline__ void advance(int slot) {
    if constexpr (kHeld > 0) {
      return;
    } else if constexpr (V > 1) {
      // what comes after frame kDepth − 1 of a round is a round's first frame: perhaps that of the next item
      if (slot == 1 && frame_ >= static_cast<int>(p_.frames)) {
        item_ += step_;
        seek();
      }
      // into the slot of the frame before, which this lane is done with
      copy_next(slots_[(slot + kDepth - 1) % kDepth]);
      __pipeline_wait_prior(kDepth - 1);
    } else if (slot == 0) {
      load_ring();
    }
  }

  // After an item's last frame, which was in the slot before `slot`.
  __device__ __forceinline__ void finish(int slot) {
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int j = 1; j < kDepth; ++j) {
        if (slot != 0 && j >= slot) load_next(held_[j]);
      }
    } else {
#pragma unroll 1
      for (; slot % kDepth != 0; ++slot) advance(slot);
    }
  }

  // z − ref and the mask in a slot's frame. A lane outside of the row finds anything.
  __device__ __forceinline__ void take(int from, C (&x)[R][V], C (&m)[V]) {
    if constexpr (kHeld > 0) {
      Held& held = held_[from];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        widen_raw(held.z[r], x[r]);
        if (p_.ref == nullptr) continue;
        C y[V];
        widen_raw(held.ref[r], y);
#pragma unroll
        for (int v = 0; v < V; ++v) x[r][v] -= y[v];
      }
      if constexpr (kMask) {
        fill_row(held.mask, p_.mask_position_stride);
        widen_raw(held.mask, m);
      }
      // what follows the last round is the first of the next item
      if (from == 0 && frame_ >= static_cast<int>(p_.frames)) {
        item_ += step_;
        seek();
      }
      load_next(held);
      return;
    }
    const Slot& slot = slots_[from];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < R; ++r) widen_raw(slot.z[r][lane], x[r]);
    if (p_.ref != nullptr) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        C y[V];
        widen_raw(slot.ref[r][lane], y);
#pragma unroll
        for (int v = 0; v < V; ++v) x[r][v] -= y[v];
      }
    }
    if constexpr (V == 1) {
      m[0] = slot.mask[lane];
    } else if constexpr (kMask) {
      if (p_.mask_position_stride != 0) {
        widen_raw(slot.mask[lane], m);
      } else {  // one element for all positions: not worth a copy ahead
        const C value = widen(*constant_mask_);
        constant_mask_ += p_.mask_frame_stride;
#pragma unroll
        for (int v = 0; v < V; ++v) m[v] = value;
      }
    }
  }

 private:
  // To the first frame of item_.
  __device__ __forceinline__ void seek() {
    frame_ = end_ = 0;
    if (item_ >= items_.count) return;
    const Columns c = columns_of<R>(p_, items_, item_);
    const int64_t position = (c.tile * int64_t{32} + threadIdx.x % 32) * V;
    if (position < p_.positions) end_ = static_cast<int>(p_.frames);
    z_ = reinterpret_cast<const char*>(static_cast<const T*>(p_.z) + c.place + position);
    if (p_.ref != nullptr)
      ref_ = reinterpret_cast<const char*>(static_cast<const T*>(p_.ref) + c.place + position);
    mask_at_ = c.mask_place + position * p_.mask_position_stride;
    mask_ = reinterpret_cast<const char*>(static_cast<const M*>(p_.mask) + mask_at_);
  }

  struct Held {
    Raw<T, V> z[R], ref[R];
    Raw<M, V> mask;
  };

  __device__ __forceinline__ void load_next(Held& to) {
    if (frame_ < end_) {
#pragma unroll
      for (int r = 0; r < R; ++r) load_raw(to.z[r], reinterpret_cast<const T*>(z_ + r * p_.row_bytes));
      z_ += p_.frame_bytes;
      if (p_.ref != nullptr) {
#pragma unroll
        for (int r = 0; r < R; ++r) load_raw(to.ref[r], reinterpret_cast<const T*>(ref_ + r * p_.row_bytes));
        ref_ += p_.frame_bytes;
      }
      if constexpr (kMask) {
        load_row(to.mask, reinterpret_cast<const M*>(mask_), p_.mask_position_stride);
        mask_ += p_.mask_frame_bytes;
      }
    }
    ++frame_;
  }

  // Every call closes a group of copies, even one of none: `advance` counts groups.
  __device__ __forceinline__ void copy_next(Slot& slot) {
    if (frame_ < end_) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int r = 0; r < R; ++r) copy(slot.z[r][lane], z_ + r * p_.row_bytes);
      z_ += p_.frame_bytes;
      if (p_.ref != nullptr) {
#pragma unroll
        for (int r = 0; r < R; ++r) copy(slot.ref[r][lane], ref_ + r * p_.row_bytes);
        ref_ += p_.frame_bytes;
      }
      if constexpr (kMask) {
        if (p_.mask_position_stride != 0) copy(slot.mask[lane], mask_);
        mask_ += p_.mask_frame_bytes;
      }
    }
    ++frame_;
    __pipeline_commit();
  }

  template <typename X>
  __device__ static __forceinline__ void copy(Raw<X, V>& to, const char* from) {
    constexpr int kUnitBytes = sizeof(to.units[0]);
#pragma unroll
    for (int i = 0; i < Raw<X, V>::kUnits; ++i)
      __pipeline_memcpy_async(&to.units[i], from + i * kUnitBytes, kUnitBytes);
  }

  __device__ __forceinline__ void load_ring() {
    const int lane = threadIdx.x % 32;
    Raw<T, 1> z[kDepth] = {}, ref[kDepth] = {};
    C m[kDepth] = {};
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      if (frame_ + j >= end_) continue;
      load_raw(z[j], reinterpret_cast<const T*>(z_));
      z_ += p_.frame_bytes;
      if (p_.ref != nullptr) {
        load_raw(ref[j], reinterpret_cast<const T*>(ref_));
        ref_ += p_.frame_bytes;
      }
      m[j] = p_.mask == nullptr ? C(1) : element_of<T>(p_.mask, p_.mask_is_float, mask_at_);
      mask_at_ += p_.mask_frame_stride;
    }
#pragma unroll
    for (int j = 0; j < kDepth; ++j) {
      slots_[j].z[0][lane] = z[j];
      slots_[j].ref[0][lane] = ref[j];
      slots_[j].mask[lane] = m[j];
    }
    frame_ += kDepth;
  }

  const TemporalParams& p_;
  const Items items_;
  Slot* const slots_;
  // what is copied next
  uint32_t item_;
  const uint32_t step_;
  int frame_ = 0, end_ = 0;  // this lane's columns have the frames before end_
  const char* z_ = nullptr;
  const char* ref_ = nullptr;
  const char* mask_ = nullptr;
  Held held_[kHeld > 0 ? kDepth : 1];
  const M* constant_mask_ = nullptr;  // where it does not change along the row
  int64_t mask_at_ = 0;
};

}  // namespace latentfast::cuda::temporal
