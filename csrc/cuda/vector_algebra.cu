// vector_dots and vector_mix on CUDA: inner products of N vectors with K others, and K linear combinations of
// N vectors.
//
// vector_dots reads tiles of up to 4 × 4 tensors once and keeps their 16 sums in registers; vector_sums.cuh
// has the order. vector_mix is one pass over the tensors as they lie: it scales the gradient of
// temporal_loss. A block looks up its vector once; only where its elements belong to several does every pack
// look up its own.
#include "../common/operators.h"
#include "columns.cuh"
#include "vector_sums.cuh"

namespace latentfast::cuda {
namespace {

template <typename T, int kTile>
struct Dots {
  static constexpr int kInputs = 2 * kTile, kSums = kTile * kTile;
  const T* x;
  const T* y;
  int64_t x_count, y_count, each, vectors;
  unsigned x_tiles;

  __device__ int64_t first_x() const { return static_cast<int64_t>(blockIdx.y % x_tiles) * kTile; }
  __device__ int64_t first_y() const { return static_cast<int64_t>(blockIdx.y / x_tiles) * kTile; }
  __device__ bool has_x(int i) const { return first_x() + i < x_count; }
  __device__ bool has_y(int j) const { return first_y() + j < y_count; }

  __device__ const T* input(int i) const {
    if (i < kTile) return has_x(i) ? x + (first_x() + i) * each : nullptr;
    return has_y(i - kTile) ? y + (first_y() + i - kTile) * each : nullptr;
  }
  __device__ void add(const Wide<T> (&values)[kInputs][kPack<T>], double (&sums)[kSums]) const {
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        double& sum = sums[j * kTile + i];
        if (has_x(i) && has_y(j)) sum = add_products<T>(values[i], values[kTile + j], sum);
      }
    }
  }
  __device__ int64_t slot(int s, int64_t vector) const {
    const int i = s % kTile, j = s / kTile;
    return has_x(i) && has_y(j) ? ((first_y() + j) * vectors + vector) * x_count + first_x() + i : -1;
  }
};

template <typename T, int kTile>
void dots(const Target& target, const View& x, const View& y, const PartedVectors& vectors, const View& out) {
  const int64_t x_count = x.size(0), y_count = y.size(0), x_tiles = ceil_div<int64_t>(x_count, kTile);
  const int64_t tiles = x_tiles * ceil_div<int64_t>(y_count, kTile);
  STD_TORCH_CHECK(tiles <= 65535, "vector_dots: too many vectors at once: ", x_count, " and ", y_count);
  const Dots<T, kTile> job{data<T>(x),
                           data<T>(y),
                           x_count,
                           y_count,
                           vectors.count * vectors.elements(),
                           vectors.count,
                           static_cast<unsigned>(x_tiles)};
  const Workspace scratch(
      target, scratch_for_sums(vectors, x_count * y_count) * static_cast<int64_t>(sizeof(double)));
  make_sums<T>(target, job, vectors, aligned16(job.x) && aligned16(job.y), tiles, x_count * y_count,
               static_cast<double*>(scratch.data()), mutable_data<double>(out), "vector_dots");
}

constexpr int kMixThreads = 256;

template <typename T, typename W>
struct MixParams {
  const T* x;
  const W* coefficients;
  T* out;
  int64_t x_count, k_count, each;  // N, K, elements of a tensor
  // runs of m elements, n·q of them for each of q neighbouring vectors; one run if all vectors share
  // coefficients
  int64_t n, q, m, coefficient_rows;

  // The row of coefficients for a run.
  __device__ int64_t row(int64_t run) const {
    if (n == 1) return run;
    const int64_t u = quotient(run, n * q), rest = run - u * n * q;
    return u * q + rest - quotient(rest, q) * q;
  }
};

