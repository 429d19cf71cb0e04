// slerp and nlerp of long vectors on compute capability 9.0: one launch, every element read from memory once.
//
//   out_k = w_a(|a|², |b|², a·b, t_k) · a + w_b(…) · b
//
// The weights need the whole vector's sums, so every element is needed twice: before and after they are
// known. Reading it twice from memory caps the rate at three fifths of a copy's. Here the chip's shared
// memory (30 MB) holds the vectors between the two uses: both inputs of one Wan 720p sample are 147 KB a
// multiprocessor.
//
// One block a multiprocessor, launched cooperatively, so that blocks may wait for each other. A *team* of
// blocks takes one vector after the other (several teams share the grid when the vectors are short); a member
// owns the same shares of each. A block's 18 warps share out its pieces. Each warp has three slots of 4 KB (a
// piece of a and of b), which it fills itself by bulk copies (the copy engine writes to shared memory and
// reports to an mbarrier) and frees itself: no warp waits for another to get its data. For every vector
//   1. each warp sums its pieces. The first stays in registers, the others in their slots; the free slots are
//      being filled already;
//   2. the first warp folds these sums into its shares', and publishes them;
//   3. three warps, one for each inner product, gather those of all shares, and the first makes the weights;
//   4. each warp writes its results, and refills each slot as soon as it has been read.
// Registers and slots hold two vectors of Wan 720p, so that what step 3 costs (a trip to L2 and back, an arc
// tangent) passes while the copies of the next vector are under way. Pieces that do not fit are summed,
// dropped and read again in step 4, mostly from L2.
#include <cooperative_groups.h>

#include <algorithm>

#include "interpolate.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kWarps = 18;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlots = 3;  // of a warp
constexpr int kSlotBytes = 2 * kPieceBytes;
constexpr int kRingBytes = kWarps * kSlots * kSlotBytes;  // of the 227 KB that a block can have
// Pieces of one vector whose sums a block gathers before it folds them: a multiple of every dtype's chunk.
[[maybe_unused]] constexpr int kRoundPieces = 8 * kWarps;
// A team of one that has no more shares than this keeps their sums in shared memory.
constexpr int kLocalShares = 32;
// What a block owns of a vector is held to half of what its registers and slots hold where teams can be chosen:
// the rest is for what comes next.
constexpr int kOwnBytes = kWarps * (kSlots + 1) * kSlotBytes / 2;
// No wait inside the kernel takes longer than the few µs of a pass; this long means that it will never end.
[[maybe_unused]] constexpr uint64_t kPatienceNanoseconds = 20'000'000'000;

// A float64 on its way between blocks: each half beside a tag, so that a reader sees in the same word what is
// written and whether it is: no fence, no counter, no second read. The tag is the number of the team's vector,
// from 1 on; memory is cleared before.
struct alignas(16) Message {
  uint64_t low, high;
};

struct Stream {
  int teams;
  int team_size;
  bool local;         // a team of one, all of whose shares fit in shared memory: nothing is exchanged
  Message* messages;  // [team][parity of the vector's number][3][share]
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Stops a kernel that waits in vain: an error is better than a card that hangs.
class Patience {
 public:
  __device__ void spend() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (start_ == 0) start_ = now;
    if (now - start_ > kPatienceNanoseconds) __trap();
  }

 private:
  uint64_t start_ = 0;
};

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  Patience patience;
  while (true) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (done) return;
    patience.spend();
  }
}

// `bytes` (a multiple of 16) from global to shared memory, by the copy engine.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void send(Message* to, double x, uint32_t tag) {
  const uint64_t upper = static_cast<uint64_t>(tag) << 32;
  const uint64_t low = upper | static_cast<uint32_t>(__double2loint(x));
  const uint64_t high = upper | static_cast<uint32_t>(__double2hiint(x));
  asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(low), "l"(high) : "memory");
}

// The sum of one inner product over all shares, as soon as they are there. For a warp.
__device__ __forceinline__ double gather(const Message* messages, int shares, uint32_t tag) {
  constexpr int kBatch = 5;  // enough for the H200's 132 shares
  double sum = 0.0;
  for (int first = threadIdx.x % 32; first < shares; first += 32 * kBatch) {
    Message got[kBatch] = {};
    bool missing[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) missing[u] = first + 32 * u < shares;
    Patience patience;
    while (true) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {  // what is there already is not read again
        asm volatile(
            "{\n\t.reg .pred p;\n\t"
            "setp.ne.u32 p, %3, 0;\n\t"
            "@p ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];\n\t}"
            : "+l"(got[u].low), "+l"(got[u].high)
            : "l"(messages + first + 32 * u), "r"(static_cast<int>(missing[u]))
            : "memory");
      }
      bool any = false;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        missing[u] = missing[u] && (got[u].low >> 32 != tag || got[u].high >> 32 != tag);
        any = any || missing[u];
      }
      if (!any) break;
      patience.spend();
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (first + 32 * u < shares) {
        sum += __hiloint2double(static_cast<int>(got[u].high), static_cast<int>(got[u].low));
      }
    }
  }
  __syncwarp();
  return fold_lanes(sum);
}

