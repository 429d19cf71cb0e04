// temporal_loss on the GPU: the latents split into rows, frames and positions, and the launch. The kernel and
// what it does are in temporal.cuh.
#include <algorithm>

#include "../common/operators.h"
#include "cooperative.cuh"
#include "temporal.cuh"

namespace latentfast::cuda::temporal {
namespace {

int64_t items_of(const TemporalParams& p, int vec, int rows) {
  return p.batch * (p.rows / rows) * (p.granules / vec);
}

template <auto kKernel>
void launch_temporal(TemporalParams& p, int vec, int rows, const Target& target) {
  const int64_t items = items_of(p, vec, rows);
  STD_TORCH_CHECK(items < INT32_MAX && p.frames < INT32_MAX, "temporal_loss: latents are too large");
  const int64_t most = resident_blocks<kKernel, kThreads>(target), each = target.device.multiprocessors;
  const int64_t blocks =
      std::clamp<int64_t>(std::max(ceil_div<int64_t>(items, kWarps), std::min(items, each)), 1, most);
  p.spread = items <= blocks * kWarps;
  launch_together<kKernel, kThreads>(p, blocks, target, "temporal_loss");
}

template <typename T, typename M, int V, bool kMask, bool kGrad, bool kSecond, bool kSquare>
void launch_rows(TemporalParams& p, const Target& target) {
  constexpr int R = kMask ? kRows<T> : 1;
  const int last = p.row_dims.dims - 1;
  // where rows together would leave multiprocessors without work, each has its own warp
  const bool many = items_of(p, V, R) >= kWarps * static_cast<int64_t>(target.device.multiprocessors);
  if (R > 1 && many && p.row_dims.stride[1][last] == 0 && p.row_dims.size[last] % R == 0)
    return launch_temporal<temporal_kernel<T, M, V, R, kMask, kGrad, kSecond, kSquare>>(p, V, R, target);
  launch_temporal<temporal_kernel<T, M, V, 1, kMask, kGrad, kSecond, kSquare>>(p, V, 1, target);
}

template <typename T, typename M, int V, bool kMask, bool kGrad, bool kSecond>
void launch_norm(TemporalParams& p, const Target& target) {
  if (p.norm == kL2) return launch_rows<T, M, V, kMask, kGrad, kSecond, true>(p, target);
  launch_rows<T, M, V, kMask, kGrad, kSecond, false>(p, target);
}

template <typename T, typename M, int V, bool kMask>
void launch_columns(TemporalParams& p, const Target& target) {
  if (p.second != 0) {
    if (p.grad != nullptr) return launch_norm<T, M, V, kMask, true, true>(p, target);
    return launch_norm<T, M, V, kMask, false, true>(p, target);
  }
  if (p.grad != nullptr) return launch_norm<T, M, V, kMask, true, false>(p, target);
  launch_norm<T, M, V, kMask, false, false>(p, target);
}

template <typename T>
void dispatch_columns(TemporalParams& p, const OptionalView& mask, const Target& target) {
  constexpr int V = kColumns;
  if constexpr (sizeof(T) < 8) {
    if (p.positions % V == 0 && aligned16(p.z) && aligned16(p.ref) && aligned16(p.mask) &&
        aligned16(p.grad)) {
      if (!mask) return launch_columns<T, T, V, false>(p, target);
      return dispatch_mask<T>(mask, [&]<typename M>() { launch_columns<T, M, V, true>(p, target); });
    }
  }
  if (p.grad != nullptr)
    return launch_temporal<temporal_kernel<T, T, 1, 1, true, true, true, false>>(p, 1, 1, target);
  launch_temporal<temporal_kernel<T, T, 1, 1, true, false, true, false>>(p, 1, 1, target);
}

// The dimensions around the frames: all but the innermost run of positions are rows.
void split_dims(TemporalParams& p, Shape shape, Shape mask, int frame_dim) {
  Joined<2> before, after;
  const bool fits = join_dims<2>(shape, 1, frame_dim, {shape, mask}, before) &&
                    join_dims<2>(shape, frame_dim + 1, shape.dims, {shape, mask}, after) &&
                    before.dims + after.dims <= kMaxDims;
  STD_TORCH_CHECK(fits, "temporal_loss: too many dimensions that broadcast differently");
  const int last = after.dims - 1;
  p.positions = after.size[last];
  p.mask_position_stride = after.stride[1][last];
  p.rows = p.mask_rows = 1;
  p.row_dims.dims = p.mask_row_dims.dims = 0;
  const auto add = [&](const Joined<2>& from, int d) {
    const int slot = p.row_dims.dims++;
    p.row_dims.size[slot] = from.size[d];
    for (int k = 0; k < 2; ++k) p.row_dims.stride[k][slot] = from.stride[k][d];
    p.rows *= from.size[d];
    if (from.stride[1][d] == 0) return;
    const int own = p.mask_row_dims.dims++;
    p.mask_row_dims.size[own] = from.size[d];
    p.mask_row_dims.stride[0][own] = from.stride[1][d];
    p.mask_rows *= from.size[d];
  };
  for (int d = 0; d < before.dims; ++d) add(before, d);
  for (int d = 0; d < last; ++d) add(after, d);
  p.row_stride = p.row_dims.stride[0][p.row_dims.dims - 1];
}

}  // namespace
}  // namespace latentfast::cuda::temporal

