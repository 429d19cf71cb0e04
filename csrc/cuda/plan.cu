// plan_run on CUDA: the walk of plan.cuh, to latents or to enlarged RGB bytes, in one launch.
//
// To latents a thread takes 16 bytes of a channel. To bytes the walk stands in front of the enlarging kernel
// of enlarge.cuh: where that maps rows of latents to RGB into shared memory, each channel of four positions
// comes from the walk instead of from memory, so that the edited latents are written nowhere. What the kernel
// does not take (other factors, widths that are no multiple of 4, a mask for each channel, float64) is walked
// to latents in scratch memory, in the working precision, and mapped from there by a second launch.
#include "enlarge.cuh"
#include "plan_lanes.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kWalkThreads = 128;

template <typename T, typename R>
__global__ void __launch_bounds__(kWalkThreads)
    plan_vectors_kernel(const __grid_constant__ PlanParams<T> p, R* out, uint32_t chunks) {
  constexpr int V = kPack<T>;
  extern __shared__ uint4 room[];
  const uint32_t channel = blockIdx.x / chunks, chunk = blockIdx.x - channel * chunks;
  const int64_t e = (static_cast<int64_t>(chunk) * kWalkThreads + threadIdx.x) * V;
  const uint32_t b = channel / static_cast<uint32_t>(p.channels);
  const SlotLanes<T, kWalkThreads> at(p, room, b, channel - b * static_cast<uint32_t>(p.channels), e);
  if (e >= p.elements) return;
  Wide<T> x[V];
  walk_plan<T>(p, at, x);
  store_narrow(out + channel * p.elements + e, x);
}

template <typename T, typename R>
__global__ void __launch_bounds__(kWalkThreads)
    plan_pairs_kernel(const __grid_constant__ PlanParams<T> p, R* out, uint32_t chunks) {
  const uint32_t b = blockIdx.x / chunks;
  const int64_t each = p.channels * p.elements;
  const int64_t pair = static_cast<int64_t>(blockIdx.x - b * chunks) * kWalkThreads + threadIdx.x;
  if (2 * pair >= each) return;
  const PairLanes<T> at(p, b, pair);
  Wide<T> x[2];
  walk_plan<T>(p, at, x);
  R* const to = out + b * each + 2 * pair;
  to[0] = narrow<R>(x[0]);
  if (!at.alone) to[1] = narrow<R>(x[1]);
}

