// plan_moments and plan_coefficients on CUDA: what a plan's reductions need, taken when tensors are bound,
// and what its sliders come to. See common/plan.h.
//
// Moments: a block takes a part of a channel and one of the values, and sums up its products with itself and
// with those behind it. The parts, which depend on the size of a channel alone, are added in order.
//
// Coefficients: a block for each sample, a thread for each channel, in float64: a few microseconds, once for
// every move of a slider. The sliders come as arguments of the kernel, so that no memory of the host's has to
// outlive a copy.
#include <algorithm>

#include "plan_lanes.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kPartElements = 8192;

LATENTFAST_HD int64_t plan_sum_count(int m) { return m + m * (m + 1) / 2; }

// Of all threads, in a fixed order; the result is thread 0's. `room` is free again after the next barrier.
__device__ double sum_of_block(double x, double* room) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) sum += room[warp];
  __syncthreads();
  return sum;
}

template <typename T>
struct MomentsParams {
  PlanParams<T> plan;  // the instructions in front
  PlanValues values;
  int64_t parts;
  double* partial;  // (channels of all samples, parts, sums)
  double* moments;
};

// Some elements of a value or of a tensor in a channel: V neighbours from element e on, or one of a pair.
template <typename T, bool kPairs>
struct MomentLanes {
  static constexpr int V = kPairs ? 1 : 4;  // the sums take as many registers again
  using Lanes = std::conditional_t<kPairs, PairLanes<T>, VectorLanes<T, V>>;
  using C = Wide<T>;
  Lanes at;
  int lane;

  __device__ static MomentLanes of(const PlanParams<T>& p, int64_t b, int64_t c, int64_t e) {
    if constexpr (kPairs) {
      const int64_t flat = c * p.elements + e;
      return {PairLanes<T>(p, b, flat / 2), static_cast<int>(flat % 2)};
    } else {
      return {VectorLanes<T, V>(p, b, c, e), 0};
    }
  }
  __device__ void take(const C (&x)[Lanes::kCount], C (&out)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = !kPairs ? x[v] : lane == 0 ? x[0] : x[Lanes::kCount - 1];
  }
  __device__ void value(const PlanParams<T>& p, C (&out)[V]) const {
    C x[Lanes::kCount];
    walk_plan<T>(p, at, x);
    take(x, out);
  }
  __device__ void tensor(const PlanParams<T>& p, int i, C (&out)[V]) const {
    typename Lanes::Operand held;
    C x[Lanes::kCount];
    at.load(p, i, held);
    at.widened(p, i, held, x);
    take(x, out);
  }
};

template <typename T, bool kPairs>
__global__ void __launch_bounds__(kThreads, 2)
    plan_moments_kernel(const __grid_constant__ MomentsParams<T> p) {
  using Lanes = MomentLanes<T, kPairs>;
  using C = Wide<T>;
  constexpr int V = Lanes::V;
  __shared__ double room[kWarps];
  __shared__ double own_first;
  const PlanParams<T>& plan = p.plan;
  const int64_t channel = blockIdx.x / p.parts, part = blockIdx.x - channel * p.parts;
  const int64_t b = channel / plan.channels, c = channel - b * plan.channels;
  const int i = blockIdx.y, m = p.values.count;
  const auto value = [&](const Lanes& lanes, C(&x)[V]) {
    i == 0 ? lanes.value(plan, x) : lanes.tensor(plan, p.values.at[i], x);
  };

  double first[kMostPlanValues];  // of value i + d
#pragma unroll
  for (int d = 1; d < kMostPlanValues; ++d) {
    first[d] = 0;
    if (i + d < m) {
      C x[V];
      const Lanes lanes = Lanes::of(plan, b, c, 0);
      lanes.tensor(plan, p.values.at[i + d], x);
      first[d] = x[0];
    }
  }
  double* const known = p.moments + channel * plan_moment_count(m);
  if (threadIdx.x == 0) {
    C x[V];
    value(Lanes::of(plan, b, c, 0), x);
    own_first = x[0];
    if (part == 0) known[i] = x[0];
    if (part + 1 == p.parts) {
      value(Lanes::of(plan, b, c, plan.elements - V), x);
      known[m + i] = x[V - 1];
    }
  }
  __syncthreads();
  first[0] = own_first;

  double sum = 0, products[kMostPlanValues] = {};
  const int64_t stop = min((part + 1) * kPartElements, plan.elements);
  for (int64_t e = part * kPartElements + threadIdx.x * V; e < stop; e += kThreads * V) {
    const Lanes lanes = Lanes::of(plan, b, c, e);
    C x[V], y[V];
    value(lanes, x);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const double rest = x[v] - first[0];
      sum += rest;
      products[0] = fma(rest, rest, products[0]);
    }
#pragma unroll
    for (int d = 1; d < kMostPlanValues; ++d) {
      if (i + d >= m) break;
      lanes.tensor(plan, p.values.at[i + d], y);
#pragma unroll
      for (int v = 0; v < V; ++v) products[d] = fma(x[v] - first[0], y[v] - first[d], products[d]);
    }
  }
  double* const to = p.partial + (channel * p.parts + part) * plan_sum_count(m);
  sum = sum_of_block(sum, room);
  if (threadIdx.x == 0) to[i] = sum;
