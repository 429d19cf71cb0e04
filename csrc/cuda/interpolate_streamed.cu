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
// owns the same shares of each. Its pieces are dealt out to 18 data warps. Each has three slots of 4 KB (a
// piece of a and of b), which it fills itself by bulk copies (the copy engine writes to shared memory and
// reports to an mbarrier) and frees itself, and room for one more piece in its registers. A 19th warp, the
// control warp, folds the pieces' sums into the shares', tells the other blocks, and makes the weights.
//
// That exchange takes some µs, a trip to L2 and back and an arc tangent. Meanwhile a data warp sums the next
// vector, as far as it has room for it: flowing_warp if all pieces of a vector fit, data_warp if some have to
// be read again. No warp waits for another but through the mbarriers below.
//
// Why nobody waits for ever, by induction over the rounds of sums (one a vector, more if it is very long): a
// data warp publishes them in order, those of vector v before it asks for v's weights. What can hold it up
// before a round is a copy, the weights of an earlier vector, or the control warp, which has to read an
// earlier round. These need nothing but earlier rounds, of all data warps of the team: a control warp sends
// the shares of v as soon as it has read the sums of v, and gathers those of the others then.
#include <cooperative_groups.h>

#include <algorithm>

#include "streamed.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kWarps = 18;  // that handle data
constexpr int kThreads = 32 * (kWarps + 1);
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

struct Stream {
  int teams;
  int team_size;
  bool local;         // a team of one, all of whose shares fit in shared memory: nothing is exchanged
  bool rereads;       // some pieces do not stay between the sums and the results
  Message* messages;  // [team][parity of the vector's number][3][share]
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// What a block owns of each vector.
struct Part {
  int share_begin, share_end;
  int first_piece, pieces;
  int rounds;

  template <typename T>
  static __device__ Part of(const Vectors& vectors, int member, int team_size) {
    Part part;
    part.share_begin = vectors.shares * member / team_size;
    part.share_end = vectors.shares * (member + 1) / team_size;
    part.first_piece = vectors.share_begin(part.share_begin) * kChunkPieces<T>;
    const int end = min(vectors.share_begin(part.share_end) * kChunkPieces<T>, vectors.pieces);
    part.pieces = end - part.first_piece;
    part.rounds = ceil_div(part.pieces, kRoundPieces);
    return part;
  }
};

// Shared memory beside the slots. Sums come in turns of rounds, weights in turns of vectors; both are counted
// over all vectors of the team.
//
// A data warp writes the sums of round r when those of r − 2 have been read (sums_free). The weights of
// vector v + 2 are made when every data warp has published its sums of v + 2, which it does behind all uses
// of the weights of v.
template <typename T>
struct Desk {
  SlotState<kSlots> slots[kWarps];
  uint64_t sums_full[2];   // every data warp has written its sums of a round
  uint64_t sums_free[2];   // the control warp has read them
  uint64_t mixes_full[2];  // a vector's weights are there
  double sums[2][3][kRoundPieces];
  double local[3][kLocalShares];
  Mix<Wide<T>> mixes[2][kMaxValues];
};

// In which order a warp that has `count` pieces of each vector goes about it, if they do not all fit
// (otherwise see flowing_warp). Its pieces are brought from their slots to the registers one by one, each
// slot is refilled, and the piece is written. The next vector is summed before piece `sum_at` is written,
// when it is in the registers already, so that the exchange has as long as that takes.
struct Order {
  int count;
  int sum_at;
  int keep;  // pieces that stay from their sum until they are written; the others are read again

  __device__ Order(int count, bool one_vector) : count(count) {
    if (one_vector) {
      sum_at = count;
      keep = min(count, count == kSlots + 1 ? count : kSlots);
    } else {
      sum_at = count - 1;
      keep = count <= kSlots ? count : kSlots - 1;  // the last slot is for the pieces that pass
    }
  }

  __device__ bool all_fit() const { return keep == count; }

