// edit and blend: one pass, each input read once and the output written once, however many directions there
// are.
#include "common/operators.h"
#include "cpu/rows.h"

namespace latentfast {
namespace {

// An operand of N stacked parts, each broadcast to `target`; one part serves all if it has no such dimension
// or size 1 there.
template <typename C>
class Stacked {
 public:
  Stacked(const View& x, Shape target, const char* name)
      : stacked_(x.dim() > target.dims && x.size(0) > 1),
        each_(stacked_ ? x.numel() / x.size(0) : 0),
        part_(x.const_data_ptr(), x.scalar_type(), part_shape(x, target), target, name) {}

  bool varies() const { return stacked_; }
  const C* direct(int64_t part, int64_t start, int64_t n) const {
    return part_.direct(start, n, part * each_);
  }
  const C* read(int64_t part, int64_t start, int n, C* buffer) const {
    return part_.read(start, n, buffer, part * each_);
  }

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
    return dtype_ == ScalarType::Double ? static_cast<const double*>(data_)[index]
                                        : static_cast<const float*>(data_)[index];
  }

 private:
  std::span<const double> host_;
  int64_t count_;
  const void* data_ = nullptr;
  ScalarType dtype_ = ScalarType::Float;
  int64_t samples_ = 1;
};

template <typename T>
struct Editing {
  using C = Working<T>;
  const T* z;
  Stacked<C> directions;
  std::optional<Stacked<C>> mask;
  Strengths strengths;
  Output<T> out;

  // All directions in one go, if nothing has to be widened, put together or kept for a second round; false if
  // something has.
  bool add_directly(int64_t sample, int64_t start, int n) const {
    if constexpr (kIsWide<T>) {
      if (strengths.count() > kSteps) return false;
      Step<C> step[kSteps];
      for (int64_t k = 0; k < strengths.count(); ++k) {
        step[k].direction = directions.direct(k, start, n);
        step[k].mask = mask.has_value() ? mask->direct(mask->varies() ? k : 0, start, n) : nullptr;
        step[k].strength = static_cast<C>(strengths.at(k, sample));
        if (step[k].direction == nullptr || (mask.has_value() && step[k].mask == nullptr)) return false;
      }
      loops_of<C>().add_steps[mask.has_value()](z + start, step, static_cast<int>(strengths.count()), n,
                                                &out[start], out.streams());
      return true;
    }
    return false;
  }

  void add_by_row(int64_t sample, int64_t start, int n) const {
    Row<T> wide, rounded_row;
    Row<C> direction_rows[kSteps], mask_rows[kSteps];
    Step<C> step[kSteps];
    const C* so_far = widen(z + start, n, wide);
    C* row = out.begin(start, rounded_row);
    const C* shared =
        mask.has_value() && !mask->varies() ? mask->read(0, start, n, mask_rows[0].values) : nullptr;
    for (int64_t k = 0; k < strengths.count(); k += kSteps) {
      const int count = static_cast<int>(std::min<int64_t>(kSteps, strengths.count() - k));
      for (int j = 0; j < count; ++j) {
        step[j].direction = directions.read(k + j, start, n, direction_rows[j].values);
        step[j].mask =
            shared == nullptr && mask.has_value() ? mask->read(k + j, start, n, mask_rows[j].values) : shared;
        step[j].strength = static_cast<C>(strengths.at(k + j, sample));
      }
      loops_of<C>().add_steps[mask.has_value()](so_far, step, count, n, row, false);
      so_far = row;
    }
    out.finish(row, n, start);
  }

  void run(int64_t numel) const {
    constexpr int64_t kPiece = 8 * kTile;
    const int64_t each = numel / strengths.samples(), pieces = ceil_div(each, kPiece);
    parallel(strengths.samples() * pieces, std::min(each, kPiece), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / pieces, start = sample * each + i % pieces * kPiece;
        const int64_t stop = std::min(start + kPiece, (sample + 1) * each);
        if (add_directly(sample, start, static_cast<int>(stop - start))) continue;
        for (int64_t at = start; at < stop; at += kTile) {
          const int n = static_cast<int>(std::min<int64_t>(kTile, stop - at));
          if (!add_directly(sample, at, n)) add_by_row(sample, at, n);
        }
      }
    });
  }
};

}  // namespace

void edit(const View& z, const View& directions, const OptionalView& strengths,
          std::span<const double> host_strengths, const OptionalView& mask, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(directions, "directions");
  check_contiguous(out, "out");
  if (mask.has_value()) check_contiguous(*mask, "mask");
  if (out.numel() == 0) return;
  dispatch_floating(z.scalar_type(), "edit", [&]<typename T>() {
    using C = Working<T>;
    const Shape target = shape_of(z);
    Editing<T> op{data<T>(z), Stacked<C>(directions, target, "directions"), std::nullopt,
                  Strengths(strengths, host_strengths), Output(mutable_data<T>(out), out.numel())};
    if (op.strengths.count() == 0) {
      op.out.copy(op.z, z.numel(), 0);
      return;
    }
    if (mask.has_value()) op.mask.emplace(*mask, target, "mask");
    op.run(z.numel());
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
    const Broadcast<C> where(mask.const_data_ptr(), mask.scalar_type(), shape_of(mask), shape_of(base),
                             "mask");
    const T *x = data<T>(base), *y = data<T>(edited);
    const int64_t numel = base.numel();
    const Output<T> to(mutable_data<T>(out), numel);
    parallel(ceil_div(numel, kTile), kTile, [&](int64_t begin, int64_t end) {
      [[maybe_unused]] Row<T> wide_x, wide_y, mixed;
      Row<C> weight;
      [[maybe_unused]] alignas(64) T packed[kTile];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t start = i * kTile;
        const int n = static_cast<int>(std::min<int64_t>(kTile, numel - start));
        const C* m = where.read(start, n, weight.values);
        if constexpr (kIsWide<T>) {
          loop.blend(x + start, y + start, m, n, &to[start], to.streams());
        } else {
          loop.blend(widen(x + start, n, wide_x), widen(y + start, n, wide_y), m, n, mixed.values, false);
          const auto bits = [](const T* values) { return reinterpret_cast<const uint16_t*>(values); };
          round_row(mixed.values, n, packed);
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
