// warp_loss: a sample's loss is Σ w d² / Σ w with d = z[t+1](x + flow[t](x)) − z[t](x), sampled bilinearly, w
// the mask, and 0 where the flow leaves the frame; beside it its gradient in z. The specification is
// latentfast/reference/temporal.py.
//
// Two launches. The first, cooperative, makes the losses: a thread takes a source pixel (t, y, x), works out
// its four taps once and goes through the channels; 256 pixels of a sample make one partial sum in double,
// and those are added in a fixed order by one block a sample.
//
// The gradient goes back to the taps, where pixels meet: a scatter. A block owns a frame of one channel (or a
// band of it) and goes through the pixels of the frame before, whose taps lie there, adding in shared memory;
// then it adds each pixel's own share. Every difference is computed twice for that, which costs less than
// atomics in global memory. Floating-point atomics would add in the order of arrival, so the contributions
// are added as 64-bit integers, whose sum knows no order. Their unit is a power of two for each sample, from
// the largest |w d| found by the first kernel: the largest sum that H·W contributions could make still fits,
// and with 14,400 pixels a frame a contribution keeps 48 bits below the largest. A sample whose gradient is
// not finite gets NaN throughout.
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
  Part* parts;   // (batch, chunks)
  Part* totals;  // (batch)
  int64_t batch, channels, frames, pairs, height, width;
  int64_t sample_stride, channel_stride, frame_stride;
  int64_t mask_strides[5];  // sample, channel, frame, y, x
  int64_t chunks;
  int64_t bands, band;  // a frame's bands, and the pixels of one
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