  // Piece 0 comes to the registers when it is summed, which are free then: one more can be kept.
  __device__ bool early() const { return sum_at == count; }
};

// All results of a piece; `out` and `left` are this lane's.
template <typename T>
__device__ __forceinline__ void write_results(const Arguments& arguments, const Mix<Wide<T>>* mixes,
                                              LanePacks<>& packs, T* out, int left) {
#pragma unroll 1
  for (int k = 0; k < arguments.values.count; ++k) {
    const Mix<Wide<T>> mix = mixes[k];
#pragma unroll
    for (int j = 0; j < kLanePacks; ++j) {  // widened for every result: there are no registers to keep it
      packs.a[j] = computed_anew(packs.a[j]);
      packs.b[j] = computed_anew(packs.b[j]);
    }
    if (mix.kind == Kind::blend) {
#pragma unroll
      for (int j = 0; j < kLanePacks; ++j) {
        const uint4 result = blend_pack<T>(mix, packs.a[j], packs.b[j]);
        if (32 * kPack<T> * j < left) store_once(out + 32 * kPack<T> * j, result);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kLanePacks; ++j) {
        const uint4 result = special_pack<T>(mix, packs.a[j], packs.b[j]);
        if (32 * kPack<T> * j < left) store_once(out + 32 * kPack<T> * j, result);
      }
    }
    out = computed_anew(out + arguments.numel);
  }
}

template <typename T, bool OneRun>
__device__ __forceinline__ void data_warp(const Arguments& arguments, const Stream& stream,
                                          const Order& order, Ring<T, OneRun, kWarps, kSlots>& ring,
                                          Desk<T>& desk, int rounds, int team) {
  const Vectors& vectors = arguments.vectors;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  LanePacks<> held;   // the piece in the registers
  unsigned kept = 0;  // slots of this vector's pieces, and from bit 8 on of the next one's: two bits each
  uint32_t round = 0, number = 0;  // of the next sums; of this vector

  // It begins where a vector before the first one would be done, but for the sums of the next.
  for (int vector = team - stream.teams; vector < vectors.count; vector += stream.teams) {
#pragma unroll 1
    for (int y = vector < 0 ? order.sum_at : 0; y <= order.count; ++y) {
      if (vector >= 0 && y < order.count && (y > 0 || !order.early())) {
        const int slot = y < order.keep ? kept >> (2 * y) & 3 : ring.take();
        held = ring.read(slot, ring.piece(computed_anew(y)).elements);
        ring.release(slot);
      }

      if (y == order.sum_at && vector + stream.teams < vectors.count) {
        constexpr int kRoundCount = kRoundPieces / kWarps;
#pragma unroll 1
        for (int first = 0; first < rounds * kRoundCount; first += kRoundCount) {
          turn_wait(desk.sums_free, round + 2);  // that of round − 2: at first, one that has always been
#pragma unroll 1
          for (int x = first; x < min(order.count, first + kRoundCount); ++x) {
            const int elements = ring.piece(computed_anew(x)).elements;
            const int slot = ring.take();
            const double folded = ring.sum(slot, elements);
            const int component = folded_component();
            if (component >= 0)
              desk.sums[round % 2][component][warp + computed_anew(x - first) * kWarps] = folded;
            const bool to_registers = order.early() && x == 0;
            if (to_registers) held = ring.read(slot, elements);
            if (to_registers || x >= order.keep) {
              ring.release(slot);
            } else {
              kept |= slot << (8 + 2 * x);
            }
          }
          barrier_arrive(&desk.sums_full[round % 2]);
          ++round;
        }
      }

      if (vector < 0 || y == order.count) break;
      if (y == 0) turn_wait(desk.mixes_full, number);
      const Piece piece = ring.piece(computed_anew(y));
      const int begin = lane * kPack<T>;
      T* const out =
          static_cast<T*>(arguments.out) + stream_base<OneRun>(vectors, computed_anew(vector)) + piece.offset;
      write_results<T>(arguments, desk.mixes[number % 2], held, out + begin, piece.elements - begin);
    }
    kept >>= 8;
    if (vector >= 0) ++number;
  }
}

// A warp whose pieces of a vector all fit into its slots and registers. Pieces go through them in order, over
// all vectors, and the warp does what it can do next: write a piece whose weights are there, which makes room
// for a copy, or sum one that has landed, of this vector or the next. (Not of the one behind, whose weights
// would take the place of those in use.) It can always do one of the two: if no slot is free to be summed,
// all pieces of this vector have been.
template <typename T, bool OneRun>
__device__ __forceinline__ void flowing_warp(const Arguments& arguments, const Stream& stream, int count,
                                             Ring<T, OneRun, kWarps, kSlots>& ring, Desk<T>& desk, int team) {
  const Vectors& vectors = arguments.vectors;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int end = (vectors.count - 1 - team) / stream.teams + 1;
  LanePacks<> held;
  bool holding = false;
  int number = 0, y = 0;  // vector and piece that is written next
  int summed = 0;         // pieces of this vector and the next one
  int slot_y = 0;         // where piece y is, or would be
#pragma unroll 1
  while (number < end) {
    if (!holding && summed > y) {
      held = ring.read(slot_y, ring.piece(computed_anew(y)).elements);
      ring.release(slot_y);
      slot_y = slot_y == kSlots - 1 ? 0 : slot_y + 1;
      holding = true;
    }
    const bool can_sum = summed < (number + 1 < end ? 2 : 1) * count && summed - y - holding < kSlots;
    bool write = holding && summed >= count;
    if (write && can_sum) {
      Patience patience;
      while (true) {
        if (turn_test(desk.mixes_full, number)) break;
        if (ring.landed()) {
          write = false;
          break;
        }
        __nanosleep(20);
        patience.spend();
      }
    }
    if (write) {
      turn_wait(desk.mixes_full, number);
      const Piece piece = ring.piece(computed_anew(y));
      const int begin = lane * kPack<T>;
      T* const out = static_cast<T*>(arguments.out) +
                     stream_base<OneRun>(vectors, team + number * stream.teams) + piece.offset;
      write_results<T>(arguments, desk.mixes[number % 2], held, out + begin, piece.elements - begin);
      holding = false;
      if (++y == count) {
        y = 0;
        ++number;
        summed -= count;
      }
    } else {
      const bool next = summed >= count;
      const int x = summed - (next ? count : 0);
      const uint32_t round = number + next;
      if (x == 0) turn_wait(desk.sums_free, round + 2);  // see data_warp
      const int elements = ring.piece(computed_anew(x)).elements;
      const int slot = ring.take();
      const double folded = ring.sum(slot, elements);
      const int component = folded_component();
      if (component >= 0) desk.sums[round % 2][component][warp + x * kWarps] = folded;
      ++summed;
      if (x + 1 == count) barrier_arrive(&desk.sums_full[round % 2]);
    }
  }
}

// The control warp goes from vector to vector. That is why two places a message do: it sends shares of vector
// v + 2 when it has gathered those of v + 1 from all members, each of which sent them when it had gathered
// those of v.
template <typename T>
__device__ __forceinline__ void control_warp(const Arguments& arguments, const Stream& stream,
                                             const Part& part, Desk<T>& desk, int team) {
  constexpr int P = kChunkPieces<T>;
  const Vectors& vectors = arguments.vectors;
  const int lane = threadIdx.x % 32;
  uint32_t round = 0, number = 0;
  for (int vector = team; vector < vectors.count; vector += stream.teams, ++number) {
    const uint32_t tag = number + 1;
    Message* const exchange =
        stream.messages + (static_cast<int64_t>(team) * 2 + number % 2) * 3 * vectors.shares;
    // each lane sees to one value of t
    const double t = lane < arguments.values.count ? arguments.values.at(lane, vector) : 0.0;

    int share = part.share_begin, share_left = 0;  // chunks of it that are missing
    double share_sum = 0.0;
#pragma unroll 1
    for (int r = 0; r < part.rounds; ++r, ++round) {
      auto& sums = desk.sums[round % 2];
      const int pieces = min(kRoundPieces, part.pieces - r * kRoundPieces);
      const int chunks = ceil_div(pieces, P);
      turn_wait(desk.sums_full, round);
#pragma unroll 1
      for (int i = lane; i < 3 * chunks; i += 32) {
        const int component = (i >= chunks) + (i >= 2 * chunks), chunk = i - component * chunks;
        double sum = 0.0;
#pragma unroll
        for (int j = chunk * P; j < chunk * P + P; ++j) {
          if (j < pieces) sum += sums[component][j];
        }
        sums[component][chunk * P] = sum;
      }
      __syncwarp();
      if (lane < 3) {  // a component each
        for (int chunk = 0; chunk < chunks;) {
          if (share_left == 0) {
            share_left = vectors.share_chunks + (share < vectors.longer_shares);
            share_sum = 0.0;
          }
          const int n = min(share_left, chunks - chunk);
#pragma unroll 4
          for (int j = 0; j < n; ++j) share_sum += sums[lane][(chunk + j) * P];
          chunk += n;
          share_left -= n;
          if (share_left == 0) {
            if (stream.local) {
              desk.local[lane][share] = share_sum;
            } else {
              send(exchange + lane * vectors.shares + share, share_sum, tag);
            }
            ++share;
          }
        }
      }
      barrier_arrive(&desk.sums_free[round % 2]);
    }

    LaneSums shares;
    if (stream.local) {
      if (lane < vectors.shares) shares = {desk.local[0][lane], desk.local[1][lane], desk.local[2][lane]};
    } else {
      shares = gather(exchange, vectors.shares, tag);
    }
    const double total = fold_warp(shares);  // the tree of fold_lanes
    constexpr unsigned kAll = 0xffffffffu;
    const Sums sums{__shfl_sync(kAll, total, 0), __shfl_sync(kAll, total, 8), __shfl_sync(kAll, total, 16)};
    if (lane < arguments.values.count) {
      desk.mixes[number % 2][lane] = make_mix<Wide<T>>(arguments.mode, sums, t, vectors.length, NoLast());
    }
    barrier_arrive(&desk.mixes_full[number % 2]);
  }
}

#endif

template <typename T, bool OneRun>
__global__ void __launch_bounds__(kThreads, 1)
    streamed_kernel(const __grid_constant__ Arguments arguments, const __grid_constant__ Stream stream) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static_assert(kRoundPieces % kChunkPieces<T> == 0);
  extern __shared__ __align__(128) unsigned char ring_bytes[];
  __shared__ Desk<T> desk;

