// plan_run on CUDA: the walk of plan.cuh, to latents or to enlarged RGB bytes.
//
// A block walks a tile of some channels and positions. To latents that is all. To bytes the edited latents
// are written nowhere: the tile is left in shared memory, mapped to RGB there, and what goes to scratch
// memory are three float32 planes, at Wan 2.1's size a tenth of what was read, from which latent_to_rgb's
// kernels then make the pixels. Walking in front of those kernels' own map, in one launch, was twice as slow:
// the threads and the registers that suit the pixels do not suit the walk, and rows at the borders were
// walked twice.
//
// What has no vectors of 16 bytes (odd sizes, float64) is walked in pairs, to latents, if need be in scratch
// memory and in the working precision.
#include "plan_lanes.cuh"
#include "preview.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kWalkThreads = 128;
constexpr int kPairThreads = 256;

template <typename T, int G>
struct TileParams {
  PlanParams<T> plan;
  PlanTile tile;
};

// Latents of the tile.
template <typename T, int G>
__global__ void __launch_bounds__(kWalkThreads)
    plan_latents_kernel(const __grid_constant__ TileParams<T, G> p, T* out) {
  using Lanes = SlotLanes<T, G, kWalkThreads>;
  extern __shared__ uint4 room[];
  const PlanTile& tile = p.tile;
  const uint32_t rest = blockIdx.x / tile.chunks, chunk = blockIdx.x - rest * tile.chunks;
  const uint32_t b = rest / tile.groups;
  const int32_t begin = static_cast<int32_t>(rest - b * tile.groups) * tile.group;
  const Lanes at(p.plan, tile, room);
  const int64_t e = (static_cast<int64_t>(chunk) * tile.vectors + at.column) * Lanes::V;
  const int32_t stop = min(begin + tile.group, static_cast<int32_t>(p.plan.channels));
  const int32_t c = begin + at.rank;
  const bool inside = c < stop && e < p.plan.elements;
  at.fetch(p.plan, b, begin, e, inside);
  if (!inside) return;
  Wide<T> x[Lanes::kCount];
  walk_plan<T>(p.plan, at, x);
  T* const to = out + (b * p.plan.channels + c) * p.plan.elements + e;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (c + g < stop) {
      store_narrow(to + g * p.plan.elements, reinterpret_cast<Wide<T>(&)[Lanes::V]>(x[g * Lanes::V]));
    }
  }
}

// RGB of the tile's positions, to (B, 3, elements of a channel). Channels are added in their order, whichever
// threads walked them: the same bits as latent_to_rgb of the unrounded latents.
template <typename T, int G>
__global__ void __launch_bounds__(kWalkThreads)
    plan_planes_kernel(const __grid_constant__ TileParams<T, G> p, const float* weight, const float* bias,
                       float* planes) {
  using Lanes = SlotLanes<T, G, kWalkThreads>;
  constexpr int V = Lanes::V;
  extern __shared__ uint4 room[];
  const PlanTile& tile = p.tile;
  const uint32_t b = blockIdx.x / tile.chunks, chunk = blockIdx.x - b * tile.chunks;
  const Lanes at(p.plan, tile, room);
  float* const walked = reinterpret_cast<float*>(room) + Lanes::room(p.plan, tile) / sizeof(float);
  const int32_t channels = static_cast<int32_t>(p.plan.channels), positions = tile.vectors * V;
  const int64_t first = static_cast<int64_t>(chunk) * positions, e = first + at.column * V;
  planes += 3 * b * p.plan.elements;
  for (int32_t begin = 0; begin < channels; begin += tile.group) {
    const int32_t count = min(tile.group, channels - begin);
    const bool inside = at.rank < count && e < p.plan.elements;
    at.fetch(p.plan, b, begin, e, inside);
    if (inside) {
      float x[Lanes::kCount];
      walk_plan<T>(p.plan, at, x);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (at.rank + g >= count) break;
        float4* const to = reinterpret_cast<float4*>(walked + (at.rank + g) * positions + at.column * V);
#pragma unroll
        for (int v = 0; v < V; v += 4) {
          const float* const four = x + g * V + v;
          to[v / 4] = make_float4(four[0], four[1], four[2], four[3]);
        }
      }
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < positions && first + i < p.plan.elements; i += blockDim.x) {
      float* const to = planes + first + i;
      float rgb[3];
#pragma unroll
      for (int k = 0; k < 3; ++k) rgb[k] = begin == 0 ? __ldg(bias + k) : to[k * p.plan.elements];
#pragma unroll 4
      for (int32_t c = 0; c < count; ++c) {
        const float x = walked[c * positions + i];
#pragma unroll
        for (int k = 0; k < 3; ++k) rgb[k] = fmaf(__ldg(weight + 3 * (begin + c) + k), x, rgb[k]);
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) to[k * p.plan.elements] = rgb[k];
    }
  }
}

