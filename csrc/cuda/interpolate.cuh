// What the CUDA kernels of `interpolate` share: how vectors are cut up, in which order they are summed, and
// how elements are blended. See interpolate.cu for the choice between the kernels.
//
// A vector of n·m elements is n runs of m neighbours. A run is cut into *pieces* of 2 KB (the last one may be
// shorter): what one warp reads at once. The pieces of 4096 elements form a *chunk*. A vector's chunks are
// dealt out in as many *shares* as the card has multiprocessors: neighbouring chunks, as evenly as that goes.
// A share's three inner products |a|², |b|², a·b are what blocks tell each other. The order of every sum is a
// function of n, m, the dtype and the card alone:
//   lane      the 16-byte packs l, l + 32, l + 64, l + 96 of a piece go to lane l, in this order;
//   piece     a tree over the 32 lanes;
//   chunk     its pieces, in order;
//   share     its chunks, in order;
//   vector    shares s, s + 32, … go to lane s of 32, in order; then a tree over the lanes.
// So a vector's sums have the same bits alone or in a batch, in every kernel below, on every grid.
#pragma once

#include <algorithm>

#include "../common/interpolation_weights.h"
#include "launch.cuh"

namespace latentfast::cuda {

constexpr int kMaxValues = 32;  // of t, in one launch
constexpr int kPieceBytes = 2048;
constexpr int kPackBytes = 16;
constexpr int kPiecePacks = kPieceBytes / kPackBytes;
constexpr int kLanePacks = kPiecePacks / 32;
constexpr int kChunkElements = 4096;
constexpr int kShortPieces = 8;  // vectors that have no more are short

template <typename T>
constexpr int kPieceElements = kPieceBytes / sizeof(T);
template <typename T>
constexpr int kChunkPieces = kChunkElements / kPieceElements<T>;

// p·q vectors of n runs of m elements: run i of vector (u, w) starts at ((u·n + i)·q + w)·m.
struct Vectors {
  int64_t count;  // p·q
  int64_t n, q, m;
  int64_t length;  // n·m
  int run_pieces;  // pieces of a run
  int pieces;      // pieces of a vector
  int chunks;
  int shares;
  int share_chunks;  // chunks of a share; the first `longer_shares` have one more
  int longer_shares;

  __device__ int64_t base(int64_t vector) const {
    return q == 1 ? vector * length : (vector / q * n * q + vector % q) * m;
  }
  // The chunk at which a share begins; the one behind the last share ends the vector.
  __device__ int share_begin(int share) const { return share * share_chunks + min(share, longer_shares); }
  // Where element e of a vector lies, counted from its base.
  __device__ int64_t offset(int64_t e) const { return q == 1 || n == 1 ? e : e / m * q * m + e % m; }
};

// How p·q vectors are cut up on a card.
template <typename T>
Vectors make_vectors(int64_t p, int64_t n, int64_t q, int64_t m, int multiprocessors) {
  if (q == 1) {  // the runs of a vector follow each other: one run
    m *= n;
    n = 1;
  } else if (n == 1) {  // every vector is one run
    p *= q;
    q = 1;
  }
  const int64_t run_pieces = ceil_div<int64_t>(m, kPieceElements<T>), pieces = n * run_pieces;
  STD_TORCH_CHECK(pieces + kChunkPieces<T> <= INT32_MAX, "vectors of ", n * m, " elements are too long");
  const int chunks = static_cast<int>(ceil_div<int64_t>(pieces, kChunkPieces<T>));
  const int shares = std::min(chunks, multiprocessors);
  return {.count = p * q,
          .n = n,
          .q = q,
          .m = m,
          .length = n * m,
          .run_pieces = static_cast<int>(run_pieces),
          .pieces = static_cast<int>(pieces),
          .chunks = chunks,
          .shares = shares,
          .share_chunks = chunks / shares,
          .longer_shares = chunks % shares};
}

// A piece of a vector: where it starts, counted from the vector's base, and its number of elements.
struct Piece {
  int64_t offset;
  int64_t first;  // its first element's number in the vector
  int elements;
};

template <typename T>
__device__ __forceinline__ Piece piece_of(const Vectors& vectors, int index) {
  const int run = vectors.n == 1 ? 0 : index / vectors.run_pieces;
  const int64_t start = static_cast<int64_t>(index - run * vectors.run_pieces) * kPieceElements<T>;
  const int64_t left = vectors.m - start;
  return {run * vectors.q * vectors.m + start, run * vectors.m + start,
          static_cast<int>(left < kPieceElements<T> ? left : kPieceElements<T>)};
}

// The values of t: on the host (passed by value) or in a tensor (K, vectors or 1).
struct Values {
  int count;
  const void* device;  // null: the values are in `host`
  bool device_is_double;
  int64_t per_vector;  // elements of a row of the tensor: 1 or the number of vectors
  double host[kMaxValues];

