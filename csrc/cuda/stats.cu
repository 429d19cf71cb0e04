// channel_stats and adain on CUDA. The specification is latentfast/reference/stats.py.
//
// A channel is a vector (p, n, q, m) as in vector_sums.cuh. Everything is counted from the channel's first
// element: a mean far from 0 costs no digits, and a constant channel has a variance of exactly 0.
//
// adain needs a channel's sums before it can change the first of its elements:
// - A channel that is one run and fits into the registers of a block (LTX-Video's: 10 KB in bfloat16) is held
//   there, and the reference's beside it: every element is read once. A block's loads are all under way
//   together, and while one block of a multiprocessor adds up, others read and write. Deviations are taken
//   from the mean in a second walk through the registers, so float32 sums lose nothing.
// - channel_stats of such channels is one launch, too: one walk, with sums in float64, which a mean near 0
//   needs, and for which there is time beside one tensor's loads.
// - Any other channel is cut into parts that all multiprocessors share (vector_sums.cuh), summed up in
//   float64, and by adain read a second time.
// Which of the two depends on the channels' sizes and the dtype alone, and so does the order of every sum.

#include "affines.cuh"

namespace latentfast::cuda {
namespace {

template <typename C>
struct Moments {
  C mean, rest, std;  // the mean is `mean` + `rest`: what is subtracted, and what its rounding left
};

// Not a maximum: that would swallow a NaN.
template <typename C>
__device__ __forceinline__ C not_negative(C x) {
  return x < 0 ? C(0) : x;
}

// factor·((z − mean)/std·style's std + style's mean) + (1 − factor)·z
template <typename To, typename C>
__device__ __forceinline__ Affine<To> restyling(const Moments<C>& own, const Moments<C>& style, C factor) {
  const C kept = 1 - factor, wanted = factor * (style.mean + style.rest);
  const C scaled = own.std == 0 ? C(0) : factor * style.std / own.std;
  if (scaled == 0) return {To(0), static_cast<To>(kept), static_cast<To>(wanted)};
  return {static_cast<To>(own.mean), static_cast<To>(scaled + kept),
          static_cast<To>(wanted - scaled * own.rest + kept * own.mean)};
}

// --- adain of channels that a block holds ---

constexpr int kMostPacks = 4;  // of each tensor that a thread of the largest blocks holds

template <typename T>
struct ResidentParams {
  const T* z;
  const T* ref;
  T* out;
  int64_t styles;
  int m, ref_m;  // elements of a channel
  bool quads;    // both tensors can be read, and out written, 16 bytes at a time
  Wide<T> factor;
};

// One thread's packs of a row: number threadIdx.x, and on in steps of a block.
template <typename T, int kPacks>
struct HeldRow {
  using C = Wide<T>;
  static constexpr int V = kPack<T>;
  uint4 raw[kPacks];

  static __device__ __forceinline__ int at(int j) {
    return (j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * V;
  }

  __device__ __forceinline__ void read(const T* row, int m, bool quads) {
    if (quads) {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        if (at(j) < m) raw[j] = load(row + at(j));
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      alignas(16) T held[V];
#pragma unroll
      for (int i = 0; i < V; ++i) held[i] = row[min(at(j) + i, m - 1)];
      raw[j] = *reinterpret_cast<const uint4*>(held);
    }
  }

  // f(j, x, elements of the row in it) for each pack.
  template <typename F>
  __device__ __forceinline__ void each(int m, F&& f) const {
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int left = m - at(j);
      if (left <= 0) continue;
      C x[V];
      unpack<T>(computed_anew(raw[j]), x);  // held narrow: widened it would fill twice the registers
      f(j, x, left);
    }
  }

  __device__ __forceinline__ C sum_from(C shift, int m) const {
    C total = 0;
    each(m, [&](int, const C(&x)[V], int left) {
      C sum = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) sum += i < left ? x[i] - shift : C(0);
      total += sum;
    });
    return total;
  }

