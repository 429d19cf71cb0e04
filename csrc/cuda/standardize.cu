// standardize and tone_map on CUDA. The specification is latentfast/reference/stats.py.
//
// Both are one pass in packs of 16 bytes that memory bounds. On the way to or from tokens, tiles are turned
// over in shared memory, so that both sides are read and written along memory.
#include <span>

#include "affines.cuh"
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

// A tile: positions of a row of tokens, and rows of the latents that the tokens are made of.
constexpr int kAcross = 64, kDown = 64;

// Latents (b, c, t, h, w), and tokens (b, t/pt · h/ph · w/pw, c·pt·ph·pw).
struct Packing {
  int64_t b, c, t, h, w, pt, ph, pw;
  int64_t rows;            // of the latents in a row of tokens: c·pt·ph
  int64_t down, frames;    // rows of tokens in a frame of them, h/ph; such frames, t/pt
  int across, run;         // positions of a tile; how many of them lie side by side in a token
  int64_t pieces, groups;  // tiles along a row of tokens, and down its rows

  Packing(int64_t b, int64_t c, int64_t t, int64_t h, int64_t w, int64_t pt, int64_t ph, int64_t pw)
      : b(b),
        c(c),
        t(t),
        h(h),
        w(w),
        pt(pt),
        ph(ph),
        pw(pw),
        rows(c * pt * ph),
        down(h / ph),
        frames(t / pt) {
    across = kAcross;  // whole tokens, or an equal part of one
    while (pw <= kAcross ? across % pw != 0 : pw % across != 0) --across;
    run = static_cast<int>(std::min<int64_t>(pw, across));
    pieces = ceil_div<int64_t>(w, across);
    groups = ceil_div<int64_t>(rows, kDown);
  }
};

template <typename T, bool kPacks, bool kSingle, typename Source>
__global__ void __launch_bounds__(kThreads)
    repack_kernel(const __grid_constant__ Source source, const __grid_constant__ Packing p, const T* from,
                  T* out) {
  __shared__ typename Source::Table table;
  // an odd number of words from one row to the next: columns are read without conflicts
  __shared__ T tile[kDown][kAcross + (sizeof(T) == 2 ? 2 : 1)];
  __shared__ int64_t starts[kDown];
  __shared__ int64_t channels[kDown];
  const int64_t block = blockIdx.x, upper = quotient(block, p.pieces), strip = quotient(upper, p.groups);
  const int64_t x = (block - upper * p.pieces) * p.across, first_row = (upper - strip * p.groups) * kDown;
  const int width = static_cast<int>(min(p.w - x, static_cast<int64_t>(p.across)));
  const int height = static_cast<int>(min(p.rows - first_row, static_cast<int64_t>(kDown)));
  const int thread = threadIdx.x;
  if (thread < height) {
    const int64_t row = first_row + thread, part = quotient(row, p.ph), channel = quotient(part, p.pt);
    const int64_t over = quotient(strip, p.down), sample = quotient(over, p.frames);
    const int64_t frame = (over - sample * p.frames) * p.pt + part - channel * p.pt;
    const int64_t line = (strip - over * p.down) * p.ph + row - part * p.ph;
    starts[thread] = (((sample * p.c + channel) * p.t + frame) * p.h + line) * p.w + x;
    channels[thread] = channel;
  }
  source.prepare(table);
  __syncthreads();

  // f(row of the tile, position in it, where that is in the latents), along them
  const auto along_latents = [&](auto&& f) {
    const int column = thread % kAcross;
    if (column >= width) return;
#pragma unroll 4
    for (int r = thread / kAcross; r < height; r += kThreads / kAcross) f(r, column, starts[r] + column);
  };
  // the same along the tokens
  const auto along_tokens = [&](auto&& f) {
    const int64_t features = p.rows * p.pw;
    if constexpr (kSingle) {  // a token is one position wide
      const int r = thread % kDown;
      if (r >= height) return;
      const int64_t first = (strip * p.w + x) * features + first_row + r;
#pragma unroll 4
      for (int column = thread / kDown; column < width; column += kThreads / kDown)
        f(r, column, first + column * features);
    } else {
      const int wide = height * p.run;
      for (int i = thread; i < width * height; i += kThreads) {
        const int set = i / wide, rest = i - set * wide, r = rest / p.run,
                  column = set * p.run + rest - r * p.run;
        const int64_t token = quotient(x + column, p.pw);
        f(r, column,
          (strip * (p.w / p.pw) + token) * features + (first_row + r) * p.pw + x + column - token * p.pw);
      }
    }
  };
  const auto changed = [&](T value, int r) {
    return narrow<T>(source.of(table, 0, channels[r])(widen(value)));
  };
  if constexpr (kPacks) {
    along_latents([&](int r, int column, int64_t at) { tile[r][column] = from[at]; });
    __syncthreads();
    along_tokens([&](int r, int column, int64_t at) { out[at] = changed(tile[r][column], r); });
  } else {
    along_tokens([&](int r, int column, int64_t at) { tile[r][column] = from[at]; });
    __syncthreads();
    along_latents([&](int r, int column, int64_t at) { out[at] = changed(tile[r][column], r); });
  }
}