  __device__ double at(int k, int64_t vector) const {
    if (device == nullptr) return host[k];
    const int64_t i = k * per_vector + (per_vector == 1 ? 0 : vector);
    return device_is_double ? __ldg(static_cast<const double*>(device) + i)
                            : __ldg(static_cast<const float*>(device) + i);
  }
};

struct Arguments {
  const void* a;
  const void* b;
  void* out;      // K results, one after the other
  int64_t numel;  // elements of `a`
  Mode mode;
  Vectors vectors;
  Values values;
};

// How one vector is made at one t: a·A + b·B, or a·A + b·Q(A) with Q the quarter turn, or a copy.
enum class Kind : int { blend, turn, turn_unit, copy_a, copy_b };

template <typename W>
struct alignas(16) Mix {  // one read from shared memory, for float32
  W a, b;
  Kind kind;
};

// `last` gives the vector's last element of A; it is asked for in vectors of odd length that have to be
// turned.
template <typename W, typename F>
__device__ Mix<W> make_mix(Mode mode, const Sums& sums, double t, int64_t elements, F&& last) {
  const int end = end_point(t);
  if (end >= 0) return {0, 0, end == 0 ? Kind::copy_a : Kind::copy_b};
  const WeightsIn<W> weights = interpolation_weights(make_pair_of<W>(mode, sums, elements), t);
  if (weights.turn == 0) return {weights.a, weights.b, Kind::blend};
  W turn = weights.turn;
  Kind kind = Kind::turn;
  if (elements % 2 == 1) {
    const double x = last();
    const double scale = quarter_turn_scale(sums.aa, sums.aa - __dmul_rn(x, x));
    kind = scale > 0.0 ? Kind::turn : Kind::turn_unit;
    turn *= static_cast<W>(scale > 0.0 ? scale : sqrt(sums.aa));
  }
  return {weights.a, turn, kind};
}

struct NoLast {
  __device__ double operator()() const { return 0.0; }
};

// --- sums
// -----------------------------------------------------------------------------------------------------------------

// One lane's share, in float64. `kLong`: of a vector of more than kShortPieces pieces. There, products of
// halves, exact in float32, are summed by eight before they are widened, because conversions to float64 run
// at an eighth of the rate: among so many sums these roundings vanish, but for angles within 1e-3 of π.
struct LaneSums {
  double aa = 0.0, bb = 0.0, ab = 0.0;

  template <typename T, bool kLong>
  __device__ __forceinline__ void add(const uint4& raw_a, const uint4& raw_b) {
    Wide<T> x[kPack<T>], y[kPack<T>];
    unpack<T>(raw_a, x);
    unpack<T>(raw_b, y);
    if constexpr (sizeof(T) == 2 && kLong) {
      float saa = x[0] * x[0], sbb = y[0] * y[0], sab = x[0] * y[0];
#pragma unroll
      for (int i = 1; i < kPack<T>; ++i) {
        saa = fmaf(x[i], x[i], saa);
        sbb = fmaf(y[i], y[i], sbb);
        sab = fmaf(x[i], y[i], sab);
      }
      aa += saa;
      bb += sbb;
      ab += sab;
    } else {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        const double u = x[i], v = y[i];
        aa = fma(u, u, aa);
        bb = fma(v, v, bb);
        ab = fma(u, v, ab);
      }
    }
  }
};

