// How overlapping tiles lie along the dimensions of what they are put together to: of stitch, on the host.
//
// Neighbours share extent = min(both sizes, overlap); a tile begins where the part that it shares with the
// one before begins. Up to `extent` of its beginning it is blended with that one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "stable.h"

namespace latentfast {

enum class Seam : int { sequential = 0, overlap_add = 1 };

struct TileAxis {
  std::vector<int64_t> size, extent, start;

  int64_t count() const { return static_cast<int64_t>(size.size()); }
  int64_t whole() const { return start.back() + size.back(); }

  void add(int64_t n, int64_t overlap) {
    extent.push_back(size.empty() ? 0 : std::min({size.back(), n, overlap}));
    start.push_back(size.empty() ? 0 : start.back() + size.back() - extent.back());
    size.push_back(n);
  }

  // The tile that position p of the whole belongs to: the last that has begun there.
  int64_t tile_at(int64_t p) const {
    int64_t k = count() - 1;
    while (start[k] > p) --k;
    return k;
  }
  bool blended(int64_t k, int64_t p) const { return p - start[k] < extent[k]; }

  // The weight of tile k at p where it is blended; the rest is that of the tile before. Not rounded yet.
  double weight(int64_t k, int64_t p, Seam seam) const {
    const double at = static_cast<double>(p - start[k]), over = static_cast<double>(extent[k]);
    return seam == Seam::sequential ? at / over : (at + 0.5) / over;
  }
};

struct TileGrid {
  TileAxis axis[3];  // frames, rows, columns
  int64_t planes;    // samples × channels

  // The tiles (T, H, W) of the operator `stitch`, checked: they were validated by the Python layer, this
  // guards the raw operator.
  TileGrid(std::span<const View> tiles, std::span<const int64_t> grid, std::span<const int64_t> overlap,
           const View& out) {
    STD_TORCH_CHECK(grid.size() == 3 && overlap.size() == 3, "stitch: grid and overlap are (T, H, W)");
    STD_TORCH_CHECK(std::all_of(grid.begin(), grid.end(), [](int64_t n) { return n > 0; }) &&
                        static_cast<int64_t>(tiles.size()) == grid[0] * grid[1] * grid[2],
                    "stitch: grid does not fit the number of tiles");
    STD_TORCH_CHECK(out.dim() == 5, "stitch: out must be (B, C, T, H, W)");
    planes = out.size(0) * out.size(1);
    const int64_t step[3] = {grid[1] * grid[2], grid[2], 1};
    for (const View& tile : tiles) {
      check_contiguous(tile, "tile");
      STD_TORCH_CHECK(tile.dim() == 5 && tile.scalar_type() == out.scalar_type() &&
                          tile.size(0) == out.size(0) && tile.size(1) == out.size(1),
                      "stitch: a tile does not fit out");
    }
    for (int d = 0; d < 3; ++d) {
      for (int64_t k = 0; k < grid[d]; ++k) axis[d].add(tiles[k * step[d]].size(2 + d), overlap[d]);
      for (int64_t k = 1; k + 1 < grid[d]; ++k) {
        STD_TORCH_CHECK(axis[d].extent[k] + axis[d].extent[k + 1] <= axis[d].size[k],
                        "stitch: a tile shares more with its neighbours than it has");
      }
      STD_TORCH_CHECK(out.size(2 + d) <= axis[d].whole(), "stitch: out is larger than what the tiles cover");
    }
    for (size_t i = 0; i < tiles.size(); ++i) {
      for (int d = 0; d < 3; ++d) {
        STD_TORCH_CHECK(tiles[i].size(2 + d) == axis[d].size[static_cast<int64_t>(i) / step[d] % grid[d]],
                        "stitch: a tile does not fit to its row or column");
      }
    }
  }

  int64_t index(int64_t k, int64_t i, int64_t j) const {
    return (k * axis[1].count() + i) * axis[2].count() + j;
  }
};

}  // namespace latentfast