void latentfast::temporal_loss(const View& z, const OptionalView& ref, const OptionalView& mask, double first,
                               double second, int64_t norm, double eps, double grad_scale, int64_t frame_dim,
                               const View& loss, const OptionalView& grad) {
  using namespace cuda;
  using namespace cuda::temporal;
  const Shape shape = shape_of(z);
  const int64_t batch = shape.sizes[0];
  if (batch == 0) return;
  check_contiguous(z, "z");
  if (ref) check_contiguous(*ref, "ref");
  if (mask) {
    check_contiguous(*mask, "mask");
    check_companion(*mask, z, "mask");
  }
  if (grad) check_contiguous(*grad, "grad");
  const Shape mask_shape = mask ? shape_of(*mask) : shape;
  TemporalParams p{};
  p.z = z.const_data_ptr();
  p.ref = ref ? ref->const_data_ptr() : nullptr;
  p.mask = mask ? mask->const_data_ptr() : nullptr;
  p.grad = grad ? grad->mutable_data_ptr() : nullptr;
  p.loss = loss.mutable_data_ptr();
  p.batch = batch;
  p.frames = shape.sizes[frame_dim];
  split_dims(p, shape, mask_shape, static_cast<int>(frame_dim));
  if (z.numel() == 0) p.rows = 0;  // nothing to walk through: the losses are 0
  p.granules = ceil_div<int64_t>(p.positions, kGranule * kUnitGranules) * kUnitGranules;
  p.sample_stride = z.numel() / batch;
  p.frame_stride = broadcast_stride(shape, static_cast<int>(frame_dim), shape.dims);
  p.mask_sample_stride = broadcast_stride(mask_shape, 0, shape.dims);
  p.mask_frame_stride = broadcast_stride(mask_shape, static_cast<int>(frame_dim), shape.dims);
  p.mask_batch = p.mask_sample_stride != 0 ? batch : 1;
  p.first = p.frames > 1 ? first : 0;
  p.second = p.frames > 2 ? second : 0;
  const double columns = static_cast<double>(p.rows) * static_cast<double>(p.positions);
  const double copies = static_cast<double>(p.rows) / static_cast<double>(p.mask_rows);
  p.count_first = mask ? copies : columns * static_cast<double>(p.frames - 1);
  p.count_second = mask ? copies : columns * static_cast<double>(p.frames - 2);
  p.eps = eps;
  p.grad_scale = grad_scale;
  p.norm = static_cast<int>(norm);
  p.mask_is_float = mask && mask->scalar_type() == ScalarType::Float;
  p.loss_is_double = loss.scalar_type() == ScalarType::Double;

  const Target target(z);
  const int64_t loss_count = batch * p.rows * p.granules;
  const int64_t weight_slices = Slices(p.mask_rows * (p.granules / kUnitGranules)).used;
  const int64_t weight_count = !mask ? 0 : p.mask_batch * (grad ? weight_slices : p.mask_rows * p.granules);
  const Workspace workspace(target, (loss_count + weight_count) * static_cast<int64_t>(sizeof(double2)));
  p.loss_sums = static_cast<double2*>(workspace.data());
  p.weight_sums = p.loss_sums + loss_count;
  dispatch_floating(z.scalar_type(), "temporal_loss", [&]<typename T>() {
    constexpr int64_t kBytes = sizeof(T);
    p.frame_bytes = p.frame_stride * kBytes;
    p.row_bytes = p.row_stride * kBytes;
    p.mask_frame_bytes = p.mask_frame_stride * (p.mask_is_float ? 4 : kBytes);
    dispatch_columns<T>(p, mask, target);
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("temporal_loss", LATENTFAST_BOX(latentfast::temporal_loss));
}