template <typename T, typename Source>
void repack(const Target& target, const Source& source, const Packing& packing, bool packs, const T* from,
            T* out) {
  const int64_t blocks = packing.b * packing.frames * packing.down * packing.pieces * packing.groups;
  STD_TORCH_CHECK(blocks <= INT32_MAX, "standardize: latents of ", packing.b * packing.c, " channels with ",
                  packing.t * packing.h * packing.w, " elements are too large to pack");
  const auto launch = [&]<bool kPacks, bool kSingle>() {
    repack_kernel<T, kPacks, kSingle, Source>
        <<<static_cast<unsigned>(blocks), kThreads, 0, target.stream>>>(source, packing, from, out);
    check_launch("standardize");
  };
  if (packs) {
    packing.pw == 1 ? launch.template operator()<true, true>() : launch.template operator()<true, false>();
  } else {
    packing.pw == 1 ? launch.template operator()<false, true>() : launch.template operator()<false, false>();
  }
}

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

// sigmoid(x)
__device__ __forceinline__ float sigmoid(float x) { return __frcp_rn(1.0f + __expf(-x)); }
__device__ __forceinline__ double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

template <typename T, int V, bool kSlope>
__global__ void __launch_bounds__(kThreads)
    tone_map_kernel(const T* z, const T* grad, T* out, int64_t count, Wide<T> s) {
  using C = Wide<T>;
  constexpr int U = kSlope ? 2 : 4;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads * U + threadIdx.x) * V;
  Raw<T, V> raw[U], upstream[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t at = first + u * kThreads * V;
    if (at >= count) continue;
    load_raw(raw[u], z + at);
    if constexpr (kSlope) load_raw(upstream[u], grad + at);
  }
  const C steepness = 4 * s, depth = C(0.8) * s;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t at = first + u * kThreads * V;
    if (at >= count) continue;
    C x[V];
    [[maybe_unused]] C g[V];
    widen_raw(raw[u], x);
    if constexpr (kSlope) widen_raw(upstream[u], g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const C size = fabs(x[i]), gate = sigmoid(steepness * (size - 1));
      x[i] = kSlope ? g[i] * (1 - depth * gate * (1 + steepness * size * (1 - gate)))
                    : x[i] * (1 - depth * gate);
    }
    store_narrow(out + at, x);
  }
}

template <typename T, bool kSlope>
void tone_map_of(const Target& target, const T* z, const T* grad, T* out, int64_t count, double s) {
  const auto launch = [&]<int V>() {
    const int64_t blocks = ceil_div<int64_t>(count, static_cast<int64_t>(kThreads) * (kSlope ? 2 : 4) * V);
    STD_TORCH_CHECK(blocks <= INT32_MAX, "tone_map: a tensor of ", count, " elements is too large");
    tone_map_kernel<T, V, kSlope><<<static_cast<unsigned>(blocks), kThreads, 0, target.stream>>>(
        z, grad, out, count, static_cast<Wide<T>>(s));
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
