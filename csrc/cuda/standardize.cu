// standardize and tone_map on CUDA. The specification is latentfast/reference/stats.py.
//
// Both are one pass in packs of 16 bytes that memory bounds, to and from tokens as well (repack.cuh).
#include <numbers>
#include <span>

#include "gate.cuh"
#include "repack.cuh"
#include "upload.cuh"

namespace latentfast::cuda {
namespace {

// The affines of the VAE's channels, from numbers that come by value or lie on the device, put into shared
// memory.
template <typename C>
struct OfChannels {
  static constexpr int kMost = 1536 / sizeof(C);  // what a kernel's arguments have room for
  struct Table {
    Affine<C> affines[kMost];
  };
  const C* mean;  // null: `host`
  const C* std;   // null: `host`
  C scale;
  bool inverse;
  int64_t channels;
  struct {
    C mean, gain;
  } host[kMost];

  __device__ __forceinline__ Affine<C> affine(int64_t c) const {
    const C middle = mean == nullptr ? host[c].mean : mean[c];
    const C gain = std == nullptr ? host[c].gain : (inverse ? std[c] / scale : scale / std[c]);
    return inverse ? Affine<C>{C(0), gain, middle} : Affine<C>{middle, gain, C(0)};
  }
  __device__ void prepare(Table& table) const {
    for (int c = threadIdx.x; c < static_cast<int>(channels); c += blockDim.x) table.affines[c] = affine(c);
    __syncthreads();
  }
  __device__ __forceinline__ Affine<C> of(const Table& table, int64_t, int64_t channel) const {
    return table.affines[channel];
  }
};

enum Layout : int { kSame, kPackTokens, kUnpackTokens };

// Affines of more channels than a kernel keeps at hand.
template <typename C>
__global__ void __launch_bounds__(kThreads)
    channel_affines_kernel(const __grid_constant__ OfChannels<C> source, Affine<C>* affines) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c < source.channels) affines[c] = source.affine(c);
}

// f(source) with the numbers of the VAE's channels.
template <typename C, typename F>
void with_channels(const Target& target, const OptionalView& mean, const OptionalView& std,
                   std::span<const double> host_mean, std::span<const double> host_std, double scale,
                   bool inverse, int64_t channels, F&& f) {
  OfChannels<C> source{};
  source.mean = data_or_null<C>(mean);
  source.std = data_or_null<C>(std);
  source.scale = static_cast<C>(scale);
  source.inverse = inverse;
  source.channels = channels;
  if (channels <= OfChannels<C>::kMost) {
    for (size_t c = 0; c < host_mean.size(); ++c) source.host[c].mean = static_cast<C>(host_mean[c]);
    for (size_t c = 0; c < host_std.size(); ++c)
      source.host[c].gain = static_cast<C>(inverse ? host_std[c] / scale : scale / host_std[c]);
    f(source);
    return;
  }
  const Workspace scratch(target, channels * static_cast<int64_t>(sizeof(Affine<C>) + 2 * sizeof(C)));
  Affine<C>* const affines = static_cast<Affine<C>*>(scratch.data());
  C* const numbers = reinterpret_cast<C*>(affines + channels);
  if (source.mean == nullptr) {
    source.mean = numbers;
    host_mean.empty() ? check(cudaMemsetAsync(numbers, 0, channels * sizeof(C), target.stream), "standardize")
                      : upload(host_mean, numbers, target.stream);
  }
  if (source.std == nullptr) {
    source.std = numbers + channels;
    upload(host_std, numbers + channels, target.stream);
  }
  channel_affines_kernel<<<static_cast<unsigned>(ceil_div<int64_t>(channels, kThreads)), kThreads, 0,
                           target.stream>>>(source, affines);
  check_launch("standardize");
  f(Remembered<C>{affines, true});
}

// --- tone map ---