// The tree over a warp's lanes, for all three sums at once: the lanes share the work, so that 6 exchanges do
// instead of 15. Lanes 0 to 7 return |a|², lanes 8 to 15 |b|², lanes 16 to 31 a·b.
__device__ __forceinline__ double fold_warp(const LaneSums& s) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  const bool upper = lane & 16, odd = lane & 8;
  const double given = __shfl_xor_sync(kAll, upper ? s.aa : s.ab, 16);
  const double given_bb = __shfl_xor_sync(kAll, s.bb, 16);
  const double aa = s.aa + given, bb = s.bb + given_bb, ab = s.ab + given;
  double r = upper ? ab : (odd ? bb : aa);
  r += __shfl_xor_sync(kAll, upper ? ab : (odd ? aa : bb), 8);
  r += __shfl_xor_sync(kAll, r, 4);
  r += __shfl_xor_sync(kAll, r, 2);
  r += __shfl_xor_sync(kAll, r, 1);
  return r;
}

// Of the three lanes that keep a folded sum: which of |a|², |b|², a·b it is; -1 in the other lanes.
__device__ __forceinline__ int folded_component() {
  const int lane = threadIdx.x % 32;
  return lane % 8 == 0 && lane <= 16 ? lane / 8 : -1;
}

// A number from every lane, over the tree that ends a vector's sums; all lanes get the result.
__device__ __forceinline__ double fold_lanes(double x) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}

// --- elements
// -------------------------------------------------------------------------------------------------------------

// One pack of the result. The kinds of turn need the vector's pairs of elements to be pairs of a pack.
template <typename T>
__device__ __forceinline__ uint4 blend_pack(const Mix<Wide<T>>& mix, const uint4& raw_a, const uint4& raw_b) {
  Wide<T> x[kPack<T>], y[kPack<T>];
  unpack<T>(raw_a, x);
  unpack<T>(raw_b, y);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = fma(mix.a, x[i], mix.b * y[i]);
  return pack<T>(x);
}

template <typename T>
__device__ __forceinline__ uint4 special_pack(const Mix<Wide<T>>& mix, const uint4& raw_a,
                                              const uint4& raw_b) {
  if (mix.kind == Kind::copy_a) return raw_a;
  if (mix.kind == Kind::copy_b) return raw_b;
  Wide<T> x[kPack<T>], r[kPack<T>];
  unpack<T>(raw_a, x);
#pragma unroll
  for (int i = 0; i < kPack<T>; i += 2) {
    r[i] = fma(mix.a, x[i], -(mix.b * x[i + 1]));
    r[i + 1] = fma(mix.a, x[i + 1], mix.b * x[i]);
  }
  return pack<T>(r);
}

// One element of the result, `e` in its vector; `partner(e)` reads an element of A. For every layout and
// kind.
template <typename T, typename F>
__device__ __forceinline__ T mix_element(const Mix<Wide<T>>& mix, T a, T b, int64_t e, int64_t elements,
                                         F&& partner) {
  if (mix.kind == Kind::copy_a) return a;
  if (mix.kind == Kind::copy_b) return b;
  const Wide<T> x = widen<T>(a);
  if (mix.kind == Kind::blend) return narrow<T>(fma(mix.a, x, mix.b * widen<T>(b)));
  Wide<T> turned = 0;
  if (mix.kind == Kind::turn_unit) {
    turned = e == 0 ? 1 : 0;
  } else if ((e ^ 1) < elements) {
    turned = widen<T>(partner(e ^ 1));
    if (e % 2 == 0) turned = -turned;
  }
  return narrow<T>(fma(mix.a, x, mix.b * turned));
}

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t,
                                std::conditional_t<sizeof(T) == 4, uint32_t, unsigned long long>>;

