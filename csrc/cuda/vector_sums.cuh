// Sums over vectors for the operators that look at many tensors at once: interpolate_bwd, vector_dots, guide.
//
// A vector of n·m elements is cut into *parts* of at least 1024 elements, longer ones where there would be
// more than 1024 of them. The order of every sum is a function of n and m, the layout and the dtype alone:
//   lane    the 16-byte packs l, l + 32, … of a part go to lane l of a warp, in this order; of vectors that
//   lie across
//           memory (m = 1), where neighbouring lanes take neighbouring vectors, all of a part goes to one
//           lane;
//   part    a tree over the lanes;
//   vector  parts s, s + 32, … go to lane s, in order; then a tree over the lanes.
// So a vector's sums have the same bits alone or in a batch, at every alignment, on every grid.
//
// Which sums are made is a Job's business:
//   static constexpr int kInputs, kSums;
//   const T* input(int i)           the i-th tensor of the block's tile; null: there is none, zeros are read
//   void add(x, sums)               the products of a pack, x[kInputs][kPack<T>], to the lane's kSums sums
//                                   or add(x, sums, at, left): `at` is where its first element lies in the
//                                   tensors, `left` how many of the vector are left from there on, for
//                                   what the job reads itself (of contiguous vectors only)
//   int64_t slot(int s, vector)     where the sum goes, counted in sums; negative: it is not wanted
#pragma once

#include <algorithm>

#include "launch.cuh"

namespace latentfast::cuda {

constexpr int64_t kPartElements = 1024;  // a multiple of every pack
constexpr int64_t kMostParts = 1024;
constexpr int kSumThreads = 256;

// How lanes read: 16 bytes at a time; an element at a time, in the same order; or a vector each, across
// memory.
enum class Access : int { quads, elements, columns };

// Quotients of indices; where both fit into 32 bits, as they nearly always do, at a fraction of the price.
__device__ __forceinline__ int64_t quotient(int64_t x, int64_t y) {
  return ((x | y) >> 32) == 0 ? static_cast<uint32_t>(x) / static_cast<uint32_t>(y) : x / y;
}

// p·q vectors of n runs of m elements, cut into parts: run i of vector (u, w) starts at ((u·n + i)·q + w)·m.
struct PartedVectors {
  int64_t count;  // p·q
  int64_t n, q, m;
  int64_t part_elements, parts;

  PartedVectors(int64_t p, int64_t runs, int64_t side, int64_t run)
      : count(p * side), n(runs), q(side), m(run), part_elements(kPartElements) {
    if (q == 1 || n == 1) {  // every vector is one run
      m *= n;
      n = q = 1;
    }
    while (part_elements * kMostParts < elements()) part_elements *= 2;
    parts = ceil_div<int64_t>(elements(), part_elements);
  }