// V: elements that are read at once; they lie in one run.
template <typename T, typename W, int V>
__global__ void __launch_bounds__(kMixThreads) mix_kernel(const __grid_constant__ MixParams<T, W> p) {
  using C = Wide<T>;
  constexpr int U = 4;  // loads that are under way together
  constexpr int64_t kStep = static_cast<int64_t>(kMixThreads) * V;
  const int64_t begin = blockIdx.x * U * kStep, first = begin + static_cast<int64_t>(threadIdx.x) * V;
  const int64_t run = quotient(begin, p.m);
  const bool uniform = min(begin + U * kStep, p.each) <= (run + 1) * p.m;
  int64_t rows[U];
  rows[0] = p.row(run);
#pragma unroll
  for (int u = 0; u < U; ++u) rows[u] = uniform ? rows[0] : p.row(quotient(first + u * kStep, p.m));

  for (int64_t k = 0; k < p.k_count; ++k) {
    C sum[U][V] = {};
    for (int64_t i = 0; i < p.x_count; ++i) {
      Raw<T, V> raw[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = first + u * kStep;
        if (at < p.each) load_raw(raw[u], p.x + i * p.each + at);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (first + u * kStep >= p.each) continue;
        const C c = static_cast<C>(p.coefficients[(k * p.coefficient_rows + rows[u]) * p.x_count + i]);
        if (c == 0) continue;
        C x[V];
        widen_raw(raw[u], x);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[u][v] = fma(c, x[v], sum[u][v]);
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t at = first + u * kStep;
      if (at < p.each) store_narrow(p.out + k * p.each + at, sum[u]);
    }
  }
}

template <typename T, typename W, int V>
void mix(const Target& target, const MixParams<T, W>& p) {
  const int64_t blocks = ceil_div<int64_t>(p.each, static_cast<int64_t>(kMixThreads) * V * 4);
  STD_TORCH_CHECK(blocks <= INT32_MAX, "vector_mix: tensors of ", p.each, " elements are too large");
  mix_kernel<T, W, V><<<static_cast<unsigned>(blocks), kMixThreads, 0, target.stream>>>(p);
  check_launch("vector_mix");
}

void vector_dots(const View& x, const View& y, int64_t p, int64_t n, int64_t q, int64_t m, const View& out) {
  check_contiguous(x, "x");
  check_contiguous(y, "y");
  check_contiguous(out, "out");
  const int64_t numel = p * n * q * m, x_count = x.size(0), y_count = y.size(0);
  STD_TORCH_CHECK(x.numel() == x_count * numel && y.numel() == y_count * numel && y.dtype == x.dtype &&
                      out.numel() == x_count * y_count * p * q && out.dtype == ScalarType::Double,
                  "vector_dots: x and y must be stacks of ", numel,
                  " elements of one dtype, and out float64");
  if (out.numel() == 0) return;
  const Target target(x);
  if (numel == 0) {
    check(cudaMemsetAsync(out.pointer, 0, out.numel() * sizeof(double), target.stream), "vector_dots");
    return;
  }
  const PartedVectors vectors(p, n, q, m);
  dispatch_floating(x.scalar_type(), "vector_dots", [&]<typename T>() {
    x_count* y_count == 1 ? dots<T, 1>(target, x, y, vectors, out) : dots<T, 4>(target, x, y, vectors, out);
  });
}

}  // namespace
}  // namespace latentfast::cuda

void latentfast::vector_mix(const View& x, const View& coefficients, int64_t p, int64_t n, int64_t q,
                            int64_t m, const View& out) {
  using namespace cuda;
  check_contiguous(x, "x");
  check_contiguous(coefficients, "coefficients");
  check_contiguous(out, "out");
  const int64_t numel = p * n * q * m, k_count = coefficients.size(0), rows = coefficients.size(1);
  const int64_t x_count = x.size(0);
  STD_TORCH_CHECK(x.numel() == x_count * numel && out.numel() == k_count * numel && out.dtype == x.dtype,
                  "vector_mix: x and out must be stacks of ", numel, " elements of one dtype");
  STD_TORCH_CHECK((rows == 1 || rows == p * q) && coefficients.size(2) == x_count,
                  "vector_mix: coefficients must be (K, 1 or ", p * q, ", ", x_count, ")");
  if (out.numel() == 0) return;
  const Target target(x);
  dispatch_floating(x.scalar_type(), "vector_mix", [&]<typename T>() {
    dispatch_wide(coefficients.scalar_type(), "vector_mix's coefficients", [&]<typename W>() {
      MixParams<T, W> params{
          data<T>(x), data<W>(coefficients), mutable_data<T>(out), x_count, k_count, numel, n, q, m, rows};
      if (rows == 1) {  // nothing depends on where a vector ends
        params.n = params.q = 1;
        params.m = numel;
      } else if (n == 1 || q == 1) {  // every vector is one run
        params.n = params.q = 1;
        params.m = n * m;
      }
      constexpr int V = kPack<T>;
      const bool quads = params.m % V == 0 && aligned16(params.x) && aligned16(params.out);
      quads ? mix<T, W, V>(target, params) : mix<T, W, 1>(target, params);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("vector_dots", LATENTFAST_BOX(latentfast::cuda::vector_dots));
  m.impl("vector_mix", LATENTFAST_BOX(latentfast::vector_mix));
}