  const Vectors& vectors = arguments.vectors;
  const int warp = threadIdx.x / 32;
  const int team = blockIdx.x / stream.team_size, member = blockIdx.x % stream.team_size;
  const Part part = Part::of<T>(vectors, member, stream.team_size);

  const int count = warp < min(part.pieces, kWarps) ? (part.pieces - 1 - warp) / kWarps + 1 : 0;
  const Order order(count, team + stream.teams >= vectors.count);
  Ring<T, OneRun, kWarps, kSlots> ring(arguments, ring_bytes + warp * kSlots * kSlotBytes, desk.slots[warp],
                                       part.first_piece + warp, count, order.keep, stream.rereads, team,
                                       stream.teams);
  if (threadIdx.x == 32 * kWarps) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&desk.sums_full[i], min(part.pieces, kWarps));
      barrier_init(&desk.sums_free[i], 1);
      barrier_init(&desk.mixes_full[i], 1);
    }
  }
  if (stream.local) {
    __syncthreads();
  } else {
    Message* const messages = stream.messages + static_cast<int64_t>(team) * 2 * 3 * vectors.shares;
    const int own = part.share_end - part.share_begin;
    for (int i = threadIdx.x; i < 2 * 3 * own; i += kThreads) {
      messages[i / own * vectors.shares + part.share_begin + i % own] = {0, 0};
    }
    cooperative_groups::this_grid().sync();  // behind the first copies
  }

  if (warp == kWarps) {
    control_warp<T>(arguments, stream, part, desk, team);
  } else if (count > 0 && order.all_fit()) {
    flowing_warp<T, OneRun>(arguments, stream, count, ring, desk, team);
  } else if (count > 0) {
    data_warp<T, OneRun>(arguments, stream, order, ring, desk, part.rounds, team);
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
  const int most_pieces =
      ceil_div(vectors.chunks, vectors.shares) * ceil_div(vectors.shares, stream.team_size) * kChunkPieces<T>;
  const bool one_vector = stream.teams >= vectors.count;
  stream.rereads = ceil_div(most_pieces, kWarps) > kSlots + one_vector;  // see Order
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
