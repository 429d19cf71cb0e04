// A plan's instruction list, walked on CUDA.
//
// The list comes in a kernel's arguments, so all threads read it from the constant cache and branch alike. A
// thread has a few elements in registers. What an instruction waits for is its operand, so none is fetched
// when its turn comes: the lanes of plan_lanes.cuh have them on their way to shared memory before the walk
// begins, or those of a few instructions together. The coefficients, which sliders move, lie in device
// memory, 16 bytes for an instruction and a channel: a CUDA graph that is replayed finds what they are by
// then.
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

struct alignas(16) PlanStep {
  PlanKind kind;
  int32_t operand, mask;  // tensors, as the lanes number them; -1 for none
  int32_t outside;        // the mask confines what was before: confine
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
  int32_t source;  // numbered as operands are
  uint32_t masks;  // tensors that are masks, a bit each
};

// from + m·(to − from), and where m is 0 or 1 the one or the other alone.
template <typename C>
__device__ __forceinline__ C mixed(C from, C to, C m) {
  const C between = fma(m, to - from, from);
  return m == 0 ? from : m == 1 ? to : between;
}

// a·x + b·y, where a weight of exactly 0 leaves its vector out.
template <typename C>
__device__ __forceinline__ C weighted(C a, C x, C b, C y) {
  return b == 0 ? a * x : a == 0 ? b * y : fma(a, x, b * y);
}

// Instruction k on the lanes x, with what was loaded of its operand and its mask; false, and nothing is done,
// if it is one for `apply_rare_step`. All threads take the same branches; operands are widened behind them,
// where they are used, and x changes in place, for the registers' sake.
template <typename T, typename Lanes, int V = Lanes::kCount>
__device__ __forceinline__ bool apply_step(const PlanParams<T>& p, int k, const Lanes& at, Wide<T> (&x)[V],
                                           typename Lanes::Operand& operand, typename Lanes::Mask& mask) {
  using C = Wide<T>;
  constexpr int kMasks = Lanes::kMasks;
  const PlanStep step = p.step[k];
  const PlanCoefficients<C> own = at.coefficients(p, k, 0);
  C m[kMasks], y[V];
  if (step.mask >= 0) at.widened(p, step.mask, mask, m);
  // x ← made(v), as far as the mask has it
  const auto each = [&](const auto& made) {
    if (step.mask < 0) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = made(v);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = mixed(x[v], made(v), m[v % kMasks]);
    }
  };

  switch (step.kind) {
    case PlanKind::add: {
      at.widened(p, step.operand, operand, y);
      const C strength = own.value[0];
      if (step.mask < 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = fma(strength, y[v], x[v]);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = fma(m[v % kMasks], strength * y[v], x[v]);
      }
      return true;
    }
    case PlanKind::affine:
      each([&](int v) {
        const PlanCoefficients<C> channel = at.coefficients(p, k, v);
        return fma(x[v] - channel.value[0], channel.value[1], channel.value[2]);
      });
      return true;
    case PlanKind::tone: {
      const C octaves = own.value[1], depth = own.value[2];
      each([&](int v) { return x[v] * (1 - depth * gate_at(fma(-octaves, fabs(x[v]), octaves))); });
      return true;
    }
    default:
      break;
  }

  const C a = own.value[0], b = own.value[1], turn = own.value[2];
  at.widened(p, step.operand, operand, y);
  if (step.outside) {  // a confine, which takes its operand as it is
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] = mixed(y[v], x[v], m[v % kMasks]);
  } else if (turn == 0 && a == 0) {
    each([&](int v) { return b * y[v]; });
  } else if (turn == 0 && b != 0) {
    each([&](int v) { return fma(a, x[v], b * y[v]); });
  } else {
    return false;
  }
  return true;
}

// What `apply_step` leaves: an interpolation at 0, or between opposite vectors.
template <typename T, typename Lanes, int V = Lanes::kCount>
__device__ __forceinline__ void apply_rare_step(const PlanParams<T>& p, int k, const Lanes& at,
                                                Wide<T> (&x)[V], typename Lanes::Operand& operand,
                                                typename Lanes::Mask& mask) {
  using C = Wide<T>;
  constexpr int kMasks = Lanes::kMasks;
  const PlanStep step = p.step[k];
  const PlanCoefficients<C> own = at.coefficients(p, k, 0);
  const C a = own.value[0], b = own.value[1], turn = own.value[2];
  C m[kMasks], y[V];
  if (step.mask >= 0) at.widened(p, step.mask, mask, m);
  at.widened(p, step.operand, operand, y);
#pragma unroll
  for (int v = 0; v < V; v += 2) {
    C made[2] = {weighted(a, x[v], b, y[v]), weighted(a, x[v + 1], b, y[v + 1])};
    if (turn != 0 && at.paired()) {
      made[0] = fma(turn, -x[v + 1], made[0]);
      made[1] = fma(turn, x[v], made[1]);
    }
    x[v] = step.mask < 0 ? made[0] : mixed(x[v], made[0], m[v % kMasks]);
    x[v + 1] = step.mask < 0 ? made[1] : mixed(x[v + 1], made[1], m[(v + 1) % kMasks]);
  }
}

// The value that all of `p`'s instructions make at these lanes.
template <typename T, typename Lanes, int V = Lanes::kCount>
__device__ __forceinline__ void walk_plan(const PlanParams<T>& p, const Lanes& at, Wide<T> (&x)[V]) {
  constexpr int kChunk = Lanes::kChunk;
  typename Lanes::Operand source, operands[kChunk];
  typename Lanes::Mask masks[kChunk];
  const auto load = [&](int k, int j) {
    const PlanStep step = p.step[k];
    if (step.operand >= 0) at.load(p, step.operand, operands[j]);
    if (step.mask >= 0) at.load(p, step.mask, masks[j]);
  };
  at.load(p, p.source, source);
  if (kChunk == 1 || p.steps == 0) at.widened(p, p.source, source, x);
  if constexpr (kChunk == 1) {
    // What is rare stands outside of the inner loop: within, it would take that loop's registers.
#pragma unroll 1
    for (int k = 0; k < p.steps; ++k) {
#pragma unroll 1
      for (; k < p.steps; ++k) {
        load(k, 0);
        if (!apply_step<T>(p, k, at, x, operands[0], masks[0])) break;
      }
      if (k < p.steps) apply_rare_step<T>(p, k, at, x, operands[0], masks[0]);
    }
  } else {
#pragma unroll 1
    for (int first = 0; first < p.steps; first += kChunk) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (first + j < p.steps) load(first + j, j);
      }
      if (first == 0) at.widened(p, p.source, source, x);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (first + j < p.steps && !apply_step<T>(p, first + j, at, x, operands[j], masks[j]))
          apply_rare_step<T>(p, first + j, at, x, operands[j], masks[j]);
      }
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
    p.step[k] = {kind_of(own.operation), takes ? own.operand : -1, own.mask,
                 own.operation == PlanOperation::confine};
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