// To latents of T, or of the working precision.
template <typename T, typename R>
void walk_to(const PlanParams<T>& p, R* out, const Target& target) {
  constexpr int V = kPack<T>;
  const int64_t channels = p.batch * p.channels;
  if constexpr (V >= 4) {
    if (plan_vectors(p, V) && aligned16(out)) {
      const int64_t chunks = ceil_div<int64_t>(p.elements, kWalkThreads * V);
      const auto bytes = static_cast<int>(SlotLanes<T, kWalkThreads>::room(p));
      if (bytes > kSharedBytes) {
        check(cudaFuncSetAttribute(plan_vectors_kernel<T, R>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
              "plan_run");
      }
      plan_vectors_kernel<T, R><<<plan_blocks(channels * chunks), kWalkThreads, bytes, target.stream>>>(
          p, out, static_cast<uint32_t>(chunks));
      check_launch("plan_run");
      return;
    }
  }
  const int64_t chunks = ceil_div<int64_t>(p.channels * p.elements, 2 * kWalkThreads);
  plan_pairs_kernel<T, R><<<plan_blocks(p.batch * chunks), kWalkThreads, 0, target.stream>>>(
      p, out, static_cast<uint32_t>(chunks));
  check_launch("plan_run");
}

// What a plan makes, as a source of enlarge.cuh's kernel.
template <typename T>
struct PlanSource {
  using C = Wide<T>;
  static constexpr bool kFoursOnly = true;
  static constexpr int kGroup = 4;  // channels that a thread walks together
  static constexpr int kParts = 4;  // threads that share the channels of a position
  static constexpr int kBlocks = 3;
  static constexpr int kMostCoefficients = 512;  // of a block in shared memory
  struct Rows {
    uint32_t b, t;
    int64_t r;
  };

  PlanParams<T> plan;
  const float* weight;
  const float* bias;
  uint32_t frames;  // of one sample
  int height, width;

  __device__ Rows rows(uint32_t index, int low) const {
    const uint32_t b = index / frames, t = index - b * frames;
    const int64_t at = static_cast<int64_t>(low) * width;
    if (plan.frame != plan.elements) return {b, t, at};
    return {b, 0, t * (static_cast<int64_t>(height) * width) + at};  // frames are not told apart
  }

  // Instructions' coefficients for all channels, if there is room for them.
  LATENTFAST_HD int held() const {
    const int64_t count = plan.steps * plan.channels;
    return count <= kMostCoefficients ? static_cast<int>(count) : 0;
  }
  int room() const { return (kMostPlanTensors + held()) * 16; }
  // By a thread's instructions: some 20 a channel and edit, some 200 for 16 pixels.
  int64_t work(int) const { return ceil_div<int64_t>(plan.channels * (plan.steps + 2), 10 * kParts); }

  // All that the block will read comes to L2, and what all threads look up to shared memory.
  __device__ void stage(uint4* room, const Rows& from, int count) const {
    static_assert(sizeof(PlanPlace) == 16 && sizeof(PlanCoefficients<C>) == 16);
    if (threadIdx.x < static_cast<uint32_t>(plan.tensors)) {
      const PlanTensor& x = plan.tensor[threadIdx.x];
      const int size = plan.masks >> threadIdx.x & 1 ? sizeof(C) : sizeof(T);
      const int64_t at = from.b * x.sample + from.t * x.frame + from.r * x.inner;
      reinterpret_cast<PlanPlace*>(room)[threadIdx.x] = {static_cast<const char*>(x.data) + at * size,
                                                        static_cast<int32_t>(x.channel), x.inner};
    }
    const uint32_t channels = static_cast<uint32_t>(plan.channels);
    for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(held()); i += blockDim.x) {
      const uint32_t k = i / channels;
      __pipeline_memcpy_async(room + kMostPlanTensors + i,
                              plan.coefficients + (k * plan.batch + from.b) * channels + (i - k * channels), 16);
    }
    const uint32_t bytes = static_cast<uint32_t>(count * width) * sizeof(T), lines = ceil_div(bytes, 128u);
    const uint32_t tensors = static_cast<uint32_t>(plan.tensors), total = channels * tensors * lines;
    for (uint32_t i = threadIdx.x; i < total; i += blockDim.x) {
      const uint32_t line = i % lines, rest = i / lines, c = rest / tensors, k = rest - c * tensors;
      const PlanTensor& x = plan.tensor[k];
      if (x.slot < 0 || x.inner == 0 || plan.masks >> k & 1) continue;
      const T* const begin =
          static_cast<const T*>(x.data) + (from.b * x.sample + c * x.channel + from.t * x.frame + from.r);
      prefetch(reinterpret_cast<const char*>(begin) + min(line * 128, bytes - 1));
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
  }

  // The threads that share a position go on with each other's sums, so that channels are added in their order.
  template <int V>
  __device__ __forceinline__ void map(const uint4* room, const Rows& from, int at, int part,
                                      float (&rgb)[3][V]) const {
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const float b = __ldg(bias + k);
#pragma unroll
      for (int v = 0; v < V; ++v) rgb[k][v] = b;
    }
    const int channels = static_cast<int>(plan.channels), lane = threadIdx.x % 32;
    PlanDesk<C> desk{reinterpret_cast<const PlanPlace*>(room),
                     reinterpret_cast<const PlanCoefficients<C>*>(room + kMostPlanTensors), channels};
    if (held() == 0) {
      desk.coefficients = plan.coefficients + from.b * plan.channels;
      desk.stride = plan.batch * plan.channels;
    }
#pragma unroll 1
    for (int begin = 0; begin < channels; begin += kParts * kGroup) {
      const int c = begin + part * kGroup;
      float x[kGroup * V];
      walk_plan<T>(plan, GroupLanes<T, V, kGroup>{desk, c, channels - 1, at}, x);
#pragma unroll
      for (int turn = 0; turn < kParts; ++turn) {
        if (part == turn) {
#pragma unroll
          for (int g = 0; g < kGroup; ++g) {
            if (c + g >= channels) break;
#pragma unroll
            for (int k = 0; k < 3; ++k) {
              const float factor = __ldg(weight + 3 * (c + g) + k);
#pragma unroll
              for (int v = 0; v < V; ++v) rgb[k][v] = fma(factor, x[g * V + v], rgb[k][v]);
            }
          }
        }
#pragma unroll
        for (int k = 0; k < 3; ++k) {
#pragma unroll
          for (int v = 0; v < V; ++v)
            rgb[k][v] = __shfl_sync(0xffffffffu, rgb[k][v], (lane & ~(kParts - 1)) + turn);
        }
      }
    }
  }
};

