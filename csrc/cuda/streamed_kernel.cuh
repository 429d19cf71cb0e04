// One pass over pairs of long vectors whose results need sums over the whole vector, on compute capability
// 9.0: one launch, every element read from memory once.
//
// The sums need the whole vector, so every element is needed twice: before and after they are known. Reading
// it twice from memory caps the rate at three fifths of a copy's. Here the chip's shared memory (30 MB) holds
// the vectors between the two uses: both inputs of one Wan 720p sample are 147 KB a multiprocessor.
//
// One block a multiprocessor, launched cooperatively, so that blocks may wait for each other. A *team* of
// blocks takes one vector after the other (several teams share the grid when the vectors are short); a member
// owns the same shares of each. Its pieces are dealt out to 18 data warps. Each has three slots of 4 KB (a
// piece of a and of b), which it fills itself by bulk copies (the copy engine writes to shared memory and
// reports to an mbarrier) and frees itself, and room for one more piece in its registers. A 19th warp, the
// control warp, folds the pieces' sums into the shares', tells the other blocks, and makes the weights.
//
// That exchange takes some µs, a trip to L2 and back and the weights' functions. Meanwhile a data warp sums
// the next vector, as far as it has room for it: flowing_warp if all pieces of a vector fit, data_warp if
// some have to be read again. No warp waits for another but through the mbarriers below.
//
// Why nobody waits for ever, by induction over the rounds of sums (one a vector, more if it is very long): a
// data warp publishes them in order, those of vector v before it asks for v's weights. What can hold it up
// before a round is a copy, the weights of an earlier vector, or the control warp, which has to read an
// earlier round. These need nothing but earlier rounds, of all data warps of the team: a control warp sends
// the shares of v as soon as it has read the sums of v, and gathers those of the others then.
//
// What is summed, weighed and written is a Job's business:
//   Element              the dtype of both inputs, a() and b()
//   kSums, LaneSums      how many sums a vector has, and what a lane keeps of them
//   add(sums, a, b)      a pack of each input to a lane's sums
//   fold(sums)           over a warp: lane_of(c) then has sum c; component() is c there, -1 in other lanes
//   prepare(lane, …)     what the control warp can read before the sums are there
//   weigh(lane, …)       what the results of a vector need of its sums, by the control warp's lanes
//   beside(…)            if kBeside: what else they need, read by each lane before it waits for the weights
//   write(…)             the results of a lane's packs of a piece
//   prefetches()         whether it pays to have L2 read ahead of the copies
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "streamed.cuh"

namespace latentfast::cuda {

constexpr int kWarps = 18;  // that handle data
constexpr int kThreads = 32 * (kWarps + 1);
constexpr int kSlots = 3;  // of a warp
constexpr int kSlotBytes = 2 * kPieceBytes;
constexpr int kRingBytes = kWarps * kSlots * kSlotBytes;
constexpr int kBlockBytes = 227 * 1024;  // of shared memory, that a block can have
// Of each warp, pieces of one vector whose sums a block gathers before it folds them: as many as shared
// memory has room for, and no fewer than the slots and the registers hold (flowing_warp takes a vector in one
// round).
template <typename Job>
constexpr int kRoundCount = Job::kSums <= 3 ? 8 : kSlots + 1;
template <typename Job>
constexpr int kRoundPieces = kRoundCount<Job> * kWarps;
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
  Message* messages;  // [team][parity of the vector's number][sum][share]
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// What a block owns of each vector.
struct Own {
  int share_begin, share_end;
  int first_piece, pieces;
  int rounds;