// One warp's slots and the order in which they are filled. All lanes hold the same state; lane 0 starts the
// copies.
//
// For every vector of the team the warp reads its pieces 0 … count−1, keeps the first `keep` of them (number 0
// in registers) and reads the others a second time. That sequence, over all vectors, is run through as fast as
// slots become free.
template <typename T>
class Ring {
 public:
  __device__ Ring(const Arguments& arguments, const Stream& stream, unsigned char* slots, uint64_t* barriers,
                  int first_piece, int pieces, int64_t vector)
      : arguments_(arguments), slots_(slots), barriers_(barriers), teams_(stream.teams), vector_(vector) {
    const int warp = threadIdx.x / 32;
    first_ = first_piece + warp;
    count = warp < pieces ? (pieces - 1 - warp) / kWarps + 1 : 0;
    keep = count <= kSlots + 1 ? count : kSlots;
    length_ = count + (count - keep);
    // What is read once may leave L2 at once; what is read again should find room there.
    if (pieces <= kWarps * (kSlots + 1)) {
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy_));
    } else {
      asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy_));
    }
  }

  // The number, in the vector, of this warp's piece x.
  __device__ int piece(int x) const { return first_ + x * kWarps; }

  // Start as many copies as there are free slots.
  __device__ void fill() {
    while (free_ != 0 && length_ != 0 && vector_ < arguments_.vectors.count) {
      const int slot = __ffs(free_) - 1;
      free_ &= ~(1u << slot);
      if (threadIdx.x % 32 == 0) {
        const Piece piece =
            piece_of<T>(arguments_.vectors, this->piece(next_ < count ? next_ : keep + next_ - count));
        const int64_t offset = arguments_.vectors.base(vector_) + piece.offset;
        const uint32_t bytes = piece.elements * static_cast<uint32_t>(sizeof(T));
        unsigned char* to = slots_ + slot * kSlotBytes;
        barrier_expect(barriers_ + slot, 2 * bytes);
        bulk_copy(to, static_cast<const T*>(arguments_.a) + offset, bytes, barriers_ + slot, policy_);
        bulk_copy(to + kPieceBytes, static_cast<const T*>(arguments_.b) + offset, bytes, barriers_ + slot,
                  policy_);
      }
      queue_ |= slot << (2 * queued_++);
      if (++next_ == length_) {
        next_ = 0;
        vector_ += teams_;
      }
    }
  }

  // The slot of the next copy in the sequence, once it has landed.
  __device__ int take() {
    const int slot = queue_ & 3;
    queue_ >>= 2;
    --queued_;
    barrier_wait(barriers_ + slot, (parities_ >> slot) & 1);
    parities_ ^= 1u << slot;
    return slot;
  }

  // The warp is done with a slot: refill it.
  __device__ void release(int slot) {
    __syncwarp();  // every lane has read it
    free_ |= 1u << slot;
    fill();
  }

  // A piece in its slot.
  __device__ LanePacks read(int slot, const Piece& piece) const {
    const uint4* const from = reinterpret_cast<const uint4*>(slots_ + slot * kSlotBytes);
    const int count = piece.elements / kPack<T>;
    LanePacks packs;
#pragma unroll
    for (int j = 0; j < kLanePacks; ++j) {
      const int i = threadIdx.x % 32 + 32 * j;
      packs.a[j] = i < count ? from[i] : uint4{0, 0, 0, 0};
      packs.b[j] = i < count ? from[i + kPiecePacks] : uint4{0, 0, 0, 0};
    }
    return packs;
  }

  int count;  // this warp's pieces of each vector
  int keep;   // how many of them stay until the weights are known

 private:
  const Arguments& arguments_;
  unsigned char* slots_;
  uint64_t* barriers_;
  uint64_t policy_;
  int first_;
  int length_;  // copies a vector
  int teams_;
  int64_t vector_;  // of the next copy
  int next_ = 0;    // its place in the vector's sequence
  unsigned free_ = (1u << kSlots) - 1, parities_ = 0;
  unsigned queue_ = 0;  // slots of the copies under way, oldest first, two bits each
  int queued_ = 0;
};