  __device__ __forceinline__ void squares_from(C centre, int m, C& total, C& squares) const {
    total = squares = 0;
    each(m, [&](int, const C(&x)[V], int left) {
      C sum = 0, square = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const C d = i < left ? x[i] - centre : C(0);
        sum += d;
        square = fma(d, d, square);
      }
      total += sum;
      squares += square;
    });
  }

  // Σ(x − first) and Σ(x − first)².
  __device__ __forceinline__ void shifted_sums(double first, int m, double (&sums)[2]) const {
    sums[0] = sums[1] = 0;
    each(m, [&](int, const C(&x)[V], int left) {
      double sum = 0, square = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const double d = i < left ? static_cast<double>(x[i]) - first : 0.0;
        sum += d;
        square = fma(d, d, square);
      }
      sums[0] += sum;
      sums[1] += square;
    });
  }

  __device__ __forceinline__ void store(T* row, int m, bool quads, const Affine<C>& affine) const {
    each(m, [&](int j, const C(&x)[V], int left) {
      C y[V];
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = affine(x[i]);
      T* const to = row + at(j);
      if (quads) {
        store_once(to, pack<T>(y));
      } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (i < left) to[i] = narrow<T>(y[i]);
        }
      }
    });
  }
};

// Sums of all threads' values, in a fixed order, for all threads. `room`: kCount · 32, for this call alone.
template <int kCount, typename C>
__device__ __forceinline__ void add_up_block(C (&x)[kCount], C* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
  const auto fold = [](C value) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) value += __shfl_xor_sync(0xffffffffu, value, i);
    return value;
  };
#pragma unroll
  for (int s = 0; s < kCount; ++s) x[s] = fold(x[s]);
  if (warps == 1) return;
  if (lane == 0) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) room[s * 32 + warp] = x[s];
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kCount; ++s) x[s] = fold(lane < warps ? room[s * 32 + lane] : C(0));
}

// From Σ(x − first) and Σ(x − first)² of `count` elements.
__device__ __forceinline__ Moments<double> moments_of(double first, double sum, double squares,
                                                      double count) {
  const double middle = sum / count;
  const double variance = not_negative((squares - sum * middle) / max(count - 1, 1.0));
  return {first + middle, 0.0, sqrt(variance)};
}

// What is known of a held row after its first walk: the mean as it will be subtracted.
template <typename C>
__device__ __forceinline__ Moments<C> held_moments(C mean, C sum, C squares, int count) {
  const C left = sum / count;  // what the mean's rounding left
  return {mean, left, sqrt(not_negative((squares - sum * left) / max(count - 1, 1)))};
}

template <typename T, int kPacks, int kMostThreads, int kBlocks>
__global__ void __launch_bounds__(kMostThreads, kBlocks)
    resident_adain_kernel(const __grid_constant__ ResidentParams<T> p) {
  using C = Wide<T>;
  __shared__ C room[2 + 4][32];
  const int64_t channel = blockIdx.x;
  const T* const z_row = p.z + channel * p.m;
  const T* const ref_row = p.ref + channel % p.styles * p.ref_m;
  HeldRow<T, kPacks> z, ref;
  z.read(z_row, p.m, p.quads);
  ref.read(ref_row, p.ref_m, p.quads);
  const C first = widen(*z_row), ref_first = widen(*ref_row);

  C sums[2] = {z.sum_from(first, p.m), ref.sum_from(ref_first, p.ref_m)};
  add_up_block(sums, room[0]);
  const C middle = first + sums[0] / p.m, ref_middle = ref_first + sums[1] / p.ref_m;

  C rest[4];
  z.squares_from(middle, p.m, rest[0], rest[1]);
  ref.squares_from(ref_middle, p.ref_m, rest[2], rest[3]);
  add_up_block(rest, room[2]);
  const Moments<C> own = held_moments(middle, rest[0], rest[1], p.m);
  const Moments<C> style = held_moments(ref_middle, rest[2], rest[3], p.ref_m);
  z.store(p.out + channel * p.m, p.m, p.quads, restyling<C>(own, style, p.factor));
}

