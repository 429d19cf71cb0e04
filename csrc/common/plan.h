// The instruction list of a plan, and how sliders become the coefficients of its instructions.
//
// Torch-free and shared by the CPU and CUDA kernels. A plan walks a value x through instructions, element by
// element; what an instruction needs of the whole of x (the angle of a slerp, a channel's mean and deviation)
// is never read from x. Between two instructions that are not linear, x is a linear combination of tensors
// v_i that exist, its base and the operands, with coefficients for each channel and a constant:
//     x = Σ_i c_i·v_i + offset.
// So the sums over x follow from those over the v_i and their products, the *moments*, which are taken once
// and stay while sliders move. All of this is float64.
#pragma once

#include <cstdint>
#include <numbers>

#include "interpolation_weights.h"

namespace latentfast {

// In the order of latentfast/_operators.py.
enum class PlanOperation : int32_t {
  lerp,
  nlerp,
  slerp,
  direction,
  blend,
  confine,
  adain,
  tone_map,
  standardize,
  unstandardize
};

struct PlanInstruction {
  PlanOperation operation;
  int32_t operand;  // numbers of tensors, -1 for none
  int32_t mask;
  int32_t slider;
  int32_t row;  // of the statistics
};

constexpr int kPlanNumbers = 5;            // integers of an instruction in the operators' `program`
constexpr int kMostPlanInstructions = 32;  // of a plan
constexpr int kMostPlanTensors = 16;       // that a plan reads
constexpr int kMostPlanValues = 9;         // that a linear combination is made of

// What the walk does for an instruction.
enum class PlanKind : int32_t {
  mix,     // x ← a·x + b·y + turn·(x turned by a quarter); a weight of exactly 0 leaves its vector out
  add,     // x ← x + mask·(strength·y)
  affine,  // x ← (x − centre)·gain + offset
  tone,    // x ← x·(1 − depth/(1 + 2^(octaves·(1 − |x|)))), from s = 0.75·compression, octaves, depth
};

LATENTFAST_HD PlanKind kind_of(PlanOperation operation) {
  switch (operation) {
    case PlanOperation::direction:
      return PlanKind::add;
    case PlanOperation::adain:
    case PlanOperation::standardize:
    case PlanOperation::unstandardize:
      return PlanKind::affine;
    case PlanOperation::tone_map:
      return PlanKind::tone;
    default:
      return PlanKind::mix;
  }
}

// The coefficients of an instruction in a channel of a sample, in the order that PlanKind names them.
template <typename C>
struct alignas(4 * sizeof(C)) PlanCoefficients {
  C value[4];
};

// --- moments ---

// Of m values in one channel: their first and last elements, Σ(v_i − first_i), Σ(v_i − first_i)(v_j −
// first_j). Counted from the first element, so that a constant channel has a deviation of exactly 0.
LATENTFAST_HD int64_t plan_moment_count(int m) { return 3 * m + m * (m + 1) / 2; }

struct PlanMoments {
  const double* at;
  int count;
  double elements;  // of the channel

