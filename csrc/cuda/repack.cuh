// Latents to tokens and back, each element through its channel's affine on the way.
//
// Where rows of the latents follow one another in memory as their tokens do, they are one: with patches of
// one position a sample is a matrix of channels by positions, and tokens are its transpose.
//
// - Squares: a thread reads 16 bytes of each of up to 8 rows, turns them over in its registers, and has 16
//   bytes of as many tokens. Nothing waits for another thread, and a thread's loads are under way together.
//   The lanes of a warp stand 4 across by 8 down: 64 bytes of a row of the latents, 128 of a token.
// - Tiles: elements through shared memory, for what does not divide into squares: other patches, rows that
//   start at odd addresses, features that do not fill 16 bytes.
#pragma once

#include <algorithm>
#include <utility>

#include "affines.cuh"

namespace latentfast::cuda {

// Latents (b, c, t, h, w), and tokens (b, t/pt · h/ph · w/pw, c·pt·ph·pw).
struct Packing {
  int64_t b, c, t, h, w, pt, ph, pw;
  int64_t rows;          // of the latents in a row of tokens: c·pt·ph
  int64_t down, frames;  // rows of tokens in a frame of them, h/ph; such frames, t/pt

  Packing(int64_t b, int64_t c, int64_t t, int64_t h, int64_t w, int64_t pt, int64_t ph, int64_t pw)
      : b(b), c(c), t(t), h(h), w(w), pt(pt), ph(ph), pw(pw), rows(c * pt * ph) {
    if (ph == 1) {
      this->w *= std::exchange(this->h, 1);
      if (pt == 1) this->w *= std::exchange(this->t, 1);
    }
    down = this->h / ph;
    frames = this->t / pt;
  }

  int64_t strips() const { return b * frames * down; }  // rows of tokens
  __host__ __device__ int64_t features() const { return rows * pw; }
  // Where the first of a strip's rows starts in the latents.
  __device__ int64_t start(int64_t strip) const {
    const int64_t over = quotient(strip, down), sample = quotient(over, frames);
    return ((sample * c * t + (over - sample * frames) * pt) * h + (strip - over * down) * ph) * w;
  }
};

// --- squares ---

constexpr int kSquareThreads = 128;
constexpr uint32_t kLanesAcross = 4;  // of a warp; the others are 8 down

struct Squares {
  uint32_t groups;               // squares down a strip
  uint32_t across;               // squares side by side that neighbouring lanes take, 1 or kLanesAcross
  uint32_t each;                 // squares of a strip, with those that only fill up the last `across`
  int64_t count;                 // of all strips
  int64_t line, frame, channel;  // steps in the latents: from a strip's row to the next, wherever that lies

  Squares(const Packing& p, int side, int width)
      : groups(static_cast<uint32_t>(p.rows / side)),
        // a warp that is through with all rows goes on along the strip: 4 or more across by itself
        across(groups > 32 / kLanesAcross ? kLanesAcross : 1),
        each(static_cast<uint32_t>(groups * across * ceil_div<int64_t>(p.w, across * side * width))),
        count(p.strips() * groups * across * ceil_div<int64_t>(p.w, across * side * width)),
        line(p.w),
        frame((p.h - p.ph + 1) * p.w),
        channel(((p.t - p.pt + 1) * p.h - p.ph + 1) * p.w) {}
};

// 16 bytes of each of some rows, whose units of kUnit bytes are turned into columns.
template <int kUnit>
struct Square {
  static constexpr int kSide = 16 / kUnit;
  uint32_t words[kSide][4];

  __device__ __forceinline__ void transpose() {
    if constexpr (kSide > 1) {
      const Square from = *this;
#pragma unroll
      for (int q = 0; q < kSide; ++q) {
#pragma unroll
        for (int j = 0; j < 4; ++j) words[q][j] = from.turned(q, j);
      }
    }
  }

  // Word j of column q.
  __device__ __forceinline__ uint32_t turned(int q, int j) const {
    if constexpr (kUnit == 2) {
      return __byte_perm(words[2 * j][q / 2], words[2 * j + 1][q / 2], q % 2 == 0 ? 0x5410 : 0x7632);
    } else {
      constexpr int kWords = kUnit / 4;
      return words[j / kWords][q * kWords + j % kWords];
    }
  }

