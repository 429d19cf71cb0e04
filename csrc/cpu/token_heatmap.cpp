// Heat maps of tokens: softmax masses on some keys, averaged over heads, without the matrix of scores.
//
// A sample's keys are packed first, head by head, in panels that hold one element of kPanel keys side by
// side; keys that are masked are left out there. A task then takes a few blocks of queries through all heads,
// so that a head's panels are read from the second-level cache by all of its blocks. The scores of one block
// with all keys lie in a buffer that is exponentiated row by row while it is in a cache.
#include <limits>
#include <memory>

#include "common/stable.h"
#include "cpu/rows.h"

namespace latentfast {
namespace {

// Queries of a block, a multiple of what the loops sum up at once, and blocks of a task.
constexpr int kBlock = 24;
constexpr int kBlocks = 8;

// Where the rows of (B, H, N, D) are, or of (B, N, H, D) where the heads come last.
template <typename T>
struct Heads {
  const T* data;
  int64_t heads, rows, width;
  int64_t sample, head, row;

  Heads(const View& x, bool last)
      : data(latentfast::data<T>(x)),
        heads(x.size(last ? 2 : 1)),
        rows(x.size(last ? 1 : 2)),
        width(x.size(3)) {
    sample = heads * rows * width;
    head = last ? width : rows * width;
    row = last ? heads * width : width;
  }
  const T* at(int64_t b, int64_t h, int64_t i) const { return data + b * sample + h * head + i * row; }
};

// What one sample's keys are asked for: which take part, and each group's weights or members among those.
template <typename C>
struct Keys {
  std::vector<int64_t> taken;               // their numbers, in order
  std::vector<std::vector<int64_t>> lists;  // positions in `taken`; empty if there are weights
  std::vector<C> weights;                   // [group][padded]
  int64_t padded = 0;

  Keys(const uint8_t* allowed, int64_t count, const OptionalView& given, std::span<const int64_t> keys,
       std::span<const int64_t> sizes) {
    std::vector<int64_t> position(count, -1);
    for (int64_t key = 0; key < count; ++key) {
      if (allowed != nullptr && allowed[key] == 0) continue;
      position[key] = static_cast<int64_t>(taken.size());
      taken.push_back(key);
    }
    const int64_t size = static_cast<int64_t>(taken.size());
    padded = ceil_div(size, int64_t(kPanel<C>)) * kPanel<C>;
    if (given.has_value()) {
      const C* from = data<C>(*given);
      weights.assign(given->size(0) * padded, C(0));
      for (int64_t g = 0; g < given->size(0); ++g) {
        for (int64_t i = 0; i < size; ++i) weights[g * padded + i] = from[g * count + taken[i]];
      }
      return;
    }
    size_t next = 0;
    for (const int64_t listed : sizes) {
      auto& list = lists.emplace_back();
      for (int64_t i = 0; i < listed; ++i, ++next) {
        const int64_t key = keys[next];
        STD_TORCH_CHECK(key >= 0 && key < count, "token_heatmap: no key ", key);
        if (position[key] >= 0) list.push_back(position[key]);
      }
    }
  }

  // The mass on group g of a row of powers.
  C mass(int64_t g, const C* row) const {
    if (!weights.empty()) {
      double lanes[kLanes] = {};
      loops_of<C>().dot(row, weights.data() + g * padded, static_cast<int>(padded), lanes);
      return static_cast<C>(add_lanes(lanes));
    }
    C sum = 0;
    for (const int64_t i : lists[g]) sum += row[i];
    return sum;
  }
};

template <typename T>
void pack(const Heads<T>& k, int64_t b, int64_t h, const std::vector<int64_t>& taken, Working<T>* panels) {
  using C = Working<T>;
  const int64_t size = static_cast<int64_t>(taken.size()), width = k.width;
  Row<T> row;
  for (int64_t start = 0; start < size; start += kPanel<C>) {
    C* panel = panels + start * width;
    for (int64_t j = 0; j < kPanel<C>; ++j) {
      if (start + j < size) {
        const C* key = widen(k.at(b, h, taken[start + j]), static_cast<int>(width), row);
        for (int64_t d = 0; d < width; ++d) panel[d * kPanel<C> + j] = key[d];
      } else {
        for (int64_t d = 0; d < width; ++d) panel[d * kPanel<C> + j] = 0;
      }
    }
  }
}

template <typename T>
struct Heatmap {
  using C = Working<T>;
  Heads<T> q, k;
  C scale;
  C* out;
  int64_t groups;

