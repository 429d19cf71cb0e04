// What the streamed kernel (streamed_kernel.cuh) is made of: barriers and bulk copies in shared memory,
// numbers that blocks send each other, and the ring of slots that feeds a warp. For compute capability 9.0.
#pragma once

#include "interpolate.cuh"

namespace latentfast::cuda {

// --- waiting
// ------------------------------------------------------------------------------------------------------------

// No wait inside the kernel takes longer than the few µs of a pass; this long means that it will never end.
[[maybe_unused]] constexpr uint64_t kPatienceNanoseconds = 20'000'000'000;

// A float64 on its way between blocks: each half beside a tag, so that a reader sees in the same word what is
// written and whether it is: no fence, no counter, no second read. The tag is the number of the team's
// vector, from 1 on; memory is cleared before.
struct alignas(16) Message {
  uint64_t low, high;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Stops a kernel that waits in vain: an error is better than a card that hangs.
class Patience {
 public:
  __device__ void spend() {
    if (++tries_ % 256 != 0) return;  // reading the clock takes time
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (start_ == 0) start_ = now;
    if (now - start_ > kPatienceNanoseconds) __trap();
  }

 private:
  uint64_t start_ = 0;
  unsigned tries_ = 0;
};

__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

// By one thread, for its warp: all that the lanes wrote and read before is behind it.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
  }
}

// True in one lane. The compiler knows that it is one, unlike of threadIdx.x % 32 == 0.
__device__ __forceinline__ bool elected() {
  uint32_t is;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "elect.sync _|p, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(is));
  return is;
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  Patience patience;
  while (true) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done) return;
    patience.spend();
  }
}

// Whether a barrier's phase of this parity is complete, now, for all lanes.
__device__ __forceinline__ bool barrier_test(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, p;\n\t}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return __all_sync(0xffffffffu, done);
}

// Two barriers for what comes in turns: number i is barrier i mod 2's completion number i / 2.
__device__ __forceinline__ void turn_wait(uint64_t (&barriers)[2], uint32_t number) {
  barrier_wait(shared_address(&barriers[number % 2]), number / 2 % 2);
}

__device__ __forceinline__ bool turn_test(uint64_t (&barriers)[2], uint32_t number) {
  return barrier_test(shared_address(&barriers[number % 2]), number / 2 % 2);
}

// --- copies and messages
// ------------------------------------------------------------------------------------------------------------

// `bytes` (a multiple of 16) from global to shared memory, by the copy engine.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Has L2 read it from memory.
__device__ __forceinline__ void bulk_prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void send(Message* to, double x, uint32_t tag) {
  const uint64_t upper = static_cast<uint64_t>(tag) << 32;
  const uint64_t low = upper | static_cast<uint32_t>(__double2loint(x));
  const uint64_t high = upper | static_cast<uint32_t>(__double2hiint(x));
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(low), "l"(high) : "memory");
}

// What a lane adds up of the shares' sums, [kSums][shares], as soon as they are there. The loads of three of
// the sums are under way together: there are no registers for more.
template <int kSums>
__device__ __forceinline__ void gather(const Message* messages, int shares, uint32_t tag,
                                       double (&sums)[kSums]) {
  constexpr int kBatch = 5;  // enough for the H200's 132 shares
  constexpr int kTogether = 3;
#pragma unroll
  for (int c = 0; c < kSums; ++c) sums[c] = 0.0;
#pragma unroll
  for (int from_c = 0; from_c < kSums; from_c += kTogether) {
    for (int first = threadIdx.x % 32; first < shares; first += 32 * kBatch) {
      Message got[kTogether][kBatch] = {};
      unsigned missing = 0;  // a bit each
#pragma unroll
      for (int c = 0; c < kTogether && from_c + c < kSums; ++c) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (first + 32 * u < shares) missing |= 1u << (c * kBatch + u);
        }
      }
      Patience patience;
      while (true) {
#pragma unroll
        for (int c = 0; c < kTogether && from_c + c < kSums; ++c) {
          const Message* const from = messages + (from_c + c) * shares + first;
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {  // what is there already is not read again
            asm volatile(
                "{\n\t.reg .pred p;\n\t"
                "setp.ne.u32 p, %3, 0;\n\t"
                "@p ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];\n\t}"
                : "+l"(got[c][u].low), "+l"(got[c][u].high)
                : "l"(from + 32 * u), "r"(missing >> (c * kBatch + u) & 1)
                : "memory");
          }
        }
#pragma unroll
        for (int c = 0; c < kTogether && from_c + c < kSums; ++c) {
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            if (got[c][u].low >> 32 == tag && got[c][u].high >> 32 == tag)
              missing &= ~(1u << (c * kBatch + u));
          }
        }
        if (missing == 0) break;
        patience.spend();
      }