  template <typename Job>
  static __device__ Own of(const Vectors& vectors, int member, int team_size) {
    using T = typename Job::Element;
    Own own;
    own.share_begin = vectors.shares * member / team_size;
    own.share_end = vectors.shares * (member + 1) / team_size;
    own.first_piece = vectors.share_begin(own.share_begin) * kChunkPieces<T>;
    const int end = min(vectors.share_begin(own.share_end) * kChunkPieces<T>, vectors.pieces);
    own.pieces = end - own.first_piece;
    own.rounds = ceil_div(own.pieces, kRoundPieces<Job>);
    return own;
  }
};

// Shared memory beside the slots. Sums come in turns of rounds, weights in turns of vectors; both are counted
// over all vectors of the team.
//
// A data warp writes the sums of round r when those of r − 2 have been read (sums_free). The weights of
// vector v + 2 are made when every data warp has published its sums of v + 2, which it does behind all uses
// of the weights of v.
template <typename Job>
struct Desk {
  SlotState<kSlots> slots[kWarps];
  uint64_t sums_full[2];     // every data warp has written its sums of a round
  uint64_t sums_free[2];     // the control warp has read them
  uint64_t weights_full[2];  // a vector's weights are there
  double sums[2][Job::kSums][kRoundPieces<Job>];
  double local[Job::kSums][kLocalShares];
  typename Job::Weights weights[2];
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

template <typename Job, bool OneRun>
__device__ __forceinline__ void data_warp(const Job& job, const Stream& stream, const Order& order,
                                          Ring<Job, OneRun, kWarps, kSlots>& ring, Desk<Job>& desk,
                                          int rounds, int team) {
  using T = typename Job::Element;
  const Vectors& vectors = job.vectors();
  const int warp = threadIdx.x / 32;
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
#pragma unroll 1
        for (int first = 0; first < rounds * kRoundCount<Job>; first += kRoundCount<Job>) {
          turn_wait(desk.sums_free, round + 2);  // that of round − 2: at first, one that has always been
#pragma unroll 1
          for (int x = first; x < min(order.count, first + kRoundCount<Job>); ++x) {
            const int elements = ring.piece(computed_anew(x)).elements;
            const int slot = ring.take();
            const double folded = ring.sum(slot, elements);
            const int component = Job::component();
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
      [[maybe_unused]] typename Job::Beside beside;
      if constexpr (Job::kBeside) {
        const Piece piece = ring.piece(computed_anew(y));
        beside =
            job.beside(stream_base<OneRun>(vectors, computed_anew(vector)) + piece.offset, piece.elements);
      }
      if (y == 0) turn_wait(desk.weights_full, number);
      const Piece piece = ring.piece(computed_anew(y));
      job.write(desk.weights[number % 2], held, beside, stream_base<OneRun>(vectors, computed_anew(vector)),
                piece, vector);
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
template <typename Job, bool OneRun>
__device__ __forceinline__ void flowing_warp(const Job& job, const Stream& stream, int count,
                                             Ring<Job, OneRun, kWarps, kSlots>& ring, Desk<Job>& desk,
                                             int team) {
  using T = typename Job::Element;
  const Vectors& vectors = job.vectors();
  const int warp = threadIdx.x / 32;
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
        if (turn_test(desk.weights_full, number)) break;
        if (ring.landed()) {
          write = false;
          break;
        }
        __nanosleep(20);
        patience.spend();
      }
    }
    if (write) {
      [[maybe_unused]] typename Job::Beside beside;
      if constexpr (Job::kBeside) {
        const Piece piece = ring.piece(computed_anew(y));
        const int64_t base = stream_base<OneRun>(vectors, team + number * stream.teams);
        beside = job.beside(base + piece.offset, piece.elements);
      }
      turn_wait(desk.weights_full, number);
      const Piece piece = ring.piece(computed_anew(y));
      const int vector = team + number * stream.teams;
      job.write(desk.weights[number % 2], held, beside, stream_base<OneRun>(vectors, vector), piece, vector);
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
      const int component = Job::component();
      if (component >= 0) desk.sums[round % 2][component][warp + x * kWarps] = folded;
      ++summed;
      if (x + 1 == count) barrier_arrive(&desk.sums_full[round % 2]);
    }
  }
}

// The control warp goes from vector to vector. That is why two places a message do: it sends shares of vector
// v + 2 when it has gathered those of v + 1 from all members, each of which sent them when it had gathered
// those of v.
template <typename Job>
__device__ __forceinline__ void control_warp(const Job& job, const Stream& stream, const Own& own,
                                             Desk<Job>& desk, int team) {
  constexpr int P = kChunkPieces<typename Job::Element>, kSums = Job::kSums;
  const Vectors& vectors = job.vectors();
  const int lane = threadIdx.x % 32;
  uint32_t round = 0, number = 0;
  for (int vector = team; vector < vectors.count; vector += stream.teams, ++number) {
    const uint32_t tag = number + 1;
    Message* const exchange =
        stream.messages + (static_cast<int64_t>(team) * 2 + number % 2) * kSums * vectors.shares;
    const typename Job::Prepared prepared = job.prepare(lane, vector);

    int share = own.share_begin, share_left = 0;  // chunks of it that are missing
    double share_sum = 0.0;
#pragma unroll 1
    for (int r = 0; r < own.rounds; ++r, ++round) {
      auto& sums = desk.sums[round % 2];
      const int pieces = min(kRoundPieces<Job>, own.pieces - r * kRoundPieces<Job>);
      const int chunks = ceil_div(pieces, P);
      turn_wait(desk.sums_full, round);
#pragma unroll 1
      for (int i = lane; i < kSums * chunks; i += 32) {
        int component = 0;
#pragma unroll
        for (int c = 1; c < kSums; ++c) component += i >= c * chunks;
        const int chunk = i - component * chunks;
        double sum = 0.0;
#pragma unroll
        for (int j = chunk * P; j < chunk * P + P; ++j) {
          if (j < pieces) sum += sums[component][j];
        }
        sums[component][chunk * P] = sum;
      }
      __syncwarp();
      if (lane < kSums) {  // a component each
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

    double sums[kSums] = {};
    if (stream.local) {
      if (lane < vectors.shares) {
#pragma unroll
        for (int c = 0; c < kSums; ++c) sums[c] = desk.local[c][lane];
      }
    } else {
      gather(exchange, vectors.shares, tag, sums);
    }
    const double total = Job::fold(Job::lane_sums(sums));  // the tree of fold_lanes
#pragma unroll
    for (int c = 0; c < kSums; ++c) sums[c] = __shfl_sync(0xffffffffu, total, Job::lane_of(c));
    job.weigh(lane, sums, prepared, desk.weights[number % 2]);
    barrier_arrive(&desk.weights_full[number % 2]);
  }
}

#endif

template <typename Job, bool OneRun>
__global__ void __launch_bounds__(kThreads, 1)
    streamed_kernel(const __grid_constant__ Job job, const __grid_constant__ Stream stream) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using T = typename Job::Element;
  static_assert(kRoundPieces<Job> % kChunkPieces<T> == 0);
  static_assert(sizeof(Desk<Job>) + kRingBytes <= kBlockBytes);
  extern __shared__ __align__(128) unsigned char ring_bytes[];
  __shared__ Desk<Job> desk;

  using T = typename Job::Element;
  const Vectors& vectors = job.vectors();
  const int warp = threadIdx.x / 32;
  const int team = blockIdx.x / stream.team_size, member = blockIdx.x % stream.team_size;
  const Own own = Own::of<Job>(vectors, member, stream.team_size);

  const int count = warp < min(own.pieces, kWarps) ? (own.pieces - 1 - warp) / kWarps + 1 : 0;
  const Order order(count, team + stream.teams >= vectors.count);
  Ring<Job, OneRun, kWarps, kSlots> ring(job, ring_bytes + warp * kSlots * kSlotBytes, desk.slots[warp],
                                         own.first_piece + warp, count, order.keep, stream.rereads, team,
                                         stream.teams);
  if (threadIdx.x == 32 * kWarps) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&desk.sums_full[i], min(own.pieces, kWarps));
      barrier_init(&desk.sums_free[i], 1);
      barrier_init(&desk.weights_full[i], 1);
    }
  }
  if (stream.local) {
    __syncthreads();
  } else {
    Message* const messages = stream.messages + static_cast<int64_t>(team) * 2 * Job::kSums * vectors.shares;
    const int shares = own.share_end - own.share_begin;
    for (int i = threadIdx.x; i < 2 * Job::kSums * shares; i += kThreads) {
      messages[i / shares * vectors.shares + own.share_begin + i % shares] = {0, 0};
    }
    cooperative_groups::this_grid().sync();  // behind the first copies
  }