// A barrier of the first `threads` threads of the block. Number 0 is __syncthreads'.
__device__ __forceinline__ void sync_first(int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    streamed_kernel(const __grid_constant__ Arguments arguments, const __grid_constant__ Stream stream) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using W = Wide<T>;
  constexpr int P = kChunkPieces<T>;
  static_assert(kRoundPieces % P == 0);
  extern __shared__ __align__(128) unsigned char ring_bytes[];
  __shared__ uint64_t barriers[kWarps * kSlots];
  __shared__ double piece_sums[kRoundPieces][3];
  __shared__ double local_sums[3][kLocalShares];
  __shared__ double totals[3];
  __shared__ Mix<W> mixes[kMaxValues];

  const Vectors& vectors = arguments.vectors;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = blockIdx.x / stream.team_size, member = blockIdx.x % stream.team_size;
  const int share_begin = vectors.shares * member / stream.team_size;
  const int share_end = vectors.shares * (member + 1) / stream.team_size;
  const int chunk_begin = vectors.share_begin(share_begin);
  const int first_piece = chunk_begin * P;
  const int pieces = min(vectors.share_begin(share_end) * P, vectors.pieces) - first_piece;
  const int rounds = ceil_div(pieces, kRoundPieces);
  Message* const messages = stream.messages + static_cast<int64_t>(team) * 2 * 3 * vectors.shares;

  Ring<T> ring(arguments, stream, ring_bytes + warp * kSlots * kSlotBytes, barriers + warp * kSlots,
               first_piece, pieces, team);
  if (lane == 0) {
    for (int slot = 0; slot < kSlots; ++slot) barrier_init(barriers + warp * kSlots + slot);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  ring.fill();

  if (!stream.local) {
    const int own = share_end - share_begin;
    for (int i = threadIdx.x; i < 2 * 3 * own; i += kThreads) {
      messages[i / own * vectors.shares + share_begin + i % own] = {0, 0};
    }
    cooperative_groups::this_grid().sync();  // behind the first copies
  }

  uint32_t tag = 0;
  for (int64_t vector = team; vector < vectors.count; vector += stream.teams) {
    ++tag;
    Message* const exchange = messages + tag % 2 * 3 * vectors.shares;
    const int value = threadIdx.x;  // the first warp's lanes each see to one value of t
    const double t = value < arguments.values.count ? arguments.values.at(value, vector) : 0.0;
    LanePacks held;     // piece 0
    unsigned kept = 0;  // slots of the other pieces that stay, two bits each

    // 1. Sums of the pieces, and 2. of the chunks and the shares.
    int share = share_begin;
    double share_sum = 0.0;
    for (int round = 0; round < rounds; ++round) {
      const int x_end = min(ring.count, (round + 1) * (kRoundPieces / kWarps));
      for (int x = round * (kRoundPieces / kWarps); x < x_end; ++x) {
        const Piece piece = piece_of<T>(vectors, ring.piece(x));
        const int slot = ring.take();
        double folded;
        if (x == 0) {
          held = ring.read(slot, piece);
          ring.release(slot);
          folded = sum_packs<T>(held);
        } else {
          folded = sum_packs<T>(ring.read(slot, piece));
          if (x < ring.keep) {
            kept |= slot << (2 * x);
          } else {
            ring.release(slot);
          }
        }
        const int component = folded_component();
        if (component >= 0)
          piece_sums[ring.piece(x) - first_piece - round * kRoundPieces][component] = folded;
      }
      __syncthreads();
      if (warp == 0) {
        const int round_pieces = min(kRoundPieces, pieces - round * kRoundPieces);
        const int round_chunks = ceil_div(round_pieces, P);
        for (int i = lane; i < 3 * round_chunks; i += 32) {
          const int chunk = i / 3, component = i % 3;
          const int end = min((chunk + 1) * P, round_pieces);
          double sum = piece_sums[chunk * P][component];
          for (int j = chunk * P + 1; j < end; ++j) sum += piece_sums[j][component];
          piece_sums[chunk * P][component] = sum;
        }
        __syncwarp();
        if (lane < 3) {
          const int begin = chunk_begin + round * (kRoundPieces / P);
          int next = vectors.share_begin(share + 1);
          for (int chunk = 0; chunk < round_chunks; ++chunk) {
            share_sum += piece_sums[chunk * P][lane];
            if (begin + chunk + 1 == next) {
              if (stream.local) {
                local_sums[lane][share] = share_sum;
              } else {
                send(exchange + lane * vectors.shares + share, share_sum, tag);
              }
              share_sum = 0.0;
              next = vectors.share_begin(++share + 1);
            }
          }
        }
        __syncwarp();
      }
      if (round + 1 < rounds) __syncthreads();
    }

    // 3. The vector's sums and its weights.
    if (warp < 3) {
      if (!stream.local) {
        const double total = gather(exchange + warp * vectors.shares, vectors.shares, tag);
        if (lane == 0) totals[warp] = total;
        sync_first(3 * 32);
      } else if (warp == 0) {
        LaneSums sums;
        if (lane < vectors.shares) {
          sums.aa = local_sums[0][lane];
          sums.bb = local_sums[1][lane];
          sums.ab = local_sums[2][lane];
        }
        const double folded = fold_warp(sums);
        const int component = folded_component();
        if (component >= 0) totals[component] = folded;
        __syncwarp();
      }
      if (value < arguments.values.count) {
        const Sums sums{totals[0], totals[1], totals[2]};
        mixes[value] = make_mix<W>(arguments.mode, sums, t, vectors.elements(), NoLast());
      }
    }
    __syncthreads();

    // 4. The results: first what is here, then what has to be read again.
    const int64_t base = vectors.base(vector);
    for (int x = 0; x < ring.count; ++x) {
      const Piece piece = piece_of<T>(vectors, ring.piece(x));
      if (x > 0) {
        const int slot = x < ring.keep ? (kept >> (2 * x)) & 3 : ring.take();
        held = ring.read(slot, piece);
        ring.release(slot);
      }
      write_packs<T, true>(arguments, mixes, held, base, piece);
    }
  }
#endif
}

// The teams that finish all vectors in the fewest steps; a step costs its chunks and, for the exchange, about
// two more. `own_chunks`: how many chunks of one vector a block should own at most.
Stream plan(const Vectors& vectors, int multiprocessors, int own_chunks) {
  Stream best{};
  int64_t best_cost = INT64_MAX;
  int size = std::min(ceil_div(vectors.chunks, own_chunks), vectors.shares);
  while (size <= multiprocessors) {
    const int teams = static_cast<int>(std::min<int64_t>(multiprocessors / size, vectors.count));
    const int team_size = std::min(multiprocessors / teams, vectors.shares);
    const int most = ceil_div(vectors.chunks, vectors.shares) * ceil_div(vectors.shares, team_size);
    const int64_t cost = ceil_div<int64_t>(vectors.count, teams) * (most + 2);
    if (cost < best_cost) {
      best_cost = cost;
      best.teams = teams;
      best.team_size = team_size;
    }
    if (teams == 1) break;
    size = multiprocessors / (multiprocessors / size) + 1;  // the next size that makes fewer teams
  }
  best.local = best.team_size == 1 && vectors.shares <= kLocalShares;
  return best;
}

template <typename T>
void allow_ring(int device) {
  static std::array<std::atomic<bool>, kMaxDevices> allowed;
  if (allowed[device].load(std::memory_order_acquire)) return;
  check(cudaFuncSetAttribute(streamed_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes),
        "shared memory of interpolate");
  allowed[device].store(true, std::memory_order_release);
}

}  // namespace

template <typename T>
void interpolate_streamed(const Target& target, const Arguments& arguments) {
  const Vectors& vectors = arguments.vectors;
  Stream stream = plan(vectors, target.device.multiprocessors, kOwnBytes / kSlotBytes / kChunkPieces<T>);
  const int64_t messages = stream.local ? 0 : static_cast<int64_t>(stream.teams) * 2 * 3 * vectors.shares;
  const Workspace workspace(target, messages * static_cast<int64_t>(sizeof(Message)));
  stream.messages = static_cast<Message*>(workspace.data());
  allow_ring<T>(target.index);
  void* parameters[] = {const_cast<Arguments*>(&arguments), &stream};
  check(cudaLaunchCooperativeKernel(streamed_kernel<T>, dim3(stream.teams * stream.team_size), dim3(kThreads),
                                    parameters, kRingBytes, target.stream),
        "interpolate");
}

template void interpolate_streamed<float>(const Target&, const Arguments&);
template void interpolate_streamed<double>(const Target&, const Arguments&);
template void interpolate_streamed<Half>(const Target&, const Arguments&);
template void interpolate_streamed<BFloat16>(const Target&, const Arguments&);

}  // namespace latentfast::cuda
