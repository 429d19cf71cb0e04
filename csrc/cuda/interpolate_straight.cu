// lerp: out_k = (1 − t_k)·a + t_k·b, in one pass over the tensors as they lie, 16 bytes at a time.
//
// Nothing is summed, so the vectors matter only where each has its own t: then the pass counts along, from
// the row that its first element is in. With one t for all, the loop is plain.
#include <algorithm>

#include "interpolate.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kThreadPacks = 4;  // loads of a thread that are under way together, of each input

// The weights at one t; `end` as in end_point().
template <typename W>
struct Blend {
  W a, b;
  int end;

  __device__ explicit Blend(double t) : a(static_cast<W>(1.0 - t)), b(static_cast<W>(t)), end(end_point(t)) {}
};

template <typename T>
__device__ __forceinline__ uint4 blend_pack(const Blend<Wide<T>>& w, const uint4& raw_a, const uint4& raw_b) {
  if (w.end == 0) return raw_a;
  if (w.end == 1) return raw_b;
  Wide<T> x[kPack<T>], y[kPack<T>];
  unpack<T>(raw_a, x);
  unpack<T>(raw_b, y);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = fma(w.a, x[i], w.b * y[i]);
  return pack<T>(x);
}

template <typename T>
__device__ __forceinline__ T blend_element(const Blend<Wide<T>>& w, T a, T b) {
  if (w.end == 0) return a;
  if (w.end == 1) return b;
  return narrow<T>(fma(w.a, widen<T>(a), w.b * widen<T>(b)));
}

// Which vector an element is in, counted along neighbouring elements.
struct Place {
  const Vectors& vectors;
  int64_t row, column;  // the row is a run of m elements

  __device__ Place(const Vectors& v, int64_t element)
      : vectors(v), row(element / v.m), column(element - row * v.m) {}
  __device__ int64_t vector() const {
    return vectors.n == 1 ? row : row / (vectors.n * vectors.q) * vectors.q + row % vectors.q;
  }
  __device__ void step() {
    if (++column == vectors.m) {
      column = 0;
      ++row;
    }
  }
};

// `PerVector`: t is (K, vectors), else one value for all.
template <typename T, bool PerVector>
__global__ void __launch_bounds__(kThreads, PerVector ? 2 : 4)
    packs_kernel(const __grid_constant__ Arguments arguments) {
  constexpr int L = kPack<T>;
  const uint4* const a = static_cast<const uint4*>(arguments.a);
  const uint4* const b = static_cast<const uint4*>(arguments.b);
  const int64_t packs = arguments.numel / L;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads * kThreadPacks + threadIdx.x;
  uint4 raw_a[kThreadPacks], raw_b[kThreadPacks];
#pragma unroll
  for (int j = 0; j < kThreadPacks; ++j) {
    const int64_t i = first + j * kThreads;
    if (i < packs) {
      raw_a[j] = load(a + i);
      raw_b[j] = load(b + i);
    }
  }
  // Pack by pack, so that only one is widened at a time.
#pragma unroll
  for (int j = 0; j < kThreadPacks; ++j) {
    const int64_t i = first + j * kThreads;
    if (i >= packs) continue;
    T* out = static_cast<T*>(arguments.out) + i * L;
    for (int k = 0; k < arguments.values.count; ++k, out += arguments.numel) {
      if constexpr (!PerVector) {
        store_once(out, blend_pack<T>(Blend<Wide<T>>(arguments.values.at(k, 0)), raw_a[j], raw_b[j]));
      } else {
        Place place(arguments.vectors, i * L);
        if (place.column + L <= arguments.vectors.m) {
          const Blend<Wide<T>> w(arguments.values.at(k, place.vector()));
          store_once(out, blend_pack<T>(w, raw_a[j], raw_b[j]));
          continue;
        }
        const T* const x = reinterpret_cast<const T*>(&raw_a[j]);
        const T* const y = reinterpret_cast<const T*>(&raw_b[j]);
        union {
          uint4 raw;
          Bits<T> element[L];
        } r;
#pragma unroll
        for (int l = 0; l < L; ++l, place.step()) {
          const T element =
              blend_element<T>(Blend<Wide<T>>(arguments.values.at(k, place.vector())), x[l], y[l]);
          r.element[l] = reinterpret_cast<const Bits<T>&>(element);
        }
        store_once(out, r.raw);
      }
    }
  }
}

// Elements one by one: tensors that do not start at 16 bytes, and the few that are left behind the last pack.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    elements_kernel(const __grid_constant__ Arguments arguments, int64_t begin) {
  const int64_t i = begin + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= arguments.numel) return;
  const int64_t vector = arguments.values.per_vector > 1 ? Place(arguments.vectors, i).vector() : 0;
  const T a = static_cast<const T*>(arguments.a)[i], b = static_cast<const T*>(arguments.b)[i];
  for (int k = 0; k < arguments.values.count; ++k) {
    static_cast<T*>(arguments.out)[k * arguments.numel + i] =
        blend_element<T>(Blend<Wide<T>>(arguments.values.at(k, vector)), a, b);
  }
}

unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "interpolate: the tensors are too large");
  return static_cast<unsigned>(blocks);
}

}  // namespace

template <typename T>
void interpolate_straight(const Target& target, const Arguments& arguments) {
  const int64_t rest = arguments.numel % kPack<T>;
  // Several results lie one after the other: all of them start at 16 bytes if nothing is left behind the last
  // pack.
  const bool wide = aligned16(arguments.a) && aligned16(arguments.b) && aligned16(arguments.out) &&
                    (rest == 0 || arguments.values.count == 1);
  const int64_t packs = wide ? arguments.numel / kPack<T> : 0;
  if (packs > 0) {
    const unsigned grid = grid_of(ceil_div<int64_t>(packs, kThreads * kThreadPacks));
    if (arguments.values.per_vector > 1) {
      packs_kernel<T, true><<<grid, kThreads, 0, target.stream>>>(arguments);
    } else {
      packs_kernel<T, false><<<grid, kThreads, 0, target.stream>>>(arguments);
    }
    check_launch("interpolate, lerp");
  }
  const int64_t begin = packs * kPack<T>;
  if (begin < arguments.numel) {
    const unsigned grid = grid_of(ceil_div<int64_t>(arguments.numel - begin, kThreads));
    elements_kernel<T><<<grid, kThreads, 0, target.stream>>>(arguments, begin);
    check_launch("interpolate, lerp of single elements");
  }
}

template void interpolate_straight<float>(const Target&, const Arguments&);
template void interpolate_straight<double>(const Target&, const Arguments&);
template void interpolate_straight<Half>(const Target&, const Arguments&);
template void interpolate_straight<BFloat16>(const Target&, const Arguments&);

}  // namespace latentfast::cuda