#pragma unroll
  for (int d = 0; d < kMostPlanValues; ++d) {
    if (i + d >= m) break;
    const double product = sum_of_block(products[d], room);
    if (threadIdx.x == 0) to[m + i * m - i * (i - 1) / 2 + d] = product;
  }
}

__global__ void __launch_bounds__(kThreads)
    add_moments_kernel(const double* partial, int64_t parts, int64_t channels, int m, double* moments) {
  const int64_t sums = plan_sum_count(m);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= channels * sums) return;
  const int64_t channel = i / sums, s = i - channel * sums;
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) total += partial[(channel * parts + part) * sums + s];
  moments[channel * plan_moment_count(m) + 2 * m + s] = total;
}

void plan_moments(std::span<const View> inputs, std::span<const int64_t> code, int64_t start,
                  std::span<const int64_t> values, const View& coefficients, const View& moments) {
  check_plan_inputs(inputs);
  check_contiguous(moments, "moments");
  if (inputs[0].numel() == 0 || values.empty()) return;
  const auto tensors = static_cast<int64_t>(inputs.size());
  const PlanValues chosen(values, tensors);
  const PlanProgram program(code, tensors, INT32_MAX, INT32_MAX);
  const Target target(inputs[0]);
  dispatch_floating(inputs[0].scalar_type(), "plan_moments", [&]<typename T>() {
    MomentsParams<T> p{plan_params<T>(inputs, program, coefficients, static_cast<int>(start), chosen), chosen,
                       0, nullptr, mutable_data<double>(moments)};
    const int64_t channels = p.plan.batch * p.plan.channels, sums = plan_sum_count(chosen.count);
    p.parts = ceil_div<int64_t>(p.plan.elements, kPartElements);
    const Workspace scratch(target, channels * p.parts * sums * static_cast<int64_t>(sizeof(double)));
    p.partial = static_cast<double*>(scratch.data());
    const dim3 grid(plan_blocks(channels * p.parts), static_cast<uint32_t>(chosen.count));
    bool pairs = true;
    if constexpr (sizeof(T) <= 4) {
      pairs = !plan_vectors(p.plan, 4);
      if (!pairs) plan_moments_kernel<T, false><<<grid, kThreads, 0, target.stream>>>(p);
    }
    if (pairs) plan_moments_kernel<T, true><<<grid, kThreads, 0, target.stream>>>(p);
    check_launch("plan_moments");
    const uint32_t blocks = plan_blocks(ceil_div<int64_t>(channels * sums, kThreads));
    add_moments_kernel<<<blocks, kThreads, 0, target.stream>>>(p.partial, p.parts, channels, chosen.count,
                                                               p.moments);
    check_launch("plan_moments");
  });
}

// --- coefficients ---

constexpr int kChannelThreads = 128;
constexpr int64_t kMostChannelBytes = 40 << 10;

struct CoefficientsParams {
  PlanProgram program;
  PlanValues values;
  int start, stop, given;
  double number[kMostPlanInstructions];  // the sliders, if `given`
  double* sliders;
  const double *statistics, *moments;
  void* out;
  int64_t elements, batch, channels;
};

