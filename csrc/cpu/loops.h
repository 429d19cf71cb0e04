// The inner loops of the CPU kernels, compiled once for every instruction set and picked when the library is
// loaded.
//
// They work on short rows in the working precision (float, or double for double); halves are widened row by
// row. Sums are kept in kLanes accumulators whatever the register width, and nothing is contracted to fused
// multiply-adds, so every instruction set gives the same bits. Torch-free; loops.cpp may use no inline
// function that other files share, because the linker could then keep the copy made for a newer processor.
#pragma once

#include <cstdint>

namespace latentfast {

// Element i of a reduced chunk is added to lane i % kLanes.
constexpr int kLanes = 16;
// Elements of a row that the loops are given at a time: a handful of such rows fits into the first-level
// cache.
constexpr int kTile = 2048;

constexpr double kOrdinaryT = 8.0;

enum class Norm : int { l2 = 0, l1 = 1, charbonnier = 2 };

// Directions that one loop adds: enough to keep the memory busy, few enough for its registers.
constexpr int kSteps = 4;
// Tensors that `combine` takes, and those that it makes at once.
constexpr int kTerms = 8, kSums = 4;

template <typename C>
struct Step {
  const C* direction;
  const C* mask;
  C strength;
};

// The rows that one order of temporal difference reads, oldest first, and their weights (null: all ones).
template <typename C>
struct FrameRows {
  const C* x[3];
  const C* mask[3];
};

// One frame further where first differences are all that is wanted: from the frame x and the slope before it
// to the frame z − ref and the slope between the two, both in place; `grad` gets the gradient of the frame
// that is left.
template <typename C>
struct FirstStep {
  const C *z, *ref;
  const C *m0, *m1;
  C *x, *slope, *penalty, *grad;
  // Elements from a row to the next frame's, which is fetched beforehand; 0 where that is not known.
  int64_t z_ahead, ref_ahead, mask_ahead;
};

// Keys of one panel of attention's keys, packed with an element of all of them side by side.
template <typename C>
constexpr int kPanel = 256 / sizeof(C);

// Elements of a token that are written or read at a time, from as many rows or half of them: floats of a
// cache line.
constexpr int kTokenRows = 16;

// (x − centre)·gain + offset, for each row its own.
template <typename C>
struct RowAffines {
  C centre[kTokenRows], gain[kTokenRows], offset[kTokenRows];
};

// kLanes of each sum over c and d = c − u.
struct ApartSums {
  double *cc, *cd, *dd, *c, *d;
};

template <typename C>
struct LoopsOf {
  // Reductions. `lanes` are kLanes doubles each, added to; column sums are one double an element, added to.
  void (*sums)(const C* a, const C* b, int n, double* aa, double* bb, double* ab);
  void (*dot)(const C* x, const C* y, int n, double* lanes);
  void (*sum)(const C* x, int n, double* lanes);
  void (*dot_columns)(const C* x, const C* y, int n, double* columns);
  void (*sums_columns)(const C* a, const C* b, int n, double* aa, double* bb, double* ab);

  // Linear combinations; in the column forms every element has its own weight.
  void (*mix)(const C* a, const C* b, int n, C wa, C wb, C* out);
  void (*mix_columns)(const C* a, const C* b, int n, const C* wa, const C* wb, C* out);
  void (*add_scaled)(const C* x, int n, C w, C* out);
  void (*add_scaled_columns)(const C* x, int n, const C* w, C* out);  // a weight of 0 leaves its element out

  // out = from + Σ mask·(strength·direction) over `count` ≤ kSteps directions, in order (`out` may be
  // `from`), written around the caches if `streams`. [masked]
  void (*add_steps[2])(const C* from, const Step<C>* steps, int count, int n, C* out, bool streams);
  // base + mask·(edited − base), base where the mask is 0, edited where it is 1; `streams` as above.
  void (*blend)(const C* base, const C* edited, const C* mask, int n, C* out, bool streams);

  // Temporal differences: the weighted penalties, and scale·(their slopes). [norm][masked]
  using Difference = void (*)(const FrameRows<C>& rows, int n, C eps, C scale, C* penalty, C* slope);
  Difference first_difference[3][2];
  Difference second_difference[3][2];
  // The first difference alone, all in one. [norm][masked]
  void (*first_step[3][2])(const FirstStep<C>& step, int n, C eps, C scale);
  void (*subtract)(const C* x, const C* y, int n, C* out);
  void (*multiply)(const C* x, const C* y, int n, C* out);