  LATENTFAST_HD double first(int i) const { return at[i]; }
  LATENTFAST_HD double last(int i) const { return at[count + i]; }
  LATENTFAST_HD double sum(int i) const { return at[2 * count + i]; }
  LATENTFAST_HD double product(int i, int j) const {
    const int low = i < j ? i : j, high = i < j ? j : i;
    return at[3 * count + low * count - low * (low - 1) / 2 + high - low];
  }
};

// --- a channel of x as a linear combination ---

struct PlanChannel {
  double weight[kMostPlanValues];
  double offset;
  // Σ of the squares of what a slerp between opposite vectors adds: a turned vector, which counts as
  // orthogonal to all others.
  double turned;
};

LATENTFAST_HD void start_channel(PlanChannel& x) {
  for (double& w : x.weight) w = 0.0;
  x.weight[0] = 1.0;
  x.offset = x.turned = 0.0;
}

struct PlanSums {
  double shift;    // x = shift + Σ weight·(v − first)
  double sum;      // Σ(x − shift)
  double squares;  // Σ(x − shift)²
  double scale;    // what `squares` would be if nothing cancelled
};

LATENTFAST_HD PlanSums sums_of(const PlanChannel& x, const PlanMoments& moments) {
  PlanSums out{x.offset, 0.0, x.turned, 0.0};
  for (int i = 0; i < moments.count; ++i) {
    const double w = x.weight[i];
    if (w == 0.0) continue;  // what is left out brings no NaN
    out.shift += w * moments.first(i);
    out.sum += w * moments.sum(i);
    out.scale += fabs(w) * sqrt(moments.product(i, i));
    for (int j = 0; j < moments.count; ++j) {
      if (x.weight[j] != 0.0) out.squares += w * x.weight[j] * moments.product(i, j);
    }
  }
  out.scale *= out.scale;
  return out;
}

// |x|², |v_j|² and x·v_j within the channel.
LATENTFAST_HD Sums products_with(const PlanChannel& x, const PlanMoments& moments, int j) {
  const PlanSums own = sums_of(x, moments);
  const double n = moments.elements, f = moments.first(j), s = moments.sum(j);
  double cross = 0.0;
  for (int i = 0; i < moments.count; ++i) {
    if (x.weight[i] != 0.0) cross += x.weight[i] * moments.product(i, j);
  }
  return {own.squares + 2.0 * own.shift * own.sum + n * own.shift * own.shift,
          moments.product(j, j) + 2.0 * f * s + n * f * f,
          cross + own.shift * s + f * own.sum + n * own.shift * f};
}

LATENTFAST_HD double last_of(const PlanChannel& x, const PlanMoments& moments) {
  double out = x.offset;
  for (int i = 0; i < moments.count; ++i) {
    if (x.weight[i] != 0.0) out += x.weight[i] * moments.last(i);
  }
  return out;
}

// x ← a·x + b·v_j + turn·(x turned); `squares`: |x|² in the channel.
LATENTFAST_HD void mix_channel(PlanChannel& x, double a, double b, int j, double turn, double squares) {
  for (double& w : x.weight) w = a == 0.0 ? 0.0 : a * w;
  x.offset = a == 0.0 ? 0.0 : a * x.offset;
  x.turned = (a == 0.0 ? 0.0 : a * a * x.turned) + (turn == 0.0 ? 0.0 : turn * turn * squares);
  if (b != 0.0) x.weight[j] += b;
}

template <typename C>
LATENTFAST_HD void affine_channel(PlanChannel& x, const PlanCoefficients<C>& own) {
  const double centre = own.value[0], gain = own.value[1], offset = own.value[2];
  for (double& w : x.weight) w *= gain;
  x.offset = (x.offset - centre) * gain + offset;
  x.turned *= gain * gain;
}

// --- coefficients ---

// Below this share of what did not cancel, a variance is float64's rounding: the channel counts as constant.
constexpr double kPlanCancelled = 1e-14;

// factor·((x − mean)/std·style_std + style_mean) + (1 − factor)·x, in the channel.
template <typename C>
LATENTFAST_HD PlanCoefficients<C> restyling_of(const PlanChannel& x, const PlanMoments& moments,
                                               double factor, double style_mean, double style_std) {
  const PlanSums own = sums_of(x, moments);
  const double n = moments.elements, middle = own.sum / n, mean = own.shift + middle;
  double square = own.squares - own.sum * middle;
  if (square <= kPlanCancelled * own.scale) square = 0.0;  // NaN stays
  const double std = sqrt(square / (n > 1.0 ? n - 1.0 : 1.0));
  const double scaled = std == 0.0 ? 0.0 : factor * style_std / std, kept = 1.0 - factor;
  if (scaled == 0.0) return {{C(0), static_cast<C>(kept), static_cast<C>(factor * style_mean), C(0)}};
  const C centre = static_cast<C>(mean);  // as it will be subtracted
  return {{centre, static_cast<C>(scaled + kept),
           static_cast<C>(factor * style_mean - scaled * (mean - centre) + kept * centre), C(0)}};
}

// Of what needs no sums. `mean`, `std`: the channel's row of the statistics, where there is one.
template <typename C>
LATENTFAST_HD PlanCoefficients<C> plain_coefficients(PlanOperation operation, double slider, double mean,
                                                     double std) {
  switch (operation) {
    case PlanOperation::lerp:
      return {{static_cast<C>(1.0 - slider), static_cast<C>(slider), C(0), C(0)}};
    case PlanOperation::direction:
      return {{static_cast<C>(slider), C(0), C(0), C(0)}};
    case PlanOperation::tone_map:
      return {{static_cast<C>(0.75 * slider), static_cast<C>(3.0 * slider * std::numbers::log2e),
               static_cast<C>(0.6 * slider), C(0)}};
    case PlanOperation::standardize:
      return {{static_cast<C>(mean), static_cast<C>(1.0 / std), C(0), C(0)}};
    case PlanOperation::unstandardize:
      return {{C(0), static_cast<C>(std), static_cast<C>(mean), C(0)}};
    default:  // blend, confine: the operand itself
      return {{C(0), C(1), C(0), C(0)}};
  }
}

// x behind an instruction that needed no sums, or an adain; `j`: its operand's place among the values. What
// is not linear changes nothing here: no sums are asked for behind it.
template <typename C>
LATENTFAST_HD void follow(PlanChannel& x, const PlanInstruction& own, const PlanCoefficients<C>& coefficients,
                          double slider, int j) {
  if (own.mask >= 0) return;
  switch (own.operation) {
    case PlanOperation::lerp:
      if (j >= 0) mix_channel(x, 1.0 - slider, slider, j, 0.0, 0.0);
      break;
    case PlanOperation::direction:
      if (j >= 0) x.weight[j] += slider;
      break;
    case PlanOperation::adain:
    case PlanOperation::standardize:
    case PlanOperation::unstandardize:
      affine_channel(x, coefficients);
      break;
    default:
      break;
  }
}

struct PlanWeights {
  double a, b, turn;
};

// nlerp's or slerp's at t. `last`: the last element of x, without a partner where their number is odd.
LATENTFAST_HD PlanWeights plan_weights(PlanOperation operation, double t, const Sums& sums, int64_t elements,
                                       double last) {
  if (t == 0.0) return {1.0, 0.0, 0.0};
  if (t == 1.0) return {0.0, 1.0, 0.0};
  const Mode mode = operation == PlanOperation::slerp ? Mode::slerp : Mode::nlerp;
  const Weights w = interpolation_weights(make_pair_of(mode, sums, elements), t);
  const double scale =
      w.turn == 0.0 || elements % 2 == 0 ? 1.0 : quarter_turn_scale(sums.aa, sums.aa - last * last);
  return {w.a, w.b, w.turn == 0.0 ? 0.0 : w.turn * scale};
}

}  // namespace latentfast