template <typename C>
__global__ void __launch_bounds__(kChannelThreads)
    plan_coefficients_kernel(const __grid_constant__ CoefficientsParams p, PlanChannel* channel_of) {
  __shared__ double room[kChannelThreads / 32];
  __shared__ PlanWeights weights;
  extern __shared__ PlanChannel held[];
  const int64_t b = blockIdx.x;
  const bool follows = p.values.count > 0;
  channel_of = channel_of == nullptr ? held : channel_of + b * p.channels;
  if (b == 0 && static_cast<int>(threadIdx.x) < p.given) p.sliders[threadIdx.x] = p.number[threadIdx.x];
  const auto for_channels = [&](auto&& f) {
    for (int64_t c = threadIdx.x; c < p.channels; c += kChannelThreads) f(c);
  };
  const auto moments = [&](int64_t c) {
    return PlanMoments{p.moments + (b * p.channels + c) * plan_moment_count(p.values.count), p.values.count,
                       static_cast<double>(p.elements)};
  };
  if (follows) for_channels([&](int64_t c) { start_channel(channel_of[c]); });

  for (int k = p.start; k < p.stop; ++k) {
    const PlanInstruction own = p.program.at[k];
    PlanCoefficients<C>* const to = static_cast<PlanCoefficients<C>*>(p.out) + (k * p.batch + b) * p.channels;
    const double slider = own.slider < 0 ? 0.0 : p.given > 0 ? p.number[own.slider] : p.sliders[own.slider];
    const int j = own.operand < 0 ? -1 : p.values.find(own.operand);
    if (own.operation == PlanOperation::slerp || own.operation == PlanOperation::nlerp) {
      Sums sums{0.0, 0.0, 0.0};
      for_channels([&](int64_t c) {
        const Sums part = products_with(channel_of[c], moments(c), j);
        sums = {sums.aa + part.aa, sums.bb + part.bb, sums.ab + part.ab};
      });
      sums.aa = sum_of_block(sums.aa, room);
      sums.bb = sum_of_block(sums.bb, room);
      sums.ab = sum_of_block(sums.ab, room);  // its barriers: every channel is done
      if (threadIdx.x == 0) {
        const double last = last_of(channel_of[p.channels - 1], moments(p.channels - 1));
        weights = plan_weights(own.operation, slider, sums, p.channels * p.elements, last);
      }
      __syncthreads();
      const PlanWeights w = weights;
      for_channels([&](int64_t c) {
        to[c] = {{static_cast<C>(w.a), static_cast<C>(w.b), static_cast<C>(w.turn), C(0)}};
        const double squares = w.turn == 0.0 ? 0.0 : products_with(channel_of[c], moments(c), j).aa;
        mix_channel(channel_of[c], w.a, w.b, j, w.turn, squares);
      });
      __syncthreads();
      continue;
    }
    for_channels([&](int64_t c) {
      const double* const row = p.statistics + ((own.row * p.batch + b) * p.channels + c) * 2;
      const double mean = own.row < 0 ? 0.0 : row[0], std = own.row < 0 ? 0.0 : row[1];
      to[c] = own.operation == PlanOperation::adain
                  ? restyling_of<C>(channel_of[c], moments(c), slider, mean, std)
                  : plain_coefficients<C>(own.operation, slider, mean, std);
      if (follows) follow(channel_of[c], own, to[c], slider, j);
    });
    __syncthreads();
  }
}

void plan_coefficients(std::span<const int64_t> code, int64_t start, int64_t stop,
                       std::span<const int64_t> values, int64_t elements, std::span<const double> given,
                       const View& statistics, const View& moments, const View& sliders,
                       const View& coefficients) {
  STD_TORCH_CHECK(coefficients.dim() == 4 && coefficients.size(3) == 4 && statistics.dim() == 4,
                  "plan_coefficients takes statistics (R, B, C, 2) and coefficients (K, B, C, 4)");
  CoefficientsParams p{PlanProgram(code, kMostPlanTensors, sliders.numel(), statistics.size(0)),
                       PlanValues(values, kMostPlanTensors),
                       static_cast<int>(start),
                       static_cast<int>(stop),
                       static_cast<int>(given.size()),
                       {},
                       mutable_data<double>(sliders),
                       data<double>(statistics),
                       data<double>(moments),
                       coefficients.mutable_data_ptr(),
                       elements,
                       coefficients.size(1),
                       coefficients.size(2)};
  STD_TORCH_CHECK(p.program.count == coefficients.size(0) && stop <= p.program.count &&
                      (given.empty() || static_cast<int64_t>(given.size()) == sliders.numel()),
                  "plan_coefficients: the sizes of the program and of its tensors differ");
  if (coefficients.numel() == 0 || elements == 0) return;
  std::copy(given.begin(), given.end(), p.number);
  const Target target(coefficients);
  // a sample's linear combinations: in shared memory, if there is room
  const int64_t bytes = values.empty() ? 0 : p.channels * static_cast<int64_t>(sizeof(PlanChannel));
  const bool shared = bytes <= kMostChannelBytes;
  const Workspace scratch(target, shared ? 0 : p.batch * bytes);
  auto* const channels = shared ? nullptr : static_cast<PlanChannel*>(scratch.data());
  dispatch_wide(coefficients.scalar_type(), "plan_coefficients", [&]<typename C>() {
    plan_coefficients_kernel<C>
        <<<plan_blocks(p.batch), kChannelThreads, shared ? static_cast<size_t>(bytes) : 0, target.stream>>>(
            p, channels);
    check_launch("plan_coefficients");
  });
}

}  // namespace
}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("plan_moments", LATENTFAST_BOX(latentfast::cuda::plan_moments));
  m.impl("plan_coefficients", LATENTFAST_BOX(latentfast::cuda::plan_coefficients));
}
