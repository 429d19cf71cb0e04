// guide of long samples on compute capability 9.0, by the streamed kernel: both predictions are read once,
// the sample that the step starts at, and what a mask needs, where they are used.
#include "guidance.cuh"
#include "streamed_kernel.cuh"

namespace latentfast::cuda {
namespace {

// kRescaled: Σ c and Σ d are summed too, which the standard deviations need. kPlain: no mask, no x0; in a
// kernel of its own, which has the registers to itself.
template <typename T, bool kRescaled, bool kPlain>
struct Guiding {
  using Element = T;
  static constexpr int kSums = kRescaled ? 5 : 3;
  struct LaneSums {  // in this order: c·c, c·d, d·d, c, d
    double of[kSums] = {};
  };
  struct Prepared {};
  using Weights = GuidanceWeights<Wide<T>>;
  struct Beside {
    Raw<T, kPack<T>> sample[kLanePacks];
  };
  Guided<T> p;
  Vectors samples;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr bool kBeside = true;
  // Products of halves are summed by eight in float32 first, each sum up to some 2^-22 off. The variance of a
  // constant is then that share of its square, and what is smaller than 2^-20 no half could tell from one.
  static constexpr double kShare = sizeof(T) == 2 ? 0x1p-20 : kConstantShare;

  __device__ const Vectors& vectors() const { return samples; }
  __device__ const T* a() const { return p.cond; }
  __device__ const T* b() const { return p.uncond; }
  // With the sample to read as well, memory has enough to do: reading ahead cost 15%, of the sample alone 3%.
  __device__ bool prefetches() const { return false; }

  static __device__ __forceinline__ void add(LaneSums& sums, const uint4& a, const uint4& b) {
    using S = std::conditional_t<sizeof(T) == 2, float, double>;
    Wide<T> c[kPack<T>], u[kPack<T>];
    unpack<T>(a, c);
    unpack<T>(b, u);
    S part[kSums];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      const S x = c[i], d = c[i] - u[i];
      part[0] = i == 0 ? x * x : fma(x, x, part[0]);
      part[1] = i == 0 ? x * d : fma(x, d, part[1]);
      part[2] = i == 0 ? d * d : fma(d, d, part[2]);
      if constexpr (kRescaled) {
        part[3] = i == 0 ? x : part[3] + x;
        part[4] = i == 0 ? d : part[4] + d;
      }
    }
#pragma unroll
    for (int s = 0; s < kSums; ++s) sums.of[s] += part[s];
  }
  static __device__ __forceinline__ LaneSums lane_sums(const double (&sums)[kSums]) {
    LaneSums out;
#pragma unroll
    for (int s = 0; s < kSums; ++s) out.of[s] = sums[s];
    return out;
  }

  // The lanes share the work, as in fold_warp: with five sums, lanes 0, 8, 16 and 24 end with one of the
  // first four, lane 4 with the fifth.
  static __device__ __forceinline__ double fold(const LaneSums& s) {
    if constexpr (!kRescaled) {
      return fold_warp({s.of[0], s.of[1], s.of[2]});
    } else {
      constexpr unsigned kAll = 0xffffffffu;
      const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8, last = threadIdx.x & 4;
      const double even_sum =
          (upper ? s.of[2] : s.of[0]) + __shfl_xor_sync(kAll, upper ? s.of[0] : s.of[2], 16);
      const double odd_sum =
          (upper ? s.of[3] : s.of[1]) + __shfl_xor_sync(kAll, upper ? s.of[1] : s.of[3], 16);
      double fifth = s.of[4] + __shfl_xor_sync(kAll, s.of[4], 16);
      double r = (odd ? odd_sum : even_sum) + __shfl_xor_sync(kAll, odd ? even_sum : odd_sum, 8);
      fifth += __shfl_xor_sync(kAll, fifth, 8);
      r = (last ? fifth : r) + __shfl_xor_sync(kAll, last ? r : fifth, 4);
      r += __shfl_xor_sync(kAll, r, 2);
      r += __shfl_xor_sync(kAll, r, 1);
      return r;
    }
  }
  static __device__ constexpr int lane_of(int component) { return component < 4 ? 8 * component : 4; }
  static __device__ __forceinline__ int component() {
    if constexpr (!kRescaled) return folded_component();
    const int lane = threadIdx.x % 32;
    return lane % 8 == 0 ? lane / 8 : lane == 4 ? 4 : -1;
  }

