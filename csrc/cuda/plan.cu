// plan_run on CUDA: the walk of plan.cuh, to latents or to enlarged RGB bytes.
//
// A block walks a tile of some channels and positions. To latents that is all. To bytes the edited latents
// are written nowhere: the tile is left in shared memory, mapped to RGB there, and what goes to scratch
// memory are three float32 planes, at Wan 2.1's size an eighth of what was read, from which latent_to_rgb's
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

constexpr int kPairThreads = 256;
constexpr int kWalkBlocks = 4;  // a multiprocessor's at a time
constexpr int kMostTileBytes =
    96 << 10;  // of shared memory, what cards from capability 8.0 on have for a block

template <typename T, int G>
struct TileParams {
  PlanParams<T> plan;
  PlanTile tile;
};

// The tile's sample, channels and first element.
template <typename T, int G>
struct TileOrigin {
  uint32_t b;
  int32_t begin, count;
  int64_t e;

  __device__ TileOrigin(const TileParams<T, G>& p, uint32_t groups) {
    uint32_t chunk = blockIdx.x, rest = 0;
    if (gridDim.x != p.tile.chunks) {
      rest = chunk / p.tile.chunks;
      chunk -= rest * p.tile.chunks;
    }
    b = groups == 1 ? rest : rest / groups;
    begin = static_cast<int32_t>(rest - b * groups) * p.tile.group;
    count = min(p.tile.group, static_cast<int32_t>(p.plan.channels) - begin);
    e = static_cast<int64_t>(chunk) * p.tile.vectors * kPack<T>;
  }
};

// Latents of the tile.
template <typename T, int G>
__global__ void __launch_bounds__(PlanTile::kThreads, kWalkBlocks)
    plan_latents_kernel(const __grid_constant__ TileParams<T, G> p, T* out) {
  using Lanes = SlotLanes<T, G>;
  extern __shared__ uint4 room[];
  const TileOrigin<T, G> tile(p, p.tile.groups);
  const Lanes at(p.plan, p.tile, room);
  const int64_t e = tile.e + threadIdx.x * Lanes::V;
  const bool inside = at.rank < tile.count && e < p.plan.elements;
  at.fetch(p.plan, tile.b, tile.begin, tile.count, e);
  if (!inside) return;
  Wide<T> x[Lanes::kCount];
  walk_plan<T>(p.plan, at, x);
  T* to = out + (tile.b * p.plan.channels + tile.begin + at.rank) * p.plan.elements + e;
#pragma unroll
  for (int g = 0; g < G; ++g, to += p.plan.elements) {
    if (at.rank + g < tile.count) {
      store_narrow(to, reinterpret_cast<Wide<T>(&)[Lanes::V]>(x[g * Lanes::V]));
    }
  }
}

__device__ __forceinline__ void add_scaled(float4& sum, float w, const float4& x) {
  sum = make_float4(fmaf(w, x.x, sum.x), fmaf(w, x.y, sum.y), fmaf(w, x.z, sum.z), fmaf(w, x.w, sum.w));
}

// A walked channel's neighbours of a tile in fours, an even number.
template <typename T>
LATENTFAST_HD int32_t pitch_of_fours(const PlanTile& tile) {
  const int32_t fours = tile.vectors * (kPack<T> / 4);
  return fours + fours % 2;
}

// Where the i-th four lie in shared memory, so that neither threads that write every other four nor such that
// read them all meet in a bank.
__device__ __forceinline__ int32_t place_of_four(int32_t i) { return i ^ (i >> 3 & 1); }

