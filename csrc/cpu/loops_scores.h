// Attention scores and their softmax, a few queries by a panel of keys: part of loops.cpp, which is compiled
// once for every instruction set.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/loops_powers.h"

namespace latentfast {
namespace {

// Queries whose scores are summed up at once, and registers of keys beside each: as many sums as registers
// hold next to the operands.
constexpr int kQueryRows = 6;
constexpr int kKeyVectors = kBytes == 64 ? 4 : 2;

template <int kRows, typename C>
inline void scores_of(const C* q, int64_t q_stride, const C* panel, int depth, C* out, int64_t out_stride) {
  constexpr int kStep = kBytes / sizeof(C), kWide = kKeyVectors * kStep;
  static_assert(kPanel<C> % kWide == 0);
  for (int at = 0; at < kPanel<C>; at += kWide) {
    Vector<C> sum[kRows][kKeyVectors] = {};
    for (int d = 0; d < depth; ++d) {
      Vector<C> key[kKeyVectors];
      for (int v = 0; v < kKeyVectors; ++v) key[v] = load(panel + d * kPanel<C> + at + v * kStep);
      for (int r = 0; r < kRows; ++r) {
        const C element = q[r * q_stride + d];
        for (int v = 0; v < kKeyVectors; ++v) sum[r][v] += element * key[v];
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kKeyVectors; ++v) store<false>(out + r * out_stride + at + v * kStep, sum[r][v]);
    }
  }
}

template <typename C>
void scores(const C* q, int64_t q_stride, int rows, const C* panel, int depth, C* out, int64_t out_stride) {
  static_assert(kQueryRows == 6);
  for (; rows >= kQueryRows; rows -= kQueryRows) {
    scores_of<kQueryRows>(q, q_stride, panel, depth, out, out_stride);
    q += kQueryRows * q_stride;
    out += kQueryRows * out_stride;
  }
  switch (rows) {
    case 5:
      return scores_of<5>(q, q_stride, panel, depth, out, out_stride);
    case 4:
      return scores_of<4>(q, q_stride, panel, depth, out, out_stride);
    case 3:
      return scores_of<3>(q, q_stride, panel, depth, out, out_stride);
    case 2:
      return scores_of<2>(q, q_stride, panel, depth, out, out_stride);
    case 1:
      return scores_of<1>(q, q_stride, panel, depth, out, out_stride);
    default:
      return;
  }
}

// The row of n scores (a multiple of kPanel) becomes 2^(scale·(score − the largest one)); their sum, in
// kLanes lanes that are added pairwise, whatever the registers' width.
template <typename C>
C softmax_row(C* row, int64_t n, C scale) {
  constexpr int kStep = kBytes / sizeof(C), kParts = kLanes / kStep > 0 ? kLanes / kStep : 1;
  static_assert(kParts * kStep == kLanes && kPanel<C> % kLanes == 0);
  Vector<C> most[kParts];
  for (int p = 0; p < kParts; ++p) most[p] = load(row + p * kStep);
  for (int64_t i = kLanes; i < n; i += kLanes) {
    for (int p = 0; p < kParts; ++p) {
      const Vector<C> x = load(row + i + p * kStep);
      most[p] = x > most[p] ? x : most[p];
    }
  }
  C lanes[kLanes];
  for (int p = 0; p < kParts; ++p) store<false>(lanes + p * kStep, most[p]);
  // a NaN may stand first, where nothing compares with it: the sum will tell
  C top = -std::numeric_limits<C>::infinity();
  for (int i = 0; i < kLanes; ++i) top = lanes[i] > top ? lanes[i] : top;
  const C base = top * scale;
  Vector<C> sum[kParts] = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    Vector<C> below[kParts], power[kParts];
    for (int p = 0; p < kParts; ++p) power[p] = below[p] = load(row + i + p * kStep) * scale - base;
    raise_two<kParts, C>(power);
    for (int p = 0; p < kParts; ++p) {
      power[p] = below[p] < Exponent<C>::kLeast ? Vector<C>{} : power[p];
      sum[p] += power[p];
      store<false>(row + i + p * kStep, power[p]);
    }
  }
  for (int p = 0; p < kParts; ++p) store<false>(lanes + p * kStep, sum[p]);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

}  // namespace
}  // namespace latentfast