// V elements a thread: 40 MB are ten rounds of blocks. With four packs a thread they were three and a third,
// and most of the card stood idle in the last.
template <typename T, int V, bool kSlope>
__global__ void __launch_bounds__(kThreads)
    tone_map_kernel(const T* z, const T* grad, T* out, int64_t count, Wide<T> steepness, Wide<T> octaves,
                    Wide<T> depth) {
  using C = Wide<T>;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V;
  if (at >= count) return;
  Raw<T, V> raw;
  [[maybe_unused]] Raw<T, V> upstream;
  load_raw(raw, z + at);
  if constexpr (kSlope) load_raw(upstream, grad + at);
  C x[V];
  [[maybe_unused]] C g[V];
  widen_raw(raw, x);
  if constexpr (kSlope) widen_raw(upstream, g);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const C size = fabs(x[i]), gate = gate_at(fma(-octaves, size, octaves));
    x[i] =
        kSlope ? g[i] * (1 - depth * gate * (1 + steepness * size * (1 - gate))) : x[i] * (1 - depth * gate);
  }
  store_narrow(out + at, x);
}

template <typename T, bool kSlope>
void tone_map_of(const Target& target, const T* z, const T* grad, T* out, int64_t count, double s) {
  using C = Wide<T>;
  const auto launch = [&]<int V>() {
    const int64_t blocks = ceil_div<int64_t>(count, static_cast<int64_t>(kThreads) * V);
    STD_TORCH_CHECK(blocks <= INT32_MAX, "tone_map: a tensor of ", count, " elements is too large");
    tone_map_kernel<T, V, kSlope><<<static_cast<unsigned>(blocks), kThreads, 0, target.stream>>>(
        z, grad, out, count, static_cast<C>(4 * s), static_cast<C>(4 * s * std::numbers::log2e),
        static_cast<C>(0.8 * s));
    check_launch("tone_map");
  };
  const bool quads = count % kPack<T> == 0 && aligned16(z) && aligned16(out) && (!kSlope || aligned16(grad));
  quads ? launch.template operator()<kPack<T>>() : launch.template operator()<1>();
}

void standardize(const View& z, const OptionalView& mean, const OptionalView& std,
                 std::span<const double> host_mean, std::span<const double> host_std, double scale,
                 bool inverse, int64_t layout, int64_t b, int64_t c, int64_t t, int64_t h, int64_t w,
                 int64_t pt, int64_t ph, int64_t pw, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(out, "out");
  const auto fits = [&](const OptionalView& device, std::span<const double> host) {
    return device ? device->numel() == c : host.empty() || static_cast<int64_t>(host.size()) == c;
  };
  STD_TORCH_CHECK(z.numel() == b * c * t * h * w && out.numel() == z.numel() && out.dtype == z.dtype &&
                      fits(mean, host_mean) && fits(std, host_std) && (std || !host_std.empty() || c == 0),
                  "standardize: z and out must have the sizes given and one dtype, mean and std ", c,
                  " numbers");
  if (out.numel() == 0) return;
  const Target target(z);
  dispatch_floating(z.scalar_type(), "standardize", [&]<typename T>() {
    using C = Wide<T>;
    constexpr ScalarType kNumbers = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
    STD_TORCH_CHECK((!mean || mean->dtype == kNumbers) && (!std || std->dtype == kNumbers),
                    "standardize: mean and std must be float32, or float64 beside float64 latents");
    with_channels<C>(target, mean, std, host_mean, host_std, scale, inverse, c, [&](const auto& source) {
      if (layout == kSame) {
        apply_affines(target, source, data<T>(z), mutable_data<T>(out), b, 1, c, t * h * w);
      } else {
        repack(target, source, Packing(b, c, t, h, w, pt, ph, pw), layout == kPackTokens, data<T>(z),
               mutable_data<T>(out));
      }
    });
  });
}

void tone_map(const View& z, const OptionalView& grad, double compression, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(out, "out");
  if (grad) check_contiguous(*grad, "grad");
  STD_TORCH_CHECK(out.numel() == z.numel() && out.dtype == z.dtype &&
                      (!grad || (grad->numel() == z.numel() && grad->dtype == z.dtype)),
                  "tone_map: z, grad and out must have one size and dtype");
  if (out.numel() == 0) return;
  const Target target(z);
  dispatch_floating(z.scalar_type(), "tone_map", [&]<typename T>() {
    const auto run = [&]<bool kSlope>() {
      tone_map_of<T, kSlope>(target, data<T>(z), data_or_null<T>(grad), mutable_data<T>(out), out.numel(),
                             0.75 * compression);
    };
    grad ? run.template operator()<true>() : run.template operator()<false>();
  });
}

}  // namespace
}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("standardize", LATENTFAST_BOX(latentfast::cuda::standardize));
  m.impl("tone_map", LATENTFAST_BOX(latentfast::cuda::tone_map));
}
