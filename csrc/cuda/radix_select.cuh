// Radix selection: the element of a rank among non-negative numbers below 2, whose bits are ordered as they
// are.
//
// Each level counts the ten bits after those that are known of the wanted element, in shared memory, then
// by integer additions in device memory, whose order does not matter. A grid meets between two levels.
#pragma once

#include "launch.cuh"

namespace latentfast::cuda {

constexpr int kSelectThreads = 512;
constexpr int kDigit = 10, kBins = 1 << kDigit;
static_assert(kBins == 2 * kSelectThreads);  // a thread looks after two bins

using Count = unsigned long long;

// The bits of a value in [0, 2).
template <typename C>
struct Keys {
  using Bits = std::conditional_t<std::is_same_v<C, double>, unsigned long long, unsigned>;
  static constexpr int kBits = std::is_same_v<C, double> ? 62 : 30;
  static constexpr int kLevels = ceil_div(kBits, kDigit);
  // Bits behind the first level + 1 digits.
  __host__ __device__ static constexpr int shift(int level) {
    const int left = kBits - kDigit * (level + 1);
    return left > 0 ? left : 0;
  }
  static __device__ __forceinline__ Bits of(C x) {
    if constexpr (std::is_same_v<C, double>) {
      return static_cast<Bits>(__double_as_longlong(x));
    } else {
      return __float_as_uint(x);
    }
  }
  static __device__ __forceinline__ C value(Bits bits) {
    if constexpr (std::is_same_v<C, double>) {
      return __longlong_as_double(static_cast<long long>(bits));
    } else {
      return __uint_as_float(bits);
    }
  }
};

// What is known of the wanted element: its first digits, and its rank among the elements that share them.
struct Place {
  Count prefix, rank;
};

// What the blocks know together of one selection.
template <typename C>
struct Selection {
  Count counts[Keys<C>::kLevels][kBins];
  Place places[Keys<C>::kLevels];  // [0] is not used: nothing is known, the rank is that of all
  typename Keys<C>::Bits beyond;   // the least that is larger in all digits but the last
};

// What a block knows.
struct SelectShared {
  unsigned counts[kBins];  // all 0 between the levels
  Count totals[kSelectThreads / 32];
  Place place;
  Count same;      // elements with the place's digits
  unsigned later;  // the next last digit that an element has; kBins: none
};

// Counts digits in shared memory, runs of the same one at once: neighbours are often alike.
struct Counter {
  unsigned* bins;
  unsigned digit = 0, run = 0;

  __device__ __forceinline__ void add(unsigned next) {
    if (next != digit) {
      empty();
      digit = next;
    }
    ++run;
  }
  __device__ __forceinline__ void empty() {
    if (run > 0) atomicAdd(bins + digit, run);
    run = 0;
  }
};

// The functions below are called by all threads of a block.
template <typename C>
struct Selector {
  using Bits = typename Keys<C>::Bits;
  static constexpr int kLevels = Keys<C>::kLevels;

  Selection<C>& found;
  SelectShared& shared;
  Count rank;

  // Adds what the block has counted to the counts of a level.
  __device__ void hand_in(Counter& counter, int level) const {
    counter.empty();
    __syncthreads();
    for (int bin = threadIdx.x; bin < kBins; bin += kSelectThreads) {
      const unsigned count = shared.counts[bin];
      if (count == 0) continue;
      atomicAdd(found.counts[level] + bin, static_cast<Count>(count));
      shared.counts[bin] = 0;
    }
    __syncthreads();
  }

  // From the place that the first `level` digits give to that with one more.
  __device__ Place descend(int level) const {
    constexpr unsigned kAll = 0xffffffffu;
    const Place from = level == 0 ? Place{0, rank} : found.places[level];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Count* const counts = found.counts[level] + 2 * threadIdx.x;
    const Count first = counts[0], own = first + counts[1];
    Count upto = own;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const Count other = __shfl_up_sync(kAll, upto, i);
      if (lane >= i) upto += other;
    }
    if (lane == 31) shared.totals[warp] = upto;
    __syncthreads();
    Count before = lane < warp ? shared.totals[lane] : 0;
#pragma unroll
    for (int i = 16; i > 0; i /= 2) before += __shfl_xor_sync(kAll, before, i);
    before += upto - own;
    if (from.rank >= before && from.rank - before < own) {  // one thread's
      const Count left = from.rank - before;
      const bool upper = left >= first;
      const int width = (level == 0 ? Keys<C>::kBits : Keys<C>::shift(level - 1)) - Keys<C>::shift(level);
      shared.place = {from.prefix << width | (2 * threadIdx.x + upper), upper ? left - first : left};
      shared.same = upper ? own - first : first;
    }
    __syncthreads();
    return shared.place;
  }

  // Before a level's elements are counted, from level 1 on: the digits that they have to share.
  __device__ Bits begin(int level, bool first_block) const {
    const Place place = descend(level - 1);
    if (first_block && threadIdx.x == 0) found.places[level] = place;
    return static_cast<Bits>(place.prefix);
  }

  // Counts an element if it shares them; keeps the least of those beyond.
  static __device__ __forceinline__ void add(C x, int level, Bits prefix, Counter& counter, Bits& beyond) {
    const int shift = Keys<C>::shift(level), before = Keys<C>::shift(level - 1);
    const Bits bits = Keys<C>::of(x), known = bits >> before;
    if (known == prefix) counter.add(static_cast<unsigned>(bits >> shift) & ((1u << (before - shift)) - 1));
    if (known > prefix) beyond = min(beyond, bits);
  }

  __device__ void end(int level, Counter& counter, Bits beyond) const {
    if (level == kLevels - 1) {
#pragma unroll
      for (int i = 16; i > 0; i /= 2) beyond = min(beyond, __shfl_xor_sync(0xffffffffu, beyond, i));
      if (threadIdx.x % 32 == 0 && beyond != ~Bits(0)) atomicMin(&found.beyond, beyond);
    }
    hand_in(counter, level);
  }

  // The element of the rank, and `share` of the way to the one after it.
  __device__ C between(C share) const {
    constexpr int kLast = kLevels - 1;
    constexpr Bits kMask = (Bits(1) << Keys<C>::shift(kLast - 1)) - 1;
    if (threadIdx.x == 0) shared.later = kBins;
    const Place place = descend(kLast);
    const Bits bits = static_cast<Bits>(place.prefix);
    const unsigned digit = static_cast<unsigned>(bits & kMask);
    unsigned later = kBins;
#pragma unroll
    for (int i = 1; i >= 0; --i) {
      const unsigned bin = 2 * threadIdx.x + i;
      if (bin > digit && found.counts[kLast][bin] > 0) later = bin;
    }
    later = __reduce_min_sync(0xffffffffu, later);
    if (threadIdx.x % 32 == 0 && later < kBins) atomicMin(&shared.later, later);
    __syncthreads();
    Bits above = bits;  // the same number again, or there is none beyond it
    if (place.rank + 1 >= shared.same) {
      if (shared.later < kBins) {
        above = bits - digit + shared.later;
      } else if (found.beyond != ~Bits(0)) {
        above = found.beyond;
      }
    }
    __syncthreads();  // what is shared is free again
    const C lower = Keys<C>::value(bits);
    return lower + share * (Keys<C>::value(above) - lower);
  }
};

}  // namespace latentfast::cuda
