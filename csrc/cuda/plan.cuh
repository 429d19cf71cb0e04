// A plan's instruction list, walked on CUDA.
//
// The list comes in a kernel's arguments, so all threads read it from the constant cache and branch alike. A
// thread has a few elements in registers. What an instruction waits for is its operand, so none is fetched
// when its turn comes: the lanes of plan_lanes.cuh have them on their way to shared memory, or to L2, before
// the walk begins. The coefficients, which sliders move, lie in device memory, 16 bytes for an instruction
// and a channel: a CUDA graph that is replayed finds what they are by then.
#pragma once

#include "../common/plan_program.h"
#include "columns.cuh"
#include "gate.cuh"

namespace latentfast::cuda {

// A tensor that broadcasts to the source, in elements. `inner`: 0 if it does not change within a frame.
struct PlanTensor {
  const void* data;
  int64_t sample, channel, frame;
  int64_t inner;
};

struct PlanStep {
  PlanKind kind;
  int8_t operand, mask;  // -1 for none
  bool outside;          // the mask confines what was before: confine
};

template <typename T>
struct PlanParams {
  PlanTensor tensor[kMostPlanTensors];
  PlanStep step[kMostPlanInstructions];
  const PlanCoefficients<Wide<T>>* coefficients;  // (K, B, C)
  int64_t batch, channels;
  int64_t elements;  // of a channel
  int64_t frame;     // of a frame; all of the channel where no tensor tells frames apart
  int32_t steps;
  uint32_t masks;  // tensors that are masks, a bit each
};

// from + m·(to − from), and where m is 0 or 1 the one or the other alone.
template <typename C>
__device__ __forceinline__ C mixed(C from, C to, C m) {
  const C between = fma(m, to - from, from);
  return m == 0 ? from : m == 1 ? to : between;
}

// Instruction k on the lanes x, with what was loaded of its operand and its mask. All threads take the same
// branches; operands are widened behind them, where they are used, for the registers' sake.
template <typename T, typename Lanes, int V = Lanes::kCount>
__device__ __forceinline__ void apply_step(const PlanParams<T>& p, int k, const Lanes& at, Wide<T> (&x)[V],
                                           typename Lanes::Operand& operand, typename Lanes::Mask& mask) {
  using C = Wide<T>;
  constexpr int kMasks = Lanes::kMasks;
  const PlanStep step = p.step[k];
  const PlanCoefficients<C> own = at.coefficients(p, k, 0);
  C made[V], m[kMasks];
  if (step.mask >= 0) at.widened(p, step.mask, mask, m);
  switch (step.kind) {
    case PlanKind::add: {
      C y[V];
      at.widened(p, step.operand, operand, y);
      const C strength = own.value[0];
      if (step.mask < 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = fma(strength, y[v], x[v]);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = fma(m[v % kMasks], strength * y[v], x[v]);
      }
      return;
    }
    case PlanKind::affine:
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const PlanCoefficients<C> each = at.coefficients(p, k, v);
        made[v] = fma(x[v] - each.value[0], each.value[1], each.value[2]);
      }
      break;
    case PlanKind::tone: {
      const C octaves = own.value[1], depth = own.value[2];
#pragma unroll
      for (int v = 0; v < V; ++v) made[v] = x[v] * (1 - depth * gate_at(fma(-octaves, fabs(x[v]), octaves)));
      break;
    }
    default: {
      const C a = own.value[0], b = own.value[1], turn = own.value[2];
      if (b == 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) made[v] = a * x[v];
      } else {
        at.widened(p, step.operand, operand, made);
        if (a == 0) {
#pragma unroll
          for (int v = 0; v < V; ++v) made[v] *= b;
        } else {
#pragma unroll
          for (int v = 0; v < V; ++v) made[v] = fma(a, x[v], b * made[v]);
        }
      }
      if (turn != 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) made[v] = fma(turn, at.partner(x, v), made[v]);
      }
    }
  }
  if (step.mask < 0) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = made[v];
  } else if (step.outside) {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = mixed(made[v], x[v], m[v % kMasks]);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = mixed(x[v], made[v], m[v % kMasks]);
  }
}

