// edit and blend: one pass, each input read once and the output written once, however many directions there are.
#include "common/operators.h"
#include "cpu/rows.h"

namespace latentfast {
namespace {

// An operand of N stacked parts, each broadcast to `target`; one part serves all if it has no such dimension or size 1 there.
template <typename C>
class Stacked {
 public:
  Stacked(const View& x, Shape target, const char* name)
      : stacked_(x.dim() > target.dims && x.size(0) > 1),
        each_(stacked_ ? x.numel() / x.size(0) : 0),
        part_(x.const_data_ptr(), x.scalar_type(), part_shape(x, target), target, name) {}

  bool varies() const { return stacked_; }
  const C* read(int64_t part, int64_t start, int n, C* buffer) const { return part_.read(start, n, buffer, part * each_); }

 private:
  static Shape part_shape(const View& x, Shape target) {
    const Shape shape = shape_of(x);
    return shape.dims > target.dims ? Shape{shape.sizes + 1, shape.dims - 1} : shape;
  }

  bool stacked_;
  int64_t each_;
  Broadcast<C> part_;
};

// strengths: N numbers on the host, or a tensor (N,) or (N, B).
class Strengths {
 public:
  Strengths(const OptionalView& device, std::span<const double> host)
      : host_(host), count_(static_cast<int64_t>(host.size())) {
    if (!device.has_value()) return;
    check_contiguous(*device, "strengths");
    data_ = device->const_data_ptr();
    dtype_ = device->scalar_type();
    count_ = device->size(0);
    samples_ = device->dim() > 1 ? device->size(1) : 1;
  }

  int64_t count() const { return count_; }
  int64_t samples() const { return samples_; }
  double at(int64_t i, int64_t sample) const {
    if (data_ == nullptr) return host_[i];
    const int64_t index = i * samples_ + (samples_ > 1 ? sample : 0);
    return dtype_ == ScalarType::Double ? static_cast<const double*>(data_)[index] : static_cast<const float*>(data_)[index];
  }

 private:
  std::span<const double> host_;
  int64_t count_;
  const void* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t samples_ = 1;
};

}  // namespace

void edit(const View& z, const View& directions, const OptionalView& strengths,
          std::span<const double> host_strengths, const OptionalView& mask, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(directions, "directions");
  check_contiguous(out, "out");
  if (mask.has_value()) check_contiguous(*mask, "mask");
  if (out.numel() == 0) return;
  const Strengths s(strengths, host_strengths);
  dispatch_floating(z.scalar_type(), "edit", [&]<typename T>() {
    using C = Working<T>;
    const auto& loop = loops_of<C>();
    const Shape target = shape_of(z);
    const Stacked<C> steps(directions, target, "directions");
    const std::optional<Stacked<C>> where = mask.has_value() ? std::optional<Stacked<C>>({*mask, target, "mask"}) : std::nullopt;
    const T* from = data<T>(z);
    const Output<T> to(mutable_data<T>(out), out.numel());
    const int64_t each = z.numel() / s.samples(), tiles = ceil_div(each, kTile);
    parallel(s.samples() * tiles, std::min<int64_t>(each, kTile), [&](int64_t begin, int64_t end) {
      Row<T> wide, rounded_row;
      Row<C> direction_rows[kSteps], mask_rows[kSteps];
      Step<C> step[kSteps];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / tiles, start = sample * each + i % tiles * kTile;
        const int n = static_cast<int>(std::min<int64_t>(kTile, (sample + 1) * each - start));
        const C* so_far = widen(from + start, n, wide);
        C* row = to.begin(start, rounded_row);
        const bool reads_shared = where.has_value() && !where->varies() && s.count() > 0;  // (0, …) masks are empty
        const C* shared = reads_shared ? where->read(0, start, n, mask_rows[0].values) : nullptr;
        for (int64_t k = 0; k < s.count(); k += kSteps) {
          const int count = static_cast<int>(std::min<int64_t>(kSteps, s.count() - k));
          for (int j = 0; j < count; ++j) {
            step[j].direction = steps.read(k + j, start, n, direction_rows[j].values);
            step[j].mask = shared == nullptr && where.has_value() ? where->read(k + j, start, n, mask_rows[j].values) : shared;
            step[j].strength = static_cast<C>(s.at(k + j, sample));
          }
          loop.add_steps[where.has_value()](so_far, step, count, n, row);
          so_far = row;
        }
        if (so_far == row) {
          to.finish(row, n, start);
        } else {
          to.copy(from + start, n, start);  // no directions
        }
      }
    });
  });
}

void blend(const View& base, const View& edited, const View& mask, const View& out) {
  check_contiguous(base, "base");
  check_contiguous(edited, "edited");
  check_contiguous(mask, "mask");
  check_contiguous(out, "out");
  if (out.numel() == 0) return;
  dispatch_floating(base.scalar_type(), "blend", [&]<typename T>() {
    using C = Working<T>;
    const auto& loop = loops_of<C>();
    const Broadcast<C> where(mask.const_data_ptr(), mask.scalar_type(), shape_of(mask), shape_of(base), "mask");
    const T *x = data<T>(base), *y = data<T>(edited);
    const int64_t numel = base.numel();
    const Output<T> to(mutable_data<T>(out), numel);
    parallel(ceil_div(numel, kTile), kTile, [&](int64_t begin, int64_t end) {
      Row<T> wide_x, wide_y, mixed;
      Row<C> weight;
      [[maybe_unused]] alignas(64) T packed[kTile];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i * kTile;
        const int n = static_cast<int>(std::min<int64_t>(kTile, numel - start));
        const C* m = where.read(start, n, weight.values);
        C* row = to.begin(start, mixed);
        loop.blend(widen(x + start, n, wide_x), widen(y + start, n, wide_y), m, n, row);
        if constexpr (kIsWide<T>) {
          to.finish(row, n, start);
        } else {
          const auto bits = [](const T* values) { return reinterpret_cast<const uint16_t*>(values); };
          round_row(row, n, packed);
          loops().select(bits(x + start), bits(y + start), m, n, reinterpret_cast<uint16_t*>(packed));
          to.copy(packed, n, start);
        }
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) {
  m.impl("edit", LATENTFAST_BOX(edit));
  m.impl("blend", LATENTFAST_BOX(blend));
}

}  // namespace latentfast
