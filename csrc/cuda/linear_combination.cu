// combine on CUDA: one pass that memory bounds, with all tensors' packs on their way together. The
// specification is latentfast/reference/guidance.py.
//
//   one output, all of one dtype      combine_kernel: packs of 16 bytes, a form for each count of tensors
//   other results of float32, halves  mixed_kernel: packs of 8 elements, a form for each count of tensors;
//                                     all threads decide alike what dtypes there are
//   float64 beside others, sizes that
//     packs do not fit                mixed_elements, one element a thread
//
// All of them sum in the same order with the same operations, so they give the same bits; the last two in
// float64 where that is asked for.
#include "../common/combination.h"
#include "columns.cuh"

namespace latentfast::cuda {
namespace {

// Small blocks: several of them are on a multiprocessor, each at another point between loads and stores.
constexpr int kThreads = 128;
constexpr int kMostTerms = kMostCombined;

template <typename T>
struct Combined {
  const T* tensors[kMostTerms];
  Wide<T> coefficients[kMostTerms];
  T* out;
  int64_t elements;
  int count;
};

// kCount: of the tensors, or 0: it is in `p`.
template <typename T, int V, int kCount>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Combined<T> p) {
  using C = Wide<T>;
  constexpr int U = kCount == 0 || kCount > 2 ? 1 : 4 / kCount, kLoads = kCount == 0 ? 1 : kCount;
  const int count = kCount == 0 ? p.count : kCount;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * U * kThreads + threadIdx.x) * V;
  C sum[U][V];
  for (int n = 0; n < count; n += kLoads) {
    Raw<T, V> raw[kLoads][U];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
#pragma unroll
      for (int i = 0; i < U; ++i) {
        const int64_t at = first + i * kThreads * V;
        if (at < p.elements) load_raw(raw[k][i], p.tensors[n + k] + at);
      }
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
#pragma unroll
      for (int i = 0; i < U; ++i) {
        C x[V];
        if (first + i * kThreads * V >= p.elements) continue;
        widen_raw(raw[k][i], x);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sum[i][v] = n + k == 0 ? p.coefficients[0] * x[v] : fma(p.coefficients[n + k], x[v], sum[i][v]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < U; ++i) {
    const int64_t at = first + i * kThreads * V;
    if (at < p.elements) store_narrow(p.out + at, sum[i]);
  }
}

template <typename T, int V, int kCount>
void launch_combine(const Target& target, const Combined<T>& p) {
  constexpr int U = kCount == 0 || kCount > 2 ? 1 : 4 / kCount;
  const int64_t blocks = ceil_div<int64_t>(p.elements, static_cast<int64_t>(kThreads) * V * U);
  STD_TORCH_CHECK(blocks <= INT32_MAX, "combine: tensors of ", p.elements, " elements are too large");
  combine_kernel<T, V, kCount><<<static_cast<unsigned>(blocks), kThreads, 0, target.stream>>>(p);
  check_launch("combine");
}

template <typename T, int kCount>
void combine_packs(const Target& target, const Combined<T>& p) {
  if constexpr (kCount > 0) {
    if (p.count == kCount) return launch_combine<T, kPack<T>, kCount>(target, p);
    combine_packs<T, kCount - 1>(target, p);
  }
}

// A tensor or an output of any dtype.
struct Operand {
  void* data;
  ScalarType dtype;
};

template <typename C>
struct Mixed {
  Operand tensors[kMostTerms];
  Operand outs[kMostCombinations];
  C coefficients[kMostCombinations][kMostTerms];
  int64_t elements;
  int count, out_count;
};

// f.operator()<T>() with the C++ type of a dtype; float64 only where it is computed in.
template <typename C, typename F>
__device__ __forceinline__ void with_type(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Float) {
    f.template operator()<float>();
  } else if (dtype == ScalarType::BFloat16) {
    f.template operator()<BFloat16>();
  } else if (dtype == ScalarType::Half) {
    f.template operator()<Half>();
  } else if constexpr (std::is_same_v<C, double>) {
    f.template operator()<double>();
  }
}

constexpr int kMixedPack = 8;

// 8 elements as they lie in memory: 16 bytes of halves, or 32.
struct MixedRaw {
  uint4 units[2];

  template <typename T>
  __device__ __forceinline__ Raw<T, kMixedPack>& of() {
    static_assert(sizeof(Raw<T, kMixedPack>) <= sizeof(MixedRaw));
    return reinterpret_cast<Raw<T, kMixedPack>&>(*this);
  }
};

// C: what the sums are made in.
template <typename C, int kCount>
__global__ void __launch_bounds__(kThreads) mixed_kernel(const __grid_constant__ Mixed<C> p) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kMixedPack;
  if (at >= p.elements) return;
  MixedRaw raw[kCount];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    with_type<float>(p.tensors[k].dtype, [&]<typename T>() {
      load_raw(raw[k].template of<T>(), static_cast<const T*>(p.tensors[k].data) + at);
    });
  }
  float x[kCount][kMixedPack];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    with_type<float>(p.tensors[k].dtype, [&]<typename T>() { widen_raw(raw[k].template of<T>(), x[k]); });
  }
  for (int j = 0; j < p.out_count; ++j) {
    float result[kMixedPack];
#pragma unroll
    for (int v = 0; v < kMixedPack; ++v) {
      C sum = p.coefficients[j][0] * static_cast<C>(x[0][v]);
#pragma unroll
      for (int k = 1; k < kCount; ++k) sum = fma(p.coefficients[j][k], static_cast<C>(x[k][v]), sum);
      result[v] = static_cast<float>(sum);
    }
    with_type<float>(p.outs[j].dtype,
                     [&]<typename T>() { store_narrow(static_cast<T*>(p.outs[j].data) + at, result); });
  }
}