// RGB of the tile's positions, to (B, 3, elements of a channel). Channels are added in their order, whichever
// threads walked them: the same bits as latent_to_rgb of the unrounded latents.
template <typename T, int G>
__global__ void __launch_bounds__(PlanTile::kThreads, kWalkBlocks)
    plan_planes_kernel(const __grid_constant__ TileParams<T, G> p, const float* weight, const float* bias,
                       float* planes) {
  using Lanes = SlotLanes<T, G>;
  constexpr int V = Lanes::V;
  extern __shared__ uint4 room[];
  const TileOrigin<T, G> tile(p, 1);
  const int32_t group = p.tile.group, channels = static_cast<int32_t>(p.plan.channels);
  const int32_t fours = p.tile.vectors * (V / 4), pitch = pitch_of_fours<T>(p.tile);
  float4* const weights = reinterpret_cast<float4*>(room);  // a channel's three
  float4* const walked = weights + group;                   // (group, pitch)
  const Lanes at(p.plan, p.tile, room + group * (1 + pitch));
  const int64_t e = tile.e + threadIdx.x * V;
  const int32_t rank = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
  planes += 3 * tile.b * p.plan.elements + tile.e;
  for (int32_t begin = 0; begin < channels; begin += group) {
    const int32_t count = min(group, channels - begin);
    const bool inside = at.rank < count && e < p.plan.elements;
    if (begin > 0) __syncthreads();  // the weights are no longer read
    for (int32_t i = rank; i < 3 * count; i += threads) {
      __pipeline_memcpy_async(reinterpret_cast<float*>(weights + i / 3) + i % 3, weight + 3 * begin + i, 4);
    }
    at.fetch(p.plan, tile.b, begin, count, e);
    if (inside) {
      float x[Lanes::kCount];
      walk_plan<T>(p.plan, at, x);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (at.rank + g >= count) break;
#pragma unroll
        for (int v = 0; v < V; v += 4) {
          const float* const four = x + g * V + v;
          walked[(at.rank + g) * pitch + place_of_four((threadIdx.x * V + v) / 4)] =
              make_float4(four[0], four[1], four[2], four[3]);
        }
      }
    }
    __syncthreads();
    for (int32_t i = rank; i < fours && tile.e + 4 * i < p.plan.elements; i += threads) {
      float4 rgb[3];
      float* const to = planes + 4 * i;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const float b = begin == 0 ? __ldg(bias + k) : 0;
        rgb[k] =
            begin == 0 ? make_float4(b, b, b, b) : *reinterpret_cast<const float4*>(to + k * p.plan.elements);
      }
      const float4* from = walked + place_of_four(i);
#pragma unroll 4
      for (int32_t c = 0; c < count; ++c, from += pitch) {
        const float4 x = *from, w = weights[c];
        add_scaled(rgb[0], w.x, x);
        add_scaled(rgb[1], w.y, x);
        add_scaled(rgb[2], w.z, x);
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) *reinterpret_cast<float4*>(to + k * p.plan.elements) = rgb[k];
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

// Calls `launch` with a tile of G channels a thread and with its bytes of shared memory, to which `more` are
// added. Four channels share the overhead of an instruction, and masks; a thread has one, if a mask tells
// channels apart or if there is no room for more.
template <typename T, typename More, typename Launch>
void with_tile(const PlanParams<T>& p, const More& more, const Launch& launch) {
  const auto with = [&]<int G>(int64_t most) {
    TileParams<T, G> own{p, {}};
    own.tile = PlanTile::of(own.plan, std::integral_constant<int, G>());
    const int64_t bytes = SlotLanes<T, G>::room(own.plan, own.tile) + more(own.tile);
    if (bytes > most) return false;
    launch(own, static_cast<int>(bytes));
    return true;
  };
  bool one = p.channels == 1;
  for (int i = 0; i < kMostPlanTensors; ++i)
    one = one || ((p.masks >> i & 1) != 0 && p.tensor[i].channel != 0);
  if (one || !with.template operator()<4>(kMostTileBytes)) with.template operator()<1>(INT64_MAX);
}

template <typename T, int G, typename... Arguments>
void launch_tile(void (*kernel)(TileParams<T, G>, Arguments...), const TileParams<T, G>& p, int64_t blocks,
                 int bytes, const Target& target, Arguments... arguments) {
  if (bytes > kSharedBytes) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "plan_run");
  }
  const dim3 threads(p.tile.vectors, ceil_div(p.tile.group, G));
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
          with_tile(
              p, [](const PlanTile&) { return 0; },
              [&]<int G>(const TileParams<T, G>& own, int bytes) {
                launch_tile(plan_latents_kernel<T, G>, own, p.batch * own.tile.groups * own.tile.chunks,
                            bytes, target, to);
              });
          if (rgb) latent_to_rgb(edited, *weight, *bias, *rgb);
          return;
        }
        const Workspace scratch(target, 3 * p.batch * p.elements * static_cast<int64_t>(sizeof(float)));
        auto* const planes = static_cast<float*>(scratch.data());
        const auto more = [](const PlanTile& tile) {
          return tile.group * (1 + pitch_of_fours<T>(tile)) * static_cast<int>(sizeof(float4));
        };
        with_tile(p, more, [&]<int G>(const TileParams<T, G>& own, int bytes) {
          launch_tile(plan_planes_kernel<T, G>, own, p.batch * own.tile.chunks, bytes, target,
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
