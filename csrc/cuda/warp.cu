// warp_loss: a sample's loss is Σ w d² / Σ w with d = z[t+1](x + flow[t](x)) − z[t](x), sampled bilinearly, w
// the mask, and 0 where the flow leaves the frame; beside it its gradient in z. The specification is
// latentfast/reference/temporal.py.
//
// One cooperative launch. A thread takes a source pixel (t, y, x), works out its four taps once and goes
// through the channels; 256 pixels of a sample make one partial sum in double, and those are added in a fixed
// order by one block a sample.
//
// The gradient goes back to the taps, where pixels meet: a scatter. Floating-point atomics would add in the
// order of arrival, so the contributions are added as 64-bit integers, whose sum knows no order. Their unit
// is a power of two for each sample, from the largest |w d| found in the first phase: the largest sum that
// H·W contributions could make still fits, and with 14,400 pixels a frame a contribution keeps 48 bits below
// the largest. A sample whose gradient is not finite gets NaN throughout. Phases: partial sums (and zeros for
// the scatter) | losses and units | scatter | conversion.
#include <cooperative_groups.h>

#include <algorithm>

#include "columns.cuh"
#include "cooperative.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// What is summed over pixels: w·d², w, and the largest |w·d| (NaN if there is one).
struct Part {
  double value, weight, peak;
};

struct WarpParams {
  const void* z;
  const void* flow;
  const void* mask;  // or null
  void* grad;        // or null
  void* loss;
  Part* parts;                    // (batch, chunks)
  Part* totals;                   // (batch)
  unsigned long long* scattered;  // like z: the gradient in units of 2^-shift
  int64_t batch, channels, pairs, height, width;
  int64_t sample_stride, channel_stride, frame_stride;
  int64_t mask_strides[5];  // sample, channel, frame, y, x
  int64_t chunks, elements;
  double grad_scale;
  bool flow_is_float, mask_is_float, loss_is_double;
};

__device__ __forceinline__ double larger(double a, double b) { return b > a || b != b ? b : a; }

__device__ __forceinline__ Part combine(const Part& a, const Part& b) {
  return {a.value + b.value, a.weight + b.weight, larger(a.peak, b.peak)};
}

// The block's parts in a fixed tree; the total is valid in thread 0.
__device__ Part block_total(Part part, Part* shared) {
  for (int o = 16; o > 0; o /= 2) {
    const Part other = {__shfl_down_sync(~0u, part.value, o), __shfl_down_sync(~0u, part.weight, o),
                        __shfl_down_sync(~0u, part.peak, o)};
    part = combine(part, other);
  }
  __syncthreads();  // `shared` may still be read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kWarps; ++i) part = combine(part, shared[i]);
  }
  return part;
}

// A source pixel: where it and its taps lie, and the taps' fractions.
template <typename C>
struct Pixel {
  bool inside;
  int64_t at, place, mask_place;  // in its frame, in z, in the mask
  int64_t tap[4];                 // offsets within a frame: (y0, x0), (y0, x1), (y1, x0), (y1, x1)
  C fx, fy;
};

template <typename T>
__device__ Pixel<Wide<T>> pixel_of(const WarpParams& p, int64_t sample, int64_t index) {
  using C = Wide<T>;
  const int64_t area = p.height * p.width;
  const int64_t t = index / area, at = index - t * area;
  const int64_t y = at / p.width, x = at - y * p.width;
  const int64_t flow = (sample * 2 * p.pairs + t) * area + at;
  const C xs = static_cast<C>(x) + element_of<T>(p.flow, p.flow_is_float, flow);
  const C ys = static_cast<C>(y) + element_of<T>(p.flow, p.flow_is_float, flow + p.pairs * area);
  Pixel<C> pixel;
  // false for NaN as well
  pixel.inside =
      xs >= 0 && xs <= static_cast<C>(p.width - 1) && ys >= 0 && ys <= static_cast<C>(p.height - 1);
  if (!pixel.inside) return pixel;
  pixel.at = at;
  pixel.place = sample * p.sample_stride + t * p.frame_stride + at;
  pixel.mask_place =
      sample * p.mask_strides[0] + t * p.mask_strides[2] + y * p.mask_strides[3] + x * p.mask_strides[4];
  const C x_floor = floor(xs), y_floor = floor(ys);
  pixel.fx = xs - x_floor;
  pixel.fy = ys - y_floor;
  const int64_t x0 = static_cast<int64_t>(x_floor), x1 = min(x0 + 1, p.width - 1);
  const int64_t y0 = static_cast<int64_t>(y_floor), y1 = min(y0 + 1, p.height - 1);
  pixel.tap[0] = y0 * p.width + x0;
  pixel.tap[1] = y0 * p.width + x1;
  pixel.tap[2] = y1 * p.width + x0;
  pixel.tap[3] = y1 * p.width + x1;
  return pixel;
}

