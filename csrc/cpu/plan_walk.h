// A plan's instruction list, walked on the CPU: rows that stay in the first-level cache go through all
// instructions before the next row is looked at, so that each tensor is read from memory once and what the
// interpreter costs is shared by a thousand elements.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "common/plan_program.h"
#include "cpu/rows.h"

namespace latentfast {

// Elements of a row: seven of them (three values, two operands, a mask, the source) in 28 KB.
constexpr int kPlanRow = 1024;

template <typename T>
class PlanWalk : public PlanSizes {
 public:
  using C = Working<T>;
  static constexpr int kMost = kPlanRow;

  struct Room {
    alignas(64) C value[3][kPlanRow], operand[2][kPlanRow], mask[kPlanRow], source[kPlanRow];
  };

  // The value that the instructions before `stop` make.
  PlanWalk(std::span<const View> inputs, const PlanProgram& program, const View& coefficients, int stop)
      : PlanSizes(inputs[0]),
        program_(program),
        coefficients_(data<PlanCoefficients<C>>(coefficients)),
        stop_(stop) {
    const Shape target = shape_of(inputs[0]);
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (is_read(static_cast<int32_t>(i))) {
        tensors_[i].emplace(inputs[i].const_data_ptr(), inputs[i].scalar_type(), shape_of(inputs[i]), target,
                            "a plan's tensor");
      }
    }
    for (int64_t b = 0; b < batch; ++b) {
      if (turns(b)) whole_.resize(batch);
    }
    for (int64_t b = 0; b < static_cast<int64_t>(whole_.size()); ++b) {
      if (turns(b)) make_whole(b);
    }
  }

  // n ≤ kMost elements of it, from element `at` of a channel on.
  const C* read(int64_t b, int64_t c, int64_t at, int n, Room& room) const {
    const int64_t start = (b * channels + c) * elements() + at;
    if (!whole_.empty() && !whole_[b].empty()) return whole_[b].data() + (start - b * channels * elements());
    const C* x = tensors_[0]->read(start, n, room.source);
    for (int k = 0; k < stop_; ++k) x = apply(k, b, c, start, n, x, room);
    return x;
  }

  // The same of one of the tensors.
  const C* tensor(int32_t i, int64_t b, int64_t c, int64_t at, int n, C* buffer) const {
    return tensors_[i]->read((b * channels + c) * elements() + at, n, buffer);
  }

 private:
  bool is_read(int32_t i) const {
    if (i == 0) return true;
    for (int k = 0; k < program_.count; ++k) {
      const PlanInstruction& own = program_.at[k];
      if (own.mask == i || (own.operand == i && own.operation != PlanOperation::adain)) return true;
    }
    return false;
  }

  const C* coefficients(int k, int64_t b, int64_t c) const {
    return coefficients_[(k * batch + b) * channels + c].value;
  }

  double turn(int k, int64_t b) const {
    return kind_of(program_.at[k].operation) == PlanKind::mix ? coefficients(k, b, 0)[2] : 0.0;
  }

  // Whether a slerp of sample b goes through a turned vector, whose pairs of elements need not lie in one
  // row.
  bool turns(int64_t b) const {
    for (int k = 0; k < stop_ && channels > 0; ++k) {
      if (turn(k, b) != 0.0) return true;
    }
    return false;
  }

  // One of `rows` that x does not lie in.
  template <size_t kCount>
  static C* free_row(C (&rows)[kCount][kPlanRow], const C* x, const C* y = nullptr) {
    size_t i = 0;
    while (rows[i] == x || rows[i] == y) ++i;
    return rows[i];
  }

