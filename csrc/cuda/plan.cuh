// A plan's instruction list, walked on CUDA.
//
// The list comes in a kernel's arguments, so all threads read it from the constant cache and branch alike. A
// thread has a few elements in registers and takes a few instructions at a time: the loads of their operands
// and masks are all under way before the first of them is computed. The coefficients, which sliders move, lie
// in device memory, one line of 16 bytes for an instruction and a channel: they are read through L1, and a
// CUDA graph that is replayed finds what they are by then.
#pragma once

#include "../common/plan_program.h"
#include "columns.cuh"
#include "gate.cuh"

namespace latentfast::cuda {

// A tensor that broadcasts to the source, in elements. `inner`: 0 if it does not change within a frame.
struct PlanTensor {
  const void* data;
  int64_t sample, channel, frame;
  int32_t inner;
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
};

// Some elements of a plan's value are lanes of a thread: kCount of them, of which those that are kMasks apart
// share a mask's element; kChunk instructions have their loads under way together. VectorLanes: V neighbours
// in a channel, in one frame.
template <typename T, int V>
struct VectorLanes {
  static constexpr int kCount = V, kMasks = V, kChunk = 4;
  using C = Wide<T>;
  template <typename M>
  using Held = Raw<M, V>;
  using Operand = Held<T>;
  using Mask = Held<C>;

  int64_t b, c, t, r;  // r: the first one's place in its frame

  // From element e of a channel on.
  __device__ VectorLanes(const PlanParams<T>& p, int64_t sample, int64_t channel, int64_t e)
      : b(sample), c(channel), t(0), r(e) {
    if (p.frame == p.elements) return;
    t = (e | p.frame) >> 32 == 0 ? static_cast<uint32_t>(e) / static_cast<uint32_t>(p.frame) : e / p.frame;
    r = e - t * p.frame;
  }
  template <typename M>
  __device__ __forceinline__ void load(const PlanTensor& x, Held<M>& held) const {
    const M* const from = static_cast<const M*>(x.data) + (b * x.sample + c * x.channel + t * x.frame);
    load_row(held, from + r * x.inner, x.inner);
  }
  template <typename M>
  __device__ __forceinline__ void widened(const PlanTensor& x, Held<M>& held, C (&out)[V]) const {
    fill_row(held, x.inner);
    widen_raw(held, out);
  }
  __device__ __forceinline__ PlanCoefficients<C> coefficients(const PlanParams<T>& p, int k, int) const {
    return p.coefficients[(k * p.batch + b) * p.channels + c];
  }
  // The element beside lane v in the quarter turn of pairs.
  __device__ __forceinline__ C partner(const C (&x)[V], int v) const {
    return v % 2 == 0 ? -x[v + 1] : x[v - 1];
  }
};

// PairLanes: the elements 2i and 2i + 1 of a sample, wherever its channels and frames begin; for what is no
// multiple of 16 bytes or not aligned.
template <typename T>
struct PairLanes {
  static constexpr int kCount = 2, kMasks = 2, kChunk = 4;
  using C = Wide<T>;
  template <typename M>
  struct Held {
    M value[2];
  };
  using Operand = Held<T>;
  using Mask = Held<C>;

  int64_t b, c[2], t[2], r[2];
  bool alone;  // the last of an odd number: the second lane then repeats the first

  __device__ PairLanes(const PlanParams<T>& p, int64_t sample, int64_t pair) : b(sample) {
    alone = 2 * pair + 1 == p.channels * p.elements;
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      const int64_t e = 2 * pair + (alone ? 0 : v);
      c[v] = e / p.elements;
      const int64_t rest = e - c[v] * p.elements;
      t[v] = rest / p.frame;
      r[v] = rest - t[v] * p.frame;
    }
  }

  template <typename M>
  __device__ __forceinline__ void load(const PlanTensor& x, Held<M>& held) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      held.value[v] =
          static_cast<const M*>(x.data)[b * x.sample + c[v] * x.channel + t[v] * x.frame + r[v] * x.inner];
    }
  }
  template <typename M>
  __device__ __forceinline__ void widened(const PlanTensor&, Held<M>& held, C (&out)[2]) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) out[v] = static_cast<C>(widen(held.value[v]));
  }
  __device__ __forceinline__ PlanCoefficients<C> coefficients(const PlanParams<T>& p, int k, int v) const {
    return p.coefficients[(k * p.batch + b) * p.channels + c[v]];
  }
  __device__ __forceinline__ C partner(const C (&x)[2], int v) const {
    return alone ? C(0) : v == 0 ? -x[1] : x[0];
  }
};

// GroupLanes: V neighbours in each of G channels, from channel c on; what is beyond the last repeats it.
// Masks are the same for all channels. An instruction is looked up once for all of them.
template <typename T, int V, int G>
struct GroupLanes {
  static constexpr int kCount = V * G, kMasks = V, kChunk = 1;
  using C = Wide<T>;
  struct Operand {
    Raw<T, V> of[G];
  };
  using Mask = Raw<C, V>;

  int64_t b, c, last, t, r;