// The value that all of `p`'s instructions make at these lanes.
template <typename T, typename Lanes, int V = Lanes::kCount>
__device__ __forceinline__ void walk_plan(const PlanParams<T>& p, const Lanes& at, Wide<T> (&x)[V]) {
  typename Lanes::Operand source;
  at.load(p, 0, source);
#pragma unroll 1
  for (int first = 0; first < p.steps || first == 0; first += Lanes::kChunk) {
    typename Lanes::Operand operands[Lanes::kChunk];
    typename Lanes::Mask masks[Lanes::kChunk];
#pragma unroll
    for (int j = 0; j < Lanes::kChunk; ++j) {
      if (first + j >= p.steps) break;
      const PlanStep step = p.step[first + j];
      if (step.operand >= 0) at.load(p, step.operand, operands[j]);
      if (step.mask >= 0) at.load(p, step.mask, masks[j]);
    }
    if (first == 0) at.widened(p, 0, source, x);
#pragma unroll
    for (int j = 0; j < Lanes::kChunk; ++j) {
      if (first + j >= p.steps) break;
      apply_step<T>(p, first + j, at, x, operands[j], masks[j]);
    }
  }
}

// --- host ---

// How a tensor lies beside the source's sizes.
inline PlanTensor plan_tensor(const View& x, const PlanSizes& sizes) {
  STD_TORCH_CHECK(x.dim() == 5, "a plan: five-dimensional tensors expected");
  const int64_t plane = x.size(3) * x.size(4);
  STD_TORCH_CHECK(plane == 1 || plane == sizes.plane(), "a plan: H and W must both be full or both 1");
  const auto stride = [&](int d, int64_t natural) { return x.size(d) == 1 ? 0 : natural; };
  const int64_t frame = plane, channel = x.size(2) * frame, sample = x.size(1) * channel;
  return {x.const_data_ptr(), stride(0, sample), stride(1, channel), stride(2, frame), plane == 1 ? 0 : 1};
}

// The first `steps` instructions, with the tensors that they and `values` read.
template <typename T>
PlanParams<T> plan_params(std::span<const View> inputs, const PlanProgram& program, const View& coefficients,
                          int steps, const PlanValues& values) {
  PlanParams<T> p{};
  const PlanSizes sizes(inputs[0]);
  bool read[kMostPlanTensors] = {true};
  for (int i = 0; i < values.count; ++i) {
    if (values.at[i] >= 0) read[values.at[i]] = true;
  }
  p.steps = steps;
  for (int k = 0; k < steps; ++k) {
    const PlanInstruction& own = program.at[k];
    const bool takes = own.operand >= 0 && own.operation != PlanOperation::adain;
    p.step[k] = {kind_of(own.operation), static_cast<int8_t>(takes ? own.operand : -1),
                 static_cast<int8_t>(own.mask), own.operation == PlanOperation::confine};
    if (takes) read[own.operand] = true;
    if (own.mask >= 0) read[own.mask] = true;
    if (own.mask >= 0) p.masks |= 1u << own.mask;
  }
  p.frame = p.elements = sizes.elements();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!read[i]) continue;
    p.tensor[i] = plan_tensor(inputs[i], sizes);
    if (sizes.frames > 1 && p.tensor[i].frame != p.tensor[i].inner * sizes.plane()) p.frame = sizes.plane();
  }
  p.coefficients = data<PlanCoefficients<Wide<T>>>(coefficients);
  p.batch = sizes.batch;
  p.channels = sizes.channels;
  return p;
}

// Whether vectors of V elements stay within their frames and are aligned to 16 bytes.
template <typename T>
bool plan_vectors(const PlanParams<T>& p, int V) {
  if (sizeof(T) > 4 || p.frame % V != 0) return false;
  for (const PlanTensor& x : p.tensor) {
    if (x.inner != 0 && !aligned16(x.data)) return false;
  }
  return true;
}

inline uint32_t plan_blocks(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "a plan: latents of this size take too many blocks: ", blocks);
  return static_cast<uint32_t>(blocks);
}

}  // namespace latentfast::cuda
