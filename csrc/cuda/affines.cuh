// Affines of channels, applied to a tensor element by element: the last step of adain and all of standardize.
#pragma once

#include "columns.cuh"
#include "vector_sums.cuh"

namespace latentfast::cuda {

// (x − centre)·gain + offset.
template <typename C>
struct Affine {
  C centre, gain, offset;

  __device__ __forceinline__ C operator()(C x) const { return (x - centre) * gain + offset; }
};

constexpr int kThreads = 256;

// Where a kernel gets the affine of a vector from: a `Table` in shared memory that the block prepares, or
// memory.
template <typename C>
struct Remembered {
  struct Table {};
  const Affine<C>* affines;
  bool by_channel;  // one for each channel, not for each vector

  __device__ void prepare(Table&) const {}
  __device__ __forceinline__ Affine<C> of(const Table&, int64_t vector, int64_t channel) const {
    return affines[by_channel ? channel : vector];
  }
};

// The tensor is (p, n, q, m); V elements at a time, which lie in one run if kOneRun.
template <typename T, typename Source, int V, bool kOneRun>
__global__ void __launch_bounds__(kThreads)
    affine_kernel(const __grid_constant__ Source source, const T* x, T* out, int64_t count, int64_t n,
                  int64_t q, int64_t m) {
  using C = Wide<T>;
  constexpr int U = 4;
  __shared__ typename Source::Table table;
  source.prepare(table);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads * U + threadIdx.x) * V;
  Raw<T, V> raw[U];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t at = first + u * kThreads * V;
    if (at < count) load_raw(raw[u], x + at);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int64_t at = first + u * kThreads * V;
    if (at >= count) continue;
    int64_t run = m == 1 ? at : quotient(at, m);
    int64_t row = quotient(run, q), w = run - row * q, j = at - run * m;
    C values[V];
    widen_raw(raw[u], values);
    Affine<C> affine = source.of(table, (n == 1 ? row : quotient(row, n)) * q + w, w);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[i] = affine(values[i]);
      if (kOneRun || i + 1 == V) continue;
      if (++j == m) {
        j = 0;
        if (++w == q) {
          w = 0;
          ++row;
        }
        affine = source.of(table, (n == 1 ? row : quotient(row, n)) * q + w, w);
      }
    }
    store_narrow(out + at, values);
  }
}

template <typename T, typename Source>
void apply_affines(const Target& target, const Source& source, const T* x, T* out, int64_t p, int64_t n,
                   int64_t q, int64_t m) {
  const int64_t count = p * n * q * m;
  const auto launch = [&]<int V, bool kOneRun>() {
    const int64_t blocks = ceil_div<int64_t>(count, static_cast<int64_t>(kThreads) * 4 * V);
    STD_TORCH_CHECK(blocks <= INT32_MAX, "a tensor of ", count, " elements is too large");
    affine_kernel<T, Source, V, kOneRun>
        <<<static_cast<unsigned>(blocks), kThreads, 0, target.stream>>>(source, x, out, count, n, q, m);
    check_launch("affines of channels");
  };
  constexpr int V = kPack<T>;
  if (!aligned16(x) || !aligned16(out) || count % V != 0) {
    launch.template operator()<1, true>();
  } else if (m % V == 0) {
    launch.template operator()<V, true>();
  } else {
    launch.template operator()<V, false>();
  }
}

}  // namespace latentfast::cuda