// w and d of a pixel in one channel; d is 0 where w is, even beside a NaN.
template <typename T>
__device__ __forceinline__ void difference(const WarpParams& p, const Pixel<Wide<T>>& pixel, int64_t channel,
                                           Wide<T>& w, Wide<T>& d) {
  using C = Wide<T>;
  w = p.mask == nullptr
          ? C(1)
          : element_of<T>(p.mask, p.mask_is_float, pixel.mask_place + channel * p.mask_strides[1]);
  d = 0;
  if (w == 0) return;
  const T* const here = static_cast<const T*>(p.z) + pixel.place + channel * p.channel_stride;
  const T* const next = here + p.frame_stride - pixel.at;
  C tap[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) tap[i] = widen(next[pixel.tap[i]]);
  const C top = tap[0] * (1 - pixel.fx) + tap[1] * pixel.fx,
          bottom = tap[2] * (1 - pixel.fx) + tap[3] * pixel.fx;
  d = top * (1 - pixel.fy) + bottom * pixel.fy - widen(*here);
}

// What turns w·d into a gradient, and the power of two that turns a gradient into integers.
struct Unit {
  double factor;
  int shift;
  bool finite;
};

__device__ Unit unit_of(const WarpParams& p, int64_t sample) {
  const double weight = __ldcg(&p.totals[sample].weight), peak = __ldcg(&p.totals[sample].peak);
  Unit unit = {0.0, 0, true};
  if (weight == 0) return unit;
  unit.factor = 2 * p.grad_scale / weight;
  // an element gathers at most one whole contribution from each pixel of the frame before, and its own
  const double most = static_cast<double>(p.height * p.width + 1) * fabs(unit.factor) * peak;
  unit.finite = isfinite(most);
  if (unit.finite && most > 0) {
    int exponent;
    frexp(most, &exponent);
    unit.shift = 62 - exponent;
  }
  return unit;
}

__device__ __forceinline__ void scatter(unsigned long long* to, double gradient, int shift) {
  atomicAdd(to, static_cast<unsigned long long>(__double2ll_rn(ldexp(gradient, shift))));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) warp_kernel(const __grid_constant__ WarpParams p) {
  using C = Wide<T>;
  __shared__ Part shared[kWarps];
  const auto grid = cooperative_groups::this_grid();
  const int64_t pixels = p.pairs * p.height * p.width;
  const int64_t thread = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t threads = gridDim.x * static_cast<int64_t>(kThreads);

  if (p.grad != nullptr) {
    for (int64_t i = thread; i < p.elements; i += threads) p.scattered[i] = 0;
  }
  for (int64_t item = blockIdx.x; item < p.batch * p.chunks; item += gridDim.x) {
    const int64_t sample = item / p.chunks, index = (item - sample * p.chunks) * kThreads + threadIdx.x;
    Part part = {0.0, 0.0, 0.0};
    if (index < pixels) {
      const Pixel<C> pixel = pixel_of<T>(p, sample, index);
      for (int64_t c = 0; pixel.inside && c < p.channels; ++c) {
        C w, d;
        difference<T>(p, pixel, c, w, d);
        const C weighted = w * d;
        part = combine(part, {static_cast<double>(weighted * d), static_cast<double>(w),
                              static_cast<double>(fabs(weighted))});
      }
    }
    part = block_total(part, shared);
    if (threadIdx.x == 0) p.parts[item] = part;
  }
  grid.sync();

  for (int64_t sample = blockIdx.x; sample < p.batch; sample += gridDim.x) {
    Part total = {0.0, 0.0, 0.0};
    for (int64_t i = threadIdx.x; i < p.chunks; i += kThreads) {
      const Part* part = p.parts + sample * p.chunks + i;
      total = combine(total, {__ldcg(&part->value), __ldcg(&part->weight), __ldcg(&part->peak)});
    }
    total = block_total(total, shared);
    if (threadIdx.x == 0) {
      p.totals[sample] = total;
      const double loss = total.weight == 0 ? 0 : total.value / total.weight;
      if (p.loss_is_double) {
        static_cast<double*>(p.loss)[sample] = loss;
      } else {
        static_cast<float*>(p.loss)[sample] = static_cast<float>(loss);
      }
    }
  }
  if (p.grad == nullptr) return;
  grid.sync();

  for (int64_t item = blockIdx.x; item < p.batch * p.chunks; item += gridDim.x) {
    const int64_t sample = item / p.chunks, index = (item - sample * p.chunks) * kThreads + threadIdx.x;
    const Unit unit = unit_of(p, sample);
    if (index >= pixels || unit.factor == 0 || !unit.finite) continue;
    const Pixel<C> pixel = pixel_of<T>(p, sample, index);
    for (int64_t c = 0; pixel.inside && c < p.channels; ++c) {
      C w, d;
      difference<T>(p, pixel, c, w, d);
      if (w == 0) continue;
      const double slope = unit.factor * static_cast<double>(w * d);
      const double fx = pixel.fx, fy = pixel.fy;
      unsigned long long* const here = p.scattered + pixel.place + c * p.channel_stride;
      unsigned long long* const next = here + p.frame_stride - pixel.at;
      scatter(here, -slope, unit.shift);
      scatter(next + pixel.tap[0], slope * (1 - fx) * (1 - fy), unit.shift);
      scatter(next + pixel.tap[1], slope * fx * (1 - fy), unit.shift);
      scatter(next + pixel.tap[2], slope * (1 - fx) * fy, unit.shift);
      scatter(next + pixel.tap[3], slope * fx * fy, unit.shift);
    }
  }
  grid.sync();

  for (int64_t i = thread; i < p.elements; i += threads) {
    const Unit unit = unit_of(p, i / p.sample_stride);
    const double sum = static_cast<double>(static_cast<long long>(__ldcg(p.scattered + i)));
    const double gradient = unit.finite ? ldexp(sum, -unit.shift) : nan("");
    static_cast<T*>(p.grad)[i] = narrow<T>(static_cast<C>(gradient));
  }
}