  // The first `left` bytes of a row, in accesses of kAccess bytes.
  template <int kAccess>
  __device__ __forceinline__ void read(int row, const void* from, int left) {
    const unsigned char* const bytes = static_cast<const unsigned char*>(from);
    uint32_t (&to)[4] = words[row];
    if constexpr (kAccess == 16) {
      const uint4 v = load(bytes);
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < 16; i += kAccess) {
        uint2 v = {0, 0};
        if constexpr (kAccess == 8) {
          if (i < left) v = load_8(bytes + i);
          to[i / 4 + 1] = v.y;
        } else {
          if (i < left) v.x = load_4(bytes + i);
        }
        to[i / 4] = v.x;
      }
    }
  }

  template <int kAccess>
  __device__ __forceinline__ void write(int row, void* to, int left) const {
    unsigned char* const bytes = static_cast<unsigned char*>(to);
    const uint32_t (&from)[4] = words[row];
    if constexpr (kAccess == 16) {
      store_once(bytes, uint4{from[0], from[1], from[2], from[3]});
    } else {
#pragma unroll
      for (int i = 0; i < 16; i += kAccess) {
        if (i >= left) continue;
        if constexpr (kAccess == 8) {
          *reinterpret_cast<uint2*>(bytes + i) = {from[i / 4], from[i / 4 + 1]};
        } else {
          *reinterpret_cast<uint32_t*>(bytes + i) = from[i / 4];
        }
      }
    }
  }

  template <typename T>
  __device__ __forceinline__ void apply(int row, const Affine<Wide<T>>& affine) {
    uint32_t (&own)[4] = words[row];
    Wide<T> x[kPack<T>];
    unpack<T>(uint4{own[0], own[1], own[2], own[3]}, x);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) x[i] = affine(x[i]);
    const uint4 results = pack<T>(x);
    own[0] = results.x, own[1] = results.y, own[2] = results.z, own[3] = results.w;
  }
};

// kWidth: of a patch; 1 stands for a patch of one position. kAccess: bytes that the latents are read or
// written at a time. Indices of squares are below 2³².
template <typename T, bool kPacks, int kWidth, int kAccess, typename Source>
__global__ void __launch_bounds__(kSquareThreads, kWidth * sizeof(T) == 2 ? 6 : 8)
    repack_squares_kernel(const __grid_constant__ Source source, const __grid_constant__ Packing p,
                          const __grid_constant__ Squares squares, const T* from, T* out) {
  __shared__ typename Source::Table table;
  constexpr int kSize = static_cast<int>(sizeof(T)), kUnit = kWidth * kSize, kSide = Square<kUnit>::kSide;
  Square<kUnit> square{};  // where the latents end, zeros
  const uint32_t number = blockIdx.x * kSquareThreads + threadIdx.x;
  const uint32_t strip = number / squares.each, in_strip = number - strip * squares.each;
  const uint32_t piece = in_strip / (squares.groups * squares.across);
  const uint32_t in_piece = in_strip - piece * squares.groups * squares.across;
  const uint32_t group = squares.across == 1 ? in_piece : in_piece / kLanesAcross, first = group * kSide;
  const int64_t x =
      static_cast<int64_t>(piece * squares.across + in_piece - group * squares.across) * kPack<T>;
  const bool here = number < squares.count && x < p.w;
  constexpr int kPositions = kPack<T>;
  const int positions =
      kAccess == 16 ? kPositions : static_cast<int>(min(p.w - x, static_cast<int64_t>(kPositions)));

  // f(row of the square, where it starts in the latents, its channel)
  const auto for_rows = [&](auto&& f) {
    if constexpr (kWidth == 1) {
      const int64_t at = p.start(strip) + first * squares.channel + x;
#pragma unroll
      for (int r = 0; r < kSide; ++r) f(r, at + r * squares.channel, first + r);
    } else {
      const uint32_t height = static_cast<uint32_t>(p.ph), depth = static_cast<uint32_t>(p.pt);
      const uint32_t upper = first / height;
      uint32_t channel = upper / depth, line = first - upper * height, frame = upper - channel * depth;
      int64_t at = p.start(strip) + ((channel * p.t + frame) * p.h + line) * p.w + x;
#pragma unroll
      for (int r = 0; r < kSide; ++r) {
        f(r, at, channel);
        const bool last_line = ++line == height;
        if (last_line) line = 0;
        const bool last_frame = last_line && ++frame == depth;
        if (last_frame) {
          frame = 0;
          ++channel;
        }
        at += last_frame ? squares.channel : last_line ? squares.frame : squares.line;
      }
    }
  };
  // f(token of the square, where its 16 bytes lie in the tokens)
  const auto for_tokens = [&](auto&& f) {
    const int64_t at = (strip * (p.w / kWidth) + x / kWidth) * p.features() + first * kWidth;
#pragma unroll
    for (int q = 0; q < kSide; ++q) {
      if (q * kWidth < positions) f(q, at + q * p.features());
    }
  };
  const auto change = [&](int r, uint32_t of) { square.template apply<T>(r, source.of(table, 0, of)); };
  if constexpr (kPacks) {
    if (here) {
      for_rows([&](int r, int64_t at, uint32_t) {
        square.template read<kAccess>(r, from + at, positions * kSize);
      });
    }
    source.prepare(table);
    if (!here) return;
    for_rows([&](int r, int64_t, uint32_t of) { change(r, of); });
    square.transpose();
    for_tokens([&](int q, int64_t at) { square.template write<16>(q, out + at, 16); });
  } else {
    if (here) for_tokens([&](int q, int64_t at) { square.template read<16>(q, from + at, 16); });
    source.prepare(table);
    if (!here) return;
    square.transpose();
    for_rows([&](int r, int64_t at, uint32_t of) {
      change(r, of);
      square.template write<kAccess>(r, out + at, positions * kSize);
    });
  }
}