#pragma unroll
      for (int c = 0; c < kTogether && from_c + c < kSums; ++c) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (first + 32 * u < shares) {
            sums[from_c + c] +=
                __hiloint2double(static_cast<int>(got[c][u].high), static_cast<int>(got[c][u].low));
          }
        }
      }
    }
  }
  __syncwarp();
}

// --- a warp's slots
// ------------------------------------------------------------------------------------------------------------

// Where vectors and their pieces are. `OneRun` is said at compile time: then all of it is linear, and what
// every copy and result pays for it is two multiplications. There are fewer than 2^31 vectors as long as
// these.
template <bool OneRun>
__device__ __forceinline__ int64_t stream_base(const Vectors& vectors, int vector) {
  if constexpr (OneRun) {
    return vector * vectors.length;
  } else {
    const int q = static_cast<int>(vectors.q), p = vector / q;
    return (p * vectors.n * vectors.q + (vector - p * q)) * vectors.m;
  }
}

template <typename T, bool OneRun>
__device__ __forceinline__ Piece stream_piece(const Vectors& vectors, int index) {
  if constexpr (OneRun) {
    const int64_t start = index * static_cast<int64_t>(kPieceElements<T>);
    return {start, start,
            index + 1 == vectors.pieces ? static_cast<int>(vectors.length - start) : kPieceElements<T>};
  } else {
    return piece_of<T>(vectors, index);
  }
}

// Of one warp's slots: barriers that say that a slot's copies have landed, what L2 does with what they read,
// and whether it is asked to read ahead of them.
template <int kSlots>
struct SlotState {
  uint64_t landed[kSlots];
  uint64_t policy;
  bool prefetches;
};

// One warp's slots and the order in which they are filled. All lanes hold the same state; one of them
// starts the copies.
//
// For every vector of the team the warp reads its pieces 0 … count−1 and reads those from number `keep` on a
// second time. That sequence, over all vectors, is run through as fast as slots become free.
template <typename Job, bool OneRun, int kWarps, int kSlots>
class Ring {
  using T = typename Job::Element;
  static constexpr int kAhead = 2;

 public:
  static constexpr int kSlotBytes = 2 * kPieceBytes;