// 16 bytes of a run, as many elements as there are; the rest is zero. `Aligned`: the run starts and ends at
// 16 bytes.
template <typename T, bool Aligned>
__device__ __forceinline__ uint4 load_pack(const T* from, int elements) {
  if constexpr (Aligned) {
    return elements > 0 ? load(from) : uint4{0, 0, 0, 0};
  } else {
    union {
      uint4 raw;
      Bits<T> x[kPack<T>];
    } u{{0, 0, 0, 0}};
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (i < elements) u.x[i] = __ldg(reinterpret_cast<const Bits<T>*>(from) + i);
    }
    return u.raw;
  }
}

// What a lane holds of a piece, or of one that is known to have no more than 32·J packs; zeros behind its
// end.
template <int J = kLanePacks>
struct LanePacks {
  uint4 a[J], b[J];
};

template <typename T, bool kLong, int J>
__device__ __forceinline__ double sum_packs(const LanePacks<J>& packs) {
  LaneSums s;
#pragma unroll
  for (int j = 0; j < J; ++j) s.add<T, kLong>(packs.a[j], packs.b[j]);
  return fold_warp(s);
}

// All results of a piece. Pack by pack, so that only one is widened at a time.
template <typename T, bool Aligned, int J>
__device__ __forceinline__ void write_packs(const Arguments& arguments, const Mix<Wide<T>>* mixes,
                                            const LanePacks<J>& packs, int64_t base, const Piece& piece) {
  const int lane_begin = threadIdx.x % 32 * kPack<T>;
  T* const first = static_cast<T*>(arguments.out) + base + piece.offset + lane_begin;
  const int left = piece.elements - lane_begin;
#pragma unroll
  for (int j = 0; j < J; ++j) {
    const int e = j * 32 * kPack<T>;
    if (e >= left) break;
    T* out = first + e;
    for (int k = 0; k < arguments.values.count; ++k, out += arguments.numel) {
      const Mix<Wide<T>> mix = mixes[k];
      if constexpr (Aligned) {
        store_once(out, mix.kind == Kind::blend ? blend_pack<T>(mix, packs.a[j], packs.b[j])
                                                : special_pack<T>(mix, packs.a[j], packs.b[j]));
      } else {
        const T* const a = reinterpret_cast<const T*>(&packs.a[j]);
        const T* const b = reinterpret_cast<const T*>(&packs.b[j]);
        const auto partner = [&](int64_t other) {
          return static_cast<const T*>(arguments.a)[base + arguments.vectors.offset(other)];
        };
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
          if (e + i < left) {
            out[i] = mix_element<T>(mix, a[i], b[i], piece.first + lane_begin + e + i,
                                    arguments.vectors.length, partner);
          }
        }
      }
    }
  }
}

// --- the kernels' launchers
// -----------------------------------------------------------------------------------------------

// Every run of elements starts and ends at a multiple of 16 bytes, in all three tensors.
template <typename T>
bool rows_aligned(const Arguments& arguments) {
  return arguments.vectors.m % kPack<T> == 0 && aligned16(arguments.a) && aligned16(arguments.b) &&
         aligned16(arguments.out);
}

template <typename T>
void interpolate_streamed(const Target& target, const Arguments& arguments);  // interpolate_streamed.cu
template <typename T>
void interpolate_rows(const Target& target, const Arguments& arguments);  // interpolate_rows.cu
template <typename T>
void interpolate_columns(const Target& target, const Arguments& arguments);  // interpolate_columns.cu
template <typename T>
void interpolate_straight(const Target& target, const Arguments& arguments);  // interpolate_straight.cu

}  // namespace latentfast::cuda
