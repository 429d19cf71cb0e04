// The arguments of combine, checked: what its implementations on the CPU and on CUDA share.
#pragma once

#include <algorithm>
#include <array>
#include <span>

#include "operators.h"
#include "stable.h"

namespace latentfast {

struct Combination {
  Combination(std::span<const View> terms, std::span<const double> numbers, const View& out,
              const OptionalView& out1, const OptionalView& out2, const OptionalView& out3)
      : tensors(terms), coefficients(numbers), views_{out} {
    size_t count = 1;
    for (const OptionalView* x : {&out1, &out2, &out3}) {
      if (x->has_value()) views_[count++] = **x;
    }
    outs = {views_.data(), count};
    STD_TORCH_CHECK(!tensors.empty() && tensors.size() <= kMostCombined, "combine: 1 to ", kMostCombined,
                    " tensors expected, got ", tensors.size());
    STD_TORCH_CHECK(tensors.size() * count == coefficients.size(), "combine: a row of ", tensors.size(),
                    " coefficients for each of ", count, " outputs expected, got ", coefficients.size());
    for (const View& x : tensors) check(x, "tensors");
    for (const View& x : outs) check(x, "out");
  }
  Combination(const Combination&) = delete;  // `outs` looks into `views_`

  // The coefficients of an output.
  const double* row(size_t out) const { return coefficients.data() + out * tensors.size(); }

  bool all_of(ScalarType dtype) const {
    const auto same = [&](const View& x) { return x.scalar_type() == dtype; };
    return std::ranges::all_of(tensors, same) && std::ranges::all_of(outs, same);
  }
  bool has(ScalarType dtype) const {
    const auto same = [&](const View& x) { return x.scalar_type() == dtype; };
    return std::ranges::any_of(tensors, same) || std::ranges::any_of(outs, same);
  }

  std::span<const View> tensors, outs;
  std::span<const double> coefficients;

 private:
  void check(const View& x, const char* name) const {
    check_contiguous(x, name);
    STD_TORCH_CHECK(x.numel() == views_[0].numel(), "combine: ", name, " must have ", views_[0].numel(),
                    " elements, got ", x.numel());
  }

  std::array<View, kMostCombinations> views_;
};

}  // namespace latentfast