  __device__ __forceinline__ int64_t channel(int g) const { return min(c + g, last); }
  template <typename M>
  __device__ __forceinline__ const M* in_frame(const PlanTensor& x) const {
    return static_cast<const M*>(x.data) + (b * x.sample + t * x.frame) + r * x.inner;
  }
  __device__ __forceinline__ void load(const PlanTensor& x, Operand& held) const {
    const T* const from = in_frame<T>(x);
#pragma unroll
    for (int g = 0; g < G; ++g) load_row(held.of[g], from + channel(g) * x.channel, x.inner);
  }
  __device__ __forceinline__ void load(const PlanTensor& x, Mask& held) const {
    load_row(held, in_frame<C>(x), x.inner);
  }
  __device__ __forceinline__ void widened(const PlanTensor& x, Operand& held, C (&out)[kCount]) const {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      fill_row(held.of[g], x.inner);
      widen_raw(held.of[g], reinterpret_cast<C(&)[V]>(out[g * V]));
    }
  }
  __device__ __forceinline__ void widened(const PlanTensor& x, Mask& held, C (&out)[V]) const {
    fill_row(held, x.inner);
    widen_raw(held, out);
  }
  __device__ __forceinline__ PlanCoefficients<C> coefficients(const PlanParams<T>& p, int k, int v) const {
    return p.coefficients[(k * p.batch + b) * p.channels + channel(v / V)];
  }
  __device__ __forceinline__ C partner(const C (&x)[kCount], int v) const {
    return v % 2 == 0 ? -x[v + 1] : x[v - 1];
  }
};

// Instruction k on the lanes x, with its operand y and its mask m.
template <typename T, typename Lanes, int V = Lanes::kCount>
__device__ __forceinline__ void apply_step(const PlanParams<T>& p, int k, const Lanes& at, Wide<T> (&x)[V],
                                           const Wide<T> (&y)[V], const Wide<T> (&m)[Lanes::kMasks]) {
  using C = Wide<T>;
  const PlanStep step = p.step[k];
  const bool masked = step.mask >= 0;
  const auto mask = [&](int v) { return m[v % Lanes::kMasks]; };
  C made[V];
  switch (step.kind) {
    case PlanKind::add: {
      const C strength = at.coefficients(p, k, 0).value[0];
#pragma unroll
      for (int v = 0; v < V; ++v)
        x[v] = masked ? fma(mask(v), strength * y[v], x[v]) : fma(strength, y[v], x[v]);
      return;
    }
    case PlanKind::affine:
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const PlanCoefficients<C> own = at.coefficients(p, k, v);
        made[v] = fma(x[v] - own.value[0], own.value[1], own.value[2]);
      }
      break;
    case PlanKind::tone: {
      const PlanCoefficients<C> own = at.coefficients(p, k, 0);
      const C octaves = own.value[1], depth = own.value[2];
#pragma unroll
      for (int v = 0; v < V; ++v) made[v] = x[v] * (1 - depth * gate_at(fma(-octaves, fabs(x[v]), octaves)));
      break;
    }
    default: {
      const PlanCoefficients<C> own = at.coefficients(p, k, 0);
      const C a = own.value[0], b = own.value[1], turn = own.value[2];
      if (b == 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) made[v] = a * x[v];
      } else if (a == 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) made[v] = b * y[v];
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) made[v] = fma(a, x[v], b * y[v]);
      }
      if (turn != 0) {
#pragma unroll
        for (int v = 0; v < V; ++v) made[v] = fma(turn, at.partner(x, v), made[v]);
      }
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (!masked) {
      x[v] = made[v];
      continue;
    }
    const C from = step.outside ? made[v] : x[v], to = step.outside ? x[v] : made[v];
    const C mixed = fma(mask(v), to - from, from);
    x[v] = mask(v) == 0 ? from : mask(v) == 1 ? to : mixed;
  }
}

// The value that all of `p`'s instructions make at these lanes.
template <typename T, typename Lanes, int V = Lanes::kCount>
__device__ __forceinline__ void walk_plan(const PlanParams<T>& p, const Lanes& at, Wide<T> (&x)[V]) {
  using C = Wide<T>;
  typename Lanes::Operand source;
  at.load(p.tensor[0], source);
#pragma unroll 1
  for (int first = 0; first < p.steps || first == 0; first += Lanes::kChunk) {
    typename Lanes::Operand operands[Lanes::kChunk];
    typename Lanes::Mask masks[Lanes::kChunk];
#pragma unroll
    for (int j = 0; j < Lanes::kChunk; ++j) {
      if (first + j >= p.steps) break;
      const PlanStep step = p.step[first + j];
      if (step.operand >= 0) at.load(p.tensor[step.operand], operands[j]);
      if (step.mask >= 0) at.load(p.tensor[step.mask], masks[j]);
    }
    if (first == 0) at.widened(p.tensor[0], source, x);
#pragma unroll
    for (int j = 0; j < Lanes::kChunk; ++j) {
      if (first + j >= p.steps) break;
      const PlanStep step = p.step[first + j];
      C y[V] = {}, m[Lanes::kMasks] = {};
      if (step.operand >= 0) at.widened(p.tensor[step.operand], operands[j], y);
      if (step.mask >= 0) at.widened(p.tensor[step.mask], masks[j], m);
      apply_step<T>(p, first + j, at, x, y, m);
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
