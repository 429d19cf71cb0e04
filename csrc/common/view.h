// What the host side of an operator knows of a tensor. Operators take views, so that both doors to them, the
// dispatcher's (stable.h) and the direct one (csrc/python/direct.cpp), end in the same function.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "broadcast.h"

namespace latentfast {

using torch::headeronly::ScalarType;

// Borrowed: valid as long as the tensor that it was made from.
struct View {
  void* pointer;
  const int64_t* shape;
  int32_t dims;
  int32_t device;  // its index; what type of device is clear from the library
  ScalarType dtype;
  bool contiguous;

  int64_t dim() const { return dims; }
  int64_t size(int64_t d) const { return shape[d]; }
  int64_t numel() const {
    int64_t count = 1;
    for (int32_t d = 0; d < dims; ++d) count *= shape[d];
    return count;
  }
  ScalarType scalar_type() const { return dtype; }
  bool is_contiguous() const { return contiguous; }
  int32_t get_device_index() const { return device; }
  const void* const_data_ptr() const { return pointer; }
  void* mutable_data_ptr() const { return pointer; }
};
using OptionalView = std::optional<View>;

inline Shape shape_of(const View& x) { return {x.shape, x.dims}; }

}  // namespace latentfast