template <typename C>
__global__ void __launch_bounds__(kThreads) mixed_elements(const __grid_constant__ Mixed<C> p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.elements) return;
  C x[kMostTerms];
#pragma unroll
  for (int k = 0; k < kMostTerms; ++k) {
    if (k >= p.count) continue;
    with_type<C>(p.tensors[k].dtype, [&]<typename T>() {
      x[k] = static_cast<C>(widen(static_cast<const T*>(p.tensors[k].data)[at]));
    });
  }
  for (int j = 0; j < p.out_count; ++j) {
    C sum = p.coefficients[j][0] * x[0];
#pragma unroll
    for (int k = 1; k < kMostTerms; ++k) {
      if (k < p.count) sum = fma(p.coefficients[j][k], x[k], sum);
    }
    with_type<C>(p.outs[j].dtype, [&]<typename T>() {
      static_cast<T*>(p.outs[j].data)[at] = narrow<T>(static_cast<Wide<T>>(sum));
    });
  }
}

unsigned blocks_of(int64_t elements, int each) {
  const int64_t blocks = ceil_div<int64_t>(elements, static_cast<int64_t>(kThreads) * each);
  STD_TORCH_CHECK(blocks <= INT32_MAX, "combine: tensors of ", elements, " elements are too large");
  return static_cast<unsigned>(blocks);
}

template <int kCount, typename C>
void launch_mixed(const Target& target, const Mixed<C>& p) {
  if constexpr (kCount > 0) {
    if (p.count < kCount) return launch_mixed<kCount - 1>(target, p);
    mixed_kernel<C, kCount><<<blocks_of(p.elements, kMixedPack), kThreads, 0, target.stream>>>(p);
    check_launch("combine");
  }
}

template <typename C>
void run_mixed(const Target& target, const Combination& given) {
  Mixed<C> p{};
  p.elements = given.outs[0].numel();
  p.count = static_cast<int>(given.tensors.size());
  p.out_count = static_cast<int>(given.outs.size());
  bool packs = p.elements % kMixedPack == 0 && !given.has(ScalarType::Double);
  const auto operand = [&](const View& x) {
    packs = packs && aligned16(x.pointer);
    return Operand{x.pointer, x.dtype};
  };
  for (int k = 0; k < p.count; ++k) p.tensors[k] = operand(given.tensors[k]);
  for (int j = 0; j < p.out_count; ++j) {
    p.outs[j] = operand(given.outs[j]);
    for (int k = 0; k < p.count; ++k) p.coefficients[j][k] = static_cast<C>(given.row(j)[k]);
  }
  if (packs) return launch_mixed<kMostTerms>(target, p);
  mixed_elements<C><<<blocks_of(p.elements, 1), kThreads, 0, target.stream>>>(p);
  check_launch("combine");
}

template <typename T>
void run_alike(const Target& target, const Combination& given) {
  Combined<T> p{};
  p.out = mutable_data<T>(given.outs[0]);
  p.elements = given.outs[0].numel();
  p.count = static_cast<int>(given.tensors.size());
  bool packs = aligned16(p.out) && p.elements % kPack<T> == 0;
  for (int i = 0; i < p.count; ++i) {
    p.tensors[i] = data<T>(given.tensors[i]);
    p.coefficients[i] = static_cast<Wide<T>>(given.coefficients[i]);
    packs = packs && aligned16(p.tensors[i]);
  }
  packs ? combine_packs<T, kMostTerms>(target, p) : launch_combine<T, 1, 0>(target, p);
}

}  // namespace
}  // namespace latentfast::cuda

void latentfast::combine(std::span<const View> tensors, std::span<const double> coefficients, int64_t precise,
                         const View& out, const OptionalView& out1, const OptionalView& out2,
                         const OptionalView& out3) {
  using namespace cuda;
  const Combination p(tensors, coefficients, out, out1, out2, out3);
  if (out.numel() == 0) return;
  const Target target(out);
  if (p.outs.size() == 1 && p.all_of(out.dtype) && (precise == 0 || out.dtype == ScalarType::Double)) {
    dispatch_floating(out.dtype, "combine", [&]<typename T>() { run_alike<T>(target, p); });
  } else {
    precise != 0 || p.has(ScalarType::Double) ? run_mixed<double>(target, p) : run_mixed<float>(target, p);
  }
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) { m.impl("combine", LATENTFAST_BOX(latentfast::combine)); }