// Call f.operator()<kWidth, kAccess>(squares) if the latents divide into squares.
template <typename T, typename F>
bool dispatch_squares(const Packing& p, const void* latents, const void* tokens, F&& f) {
  const auto with_width = [&]<int kWidth>() {
    constexpr int kSide = kPack<T> / kWidth, kSize = static_cast<int>(sizeof(T));
    const Squares squares(p, kSide, kWidth);
    if (p.rows % kSide != 0 || p.rows > INT32_MAX || squares.count > INT64_C(0xffffff00)) return false;
    // every row starts at a multiple of the lowest bit that is set
    const uint64_t bits = reinterpret_cast<uintptr_t>(latents) | static_cast<uint64_t>(p.w) * kSize;
    if (bits % 16 == 0) {
      f.template operator()<kWidth, 16>(squares);
    } else if (bits % 8 == 0) {
      f.template operator()<kWidth, 8>(squares);
    } else if (bits % 4 == 0 && kSize <= 4) {
      f.template operator()<kWidth, std::max(4, kSize)>(squares);
    } else {
      return false;
    }
    return true;
  };
  if (!aligned16(tokens)) return false;
  if (p.pw == 1 && p.rows == p.c) return with_width.template operator()<1>();
  if (p.pw == 2) return with_width.template operator()<2>();
  return false;
}

// --- tiles ---

// A tile: positions of a row of tokens, and rows of the latents that the tokens are made of.
constexpr int kAcross = 64, kDown = 64;

struct Tiles {
  int across, run;         // positions of a tile; how many of them lie side by side in a token
  int64_t pieces, groups;  // tiles along a row of tokens, and down its rows

  explicit Tiles(const Packing& packing) : across(kAcross) {
    // whole tokens, or an equal part of one
    while (packing.pw <= kAcross ? across % packing.pw != 0 : packing.pw % across != 0) --across;
    run = static_cast<int>(std::min<int64_t>(packing.pw, across));
    pieces = ceil_div<int64_t>(packing.w, across);
    groups = ceil_div<int64_t>(packing.rows, kDown);
  }
};