template <typename T, typename M, int kPacks, int kMostThreads, int kBlocks>
__global__ void __launch_bounds__(kMostThreads, kBlocks)
    resident_stats_kernel(const T* x, int m, bool quads, M* mean, M* std) {
  __shared__ double room[2][32];
  const int64_t channel = blockIdx.x;
  const T* const row = x + channel * m;
  HeldRow<T, kPacks> held;
  held.read(row, m, quads);
  const double first = widen(*row);
  double sums[2];
  held.shifted_sums(first, m, sums);
  add_up_block(sums, room[0]);
  if (threadIdx.x == 0) {
    const Moments<double> moments = moments_of(first, sums[0], sums[1], m);
    mean[channel] = static_cast<M>(moments.mean);
    std[channel] = static_cast<M>(moments.std);
  }
}

// Whether a block can hold channels of m elements, each of them one run.
template <typename T>
bool resident(const PartedVectors& channels) {
  return channels.n == 1 && channels.m <= int64_t(kMostPacks) * 1024 * kPack<T> &&
         channels.count <= INT32_MAX;
}

// launch.operator()<kPacks, kMostThreads, kBlocks>(threads) for rows of `m` elements. Small blocks: while one
// of a multiprocessor's adds up, the others read and write.
template <typename T, typename F>
void dispatch_packs(int m, F&& launch) {
  constexpr int kSmall = 128;
  const int packs = ceil_div(m, kPack<T>);
  const auto threads = [&](int each) { return ceil_div(ceil_div(packs, each), 32) * 32; };
  switch (ceil_div(packs, kSmall)) {
    case 1:
      return launch.template operator()<1, kSmall, 12>(threads(1));
    case 2:
      return launch.template operator()<2, kSmall, 10>(threads(2));
    case 3:
      return launch.template operator()<3, kSmall, 8>(threads(3));
    case 4:
      return launch.template operator()<4, kSmall, 7>(threads(4));
    case 5:
    case 6:
      return launch.template operator()<6, kSmall, 6>(threads(6));
    default:
      return launch.template operator()<kMostPacks, 1024, 1>(threads(kMostPacks));
  }
}

template <typename T>
void resident_adain(const Target& target, const ResidentParams<T>& params, int64_t channels) {
  dispatch_packs<T>(std::max(params.m, params.ref_m),
                    [&]<int kPacks, int kMostThreads, int kBlocks>(int threads) {
                      resident_adain_kernel<T, kPacks, kMostThreads, kBlocks>
                          <<<static_cast<unsigned>(channels), threads, 0, target.stream>>>(params);
                      check_launch("adain");
                    });
}

template <typename T, typename M>
void resident_stats(const Target& target, const T* x, const PartedVectors& channels, M* mean, M* std) {
  const int m = static_cast<int>(channels.m);
  const bool quads = aligned16(x) && m % kPack<T> == 0;
  dispatch_packs<T>(m, [&]<int kPacks, int kMostThreads, int kBlocks>(int threads) {
    resident_stats_kernel<T, M, kPacks, kMostThreads, kBlocks>
        <<<static_cast<unsigned>(channels.count), threads, 0, target.stream>>>(x, m, quads, mean, std);
    check_launch("channel_stats");
  });
}

// --- sums of channels that many blocks share ---

constexpr int kWarps = kSumThreads / 32;

