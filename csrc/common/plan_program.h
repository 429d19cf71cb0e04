// The arguments of a plan's operators, checked: what their implementations on the CPU and on CUDA share.
#pragma once

#include <span>

#include "plan.h"
#include "stable.h"

namespace latentfast {

struct PlanProgram {
  int32_t count = 0;
  PlanInstruction at[kMostPlanInstructions];

  // `code`: kPlanNumbers integers an instruction, about `tensors` tensors, `sliders` and `rows` of
  // statistics.
  PlanProgram(std::span<const int64_t> code, int64_t tensors, int64_t sliders, int64_t rows) {
    const auto instructions = static_cast<int64_t>(code.size()) / kPlanNumbers;
    STD_TORCH_CHECK(static_cast<int64_t>(code.size()) == instructions * kPlanNumbers &&
                        instructions <= kMostPlanInstructions,
                    "a plan: at most ", kMostPlanInstructions, " instructions of ", kPlanNumbers,
                    " numbers expected, got ", code.size(), " numbers");
    count = static_cast<int32_t>(instructions);
    for (int k = 0; k < count; ++k) {
      const int64_t* const x = code.data() + k * kPlanNumbers;
      const bool known = x[0] >= 0 && x[0] <= static_cast<int64_t>(PlanOperation::unstandardize);
      const auto within = [](int64_t i, int64_t limit) { return i >= -1 && i < limit; };
      STD_TORCH_CHECK(known && within(x[1], tensors) && within(x[2], tensors) && within(x[3], sliders) &&
                          within(x[4], rows),
                      "a plan: instruction ", k, " names what is not there");
      at[k] = {static_cast<PlanOperation>(x[0]), static_cast<int32_t>(x[1]), static_cast<int32_t>(x[2]),
               static_cast<int32_t>(x[3]), static_cast<int32_t>(x[4])};
      const PlanKind kind = kind_of(at[k].operation);
      STD_TORCH_CHECK((kind != PlanKind::mix && kind != PlanKind::add) || at[k].operand >= 0,
                      "a plan: instruction ", k, " lacks its operand");
    }
  }
};

// The numbers of the tensors that a linear combination is made of; the first is the value itself.
struct PlanValues {
  int32_t count = 0;
  int32_t at[kMostPlanValues];

  PlanValues(std::span<const int64_t> values, int64_t tensors) : count(static_cast<int32_t>(values.size())) {
    STD_TORCH_CHECK(values.size() <= kMostPlanValues, "a plan: at most ", kMostPlanValues,
                    " values expected");
    for (int i = 0; i < count; ++i) {
      STD_TORCH_CHECK(values[i] < tensors && (i == 0 || values[i] >= 0), "a plan: no tensor ", values[i]);
      at[i] = static_cast<int32_t>(values[i]);
    }
  }

  // Where a tensor is among them, or -1.
  LATENTFAST_HD int find(int32_t tensor) const {
    for (int i = 0; i < count; ++i) {
      if (at[i] == tensor) return i;
    }
    return -1;
  }
};

// The sizes of a plan's source (B, C, T, H, W).
struct PlanSizes {
  int64_t batch, channels, frames, height, width;

  explicit PlanSizes(const View& source)
      : batch(source.size(0)),
        channels(source.size(1)),
        frames(source.size(2)),
        height(source.size(3)),
        width(source.size(4)) {}
  LATENTFAST_HD int64_t plane() const { return height * width; }
  LATENTFAST_HD int64_t elements() const { return frames * plane(); }  // of a channel
};

inline void check_plan_inputs(std::span<const View> inputs) {
  STD_TORCH_CHECK(!inputs.empty() && inputs.size() <= kMostPlanTensors, "a plan: 1 to ", kMostPlanTensors,
                  " tensors expected, got ", inputs.size());
  STD_TORCH_CHECK(inputs[0].dim() == 5, "a plan: the source must be (B, C, T, H, W)");
  for (const View& x : inputs) check_contiguous(x, "inputs");
}

}  // namespace latentfast