  __host__ __device__ int64_t elements() const { return n * m; }
  bool in_columns() const { return m == 1 && q > 1; }
  __device__ int64_t base(int64_t vector) const {
    if (n == 1) return vector * m;
    const int64_t u = quotient(vector, q);
    return (u * n * q + vector - u * q) * m;
  }
  // Where element e of a vector lies, counted from its base.
  template <Access kAccess>
  __device__ int64_t offset(int64_t e) const {
    if (kAccess == Access::columns) return e * q;
    if (n == 1) return e;
    const int64_t run = quotient(e, m);
    return run * q * m + e - run * m;
  }
};

template <Access kAccess>
constexpr int kPartLanes = kAccess == Access::columns ? 1 : 32;

// A part of a vector, and which of its packs are this thread's: those from element `first` on, in steps.
struct Part {
  int64_t vector, index;
  int64_t base;         // of the vector
  int64_t first, last;  // this thread's first element's number in the vector; where the part ends
};

// The number of parts that the threads of a grid look after: `index` runs over them.
template <typename T, Access kAccess>
__device__ __forceinline__ Part part_of(const PartedVectors& vectors, int64_t index) {
  Part part;
  if (kAccess == Access::columns) {
    part.index = quotient(index, vectors.count);
    part.vector = index - part.index * vectors.count;
  } else {
    part.vector = quotient(index, vectors.parts);
    part.index = index - part.vector * vectors.parts;
  }
  const int64_t begin = part.index * vectors.part_elements;
  part.base = vectors.base(part.vector);
  part.first = begin + threadIdx.x % kPartLanes<kAccess> * kPack<T>;
  part.last = min(begin + vectors.part_elements, vectors.elements());
  return part;
}

template <typename T, Access kAccess>
constexpr int kPartStep = kPartLanes<kAccess> * kPack<T>;

// f(part) for this thread's share of all parts. All lanes of a part are called together.
template <typename T, Access kAccess, typename F>
__device__ __forceinline__ void for_parts(const PartedVectors& vectors, F&& f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x / kPartLanes<kAccess>;
  int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kPartLanes<kAccess>;
  for (; i < vectors.count * vectors.parts; i += step) f(part_of<T, kAccess>(vectors, i));
}

template <Access kAccess>
unsigned blocks_for_parts(const PartedVectors& vectors, int threads) {
  const int64_t wanted = ceil_div<int64_t>(vectors.count * vectors.parts, threads / kPartLanes<kAccess>);
  return static_cast<unsigned>(std::min<int64_t>(wanted, INT32_MAX));
}

// Neighbouring elements of a vector, kPack<T> of them; zeros behind its end.
template <typename T, Access kAccess>
struct VectorPack {
  std::conditional_t<kAccess == Access::quads, uint4, Wide<T>[kPack<T>]> held;

  // `from`: the vector's base, or null for zeros; `e`: the number of the pack's first element in the vector.
  __device__ __forceinline__ void read(const T* from, const PartedVectors& vectors, int64_t e) {
    if constexpr (kAccess == Access::quads) {
      held = from == nullptr ? uint4{0, 0, 0, 0} : load(from + vectors.offset<kAccess>(e));
    } else {
      const int64_t elements = vectors.elements();
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        held[i] =
            from != nullptr && e + i < elements ? widen<T>(from[vectors.offset<kAccess>(e + i)]) : Wide<T>(0);
      }
    }
  }
  __device__ __forceinline__ void widened(Wide<T> (&x)[kPack<T>]) const {
    if constexpr (kAccess == Access::quads) {
      unpack<T>(held, x);
    } else {
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) x[i] = held[i];
    }
  }
};

template <typename T, Access kAccess>
__device__ __forceinline__ void write_pack(T* to, const PartedVectors& vectors, int64_t e,
                                           const Wide<T> (&x)[kPack<T>]) {
  if constexpr (kAccess == Access::quads) {
    store_once(to + vectors.offset<kAccess>(e), pack<T>(x));
  } else {
    const int64_t elements = vectors.elements();
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      if (e + i < elements) to[vectors.offset<kAccess>(e + i)] = narrow<T>(x[i]);
    }
  }
}

// sum + x·y, in float64 for every dtype: gradients of nearly opposite vectors live on what is left when these
// sums cancel.
template <typename T>
__device__ __forceinline__ double add_products(const Wide<T> (&x)[kPack<T>], const Wide<T> (&y)[kPack<T>],
                                               double sum) {
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) sum = fma(static_cast<double>(x[i]), static_cast<double>(y[i]), sum);
  return sum;
}