  // Statistics: Σ(x − shift) and Σ(x − shift)², added to lanes or columns as the reductions above.
  void (*shifted_sums)(const C* x, int n, C shift, double* sum, double* squares);
  void (*shifted_sums_columns)(const C* x, const C* shift, int n, double* sum, double* squares);
  // (x − centre)·gain + offset; in the column form every element has its own.
  void (*affine)(const C* x, int n, C centre, C gain, C offset, C* out);
  void (*affine_columns)(const C* x, int n, const C* centre, const C* gain, const C* offset, C* out);
  // The affines of n elements of rows that lie side by side in every token, pw elements of each; a token
  // begins `stride` after the one before. `count` rows, pw·count ≤ kTokenRows; n is a multiple of pw. [pw −
  // 1]
  void (*affine_to_tokens[2])(const C* const* rows, const RowAffines<C>& own, int count, int n, C* tokens,
                              int64_t stride);
  void (*affine_from_tokens[2])(const C* tokens, int64_t stride, const RowAffines<C>& own, int count, int n,
                                C* const* rows);
  // x·(1 − 0.8·s·gate) with gate = sigmoid(4·s·(|x| − 1)), or grad times its slope; written around the caches
  // if `streams`. [slope]
  void (*tone_map[2])(const C* x, const C* grad, int n, C s, C* out, bool streams);
  // Previews. Three sums, red, green and blue, each add their weight times x.
  void (*add_to_rgb)(const C* x, int n, const C* weight, C* red, C* green, C* blue);
  // a + f·(b − a), as it is, or as bytes: rounded, ties to even, clamped, 0 for NaN.
  void (*between)(const C* a, const C* b, int n, C f, C* out);
  void (*between_as_bytes)(const C* a, const C* b, int n, C f, uint8_t* out);
  // Scores of `rows` queries with a panel of keys [depth][kPanel]: out[r][j] = Σ_d q[r][d]·panel[d][j], in
  // the order of d. Strides in elements.
  void (*scores)(const C* q, int64_t q_stride, int rows, const C* panel, int depth, C* out,
                 int64_t out_stride);
  // 2^(scale·(score − the largest)) in place, and their sum, of n scores, a multiple of kPanel; −∞ gives 0.
  C (*softmax_row)(C* row, int64_t n, C scale);
  // Added to the sums, those of c and d themselves only if [plain].
  void (*apart_sums[2])(const C* c, const C* u, int n, const ApartSums& sums);
  // wc·cond + wd·(cond − uncond), or sample + dt·that, written around the caches if `streams`. [with sample]
  void (*guide[2])(const C* cond, const C* uncond, const C* sample, int n, C wc, C wd, C dt, C* out,
                   bool streams);
  // Σ w[k]·x[k], in order; `streams` as above. [number of terms − 1]
  void (*combine[kTerms])(const C* const* x, const C* w, int n, C* out, bool streams);
};

struct Loops {
  const char* isa;
  LoopsOf<float> single_precision;
  LoopsOf<double> double_precision;

  void (*widen_half)(const uint16_t* x, int n, float* out);
  void (*widen_bfloat16)(const uint16_t* x, int n, float* out);
  void (*round_half)(const float* x, int n, uint16_t* out);
  void (*round_bfloat16)(const float* x, int n, uint16_t* out);
  void (*to_double)(const float* x, int n, double* out);
  void (*to_single)(const double* x, int n, float* out);
  // out[k] = Σ w[k·count + t]·x[t], in order and in float64, rounded once. [number of outputs − 1]
  void (*combine_in_double[kSums])(const float* const* x, int count, const double* w, int n,
                                   float* const* out);
  // Where mask is 0 the bits of base, where it is 1 those of edited: a half that was widened and rounded
  // again may have lost those of a NaN. `out` holds the blend elsewhere.
  void (*select)(const uint16_t* base, const uint16_t* edited, const float* mask, int n, uint16_t* out);
  // A copy that goes around the caches: for results that no one reads before they are evicted.
  void (*stream)(const void* x, int64_t bytes, void* out);
  // Slerp's angles θ and sin θ from |a|², |b|², a·b; `ordinary` is 1 where `arc_weights` serves for |t| ≤
  // kOrdinaryT, else 0.
  void (*angles)(const double* aa, const double* bb, const double* ab, int n, double* theta, double* sine,
                 double* ordinary);
  // Its weights at t, one value a pair.
  void (*arc_weights)(const double* theta, const double* sine, const double* t, int n, double* a, double* b);
};

// The loops in use, and a way to choose an older instruction set: for the tests that compare their bits.
const Loops& loops();

template <typename C>
const LoopsOf<C>& loops_of();
template <>
inline const LoopsOf<float>& loops_of<float>() {
  return loops().single_precision;
}
template <>
inline const LoopsOf<double>& loops_of<double>() {
  return loops().double_precision;
}

}  // namespace latentfast
