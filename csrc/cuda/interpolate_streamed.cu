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
//   2. three warps, one for each inner product, fold these sums into the block's shares' and publish them;
//   3. they gather those of all shares, and the first makes the weights;
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
// What a block owns of a vector is held to half of what its registers and slots hold where teams can be
// chosen: the rest is for what comes next.
constexpr int kOwnBytes = kWarps * (kSlots + 1) * kSlotBytes / 2;
// No wait inside the kernel takes longer than the few µs of a pass; this long means that it will never end.
[[maybe_unused]] constexpr uint64_t kPatienceNanoseconds = 20'000'000'000;

// A float64 on its way between blocks: each half beside a tag, so that a reader sees in the same word what is
// written and whether it is: no fence, no counter, no second read. The tag is the number of the team's
// vector, from 1 on; memory is cleared before.
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

__device__ __forceinline__ void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
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

// `bytes` (a multiple of 16) from global to shared memory, by the copy engine.
__device__ __forceinline__ void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
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

// Where vectors and their pieces are. `OneRun` is said at compile time: then all of it is linear, and what
// every copy and result pays for it is two multiplications. There are fewer than 2^31 vectors as long as
// these.
template <typename T, bool OneRun>
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

// One warp's slots and the order in which they are filled. All lanes hold the same state; lane 0 starts the
// copies.
//
// For every vector of the team the warp reads its pieces 0 … count−1, keeps the first `keep` of them (number
// 0 in registers) and reads the others a second time. That sequence, over all vectors, is run through as fast
// as slots become free.
template <typename T, bool OneRun>
class Ring {
 public:
  __device__ Ring(const Arguments& arguments, const Stream& stream, unsigned char* slots, uint64_t* barriers,
                  int first_piece, int pieces, int vector)
      : arguments_(arguments),
        slots_(slots),
        barriers_(shared_address(barriers)),
        teams_(stream.teams),
        vector_(vector) {
    const int warp = threadIdx.x / 32;
    first_ = first_piece + warp;
    count = warp < pieces ? (pieces - 1 - warp) / kWarps + 1 : 0;
    keep = count <= kSlots + 1 ? count : kSlots;
    length_ = count + (count - keep);
    if (count == 0) vector_ = static_cast<int>(arguments.vectors.count);  // nothing to do
    // What is read once may leave L2 at once; what is read again should find room there.
    if (pieces <= kWarps * (kSlots + 1)) {
      asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy_));
    } else {
      asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0;" : "=l"(policy_));
    }
    if (threadIdx.x % 32 == 0) {
      for (int slot = 0; slot < kSlots; ++slot) barrier_init(barriers_ + slot * sizeof(uint64_t));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
#pragma unroll 1
    for (int slot = 0; slot < kSlots; ++slot) start(slot);
  }

  // This warp's piece x, in the vector.
  __device__ int number(int x) const { return first_ + x * kWarps; }
  __device__ Piece piece(int x) const { return stream_piece<T, OneRun>(arguments_.vectors, number(x)); }

  // The slot of the next copy in the sequence, once it has landed.
  __device__ int take() {
    const int slot = queue_ & 3;
    queue_ >>= 2;
    queue_end_ -= 2;
    barrier_wait(barriers_ + slot * sizeof(uint64_t), (parities_ >> slot) & 1);
    parities_ ^= 1u << slot;
    return slot;
  }

  // The warp is done with a slot: refill it.
  __device__ void release(int slot) {
    __syncwarp();  // every lane has read it
    start(slot);
  }

  // What a slot holds.
  __device__ LanePacks<> read(int slot, const Piece& piece) const {
    const uint4* const from = reinterpret_cast<const uint4*>(slots_ + slot * kSlotBytes) + threadIdx.x % 32;
    const int left = piece.elements / kPack<T> - static_cast<int>(threadIdx.x % 32);
    LanePacks<> packs;
#pragma unroll
    for (int j = 0; j < kLanePacks; ++j) {
      packs.a[j] = 32 * j < left ? from[32 * j] : uint4{0, 0, 0, 0};
      packs.b[j] = 32 * j < left ? from[32 * j + kPiecePacks] : uint4{0, 0, 0, 0};
    }
    return packs;
  }

  int count;  // this warp's pieces of each vector
  int keep;   // how many of them stay until the weights are known

 private:
  // The next copy of the sequence, into a free slot.
  __device__ void start(int slot) {
    const Vectors& vectors = arguments_.vectors;
    if (vector_ >= vectors.count) return;
    if (threadIdx.x % 32 == 0) {
      const Piece next = piece(next_ < count ? next_ : keep + next_ - count);
      const int64_t offset = stream_base<T, OneRun>(vectors, vector_) + next.offset;
      const uint32_t bytes = next.elements * static_cast<uint32_t>(sizeof(T));
      const uint32_t barrier = barriers_ + slot * sizeof(uint64_t);
      const uint32_t to = shared_address(slots_) + slot * kSlotBytes;
      barrier_expect(barrier, 2 * bytes);
      bulk_copy(to, static_cast<const T*>(arguments_.a) + offset, bytes, barrier, policy_);
      bulk_copy(to + kPieceBytes, static_cast<const T*>(arguments_.b) + offset, bytes, barrier, policy_);
    }
    queue_ |= slot << queue_end_;
    queue_end_ += 2;
    if (++next_ == length_) {
      next_ = 0;
      vector_ += teams_;
    }
  }

  const Arguments& arguments_;
  const unsigned char* slots_;
  uint32_t barriers_;
  uint64_t policy_;
  int first_;
  int length_;  // copies a vector
  int teams_;
  int vector_;    // of the next copy
  int next_ = 0;  // its place in the vector's sequence
  unsigned parities_ = 0;
  unsigned queue_ = 0;  // slots of the copies under way, oldest first, two bits each
  int queue_end_ = 0;
};

