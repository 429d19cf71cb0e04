// stitch: the result row by row, each put together from pieces of one column of tiles, seam or plain.
// The specification is latentfast/reference/tiles.py.
//
// A row is made in a buffer in the first-level cache and written from there in one go, around the caches
// where it is large. In a plain piece one tile lies: it is copied, with its bits. In a seam two, four or
// eight meet, and which is blended into which first is diffusers' order: a tile is blended into the one
// above, which was blended to its own left before, then into the one at its left, then into the clip before.
#include "common/tiles.h"

#include "cpu/rows.h"

namespace latentfast {
namespace {

// A position along a dimension: in tile k, and, if that is `blended` there, in tile k − 1 as well.
template <typename C>
struct Position {
  int64_t k, at, before;  // before: the position in tile k − 1
  bool blended;
  C weight, rest;  // of tile k and of the one before

  Position(const TileAxis& axis, int64_t p, Seam seam)
      : k(axis.tile_at(p)),
        at(p - axis.start[k]),
        before(0),
        blended(axis.blended(k, p)),
        weight(1),
        rest(0) {
    if (!blended) return;
    const double w = axis.weight(k, p, seam);
    before = p - axis.start[k - 1];
    weight = static_cast<C>(w);
    rest = static_cast<C>(1.0 - w);
  }
};

template <typename T>
class Stitching {
  using C = Working<T>;

 public:
  Stitching(std::span<const View> tiles, const TileGrid& grid, Seam seam, std::span<const double> clamp,
            const View& out)
      : grid_(grid),
        seam_(seam),
        clamps_(!clamp.empty()),
        low_(clamps_ ? static_cast<C>(clamp[0]) : C(0)),
        high_(clamps_ ? static_cast<C>(clamp[1]) : C(0)),
        frames_(out.size(2)),
        height_(out.size(3)),
        width_(out.size(4)),
        out_(mutable_data<T>(out), out.numel()) {
    for (const View& tile : tiles) tiles_.push_back(data<T>(tile));
    const TileAxis& columns = grid.axis[2];
    for (int64_t x = 0; x < width_; ++x) {
      const Position<C> position(columns, x, seam);
      weights_.push_back(position.weight);
      rests_.push_back(position.rest);
    }
    for (int64_t j = 0; j < columns.count(); ++j) {
      const int64_t begin = columns.start[j], edge = begin + columns.extent[j];
      const int64_t end = j + 1 < columns.count() ? columns.start[j + 1] : columns.whole();
      add_pieces(j, begin, std::min(edge, width_), true);
      add_pieces(j, edge, std::min(end, width_), false);
    }
  }

  void run() const {
    parallel(grid_.planes * frames_ * height_, width_, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t y = row % height_, t = row / height_ % frames_, plane = row / height_ / frames_;
        make(plane, Position<C>(grid_.axis[0], t, seam_), Position<C>(grid_.axis[1], y, seam_), row * width_);
      }
    });
  }

 private:
  // Columns of the result that are all plain or all seam, of tile column j: at most kTile of them.
  struct Piece {
    int64_t j, begin;
    int count;
    bool blended;
  };
  // A part of a row on its way, and the buffers for what it is made of.
  struct Buffers {
    Row<T> own, above, left, both, earlier, first, second;
  };
  // What two neighbours weigh: the same all along a row, or different from column to column.
  struct Weights {
    C rest, weight;
    const C *rests, *weights;
  };

  void add_pieces(int64_t j, int64_t begin, int64_t end, bool blended) {
    for (; begin < end; begin += kTile) {
      pieces_.push_back({j, begin, static_cast<int>(std::min<int64_t>(kTile, end - begin)), blended});
    }
  }

  void make(int64_t plane, const Position<C>& t, const Position<C>& y, int64_t to) const {
    alignas(64) T line[kTile];
    Buffers buffers;
    int64_t written = 0;
    int ready = 0;
    for (const Piece& piece : pieces_) {
      if (ready + piece.count > kTile) {
        out_.copy(line, ready, to + written);
        written += ready;
        ready = 0;
      }
      if (!piece.blended && !y.blended && !t.blended && !clamps_) {
        std::copy_n(tile(t.k, y.k, piece.j, plane, t.at, y.at, piece.begin), piece.count, line + ready);
      } else {
        round_row(clamped(seam(plane, t, y, piece, buffers), piece.count, buffers.first), piece.count,
                  line + ready);
      }
      ready += piece.count;
    }
    out_.copy(line, ready, to + written);
  }

  // A tile's elements from column x of the result on.
  const T* tile(int64_t k, int64_t i, int64_t j, int64_t plane, int64_t t, int64_t y, int64_t x) const {
    const auto& [frames, rows, columns] = grid_.axis;
    return tiles_[grid_.index(k, i, j)] +
           ((plane * frames.size[k] + t) * rows.size[i] + y) * columns.size[j] + (x - columns.start[j]);
  }