void warp_loss(Tensor z, Tensor flow, OptionalTensor mask, double grad_scale, int64_t frame_dim, Tensor loss,
               OptionalTensor grad) {
  STD_TORCH_CHECK(z.dim() == 5 && (frame_dim == 1 || frame_dim == 2),
                  "warp_loss: z must have 5 dimensions, frames along 1 or 2");
  check_contiguous(z, "z");
  check_contiguous(flow, "flow");
  check_companion(flow, z, "flow");
  if (mask) {
    check_contiguous(*mask, "mask");
    check_companion(*mask, z, "mask");
  }
  if (grad) check_contiguous(*grad, "grad");
  const int frame = static_cast<int>(frame_dim), channel = 3 - frame;
  const Shape shape = shape_of(z);
  WarpParams p{};
  p.batch = shape.sizes[0];
  if (p.batch == 0) return;
  p.z = z.const_data_ptr();
  p.flow = flow.const_data_ptr();
  p.mask = mask ? mask->const_data_ptr() : nullptr;
  p.grad = grad ? grad->mutable_data_ptr() : nullptr;
  p.loss = loss.mutable_data_ptr();
  p.channels = shape.sizes[channel];
  p.height = shape.sizes[3];
  p.width = shape.sizes[4];
  p.elements = z.numel();
  p.pairs = p.elements == 0 ? 0 : std::max<int64_t>(shape.sizes[frame] - 1, 0);
  const int64_t area = p.height * p.width;
  p.sample_stride = p.elements / p.batch;
  p.channel_stride = channel == 2 ? area : shape.sizes[2] * area;
  p.frame_stride = frame == 2 ? area : shape.sizes[2] * area;
  if (mask) {
    const Shape own = shape_of(*mask);
    const int dims[5] = {0, channel, frame, 3, 4};
    for (int i = 0; i < 5; ++i) p.mask_strides[i] = broadcast_stride(own, dims[i], 5);
  }
  p.chunks = ceil_div<int64_t>(p.pairs * area, kThreads);
  p.grad_scale = grad_scale;
  p.flow_is_float = flow.scalar_type() == ScalarType::Float;
  p.mask_is_float = mask && mask->scalar_type() == ScalarType::Float;
  p.loss_is_double = loss.scalar_type() == ScalarType::Double;

  const Target target(z);
  const int64_t parts = p.batch * (p.chunks + 1) * static_cast<int64_t>(sizeof(Part));
  const Workspace workspace(target, parts + (grad ? p.elements * 8 : 0));
  p.parts = static_cast<Part*>(workspace.data());
  p.totals = p.parts + p.batch * p.chunks;
  p.scattered = reinterpret_cast<unsigned long long*>(p.totals + p.batch);
  dispatch_floating(z.scalar_type(), "warp_loss", [&]<typename T>() {
    const int64_t wanted =
        std::max(p.batch * std::max<int64_t>(p.chunks, 1), ceil_div<int64_t>(p.elements, 4 * kThreads));
    const int64_t blocks = std::min(wanted, resident_blocks<warp_kernel<T>, kThreads>(target));
    launch_together<warp_kernel<T>, kThreads>(p, blocks, target, "warp_loss");
  });
}

}  // namespace
}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("warp_loss", TORCH_BOX(&latentfast::cuda::warp_loss));
}