// Σ(x − first) and Σ(x − first)² of each part, [2][vectors][parts].
template <typename T, Access kAccess>
__global__ void __launch_bounds__(kSumThreads)
    shifted_sums_kernel(const T* x, const __grid_constant__ PartedVectors vectors, double* sums) {
  constexpr int U = kAccess == Access::quads ? 4 : 1;
  constexpr int V = kPack<T>;
  for_parts<T, kAccess>(vectors, [&](const Part& part) {
    const double first = widen(x[part.base]);
    double total = 0, squares = 0;
    for (int64_t e = part.first; e < part.last; e += U * kPartStep<T, kAccess>) {
      VectorPack<T, kAccess> packs[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = e + u * kPartStep<T, kAccess>;
        packs[u].read(at < part.last ? x + part.base : nullptr, vectors, at);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        Wide<T> values[V];
        packs[u].widened(values);
        const int64_t left = part.last - (e + u * kPartStep<T, kAccess>);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const double d = i < left ? static_cast<double>(values[i]) - first : 0.0;
          total += d;
          squares = fma(d, d, squares);
        }
      }
    }
    total = fold_part<kAccess>(total);
    squares = fold_part<kAccess>(squares);
    if (threadIdx.x % kPartLanes<kAccess> == 0) {
      const int64_t slot = part.vector * vectors.parts + part.index;
      sums[slot] = total;
      sums[vectors.count * vectors.parts + slot] = squares;
    }
  });
}

template <typename T>
void shifted_sums(const Target& target, const T* x, const PartedVectors& vectors, double* sums) {
  dispatch_access<T>(vectors, aligned16(x), [&]<Access kAccess>() {
    shifted_sums_kernel<T, kAccess>
        <<<blocks_for_parts<kAccess>(vectors, kSumThreads), kSumThreads, 0, target.stream>>>(x, vectors,
                                                                                             sums);
  });
  check_launch("sums of channels");
}

int64_t scratch_for(const PartedVectors& vectors) { return 2 * vectors.count * vectors.parts; }

// A vector's moments, by all lanes of a warp.
template <typename T>
__device__ __forceinline__ Moments<double> warp_moments(const T* x, const PartedVectors& vectors,
                                                        const double* sums, int64_t vector) {
  double total = 0, squares = 0;
  const double* const from = sums + vector * vectors.parts;
  for (int64_t s = threadIdx.x % 32; s < vectors.parts; s += 32) {
    total += from[s];
    squares += from[vectors.count * vectors.parts + s];
  }
  total = fold_part<Access::quads>(total);
  squares = fold_part<Access::quads>(squares);
  return moments_of(static_cast<double>(widen(x[vectors.base(vector)])), total, squares,
                    static_cast<double>(vectors.elements()));
}

// f(vector) for each, by a warp.
template <typename F>
__device__ __forceinline__ void for_vectors(int64_t count, F&& f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t v = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; v < count; v += step) f(v);
}

unsigned blocks_for_vectors(int64_t count) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(count, kWarps), INT32_MAX));
}