template <Access kAccess>
__device__ __forceinline__ double fold_part(double x) {
#pragma unroll
  for (int i = kPartLanes<kAccess> / 2; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}

template <typename T, Access kAccess, typename Job>
__global__ void __launch_bounds__(kSumThreads)
    part_sums_kernel(const __grid_constant__ Job job, const __grid_constant__ PartedVectors vectors,
                     double* sums) {
  // packs of each input whose loads are under way together
  constexpr int U = kAccess == Access::quads && Job::kInputs <= 3 ? 4 : 1;
  for_parts<T, kAccess>(vectors, [&](const Part& part) {
    double mine[Job::kSums] = {};
    for (int64_t e = part.first; e < part.last; e += U * kPartStep<T, kAccess>) {
      VectorPack<T, kAccess> packs[U][Job::kInputs];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t at = e + u * kPartStep<T, kAccess>;
#pragma unroll
        for (int i = 0; i < Job::kInputs; ++i) {
          const T* const from = job.input(i);
          packs[u][i].read(from != nullptr && at < part.last ? from + part.base : nullptr, vectors, at);
        }
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        Wide<T> x[Job::kInputs][kPack<T>];
#pragma unroll
        for (int i = 0; i < Job::kInputs; ++i) packs[u][i].widened(x[i]);
        if constexpr (requires { job.add(x, mine); }) {
          job.add(x, mine);
        } else {
          const int64_t at = e + u * kPartStep<T, kAccess>;
          job.add(x, mine, part.base + at, vectors.elements() - at);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < Job::kSums; ++s) {
      const int64_t slot = job.slot(s, part.vector);
      if (slot < 0) continue;
      const double sum = fold_part<kAccess>(mine[s]);
      if (threadIdx.x % kPartLanes<kAccess> == 0) sums[slot * vectors.parts + part.index] = sum;
    }
  });
}

// A warp adds up the parts of a sum. (A template so that each translation unit may have it.)
template <typename Sum>
__global__ void __launch_bounds__(kSumThreads)
    add_parts_kernel(const Sum* part_sums, int64_t parts, int64_t count, Sum* sums) {
  const int lane = threadIdx.x % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSumThreads / 32;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) / 32; i < count;
       i += step) {
    const Sum* const from = part_sums + i * parts;
    Sum sum = 0;
#pragma unroll 8
    for (int64_t s = lane; s < parts; s += 32) sum += from[s];
    sum = fold_part<Access::quads>(sum);
    if (lane == 0) sums[i] = sum;
  }
}

// Call f.operator()<kAccess>(); `aligned`: every tensor starts at 16 bytes.
template <typename T, typename F>
void dispatch_access(const PartedVectors& vectors, bool aligned, F&& f) {
  if (vectors.in_columns()) {
    f.template operator()<Access::columns>();
  } else if (aligned && vectors.m % kPack<T> == 0) {
    f.template operator()<Access::quads>();
  } else {
    f.template operator()<Access::elements>();
  }
}

// The float64 that `make_sums` needs as scratch memory for `count` sums of each vector.
inline int64_t scratch_for_sums(const PartedVectors& vectors, int64_t count) {
  return vectors.parts > 1 ? vectors.count * vectors.parts * count : 0;
}

// All sums of `job`, `count` of each vector, by `tiles` rows of blocks.
template <typename T, typename Job>
void make_sums(const Target& target, const Job& job, const PartedVectors& vectors, bool aligned,
               int64_t tiles, int64_t count, double* scratch, double* sums, const char* name) {
  STD_TORCH_CHECK(tiles <= 65535, name, ": too many tensors at once");
  double* const part_sums = vectors.parts > 1 ? scratch : sums;
  dispatch_access<T>(vectors, aligned, [&]<Access kAccess>() {
    const dim3 grid(blocks_for_parts<kAccess>(vectors, kSumThreads), static_cast<unsigned>(tiles));
    part_sums_kernel<T, kAccess, Job><<<grid, kSumThreads, 0, target.stream>>>(job, vectors, part_sums);
  });
  check_launch(name);
  if (vectors.parts == 1) return;
  const int64_t all = vectors.count * count;
  const int64_t blocks = std::min<int64_t>(ceil_div<int64_t>(all, kSumThreads / 32), INT32_MAX);
  add_parts_kernel<double>
      <<<static_cast<unsigned>(blocks), kSumThreads, 0, target.stream>>>(part_sums, vectors.parts, all, sums);
  check_launch(name);
}

}  // namespace latentfast::cuda