  __device__ Prepared prepare(int, int) const { return {}; }
  __device__ __forceinline__ void weigh(int lane, const double (&sums)[kSums], Prepared,
                                        Weights& weights) const {
    GuidanceSums named{};
    named.cc = sums[0];
    named.cd = sums[1];
    named.dd = sums[2];
    if constexpr (kRescaled) {
      named.c = sums[3];
      named.d = sums[4];
    }
    if (lane == 0) weights = Weights::of(guidance_coefficients(p.options, named, kShare));
  }

  __device__ __forceinline__ Beside beside(int64_t offset, int elements) const {
    const int begin = threadIdx.x % 32 * kPack<T>;
    Beside out{};
#pragma unroll
    for (int j = 0; j < kLanePacks; ++j) {
      const int e = begin + 32 * kPack<T> * j;
      if (p.sample != nullptr && e < elements) load_raw(out.sample[j], p.sample + offset + e);
    }
    return out;
  }

  // The prediction at a pack.
  static __device__ __forceinline__ void guide(const Weights& weights, const uint4& a, const uint4& b,
                                               Wide<T> (&guided)[kPack<T>]) {
    Wide<T> u[kPack<T>];
    unpack<T>(a, guided);
    unpack<T>(b, u);
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) guided[i] = weights(guided[i], guided[i] - u[i]);
  }

  __device__ __forceinline__ void write(const Weights& of_sample, LanePacks<>& packs, Beside& beside,
                                        int64_t base, const Piece& piece, int sample) const {
    constexpr int kStep = 32 * kPack<T>;
    const Weights weights = of_sample;
    int e = threadIdx.x % 32 * kPack<T>;
    Wide<T> guided[kPack<T>];
    if constexpr (kPlain) {
      T* const out = p.out + base + piece.offset;
#pragma unroll
      for (int j = 0; j < kLanePacks; ++j, e += kStep) {
        if (e >= piece.elements) continue;
        guide(weights, packs.a[j], packs.b[j], guided);
        if (p.sample != nullptr) {
          Wide<T> x[kPack<T>];
          widen_raw(beside.sample[j], x);
#pragma unroll
          for (int i = 0; i < kPack<T>; ++i) guided[i] = fma(p.dt, guided[i], x[i]);
        }
        store_narrow(out + e, guided);
      }
    } else {
      // The code for every case is there once: the packs come to it one after the other.
#pragma unroll 1
      for (int j = 0; j < kLanePacks; ++j, e += kStep) {
        if (e < piece.elements) {
          guide(weights, packs.a[0], packs.b[0], guided);
          write_guided<T, kPack<T>, true>(p, sample, piece.offset + e, guided, beside.sample[0]);
        }
#pragma unroll
        for (int i = 1; i < kLanePacks; ++i) {
          packs.a[i - 1] = packs.a[i];
          packs.b[i - 1] = packs.b[i];
          beside.sample[i - 1] = beside.sample[i];
        }
      }
    }
  }
#endif
};

template <typename Job, typename T>
void launch(const Target& target, const Guided<T>& p, const Vectors& samples) {
  with_stream<Job>(target, samples, [&](const Stream& stream) {
    launch_streamed<Job, true>(target, Job{p, samples}, stream, "guide");
  });
}

}  // namespace

template <typename T>
bool guide_streamed(const Target& target, const Guided<T>& p) {
  if (target.device.capability < 90 || p.momentum != nullptr || !in_packs(p) ||
      (p.mask != nullptr && !p.mask_in_packs)) {
    return false;
  }
  const Vectors samples = make_vectors<T>(p.samples, 1, 1, p.each, target.device.multiprocessors);
  if (samples.pieces <= kShortPieces) return false;
  const bool plain = p.mask == nullptr && p.x0 == nullptr;
  if (p.options.rescale > 0.0) {
    plain ? launch<Guiding<T, true, true>>(target, p, samples)
          : launch<Guiding<T, true, false>>(target, p, samples);
  } else {
    plain ? launch<Guiding<T, false, true>>(target, p, samples)
          : launch<Guiding<T, false, false>>(target, p, samples);
  }
  return true;
}

template bool guide_streamed<float>(const Target&, const Guided<float>&);
template bool guide_streamed<Half>(const Target&, const Guided<Half>&);
template bool guide_streamed<BFloat16>(const Target&, const Guided<BFloat16>&);

}  // namespace latentfast::cuda