  if (warp == kWarps) {
    control_warp(job, stream, own, desk, team);
  } else if (count > 0 && order.all_fit()) {
    flowing_warp<Job, OneRun>(job, stream, count, ring, desk, team);
  } else if (count > 0) {
    data_warp<Job, OneRun>(job, stream, order, ring, desk, own.rounds, team);
  }
#endif
}

// The teams that finish all vectors in the fewest steps; a step costs its chunks and, for the exchange, about
// two more. `own_chunks`: how many chunks of one vector a block should own at most.
inline Stream plan(const Vectors& vectors, int multiprocessors, int own_chunks) {
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

template <typename Job, bool OneRun>
void launch_streamed(const Target& target, const Job& job, const Stream& stream, const char* name) {
  static std::array<std::atomic<bool>, kMaxDevices> allowed;  // to have as much shared memory
  if (!allowed[target.index].load(std::memory_order_acquire)) {
    check(cudaFuncSetAttribute(streamed_kernel<Job, OneRun>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               kRingBytes),
          name);
    allowed[target.index].store(true, std::memory_order_release);
  }
  void* parameters[] = {const_cast<Job*>(&job), const_cast<Stream*>(&stream)};
  check(cudaLaunchCooperativeKernel(streamed_kernel<Job, OneRun>, dim3(stream.teams * stream.team_size),
                                    dim3(kThreads), parameters, kRingBytes, target.stream),
        name);
}

// f(stream): launches with how the vectors are dealt out. Its memory is there meanwhile.
template <typename Job, typename F>
void with_stream(const Target& target, const Vectors& vectors, F&& f) {
  constexpr int P = kChunkPieces<typename Job::Element>;
  Stream stream = plan(vectors, target.device.multiprocessors, kOwnBytes / kSlotBytes / P);
  const int64_t messages =
      stream.local ? 0 : static_cast<int64_t>(stream.teams) * 2 * Job::kSums * vectors.shares;
  const Workspace workspace(target, messages * static_cast<int64_t>(sizeof(Message)));
  stream.messages = static_cast<Message*>(workspace.data());
  const int most_pieces =
      ceil_div(vectors.chunks, vectors.shares) * ceil_div(vectors.shares, stream.team_size) * P;
  const bool one_vector = stream.teams >= vectors.count;
  stream.rereads = ceil_div(most_pieces, kWarps) > kSlots + one_vector;  // see Order
  f(stream);
}

}  // namespace latentfast::cuda