  // Queries [begin, end) of sample b, at most kBlocks blocks of them.
  void rows(int64_t b, int64_t begin, int64_t end, const Keys<C>& keys, const C* packed, C* scores) const {
    const auto& loop = loops_of<C>();
    const int64_t width = q.width, padded = keys.padded, size = static_cast<int64_t>(keys.taken.size());
    alignas(64) C widened[kBlock * 256];
    std::vector<C> total(groups * (end - begin), C(0));
    for (int64_t h = 0; h < q.heads; ++h) {
      const C* panels = packed + h * padded * width;
      for (int64_t at = begin; at < end; at += kBlock) {
        const int count = static_cast<int>(std::min<int64_t>(kBlock, end - at));
        const C* query;
        int64_t stride = q.row;
        if constexpr (kIsWide<T>) {
          query = q.at(b, h, at);
        } else {
          Row<T> row;
          for (int i = 0; i < count; ++i) {
            std::copy_n(widen(q.at(b, h, at + i), static_cast<int>(width), row), width, widened + i * width);
          }
          query = widened;
          stride = width;
        }
        for (int64_t start = 0; start < padded; start += kPanel<C>) {
          loop.scores(query, stride, count, panels + start * width, static_cast<int>(width), scores + start,
                      padded);
        }
        for (int i = 0; i < count; ++i) {
          C* row = scores + i * padded;
          std::fill(row + size, row + padded, -std::numeric_limits<C>::infinity());
          const C inverse = 1 / loop.softmax_row(row, padded, scale);
          for (int64_t g = 0; g < groups; ++g)
            total[g * (end - begin) + at + i - begin] += keys.mass(g, row) * inverse;
        }
      }
    }
    const C share = C(1) / static_cast<C>(q.heads);
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t i = begin; i < end; ++i) {
        out[(b * groups + g) * q.rows + i] = total[g * (end - begin) + i - begin] * share;
      }
    }
  }

  void sample(int64_t b, const Keys<C>& keys) const {
    const int64_t padded = keys.padded, width = q.width;
    const std::unique_ptr<C[]> packed(new C[q.heads * padded * width]);
    parallel(q.heads, padded * width, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) pack(k, b, h, keys.taken, packed.get() + h * padded * width);
    });
    constexpr int64_t kTask = kBlock * kBlocks;
    parallel(ceil_div(q.rows, kTask), kTask * padded, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<C[]> scores(new C[kBlock * padded]);
      for (int64_t i = begin; i < end; ++i) {
        rows(b, i * kTask, std::min(q.rows, (i + 1) * kTask), keys, packed.get(), scores.get());
      }
    });
  }
};

}  // namespace

void token_heatmap(const View& q, const View& k, bool q_heads_last, bool k_heads_last,
                   const OptionalView& weights, std::span<const int64_t> keys, std::span<const int64_t> sizes,
                   const OptionalView& key_mask, double scale, const View& out) {
  check_contiguous(q, "q");
  check_contiguous(k, "k");
  check_contiguous(out, "out");
  if (weights.has_value()) check_contiguous(*weights, "weights");
  if (key_mask.has_value()) check_contiguous(*key_mask, "key_mask");
  if (out.numel() == 0) return;
  dispatch_floating(q.scalar_type(), "token_heatmap", [&]<typename T>() {
    using C = Working<T>;
    constexpr double kLog2E = 1.44269504088896340736;
    const Heads<T> queries(q, q_heads_last), all_keys(k, k_heads_last);
    STD_TORCH_CHECK(queries.width <= 256, "token_heatmap: heads of at most 256 elements");
    const Heatmap<T> op{queries, all_keys, static_cast<C>(scale * kLog2E), mutable_data<C>(out), out.size(1)};
    const auto* allowed =
        key_mask.has_value() ? static_cast<const uint8_t*>(key_mask->const_data_ptr()) : nullptr;
    const bool own = key_mask.has_value() && key_mask->size(0) > 1;
    for (int64_t b = 0; b < out.size(0); ++b) {
      const Keys<C> asked(allowed == nullptr ? nullptr : allowed + (own ? b * all_keys.rows : 0),
                          all_keys.rows, weights, keys, sizes);
      if (asked.taken.empty() || queries.heads == 0) {
        std::fill_n(op.out + b * op.groups * queries.rows, op.groups * queries.rows, C(0));
      } else {
        op.sample(b, asked);
      }
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) { m.impl("token_heatmap", LATENTFAST_BOX(token_heatmap)); }

}  // namespace latentfast
