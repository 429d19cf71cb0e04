// Broadcasting without torch: how the elements of several contiguous, right-aligned operands meet those of
// one target shape, with neighbouring dimensions joined wherever every operand walks them alike.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace latentfast {

constexpr int kMaxDims = 16;  // after joining; a video needs 6 at most

// A borrowed shape.
struct Shape {
  const int64_t* sizes;
  int dims;
};

// The joined dimensions of a target, outermost first, and the strides (in elements, 0 = broadcast) of N
// operands in them.
template <int N>
struct Joined {
  int dims = 0;
  int64_t size[kMaxDims];
  int64_t stride[N][kMaxDims];

  LATENTFAST_HD int64_t numel() const {
    int64_t count = 1;
    for (int d = 0; d < dims; ++d) count *= size[d];
    return count;
  }

  // Where the target's element `index` (row-major) lies in each operand.
  LATENTFAST_HD void offsets(int64_t index, int64_t (&out)[N]) const {
    for (int k = 0; k < N; ++k) out[k] = 0;
    for (int d = dims - 1; d >= 0; --d) {
      const int64_t rest = index / size[d], i = index - rest * size[d];
      for (int k = 0; k < N; ++k) out[k] += i * stride[k][d];
      index = rest;
    }
  }
};

// The stride of dimension `dim` of a target with `target_dims` dimensions in a contiguous operand aligned at
// the right: 0 where the operand has size 1 there, or no such dimension.
inline int64_t broadcast_stride(Shape operand, int dim, int target_dims) {
  const int d = dim - (target_dims - operand.dims);
  if (d < 0 || operand.sizes[d] == 1) return 0;
  int64_t stride = 1;
  for (int i = operand.dims - 1; i > d; --i) stride *= operand.sizes[i];
  return stride;
}

// Join the dimensions [first, last) of `target` for `operands`; false if more than kMaxDims are left.
// The result of an empty range is one dimension of size 1, so that the kernels need no special case.
template <int N>
bool join_dims(Shape target, int first, int last, const Shape (&operands)[N], Joined<N>& out) {
  out.dims = 0;
  for (int d = first; d < last; ++d) {
    const int64_t size = target.sizes[d];
    if (size == 1) continue;
    int64_t stride[N];
    bool joins = out.dims > 0;
    for (int k = 0; k < N; ++k) {
      stride[k] = broadcast_stride(operands[k], d, target.dims);
      joins = joins && out.stride[k][out.dims - 1] == stride[k] * size;
    }
    if (!joins && out.dims == kMaxDims) return false;
    const int slot = joins ? out.dims - 1 : out.dims++;
    out.size[slot] = joins ? out.size[slot] * size : size;
    for (int k = 0; k < N; ++k) out.stride[k][slot] = stride[k];
  }
  if (out.dims == 0) {
    out.dims = 1;
    out.size[0] = 1;
    for (int k = 0; k < N; ++k) out.stride[k][0] = 0;
  }
  return true;
}

}  // namespace latentfast