template <typename T, typename R>
__global__ void __launch_bounds__(kPairThreads)
    plan_pairs_kernel(const __grid_constant__ PlanParams<T> p, R* out, uint32_t chunks) {
  const uint32_t b = blockIdx.x / chunks;
  const int64_t each = p.channels * p.elements;
  const int64_t pair = static_cast<int64_t>(blockIdx.x - b * chunks) * kPairThreads + threadIdx.x;
  if (2 * pair >= each) return;
  const PairLanes<T> at(p, b, pair);
  Wide<T> x[2];
  walk_plan<T>(p, at, x);
  R* const to = out + b * each + 2 * pair;
  to[0] = narrow<R>(x[0]);
  if (!at.alone) to[1] = narrow<R>(x[1]);
}

template <typename T, typename R>
void walk_pairs(const PlanParams<T>& p, R* out, const Target& target) {
  const int64_t chunks = ceil_div<int64_t>(p.channels * p.elements, 2 * kPairThreads);
  plan_pairs_kernel<T, R><<<plan_blocks(p.batch * chunks), kPairThreads, 0, target.stream>>>(
      p, out, static_cast<uint32_t>(chunks));
  check_launch("plan_run");
}

// Launches `kernel<G>` with a tile's parameters and what follows them. G: the channels that share a thread,
// and with it masks, if no mask tells channels apart.
template <typename T, typename Launch>
void with_tile(const PlanParams<T>& p, const Launch& launch) {
  bool one = p.channels == 1;
  for (int i = 0; i < kMostPlanTensors; ++i)
    one = one || ((p.masks >> i & 1) != 0 && p.tensor[i].channel != 0);
  const auto with = [&]<int G>() { launch(TileParams<T, G>{p, PlanTile(p, G, kWalkThreads, kPack<T>)}); };
  one ? with.template operator()<1>() : with.template operator()<2>();
}

template <typename T, int G, typename... Arguments>
void launch_tile(void (*kernel)(TileParams<T, G>, Arguments...), const TileParams<T, G>& p, int64_t blocks,
                 int64_t more, const Target& target, Arguments... arguments) {
  const auto bytes = static_cast<int>(SlotLanes<T, G, kWalkThreads>::room(p.plan, p.tile) + more);
  if (bytes > kSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "plan_run");
  }
  const int threads = ceil_div(ceil_div(p.tile.group, G) * p.tile.vectors, 32) * 32;
  kernel<<<plan_blocks(blocks), threads, bytes, target.stream>>>(p, arguments...);
  check_launch("plan_run");
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
    using C = Wide<T>;
    const auto p = plan_params<T>(inputs, program, coefficients, program.count, no_values);
    if (latents) check_contiguous(*latents, "latents");
    T* const to = latents ? mutable_data<T>(*latents) : nullptr;
    View edited = latents ? *latents : source;
    if constexpr (sizeof(T) <= 4) {
      if (plan_vectors(p, kPack<T>) && aligned16(to)) {
        if (latents) {
          with_tile(p, [&]<int G>(const TileParams<T, G>& own) {
            launch_tile(plan_latents_kernel<T, G>, own, p.batch * own.tile.groups * own.tile.chunks, 0,
                        target, to);
          });
          if (rgb) latent_to_rgb(edited, *weight, *bias, *rgb);
          return;
        }
        const Workspace scratch(target, 3 * p.batch * p.elements * static_cast<int64_t>(sizeof(float)));
        auto* const planes = static_cast<float*>(scratch.data());
        with_tile(p, [&]<int G>(const TileParams<T, G>& own) {
          const int64_t walked =
              own.tile.group * own.tile.vectors * static_cast<int64_t>(16 * sizeof(C) / sizeof(T));
          launch_tile(plan_planes_kernel<T, G>, own, p.batch * own.tile.chunks, walked, target,
                      data<float>(*weight), data<float>(*bias), planes);
        });
        return enlarge_planes(planes, sizes.batch, sizes.frames, sizes.height, sizes.width, *rgb);
      }
    }
    const Workspace scratch(target, latents ? 0 : source.numel() * static_cast<int64_t>(sizeof(C)));
    if (latents) {
      walk_pairs(p, to, target);
    } else {
      edited.pointer = scratch.data();
      edited.dtype = std::is_same_v<C, double> ? ScalarType::Double : ScalarType::Float;
      walk_pairs(p, mutable_data<C>(edited), target);
    }
    if (rgb) latent_to_rgb(edited, *weight, *bias, *rgb);
  });
}

}  // namespace
}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("plan_run", LATENTFAST_BOX(latentfast::cuda::plan_run));
}
