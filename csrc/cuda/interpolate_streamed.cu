// slerp and nlerp of long vectors on compute capability 9.0, by the streamed kernel:
//
//   out_k = w_a(|a|², |b|², a·b, t_k) · a + w_b(…) · b
#include "streamed_kernel.cuh"

namespace latentfast::cuda {
namespace {

template <typename T>
struct Interpolation {
  using Element = T;
  using LaneSums = latentfast::cuda::LaneSums;
  using Prepared = double;  // a value of t
  struct Weights {
    Mix<Wide<T>> mixes[kMaxValues];
  };
  struct Beside {};
  static constexpr int kSums = 3;
  Arguments arguments;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static constexpr bool kBeside = false;
  // With more values of t, memory has enough to do with the results: reading ahead then cost 5%.
  static constexpr int kFewValues = 2;

  __device__ const Vectors& vectors() const { return arguments.vectors; }
  __device__ const T* a() const { return static_cast<const T*>(arguments.a); }
  __device__ const T* b() const { return static_cast<const T*>(arguments.b); }
  __device__ bool prefetches() const { return arguments.values.count <= kFewValues; }

  static __device__ __forceinline__ void add(LaneSums& sums, const uint4& a, const uint4& b) {
    sums.add<T, true>(a, b);
  }
  static __device__ __forceinline__ LaneSums lane_sums(const double (&sums)[kSums]) {
    return {sums[0], sums[1], sums[2]};
  }
  static __device__ __forceinline__ double fold(const LaneSums& sums) { return fold_warp(sums); }
  static __device__ constexpr int lane_of(int component) { return 8 * component; }
  static __device__ __forceinline__ int component() { return folded_component(); }

  // Each lane of the control warp sees to one value of t.
  __device__ __forceinline__ double prepare(int lane, int vector) const {
    return lane < arguments.values.count ? arguments.values.at(lane, vector) : 0.0;
  }
  __device__ __forceinline__ void weigh(int lane, const double (&sums)[kSums], double t,
                                        Weights& weights) const {
    if (lane < arguments.values.count) {
      weights.mixes[lane] = make_mix<Wide<T>>(arguments.mode, {sums[0], sums[1], sums[2]}, t,
                                              arguments.vectors.length, NoLast());
    }
  }

  __device__ __forceinline__ void write(const Weights& weights, LanePacks<>& packs, Beside&, int64_t base,
                                        const Piece& piece, int) const {
    const int begin = threadIdx.x % 32 * kPack<T>, left = piece.elements - begin;
    T* out = static_cast<T*>(arguments.out) + base + piece.offset + begin;
#pragma unroll 1
    for (int k = 0; k < arguments.values.count; ++k) {
      const Mix<Wide<T>> mix = weights.mixes[k];
#pragma unroll
      for (int j = 0; j < kLanePacks; ++j) {  // widened for every result: there are no registers to keep it
        packs.a[j] = computed_anew(packs.a[j]);
        packs.b[j] = computed_anew(packs.b[j]);
      }
      if (mix.kind == Kind::blend) {
#pragma unroll
        for (int j = 0; j < kLanePacks; ++j) {
          const uint4 result = blend_pack<T>(mix, packs.a[j], packs.b[j]);
          if (32 * kPack<T> * j < left) store_once(out + 32 * kPack<T> * j, result);
        }
      } else {
#pragma unroll
        for (int j = 0; j < kLanePacks; ++j) {
          const uint4 result = special_pack<T>(mix, packs.a[j], packs.b[j]);
          if (32 * kPack<T> * j < left) store_once(out + 32 * kPack<T> * j, result);
        }
      }
      out = computed_anew(out + arguments.numel);
    }
  }
#endif
};

}  // namespace

template <typename T>
void interpolate_streamed(const Target& target, const Arguments& arguments) {
  using Job = Interpolation<T>;
  with_stream<Job>(target, arguments.vectors, [&](const Stream& stream) {
    if (arguments.vectors.n == 1) {
      launch_streamed<Job, true>(target, {arguments}, stream, "interpolate");
    } else {
      launch_streamed<Job, false>(target, {arguments}, stream, "interpolate");
    }
  });
}

template void interpolate_streamed<float>(const Target&, const Arguments&);
template void interpolate_streamed<double>(const Target&, const Arguments&);
template void interpolate_streamed<Half>(const Target&, const Arguments&);
template void interpolate_streamed<BFloat16>(const Target&, const Arguments&);

}  // namespace latentfast::cuda