#endif

template <typename T, bool OneRun>
__global__ void __launch_bounds__(kThreads, 1)
    streamed_kernel(const __grid_constant__ Arguments arguments, const __grid_constant__ Stream stream) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using W = Wide<T>;
  constexpr int P = kChunkPieces<T>;
  static_assert(kRoundPieces % P == 0);
  extern __shared__ __align__(128) unsigned char ring_bytes[];
  __shared__ uint64_t barriers[kWarps * kSlots];
  __shared__ double piece_sums[3][kRoundPieces];
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

  Ring<T, OneRun> ring(arguments, stream, ring_bytes + warp * kSlots * kSlotBytes, barriers + warp * kSlots,
                       first_piece, pieces, team);
  if (!stream.local) {
    const int own = share_end - share_begin;
    for (int i = threadIdx.x; i < 2 * 3 * own; i += kThreads) {
      messages[i / own * vectors.shares + share_begin + i % own] = {0, 0};
    }
    cooperative_groups::this_grid().sync();  // behind the first copies
  }

  uint32_t tag = 0;
  for (int vector = team; vector < vectors.count; vector += stream.teams) {
    ++tag;
    Message* const exchange = messages + tag % 2 * 3 * vectors.shares;
    const int value = threadIdx.x;  // the first warp's lanes each see to one value of t
    const double t = value < arguments.values.count ? arguments.values.at(value, vector) : 0.0;
    LanePacks<> held;   // piece 0
    unsigned kept = 0;  // slots of the other pieces that stay, two bits each

    // 1. Sums of the pieces, and 2. of the chunks and the shares.
    int share = share_begin, share_left = 0;  // chunks of it that are missing
    double share_sum = 0.0;
    for (int round = 0; round < rounds; ++round) {
      const int x_end = min(ring.count, (round + 1) * (kRoundPieces / kWarps));
      for (int x = round * (kRoundPieces / kWarps); x < x_end; ++x) {
        const Piece piece = ring.piece(x);
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
          piece_sums[component][ring.number(x) - first_piece - round * kRoundPieces] = folded;
      }
      __syncthreads();
      if (warp < 3) {
        double* const sums = piece_sums[warp];
        const int round_pieces = min(kRoundPieces, pieces - round * kRoundPieces);
        const int round_chunks = ceil_div(round_pieces, P);
#pragma unroll 1
        for (int chunk = lane; chunk < round_chunks; chunk += 32) {
          double sum = 0.0;
#pragma unroll
          for (int j = chunk * P; j < chunk * P + P; ++j) {
            if (j < round_pieces) sum += sums[j];
          }
          sums[chunk * P] = sum;
        }
        __syncwarp();
        if (lane == 0) {
          for (int chunk = 0; chunk < round_chunks;) {
            if (share_left == 0) {
              share_left = vectors.share_chunks + (share < vectors.longer_shares);
              share_sum = 0.0;
            }
            const int n = min(share_left, round_chunks - chunk);
#pragma unroll 4
            for (int j = 0; j < n; ++j) share_sum += sums[(chunk + j) * P];
            chunk += n;
            share_left -= n;
            if (share_left == 0) {
              if (stream.local) {
                local_sums[warp][share] = share_sum;
              } else {
                send(exchange + warp * vectors.shares + share, share_sum, tag);
              }
              ++share;
            }
          }
        }
        __syncwarp();
      }
      if (round + 1 < rounds) __syncthreads();
    }

    // 3. The vector's sums and its weights.
    if (warp < 3) {
      const double total = stream.local ? fold_lanes(lane < vectors.shares ? local_sums[warp][lane] : 0.0)
                                        : gather(exchange + warp * vectors.shares, vectors.shares, tag);
      if (lane == 0) totals[warp] = total;
      asm volatile("bar.sync 1, 96;" ::: "memory");  // these three warps alone
      if (value < arguments.values.count) {
        const Sums sums{totals[0], totals[1], totals[2]};
        mixes[value] = make_mix<W>(arguments.mode, sums, t, vectors.length, NoLast());
      }
    }
    __syncthreads();

    // 4. The results: first what is here, then what has to be read again.
    const int64_t base = stream_base<T, OneRun>(vectors, vector);
    for (int x = 0; x < ring.count; ++x) {
      const Piece piece = ring.piece(x);
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

template <typename T, bool OneRun>
void launch(const Target& target, const Arguments& arguments, const Stream& stream) {
  static std::array<std::atomic<bool>, kMaxDevices> allowed;  // to have as much shared memory
  if (!allowed[target.index].load(std::memory_order_acquire)) {
    check(cudaFuncSetAttribute(streamed_kernel<T, OneRun>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kRingBytes),
          "shared memory of interpolate");
    allowed[target.index].store(true, std::memory_order_release);
  }
  void* parameters[] = {const_cast<Arguments*>(&arguments), const_cast<Stream*>(&stream)};
  check(cudaLaunchCooperativeKernel(streamed_kernel<T, OneRun>, dim3(stream.teams * stream.team_size),
                                    dim3(kThreads), parameters, kRingBytes, target.stream),
        "interpolate");
}

}  // namespace

template <typename T>
void interpolate_streamed(const Target& target, const Arguments& arguments) {
  const Vectors& vectors = arguments.vectors;
  Stream stream = plan(vectors, target.device.multiprocessors, kOwnBytes / kSlotBytes / kChunkPieces<T>);
  const int64_t messages = stream.local ? 0 : static_cast<int64_t>(stream.teams) * 2 * 3 * vectors.shares;
  const Workspace workspace(target, messages * static_cast<int64_t>(sizeof(Message)));
  stream.messages = static_cast<Message*>(workspace.data());
  if (vectors.n == 1) {
    launch<T, true>(target, arguments, stream);
  } else {
    launch<T, false>(target, arguments, stream);
  }
}

template void interpolate_streamed<float>(const Target&, const Arguments&);
template void interpolate_streamed<double>(const Target&, const Arguments&);
template void interpolate_streamed<Half>(const Target&, const Arguments&);
template void interpolate_streamed<BFloat16>(const Target&, const Arguments&);

}  // namespace latentfast::cuda