  // Instruction k on the row x at `start` of sample b; where the result lies.
  const C* apply(int k, int64_t b, int64_t c, int64_t start, int n, const C* x, Room& room) const {
    const auto& loop = loops_of<C>();
    const PlanInstruction& own = program_.at[k];
    const C* const f = coefficients(k, b, c);
    const C* const mask = own.mask < 0 ? nullptr : tensors_[own.mask]->read(start, n, room.mask);
    C* const out = free_row(room.value, x);
    const auto operand = [&] { return tensors_[own.operand]->read(start, n, free_row(room.operand, x)); };
    const C* made = out;
    switch (kind_of(own.operation)) {
      case PlanKind::add: {
        const Step<C> step{operand(), mask, f[0]};
        loop.add_steps[mask != nullptr](x, &step, 1, n, out, false);
        return out;
      }
      case PlanKind::affine:
        loop.affine(x, n, f[0], f[1], f[2], out);
        break;
      case PlanKind::tone:
        loop.tone_map[0](x, nullptr, n, f[0], out, false);
        break;
      case PlanKind::mix:
        made = mix(x, f[0], f[1], n, operand, out);
    }
    return masked(own, x, made, mask, n, free_row(room.value, x, out));
  }

  template <typename Operand>
  const C* mix(const C* x, C a, C b, int n, Operand&& operand, C* out) const {
    const auto& loop = loops_of<C>();
    if (b == 0) {
      if (a == 1) return x;
      loop.affine(x, n, C(0), a, C(0), out);
      return out;
    }
    const C* const y = operand();
    if (a == 0 && b == 1) return y;
    if (a == 0) {
      loop.affine(y, n, C(0), b, C(0), out);
    } else {
      loop.mix(x, y, n, a, b, out);
    }
    return out;
  }

  // `made` within the mask, x outside; the other way round for confine.
  static const C* masked(const PlanInstruction& own, const C* x, const C* made, const C* mask, int n,
                         C* out) {
    if (mask == nullptr) return made;
    const bool inside = own.operation != PlanOperation::confine;
    loops_of<C>().blend(inside ? x : made, inside ? made : x, mask, n, out, false);
    return out;
  }

  // Sample b as a whole, an instruction at a time: for vectors that a slerp turns.
  void make_whole(int64_t b) {
    const int64_t size = channels * elements();
    std::vector<C> x(size), y(size), made;
    Room room;
    const auto rows = [&](auto&& f) {
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < elements(); i += kPlanRow) {
          f(c, c * elements() + i, static_cast<int>(std::min<int64_t>(kPlanRow, elements() - i)));
        }
      }
    };
    const auto fill = [&](int32_t i, std::vector<C>& to) {
      rows([&](int64_t, int64_t at, int n) {
        std::copy_n(tensors_[i]->read(b * size + at, n, room.source), n, to.data() + at);
      });
    };
    fill(0, x);
    for (int k = 0; k < stop_; ++k) {
      const PlanInstruction& own = program_.at[k];
      if (turn(k, b) == 0.0) {
        rows([&](int64_t c, int64_t at, int n) {
          const C* const row = apply(k, b, c, b * size + at, n, x.data() + at, room);
          if (row != x.data() + at) std::copy_n(row, n, x.data() + at);
        });
        continue;
      }
      fill(own.operand, y);
      const C* const f = coefficients(k, b, 0);
      made.resize(size);
      for (int64_t i = 0; i < size; ++i) {
        const bool odd = i % 2 == 1, alone = !odd && i + 1 == size;
        const C partner = alone ? C(0) : odd ? x[i - 1] : -x[i + 1];
        made[i] = f[0] * x[i] + f[1] * y[i] + f[2] * partner;
      }
      rows([&](int64_t, int64_t at, int n) {
        const C* const mask = own.mask < 0 ? nullptr : tensors_[own.mask]->read(b * size + at, n, room.mask);
        const C* const row = masked(own, x.data() + at, made.data() + at, mask, n, room.value[0]);
        std::copy_n(row, n, x.data() + at);
      });
    }
    whole_[b] = std::move(x);
  }

  const PlanProgram& program_;
  const PlanCoefficients<C>* coefficients_;
  int stop_;
  std::array<std::optional<Broadcast<C>>, kMostPlanTensors> tensors_;
  std::vector<std::vector<C>> whole_;  // of samples that need it
};

}  // namespace latentfast