// Division in 32 bits, where that does, is several times as fast.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) <= UINT32_MAX ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
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
__device__ __forceinline__ Pixel<Wide<T>> pixel_of(const WarpParams& p, int64_t sample, int64_t t,
                                                   int64_t at) {
  using C = Wide<T>;
  const int64_t area = p.height * p.width;
  const int64_t y = quotient(at, p.width), x = at - y * p.width;
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

// What a pixel's difference in one channel sends back, in integer units.
template <typename T>
__device__ __forceinline__ double slope_of(const WarpParams& p, const Pixel<Wide<T>>& pixel, int64_t channel,
                                           const Unit& unit) {
  Wide<T> w, d;
  difference<T>(p, pixel, channel, w, d);
  return ldexp(unit.factor * static_cast<double>(w * d), unit.shift);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) warp_kernel(const __grid_constant__ WarpParams p) {
  using C = Wide<T>;
  __shared__ Part shared[kWarps];
  const auto grid = cooperative_groups::this_grid();
  const int64_t area = p.height * p.width, pixels = p.pairs * area;

  for (int64_t item = blockIdx.x; item < p.batch * p.chunks; item += gridDim.x) {
    const int64_t sample = item / p.chunks, index = (item - sample * p.chunks) * kThreads + threadIdx.x;
    Part part = {0.0, 0.0, 0.0};
    if (index < pixels) {
      const int64_t t = quotient(index, area);
      const Pixel<C> pixel = pixel_of<T>(p, sample, t, index - t * area);
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
}

constexpr int kPlaneThreads = 512;

// A sum of 64 bits in two words a plane apart, whose banks neighbouring pixels do not share: shared memory
// adds words at once, but 64 bits by trying again and again.
__device__ __forceinline__ void add_wide(uint32_t* low, uint32_t* high, double contribution) {
  const int64_t bits = __double2ll_rn(contribution);
  const uint32_t addend = static_cast<uint32_t>(bits);
  const uint32_t carry = atomicAdd(low, addend) > ~addend ? 1 : 0;
  const uint32_t rest = static_cast<uint32_t>(bits >> 32) + carry;
  if (rest != 0) atomicAdd(high, rest);
}

template <typename T>
__global__ void __launch_bounds__(kPlaneThreads, 2)
    warp_gradient_kernel(const __grid_constant__ WarpParams p) {
  using C = Wide<T>;
  extern __shared__ uint32_t plane[];
  uint32_t *const low = plane, *const high = plane + p.band;
  int64_t item = blockIdx.x;  // (sample, frame, channel, band)
  const auto next = [&item](int64_t size) {
    const int64_t rest = quotient(item, size), index = item - rest * size;
    item = rest;
    return index;
  };
  const int64_t begin = next(p.bands) * p.band, channel = next(p.channels), t = next(p.frames), sample = item;
  const int64_t area = p.height * p.width, end = min(begin + p.band, area);
  const Unit unit = unit_of(p, sample);
  const bool moves = unit.finite && unit.factor != 0;

  for (int64_t i = threadIdx.x; i < 2 * p.band; i += kPlaneThreads) plane[i] = 0;
  __syncthreads();
  if (t > 0 && moves) {
    for (int64_t at = threadIdx.x; at < area; at += kPlaneThreads) {
      const Pixel<C> pixel = pixel_of<T>(p, sample, t - 1, at);
      if (!pixel.inside) continue;
      if (pixel.tap[0] >= end || pixel.tap[3] < begin) continue;
      const double slope = slope_of<T>(p, pixel, channel, unit);
      if (slope == 0) continue;
      const double fx = pixel.fx, fy = pixel.fy;
      const double share[4] = {(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t to = pixel.tap[i] - begin;
        if (to >= 0 && pixel.tap[i] < end) add_wide(low + to, high + to, slope * share[i]);
      }
    }
  }
  __syncthreads();
  T* const out =
      static_cast<T*>(p.grad) + sample * p.sample_stride + t * p.frame_stride + channel * p.channel_stride;
  for (int64_t at = begin + threadIdx.x; at < end; at += kPlaneThreads) {
    int64_t sum = static_cast<int64_t>(static_cast<uint64_t>(high[at - begin]) << 32 | low[at - begin]);
    if (t < p.pairs && moves) {
      const Pixel<C> pixel = pixel_of<T>(p, sample, t, at);
      if (pixel.inside) sum -= __double2ll_rn(slope_of<T>(p, pixel, channel, unit));
    }
    const double gradient = unit.finite ? ldexp(static_cast<double>(sum), -unit.shift) : nan("");
    out[at] = narrow<T>(static_cast<C>(gradient));
  }
}

// Bytes of shared memory that a block may have. Asked for once a device.
template <typename T>
int64_t shared_bytes(const Target& target) {
  static std::array<std::atomic<int>, kMaxDevices> known;
  int bytes = known[target.index].load(std::memory_order_relaxed);
  if (bytes == 0) {
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, target.index),
          "cudaDeviceGetAttribute");
    check(cudaFuncSetAttribute(warp_gradient_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "cudaFuncSetAttribute");
    known[target.index].store(bytes, std::memory_order_relaxed);
  }
  return bytes;
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
  p.frames = shape.sizes[frame];
  const int64_t elements = z.numel();
  p.pairs = elements == 0 ? 0 : std::max<int64_t>(p.frames - 1, 0);
  const int64_t area = p.height * p.width;
  p.sample_stride = elements / p.batch;
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
  const Workspace workspace(target, p.batch * (p.chunks + 1) * static_cast<int64_t>(sizeof(Part)));
  p.parts = static_cast<Part*>(workspace.data());
  p.totals = p.parts + p.batch * p.chunks;
  dispatch_floating(z.scalar_type(), "warp_loss", [&]<typename T>() {
    const int64_t blocks =
        std::min(p.batch * std::max<int64_t>(p.chunks, 1), resident_blocks<warp_kernel<T>, kThreads>(target));
    launch_together<warp_kernel<T>, kThreads>(p, blocks, target, "warp_loss");
    if (!grad || elements == 0) return;
    constexpr int64_t kSum = sizeof(int64_t);
    p.bands = ceil_div(area * kSum, shared_bytes<T>(target));
    p.band = ceil_div(area, p.bands);
    const int64_t planes = p.batch * p.frames * p.channels * p.bands;
    STD_TORCH_CHECK(planes <= INT32_MAX, "warp_loss: a tensor of ", elements, " elements is too large");
    warp_gradient_kernel<T>
        <<<static_cast<uint32_t>(planes), kPlaneThreads, p.band * kSum, target.stream>>>(p);
    check_launch("warp_loss");
  });
}

}  // namespace
}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("warp_loss", TORCH_BOX(&latentfast::cuda::warp_loss));
}
