// slerp and nlerp of vectors that lie across memory: element i of vector w at i·q + w, as the channels of
// every position do in (B, C, T, H, W).
//
// A thread takes as many neighbouring vectors as 16 bytes hold, so that loads and stores are wide, and walks
// along them twice: for the sums, then for the results, when the elements come from L1 or L2. No two threads
// have to meet. The weights cost more than the elements of vectors as short as these; they are made in a
// loop, not unrolled over the thread's vectors, so that the code of one arc tangent is there once, and go
// through shared memory because a loop cannot index registers.
//
// Order of the sums: along the vector; of halves, eight products are summed in float32 before they are
// widened.
#include "interpolate.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kGroup = 8;  // elements of a half-precision vector that are summed in float32
// Fewer threads than this leave multiprocessors idle: then each takes one vector.
constexpr int64_t kEnoughThreads = 8192;

// `L` neighbouring elements of a tensor, as raw bits.
template <typename T, int L>
struct Cells {
  static_assert(L == 1 || L == kPack<T>);
  std::conditional_t<L == 1, Bits<T>, uint4> raw;

  __device__ static Cells at(const T* p) {
    if constexpr (L == 1) {
      return {__ldg(reinterpret_cast<const Bits<T>*>(p))};
    } else {
      return {load(p)};
    }
  }
  __device__ void widened(Wide<T> (&x)[L]) const {
    if constexpr (L == 1) {
      x[0] = widen<T>(reinterpret_cast<const T&>(raw));
    } else {
      unpack<T>(raw, x);
    }
  }
};

template <typename T, int L>
__device__ __forceinline__ void store_cells(T* to, const Wide<T> (&x)[L]) {
  if constexpr (L == 1) {
    *to = narrow<T>(x[0]);
  } else {
    store_once(to, pack<T>(x));
  }
}

template <typename T, int L>
__global__ void __launch_bounds__(kThreads) columns_kernel(const __grid_constant__ Arguments arguments) {
  using W = Wide<T>;
  __shared__ double sums[3][L][kThreads];
  __shared__ Mix<W> mixes[L][kThreads];
  const int64_t n = arguments.vectors.n, q = arguments.vectors.q;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * L;  // of this thread's vectors
  if (first >= arguments.vectors.count)
    return;  // no barrier follows: every thread reads back only what it wrote
  const int64_t base = first / q * n * q + first % q;
  const T* const a = static_cast<const T*>(arguments.a) + base;
  const T* const b = static_cast<const T*>(arguments.b) + base;
  {
    double aa[L] = {}, bb[L] = {}, ab[L] = {};
    for (int64_t group = 0; group < n; group += kGroup) {
      Cells<T, L> raw_a[kGroup], raw_b[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (group + i < n) {
          raw_a[i] = Cells<T, L>::at(a + (group + i) * q);
          raw_b[i] = Cells<T, L>::at(b + (group + i) * q);
        }
      }
      W saa[L] = {}, sbb[L] = {}, sab[L] = {};
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (group + i < n) {
          W x[L], y[L];
          raw_a[i].widened(x);
          raw_b[i].widened(y);
#pragma unroll
          for (int l = 0; l < L; ++l) {
            if constexpr (sizeof(T) == 2) {
              saa[l] = fma(x[l], x[l], saa[l]);
              sbb[l] = fma(y[l], y[l], sbb[l]);
              sab[l] = fma(x[l], y[l], sab[l]);
            } else {
              const double u = x[l], v = y[l];
              aa[l] = fma(u, u, aa[l]);
              bb[l] = fma(v, v, bb[l]);
              ab[l] = fma(u, v, ab[l]);
            }
          }
        }
      }
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int l = 0; l < L; ++l) {
          aa[l] += saa[l];
          bb[l] += sbb[l];
          ab[l] += sab[l];
        }
      }
    }
#pragma unroll
    for (int l = 0; l < L; ++l) {
      sums[0][l][threadIdx.x] = aa[l];
      sums[1][l][threadIdx.x] = bb[l];
      sums[2][l][threadIdx.x] = ab[l];
    }
  }

  for (int k = 0; k < arguments.values.count; ++k) {
    bool all_blend = true;
#pragma unroll 1
    for (int l = 0; l < L; ++l) {
      const Sums s{sums[0][l][threadIdx.x], sums[1][l][threadIdx.x], sums[2][l][threadIdx.x]};
      const auto last = [&]() -> double { return widen<T>(a[(n - 1) * q + l]); };
      const Mix<W> mix = make_mix<W>(arguments.mode, s, arguments.values.at(k, first + l), n, last);
      all_blend = all_blend && mix.kind == Kind::blend;
      mixes[l][threadIdx.x] = mix;
    }
    W wa[L], wb[L];
#pragma unroll
    for (int l = 0; l < L; ++l) {
      wa[l] = mixes[l][threadIdx.x].a;
      wb[l] = mixes[l][threadIdx.x].b;
    }
    T* const out = static_cast<T*>(arguments.out) + k * arguments.numel + base;
    if (all_blend) {
#pragma unroll 4
      for (int64_t i = 0; i < n; ++i) {
        W x[L], y[L], r[L];
        Cells<T, L>::at(a + i * q).widened(x);
        Cells<T, L>::at(b + i * q).widened(y);
#pragma unroll
        for (int l = 0; l < L; ++l) r[l] = fma(wa[l], x[l], wb[l] * y[l]);
        store_cells<T, L>(out + i * q, r);
      }
    } else {  // end points and opposite vectors: one element at a time
      for (int64_t i = 0; i < n; ++i) {
        for (int l = 0; l < L; ++l) {
          out[i * q + l] = mix_element<T>(mixes[l][threadIdx.x], a[i * q + l], b[i * q + l], i, n,
                                          [&](int64_t other) { return a[other * q + l]; });
        }
      }
    }
  }
}

template <typename T, int L>
void launch(const Target& target, const Arguments& arguments) {
  const int64_t blocks = ceil_div<int64_t>(arguments.vectors.count, static_cast<int64_t>(kThreads) * L);
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "interpolate: too many vectors: ", arguments.vectors.count);
  columns_kernel<T, L><<<static_cast<unsigned>(blocks), kThreads, 0, target.stream>>>(arguments);
  check_launch("interpolate, columns");
}

}  // namespace

template <typename T>
void interpolate_columns(const Target& target, const Arguments& arguments) {
  const bool wide = arguments.vectors.q % kPack<T> == 0 && aligned16(arguments.a) && aligned16(arguments.b) &&
                    aligned16(arguments.out) && arguments.vectors.count / kPack<T> >= kEnoughThreads;
  if (wide) {
    launch<T, kPack<T>>(target, arguments);
  } else {
    launch<T, 1>(target, arguments);
  }
}

template void interpolate_columns<float>(const Target&, const Arguments&);
template void interpolate_columns<double>(const Target&, const Arguments&);
template void interpolate_columns<Half>(const Target&, const Arguments&);
template void interpolate_columns<BFloat16>(const Target&, const Arguments&);

}  // namespace latentfast::cuda