  // `count`: the warp's pieces of each vector, every kWarps-th from `first_piece` on. Starts the first
  // copies.
  __device__ Ring(const Job& job, const unsigned char* slots, SlotState<kSlots>& state, int first_piece,
                  int count, int keep, bool rereads, int vector, int teams)
      : job_(job),
        slots_(slots),
        state_(state),
        first_(first_piece),
        count_(count),
        keep_(keep),
        teams_(teams),
        vector_(vector) {
    if (count == 0) return;
    if (threadIdx.x % 32 == 0) {
      for (int slot = 0; slot < kSlots; ++slot) barrier_init(&state.landed[slot], 1);
      // What is read once may leave L2 at once; what is read again should find room there.
      if (rereads) {
        asm("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(state.policy));
      } else {
        asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(state.policy));
      }
      state.prefetches = !rereads && job.prefetches();
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
#pragma unroll 1
    for (int slot = 0; slot < kSlots; ++slot) start(slot);
  }

  // This warp's piece x, in the vector.
  __device__ Piece piece(int x) const { return stream_piece<T, OneRun>(job_.vectors(), first_ + x * kWarps); }

  // The slot of the next copy in the sequence, once it has landed.
  __device__ int take() {
    const int slot = queue_ & 3;
    queue_ >>= 2;
    barrier_wait(shared_address(&state_.landed[slot]), (parities_ >> slot) & 1);
    parities_ ^= 1u << slot;
    return slot;
  }

  // Whether `take` would not have to wait. There has to be a copy under way.
  __device__ bool landed() const {
    const int slot = queue_ & 3;
    return barrier_test(shared_address(&state_.landed[slot]), (parities_ >> slot) & 1);
  }

  // The warp is done with a slot: refill it.
  __device__ void release(int slot) {
    __syncwarp();  // every lane has read it
    start(slot);
  }

  // The sums of what a slot holds: half of it at a time, for which there are registers.
  __device__ double sum(int slot, int elements) const {
    typename Job::LaneSums sums;
#pragma unroll
    for (int half = 0; half < kLanePacks; half += kLanePacks / 2) {
      const LanePacks<kLanePacks / 2> packs = read<kLanePacks / 2>(slot, elements, half);
#pragma unroll
      for (int j = 0; j < kLanePacks / 2; ++j) Job::add(sums, packs.a[j], packs.b[j]);
      asm volatile("" ::: "memory");
    }
    return Job::fold(sums);
  }

  // What a slot holds; zeros behind the piece's end.
  template <int J = kLanePacks>
  __device__ LanePacks<J> read(int slot, int elements, int first = 0) const {
    const int lane = threadIdx.x % 32 + 32 * first;
    const uint4* const from = reinterpret_cast<const uint4*>(slots_ + slot * kSlotBytes) + lane;
    LanePacks<J> packs;
    if (elements == kPieceElements<T>) {
#pragma unroll
      for (int j = 0; j < J; ++j) {
        packs.a[j] = from[32 * j];
        packs.b[j] = from[32 * j + kPiecePacks];
      }
    } else {
      const int left = elements / kPack<T> - lane;
#pragma unroll
      for (int j = 0; j < J; ++j) {
        packs.a[j] = 32 * j < left ? from[32 * j] : uint4{0, 0, 0, 0};
        packs.b[j] = 32 * j < left ? from[32 * j + kPiecePacks] : uint4{0, 0, 0, 0};
      }
    }
    return packs;
  }

 private:
  // The next copy of the sequence, into a free slot.
  __device__ void start(int slot) {
    const Vectors& vectors = job_.vectors();
    if (vector_ >= vectors.count) return;
    if (elected()) {
      const Piece next = piece(next_ < count_ ? next_ : keep_ + next_ - count_);
      const int64_t offset = stream_base<OneRun>(vectors, vector_) + next.offset;
      const uint32_t bytes = next.elements * static_cast<uint32_t>(sizeof(T));
      const uint32_t barrier = shared_address(&state_.landed[slot]);
      const uint32_t to = shared_address(slots_) + slot * kSlotBytes;
      barrier_expect(barrier, 2 * bytes);
      bulk_copy(to, job_.a() + offset, bytes, barrier, state_.policy);
      bulk_copy(to + kPieceBytes, job_.b() + offset, bytes, barrier, state_.policy);
      if (state_.prefetches) prefetch();
    }
    queue_ += (slot + 4 - 1) << (31 - __clz(queue_));  // behind the last: 1 becomes 1xx
    if (++next_ == 2 * count_ - keep_) {
      next_ = 0;
      vector_ += teams_;
    }
  }

  // Has L2 read the piece that comes kAhead copies after this one, so that memory has work while all slots
  // wait for weights. What is read a second time is in L2 already.
  __device__ void prefetch() const {
    const Vectors& vectors = job_.vectors();
    const int all = 2 * count_ - keep_;
    int ahead = next_ + kAhead, vector = vector_;
    while (ahead >= all) {
      ahead -= all;
      vector += teams_;
    }
    if (ahead >= count_ || vector >= vectors.count) return;
    const Piece piece = this->piece(ahead);
    const int64_t offset = stream_base<OneRun>(vectors, vector) + piece.offset;
    const uint32_t bytes = piece.elements * static_cast<uint32_t>(sizeof(T));
    bulk_prefetch(job_.a() + offset, bytes);
    bulk_prefetch(job_.b() + offset, bytes);
  }

  const Job& job_;
  const unsigned char* slots_;
  SlotState<kSlots>& state_;
  int first_, count_, keep_;
  int teams_;
  int vector_;    // of the next copy
  int next_ = 0;  // its place in the vector's sequence
  unsigned parities_ = 0;
  unsigned queue_ = 1;  // slots of the copies under way, the oldest lowest, two bits each; then a 1
};

#endif

}  // namespace latentfast::cuda