// The walk and the pixels in one launch, if the kernel takes them; false if not.
template <typename T>
bool walk_to_bytes(const PlanParams<T>& p, const PlanSizes& sizes, const View& weight, const View& bias,
                   const View& rgb, const Target& target) {
  if constexpr (sizeof(T) <= 4) {
    if (sizes.width % 4 != 0 || !plan_vectors(p, 4) || std::max(sizes.height, sizes.width) > INT32_MAX / 64 ||
        sizes.channels * sizes.elements() > INT32_MAX) {
      return false;
    }
    for (int k = 0; k < p.steps; ++k) {  // lanes of several channels share a mask
      if (p.step[k].mask >= 0 && p.tensor[p.step[k].mask].channel != 0) return false;
    }
    const PlanSource<T> source{p,
                               data<float>(weight),
                               data<float>(bias),
                               static_cast<uint32_t>(sizes.frames),
                               static_cast<int>(sizes.height),
                               static_cast<int>(sizes.width)};
    uint8_t* const to = mutable_data<uint8_t>(rgb);
    const int64_t frames = sizes.batch * sizes.frames;
    switch (factor_of(source, rgb.size(2), rgb.size(3), to)) {
      case 4:
        enlarge<PlanSource<T>, 4>(source, to, frames, target);
        return true;
      case 8:
        enlarge<PlanSource<T>, 8>(source, to, frames, target);
        return true;
      case 16:
        enlarge<PlanSource<T>, 16>(source, to, frames, target);
        return true;
    }
  }
  return false;
}

void plan_run(std::span<const View> inputs, std::span<const int64_t> code, const View&, const View&,
              const View& coefficients, const OptionalView& weight, const OptionalView& bias,
              const OptionalView& latents, const OptionalView& rgb) {
  check_plan_inputs(inputs);
  check_contiguous(coefficients, "coefficients");
  const View& source = inputs[0];
  STD_TORCH_CHECK(!rgb || (weight && bias && rgb->dim() == 5 && rgb->scalar_type() == ScalarType::Byte),
                  "plan_run: rgb (B, T, H', W', 3) of bytes needs weight and bias");
  if (source.numel() == 0) {  // without channels pixels are all bias
    if (rgb && rgb->numel() > 0) latent_to_rgb(source, *weight, *bias, *rgb);
    return;
  }
  const auto tensors = static_cast<int64_t>(inputs.size());
  const PlanProgram program(code, tensors, INT32_MAX, INT32_MAX);
  const PlanValues no_values({}, tensors);
  const PlanSizes sizes(source);
  const Target target(source);
  dispatch_floating(source.scalar_type(), "plan_run", [&]<typename T>() {
    const auto p = plan_params<T>(inputs, program, coefficients, program.count, no_values);
    if (!latents && walk_to_bytes(p, sizes, *weight, *bias, *rgb, target)) return;
    if (latents) {
      check_contiguous(*latents, "latents");
      walk_to(p, mutable_data<T>(*latents), target);
      if (rgb) latent_to_rgb(*latents, *weight, *bias, *rgb);
      return;
    }
    using C = Wide<T>;
    const Workspace scratch(target, source.numel() * static_cast<int64_t>(sizeof(C)));
    View edited = source;
    edited.pointer = scratch.data();
    edited.dtype = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
    walk_to(p, mutable_data<C>(edited), target);
    latent_to_rgb(edited, *weight, *bias, *rgb);
  });
}

}  // namespace
}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("plan_run", LATENTFAST_BOX(latentfast::cuda::plan_run));
}