  const C* seam(int64_t plane, const Position<C>& t, const Position<C>& y, const Piece& piece,
                Buffers& b) const {
    const C* own = in_clip(plane, t.k, t.at, y, piece, b);
    if (!t.blended) return own;
    std::copy_n(own, piece.count, b.earlier.values);
    const C* before = in_clip(plane, t.k - 1, t.before, y, piece, b);
    return mixed(before, b.earlier.values, piece.count, {t.rest, t.weight, nullptr, nullptr}, b, b.both);
  }

  // Within one temporal tile.
  const C* in_clip(int64_t plane, int64_t k, int64_t t, const Position<C>& y, const Piece& piece,
                   Buffers& b) const {
    const Weights across{0, 0, rests_.data() + piece.begin, weights_.data() + piece.begin};
    const Weights down{y.rest, y.weight, nullptr, nullptr};
    const auto raw = [&](int64_t i, int64_t at, int64_t j, Row<T>& buffer) {
      return widen(tile(k, i, j, plane, t, at, piece.begin), piece.count, buffer);
    };
    const int64_t j = piece.j;
    const C* own = raw(y.k, y.at, j, b.own);
    if (y.blended) {
      const C* above = raw(y.k - 1, y.before, j, b.above);
      if (piece.blended && seam_ == Seam::sequential) {
        above = mixed(raw(y.k - 1, y.before, j - 1, b.left), above, piece.count, across, b, b.above);
      }
      own = mixed(above, own, piece.count, down, b, b.own);
    }
    if (!piece.blended) return own;
    const C* left = raw(y.k, y.at, j - 1, b.left);
    if (y.blended) left = mixed(raw(y.k - 1, y.before, j - 1, b.above), left, piece.count, down, b, b.left);
    return mixed(left, own, piece.count, across, b, b.own);
  }

  // rest·before + weight·own. In sequential order each product and the sum are rounded to T; `to` may be one
  // of the two.
  const C* mixed(const C* before, const C* own, int n, const Weights& w, Buffers& b, Row<T>& to) const {
    const auto& loop = loops_of<C>();
    if (kIsWide<T> || seam_ == Seam::overlap_add) {
      C* const sum = b.first.values;
      w.weights == nullptr ? loop.mix(before, own, n, w.rest, w.weight, sum)
                           : loop.mix_columns(before, own, n, w.rests, w.weights, sum);
      std::copy_n(sum, n, to.values);
    } else {
      const C* x = product(before, n, w.rests, w.rest, b.first);
      const C* y = product(own, n, w.weights, w.weight, b.second);
      for (int i = 0; i < n; ++i) to.values[i] = x[i] + y[i];
      to_dtype(to, n);
    }
    return to.values;
  }

  const C* product(const C* x, int n, const C* each, C all, Row<T>& to) const {
    if (each != nullptr) {
      loops_of<C>().multiply(x, each, n, to.values);
    } else {
      for (int i = 0; i < n; ++i) to.values[i] = x[i] * all;
    }
    to_dtype(to, n);
    return to.values;
  }

  // Rounds a row to T.
  void to_dtype(Row<T>& row, int n) const {
    if constexpr (!kIsWide<T>) {
      alignas(64) T rounded[kTile];
      round_row(row.values, n, rounded);
      widen(rounded, n, row);
    }
  }

  const C* clamped(const C* row, int n, Row<T>& to) const {
    if (!clamps_) return row;
    if constexpr (!kIsWide<T>) {
      std::copy_n(row, n, to.values);
      to_dtype(to, n);
      row = to.values;
    }
    for (int i = 0; i < n; ++i) {  // NaN stays
      to.values[i] = row[i] < low_ ? low_ : row[i] > high_ ? high_ : row[i];
    }
    return to.values;
  }

  const TileGrid& grid_;
  Seam seam_;
  bool clamps_;
  C low_, high_;
  int64_t frames_, height_, width_;
  Output<T> out_;
  std::vector<const T*> tiles_;
  std::vector<Piece> pieces_;
  std::vector<C> weights_, rests_;  // along a row
};

}  // namespace

void stitch(std::span<const View> tiles, std::span<const int64_t> grid, std::span<const int64_t> overlap,
            int64_t kind, std::span<const double> clamp, const View& out) {
  check_contiguous(out, "out");
  const TileGrid layout(tiles, grid, overlap, out);
  if (out.numel() == 0) return;
  dispatch_floating(out.scalar_type(), "stitch", [&]<typename T>() {
    Stitching<T>(tiles, layout, static_cast<Seam>(kind), clamp, out).run();
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("stitch", LATENTFAST_BOX(stitch)); }

}  // namespace latentfast