template <typename T, bool kPacks, bool kSingle, typename Source>
__global__ void __launch_bounds__(kThreads)
    repack_tiles_kernel(const __grid_constant__ Source source, const __grid_constant__ Packing p,
                        const __grid_constant__ Tiles tiles, const T* from, T* out) {
  __shared__ typename Source::Table table;
  // an odd number of words from one row to the next: columns are read without conflicts
  __shared__ T tile[kDown][kAcross + (sizeof(T) == 2 ? 2 : 1)];
  __shared__ int64_t starts[kDown];
  __shared__ int64_t channels[kDown];
  const int64_t block = blockIdx.x, upper = quotient(block, tiles.pieces),
                strip = quotient(upper, tiles.groups);
  const int64_t x = (block - upper * tiles.pieces) * tiles.across,
                first_row = (upper - strip * tiles.groups) * kDown;
  const int width = static_cast<int>(min(p.w - x, static_cast<int64_t>(tiles.across)));
  const int height = static_cast<int>(min(p.rows - first_row, static_cast<int64_t>(kDown)));
  const int thread = threadIdx.x;
  if (thread < height) {
    const int64_t row = first_row + thread, part = quotient(row, p.ph), channel = quotient(part, p.pt);
    const int64_t frame = part - channel * p.pt, line = row - part * p.ph;
    starts[thread] = p.start(strip) + ((channel * p.t + frame) * p.h + line) * p.w + x;
    channels[thread] = channel;
  }
  source.prepare(table);
  __syncthreads();

  // f(row of the tile, position in it, where that is in the latents), along them
  const auto along_latents = [&](auto&& f) {
    const int column = thread % kAcross;
    if (column >= width) return;
#pragma unroll 4
    for (int r = thread / kAcross; r < height; r += kThreads / kAcross) f(r, column, starts[r] + column);
  };
  // the same along the tokens
  const auto along_tokens = [&](auto&& f) {
    const int64_t features = p.features();
    if constexpr (kSingle) {  // a token is one position wide
      const int r = thread % kDown;
      if (r >= height) return;
      const int64_t first = (strip * p.w + x) * features + first_row + r;
#pragma unroll 4
      for (int column = thread / kDown; column < width; column += kThreads / kDown)
        f(r, column, first + column * features);
    } else {
      const int wide = height * tiles.run;
      for (int i = thread; i < width * height; i += kThreads) {
        const int set = i / wide, rest = i - set * wide, r = rest / tiles.run,
                  column = set * tiles.run + rest - r * tiles.run;
        const int64_t token = quotient(x + column, p.pw);
        f(r, column,
          (strip * (p.w / p.pw) + token) * features + (first_row + r) * p.pw + x + column - token * p.pw);
      }
    }
  };
  const auto changed = [&](T value, int r) {
    return narrow<T>(source.of(table, 0, channels[r])(widen(value)));
  };
  if constexpr (kPacks) {
    along_latents([&](int r, int column, int64_t at) { tile[r][column] = from[at]; });
    __syncthreads();
    along_tokens([&](int r, int column, int64_t at) { out[at] = changed(tile[r][column], r); });
  } else {
    along_tokens([&](int r, int column, int64_t at) { tile[r][column] = from[at]; });
    __syncthreads();
    along_latents([&](int r, int column, int64_t at) { out[at] = changed(tile[r][column], r); });
  }
}

template <typename T, typename Source>
void repack(const Target& target, const Source& source, const Packing& packing, bool packs, const T* from,
            T* out) {
  const auto blocks_of = [&](int64_t blocks) {
    STD_TORCH_CHECK(blocks <= INT32_MAX, "standardize: latents of ", packing.b * packing.c, " channels with ",
                    packing.t * packing.h * packing.w, " elements are too large to pack");
    return static_cast<unsigned>(blocks);
  };
  const auto by_squares = [&]<int kWidth, int kAccess>(const Squares& squares) {
    const unsigned blocks = blocks_of(ceil_div<int64_t>(squares.count, kSquareThreads));
    const auto launch = [&]<bool kPacks>() {
      repack_squares_kernel<T, kPacks, kWidth, kAccess, Source>
          <<<blocks, kSquareThreads, 0, target.stream>>>(source, packing, squares, from, out);
      check_launch("standardize");
    };
    packs ? launch.template operator()<true>() : launch.template operator()<false>();
  };
  const void* const latents = packs ? from : out;
  const void* const tokens = packs ? out : from;
  if (dispatch_squares<T>(packing, latents, tokens, by_squares)) return;
  const Tiles tiles(packing);
  const unsigned blocks = blocks_of(packing.strips() * tiles.pieces * tiles.groups);
  const auto launch = [&]<bool kPacks, bool kSingle>() {
    repack_tiles_kernel<T, kPacks, kSingle, Source>
        <<<blocks, kThreads, 0, target.stream>>>(source, packing, tiles, from, out);
    check_launch("standardize");
  };
  if (packs) {
    packing.pw == 1 ? launch.template operator()<true, true>() : launch.template operator()<true, false>();
  } else {
    packing.pw == 1 ? launch.template operator()<false, true>() : launch.template operator()<false, false>();
  }
}

}  // namespace latentfast::cuda