template <typename T, typename M>
__global__ void __launch_bounds__(kSumThreads)
    moments_kernel(const T* x, const __grid_constant__ PartedVectors vectors, const double* sums, M* mean,
                   M* std) {
  for_vectors(vectors.count, [&](int64_t v) {
    const Moments<double> moments = warp_moments(x, vectors, sums, v);
    if (threadIdx.x % 32 == 0) {
      mean[v] = static_cast<M>(moments.mean);
      std[v] = static_cast<M>(moments.std);
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    restyling_kernel(const T* z, const __grid_constant__ PartedVectors vectors, const double* sums,
                     const T* ref, const __grid_constant__ PartedVectors styles, const double* ref_sums,
                     double factor, Affine<Wide<T>>* affines) {
  using C = Wide<T>;
  for_vectors(vectors.count, [&](int64_t v) {
    Moments<double> own = warp_moments(z, vectors, sums, v);
    const Moments<double> style = warp_moments(ref, styles, ref_sums, v % styles.count);
    const double mean = own.mean;
    own.mean = static_cast<C>(mean);  // as it will be subtracted
    own.rest = mean - own.mean;
    if (threadIdx.x % 32 == 0) affines[v] = restyling<C>(own, style, factor);
  });
}

void channel_stats(const View& z, int64_t p, int64_t n, int64_t q, int64_t m, const View& mean,
                   const View& std) {
  check_contiguous(z, "z");
  check_contiguous(mean, "mean");
  check_contiguous(std, "std");
  STD_TORCH_CHECK(
      z.numel() == p * n * q * m && mean.numel() == p * q && std.numel() == p * q && mean.dtype == std.dtype,
      "channel_stats: mean and std must be ", p * q, " numbers of one dtype");
  if (mean.numel() == 0) return;
  const Target target(z);
  dispatch_wide(mean.scalar_type(), "channel_stats's mean", [&]<typename M>() {
    if (z.numel() == 0) {
      for (const View* to : {&mean, &std})
        check(cudaMemsetAsync(to->pointer, 0, to->numel() * sizeof(M), target.stream), "channel_stats");
      return;
    }
    const PartedVectors vectors(p, n, q, m);
    dispatch_floating(z.scalar_type(), "channel_stats", [&]<typename T>() {
      if (resident<T>(vectors)) {
        return resident_stats(target, data<T>(z), vectors, mutable_data<M>(mean), mutable_data<M>(std));
      }
      const Workspace scratch(target, scratch_for(vectors) * static_cast<int64_t>(sizeof(double)));
      double* const sums = static_cast<double*>(scratch.data());
      shifted_sums(target, data<T>(z), vectors, sums);
      moments_kernel<T, M><<<blocks_for_vectors(vectors.count), kSumThreads, 0, target.stream>>>(
          data<T>(z), vectors, sums, mutable_data<M>(mean), mutable_data<M>(std));
      check_launch("channel_stats");
    });
  });
}

void adain(const View& z, const View& ref, double factor, int64_t p, int64_t n, int64_t q, int64_t m,
           int64_t ref_p, int64_t ref_n, int64_t ref_m, const View& out) {
  check_contiguous(z, "z");
  check_contiguous(ref, "ref");
  check_contiguous(out, "out");
  STD_TORCH_CHECK(z.numel() == p * n * q * m && out.numel() == z.numel() &&
                      ref.numel() == ref_p * ref_n * q * ref_m && (ref_p == p || ref_p == 1) &&
                      ref.dtype == z.dtype && out.dtype == z.dtype,
                  "adain: z, ref and out must have the sizes given and one dtype");
  if (out.numel() == 0) return;
  const Target target(z);
  const PartedVectors vectors(p, n, q, m), styles(ref_p, ref_n, q, ref_m);
  dispatch_floating(z.scalar_type(), "adain", [&]<typename T>() {
    using C = Wide<T>;
    const T* const from = data<T>(z);
    const T* const style = data<T>(ref);
    T* const to = mutable_data<T>(out);
    if (resident<T>(vectors) && resident<T>(styles)) {
      const bool quads = aligned16(from) && aligned16(style) && aligned16(to) && vectors.m % kPack<T> == 0 &&
                         styles.m % kPack<T> == 0;
      resident_adain<T>(target,
                        {from, style, to, styles.count, static_cast<int>(vectors.m),
                         static_cast<int>(styles.m), quads, static_cast<C>(factor)},
                        vectors.count);
      return;
    }
    const int64_t sums = scratch_for(vectors), style_sums = scratch_for(styles);
    const Workspace scratch(target, (sums + style_sums) * static_cast<int64_t>(sizeof(double)) +
                                        vectors.count * static_cast<int64_t>(sizeof(Affine<C>)));
    double* const of_z = static_cast<double*>(scratch.data());
    double* const of_ref = of_z + sums;
    Affine<C>* const affines = reinterpret_cast<Affine<C>*>(of_ref + style_sums);
    shifted_sums(target, from, vectors, of_z);
    shifted_sums(target, style, styles, of_ref);
    restyling_kernel<T><<<blocks_for_vectors(vectors.count), kSumThreads, 0, target.stream>>>(
        from, vectors, of_z, style, styles, of_ref, factor, affines);
    check_launch("adain");
    apply_affines(target, Remembered<C>{affines, false}, from, to, p, n, q, m);
  });
}

}  // namespace
}  // namespace latentfast::cuda

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("channel_stats", LATENTFAST_BOX(latentfast::cuda::channel_stats));
  m.impl("adain", LATENTFAST_BOX(latentfast::cuda::adain));
}
