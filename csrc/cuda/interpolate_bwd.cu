// interpolate_bwd on CUDA: the gradients of lerp, nlerp and slerp in their vectors and in t.
//
// With G_a = Σ g·a and G_b = Σ g·b of a vector's upstream gradient g at each t, and the weights w_a, w_b as
// functions of |a|², |b|², a·b and t: grad_a = Σ_t w_a g + 2 D_aa a + D_ab b, where D_aa = Σ_t G_a ∂w_a/∂|a|²
// + G_b ∂w_b/∂|a|², and so on (csrc/common/interpolation_weights.h). Where vectors cancel out, a turned by a
// quarter, Q(a), stands in.
//
// In order on the stream: the sums, two launches for vectors of more than one part (vector_sums.cuh), none
// for lerp without a gradient of t; a thread for every vector and t, which makes the weights and slopes; the
// gradients. Elements are read from memory twice.
#include "interpolate.cuh"
#include "upload.cuh"
#include "vector_sums.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kThreads = 256;
// A vector's sums: |a|², |b|², a·b, and at each t g·a, g·b, g·Q(a).
constexpr int kOwnSums = 3, kSumsEach = 3;

// What one vector's gradients get from one t.
struct Share {
  double a, b, turn;  // the weights of g; that of Q holds what an odd vector's turn is scaled by
  double aa, bb, ab;  // of D
};

struct Backward {
  const void* grad;
  const void* a;
  const void* b;
  void* grad_a;  // null: not wanted, as for the others
  void* grad_b;
  void* grad_t;
  bool grad_t_is_double;
  int64_t numel;
  Mode mode;

  // lerp's weights do not depend on the vectors
  __host__ __device__ bool bends() const { return mode != Mode::lerp; }
  bool reduces() const { return bends() || grad_t != nullptr; }
};

// The sums of a, b and kTile gradients.
template <typename T, int kTile>
struct GradientSums {
  static constexpr int kInputs = 2 + kTile, kSums = kOwnSums + kSumsEach * kTile;
  Backward of;
  int64_t values, vectors;

  __device__ int64_t first() const { return static_cast<int64_t>(blockIdx.y) * kTile; }
  __device__ bool has(int k) const { return first() + k < values; }

  __device__ const T* input(int i) const {
    if (i < 2) return static_cast<const T*>(i == 0 ? of.a : of.b);
    return has(i - 2) ? static_cast<const T*>(of.grad) + (first() + i - 2) * of.numel : nullptr;
  }
  __device__ void add(const Wide<T> (&x)[kInputs][kPack<T>], double (&sums)[kSums]) const {
    if (of.bends()) {
      sums[0] = add_products<T>(x[0], x[0], sums[0]);
      sums[1] = add_products<T>(x[1], x[1], sums[1]);
      sums[2] = add_products<T>(x[0], x[1], sums[2]);
    }
    [[maybe_unused]] Wide<T> turned[kPack<T>];
    if (turns()) {
#pragma unroll
      for (int i = 0; i < kPack<T>; i += 2) {
        turned[i] = -x[0][i + 1];
        turned[i + 1] = x[0][i];
      }
    }
#pragma unroll
    for (int k = 0; k < kTile; ++k) {
      double* const mine = sums + kOwnSums + kSumsEach * k;
      mine[0] = add_products<T>(x[2 + k], x[0], mine[0]);
      mine[1] = add_products<T>(x[2 + k], x[1], mine[1]);
      if (turns()) mine[2] = add_products<T>(x[2 + k], turned, mine[2]);
    }
  }
  __device__ int64_t slot(int s, int64_t vector) const {
    if (s < kOwnSums) return of.bends() && blockIdx.y == 0 ? s * vectors + vector : -1;
    const int k = (s - kOwnSums) / kSumsEach, component = (s - kOwnSums) % kSumsEach;
    if (!has(k) || (component == 2 && !turns())) return -1;
    return (kOwnSums + (first() + k) * kSumsEach + component) * vectors + vector;
  }

 private:
  // Q(a) has a part in the gradient of t alone.
  __device__ bool turns() const { return of.bends() && of.grad_t != nullptr; }
};

// The weights and slopes of every vector at every t. `shares`: (K, vectors).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    shares_kernel(const __grid_constant__ Backward of, const __grid_constant__ PartedVectors vectors,
                  const __grid_constant__ Values values, const double* sums, bool reduces, Share* shares) {
  const int64_t count = vectors.count, elements = vectors.elements();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count * values.count;
       i += step) {
    const int64_t k = quotient(i, count), v = i - k * count;
    const auto own = [&](int s) { return of.bends() ? sums[s * count + v] : 0.0; };
    const Sums pair_sums{own(0), own(1), own(2)};
    const double t = values.at(static_cast<int>(k), v);
    const Pair pair = make_pair_of(of.mode, pair_sums, elements);
    const Weights weights = interpolation_weights(pair, t);
    Share share{weights.a, weights.b, weights.turn, 0.0, 0.0, 0.0};
    if (reduces) {
      const WeightSlopes slopes = interpolation_slopes(pair, t);
      const double* const each = sums + (kOwnSums + k * kSumsEach) * count + v;
      const double ga = each[0], gb = each[count];
      share.aa = ga * slopes.a_aa + gb * slopes.b_aa;
      share.bb = ga * slopes.a_bb + gb * slopes.b_bb;
      share.ab = ga * slopes.a_ab + gb * slopes.b_ab;
      double scale = 1.0;  // of the turn; 0: nothing is left to turn, the first unit vector stands in
      const int64_t base = vectors.base(v);
      if ((weights.turn != 0.0 || slopes.turn_t != 0.0) && elements % 2 == 1) {
        const double last =
            widen<T>(static_cast<const T*>(of.a)[base + vectors.offset<Access::elements>(elements - 1)]);
        scale = quarter_turn_scale(pair_sums.aa, pair_sums.aa - __dmul_rn(last, last));
        share.turn *= scale;
      }
      if (of.grad_t != nullptr) {
        double along_t = ga * slopes.a_t + gb * slopes.b_t;
        if (slopes.turn_t != 0.0) {
          const double turned =
              scale > 0.0
                  ? scale * each[2 * count]
                  : sqrt(pair_sums.aa) * widen<T>(static_cast<const T*>(of.grad)[k * of.numel + base]);
          along_t += slopes.turn_t * turned;
        }
        if (of.grad_t_is_double) {
          static_cast<double*>(of.grad_t)[i] = along_t;
        } else {
          static_cast<float*>(of.grad_t)[i] = static_cast<float>(along_t);
        }
      }
    }
    shares[i] = share;
  }
}

// The gradients of a thread's packs of a part, in the precision W. `shares`: the vector's at the first t;
// `total`: D.
template <typename T, Access kAccess, typename W>
__device__ __forceinline__ void write_gradients(const Backward& of, const PartedVectors& vectors, int values,
                                                const Part& part, const Share* shares, const Share& total) {
  constexpr int U = kAccess == Access::quads && sizeof(W) == 4 ? 2 : 1;
  const W aa = static_cast<W>(2.0 * total.aa), bb = static_cast<W>(2.0 * total.bb),
          ab = static_cast<W>(total.ab);
  const auto base_of = [&](const void* tensor) { return static_cast<const T*>(tensor) + part.base; };
  for (int64_t e = part.first; e < part.last; e += U * kPartStep<T, kAccess>) {
    const auto at = [&](int u) { return e + u * kPartStep<T, kAccess>; };
    W along_a[U][kPack<T>] = {}, along_b[U][kPack<T>] = {};
    if (of.bends()) {
      VectorPack<T, kAccess> a[U], b[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const bool inside = at(u) < part.last;
        a[u].read(inside ? base_of(of.a) : nullptr, vectors, at(u));
        b[u].read(inside ? base_of(of.b) : nullptr, vectors, at(u));
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        Wide<T> x[kPack<T>], y[kPack<T>];
        a[u].widened(x);
        b[u].widened(y);
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
          along_a[u][i] = fma(aa, static_cast<W>(x[i]), ab * y[i]);
          along_b[u][i] = fma(bb, static_cast<W>(y[i]), ab * x[i]);
        }
      }
    }
    for (int k = 0; k < values; ++k) {
      const Share& share = shares[k * vectors.count];
      const W wa = static_cast<W>(share.a), wb = static_cast<W>(share.b);
      VectorPack<T, kAccess> g[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        g[u].read(at(u) < part.last ? base_of(of.grad) + k * of.numel : nullptr, vectors, at(u));
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        Wide<T> x[kPack<T>];
        g[u].widened(x);
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) {
          along_a[u][i] = fma(wa, static_cast<W>(x[i]), along_a[u][i]);
          along_b[u][i] = fma(wb, static_cast<W>(x[i]), along_b[u][i]);
        }
        if constexpr (sizeof(W) == 8) {
          if (share.turn !=
              0.0) {  // the turn transposed; an odd vector's last element meets the zero behind it
#pragma unroll
            for (int i = 0; i < kPack<T>; i += 2) {
              along_a[u][i] = fma(share.turn, static_cast<W>(x[i + 1]), along_a[u][i]);
              along_a[u][i + 1] = fma(-share.turn, static_cast<W>(x[i]), along_a[u][i + 1]);
            }
          }
        }
      }
    }
    const auto put = [&](void* to, const W(&along)[U][kPack<T>]) {
      if (to == nullptr) return;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        Wide<T> out[kPack<T>];
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) out[i] = static_cast<Wide<T>>(along[u][i]);
        if (at(u) < part.last) write_pack<T, kAccess>(static_cast<T*>(to) + part.base, vectors, at(u), out);
      }
    };
    put(of.grad_a, along_a);
    put(of.grad_b, along_b);
  }
}

template <typename T, Access kAccess>
__global__ void __launch_bounds__(kThreads)
    gradients_kernel(const __grid_constant__ Backward of, const __grid_constant__ PartedVectors vectors,
                     int values, const Share* shares) {
  for_parts<T, kAccess>(vectors, [&](const Part& part) {
    const Share* const mine = shares + part.vector;
    Share total{};
    bool delicate = false;
    for (int k = 0; k < values; ++k) {
      const Share& share = mine[k * vectors.count];
      total.aa += share.aa;
      total.bb += share.bb;
      total.ab += share.ab;
      delicate = delicate || is_delicate({share.a, share.b, share.turn});
    }
    if (delicate) {
      write_gradients<T, kAccess, double>(of, vectors, values, part, mine, total);
    } else {
      write_gradients<T, kAccess, Wide<T>>(of, vectors, values, part, mine, total);
    }
  });
}

template <typename T>
void run(const Target& target, const Backward& of, const PartedVectors& vectors, Values values,
         std::span<const double> ts) {
  const int64_t count = values.count, sum_count = of.reduces() ? kOwnSums + kSumsEach * count : 0;
  const bool uploads = values.device == nullptr && count > kMaxValues;
  const int64_t scratch_doubles = scratch_for_sums(vectors, sum_count),
                sums_doubles = sum_count * vectors.count;
  const int64_t shares_doubles = count * vectors.count * static_cast<int64_t>(sizeof(Share) / sizeof(double));
  const Workspace workspace(target,
                            (scratch_doubles + sums_doubles + shares_doubles + (uploads ? count : 0)) *
                                static_cast<int64_t>(sizeof(double)));
  double* const scratch = static_cast<double*>(workspace.data());
  double* const sums = scratch + scratch_doubles;
  Share* const shares = reinterpret_cast<Share*>(sums + sums_doubles);
  if (uploads) {
    double* const to = sums + sums_doubles + shares_doubles;
    upload(ts, to, target.stream);
    values.device = to;
    values.device_is_double = true;
    values.per_vector = 1;
  }

  const bool aligned = aligned16(of.grad) && aligned16(of.a) && aligned16(of.b) && aligned16(of.grad_a) &&
                       aligned16(of.grad_b);
  const auto sum_up = [&]<int kTile>() {
    make_sums<T>(target, GradientSums<T, kTile>{of, count, vectors.count}, vectors, aligned,
                 ceil_div<int64_t>(count, kTile), sum_count, scratch, sums, "interpolate_bwd, sums");
  };
  if (of.reduces()) count == 1 ? sum_up.template operator()<1>() : sum_up.template operator()<4>();
  const int64_t blocks = ceil_div<int64_t>(count * vectors.count, kThreads);
  shares_kernel<T>
      <<<static_cast<unsigned>(std::min<int64_t>(blocks, INT32_MAX)), kThreads, 0, target.stream>>>(
          of, vectors, values, sums, of.reduces(), shares);
  check_launch("interpolate_bwd, weights");
  if (of.grad_a == nullptr && of.grad_b == nullptr) return;
  dispatch_access<T>(vectors, aligned, [&]<Access kAccess>() {
    gradients_kernel<T, kAccess>
        <<<blocks_for_parts<kAccess>(vectors, kThreads), kThreads, 0, target.stream>>>(of, vectors,
                                                                                       values.count, shares);
  });
  check_launch("interpolate_bwd, gradients");
}

void interpolate_bwd(const View& grad, const View& a, const View& b, const OptionalView& t,
                     std::span<const double> ts, int64_t mode, int64_t p, int64_t n, int64_t q, int64_t m,
                     const OptionalView& grad_a, const OptionalView& grad_b, const OptionalView& grad_t) {
  check_contiguous(grad, "grad");
  check_contiguous(a, "a");
  check_contiguous(b, "b");
  const int64_t numel = p * n * q * m, count = t ? t->size(0) : static_cast<int64_t>(ts.size());
  STD_TORCH_CHECK(a.numel() == numel && b.numel() == numel && grad.numel() == count * numel &&
                      b.dtype == a.dtype && grad.dtype == a.dtype,
                  "interpolate_bwd: a, b and grad must have ", numel, ", ", numel, " and ", count * numel,
                  " elements of one dtype");
  STD_TORCH_CHECK(count <= INT32_MAX, "interpolate_bwd: too many values of t: ", count);
  const auto check_output = [&](const OptionalView& x, int64_t elements, const char* name) {
    if (!x) return;
    check_contiguous(*x, name);
    STD_TORCH_CHECK(x->numel() == elements, "interpolate_bwd: ", name, " must have ", elements, " elements");
  };
  check_output(grad_a, numel, "grad_a");
  check_output(grad_b, numel, "grad_b");
  check_output(grad_t, count * p * q, "grad_t");

  const Target target(a);
  if (numel == 0 || count == 0) {  // sums of nothing
    for (const OptionalView& x : {grad_a, grad_b, grad_t}) {
      if (!x || x->numel() == 0) continue;
      const int64_t item = x->dtype == ScalarType::Double ? 8 : x->dtype == ScalarType::Float ? 4 : 2;
      check(cudaMemsetAsync(x->pointer, 0, x->numel() * item, target.stream), "interpolate_bwd");
    }
    return;
  }
  Values values{};
  values.count = static_cast<int>(count);
  if (t) {
    check_contiguous(*t, "t");
    values.device = t->pointer;
    values.device_is_double = t->dtype == ScalarType::Double;
    values.per_vector = t->size(1);
    STD_TORCH_CHECK(values.device_is_double || t->dtype == ScalarType::Float,
                    "interpolate_bwd: t must be float32 or float64");
    STD_TORCH_CHECK(values.per_vector == 1 || values.per_vector == p * q,
                    "interpolate_bwd: t must have 1 or ", p * q, " columns, got ", values.per_vector);
  } else {
    std::copy_n(ts.begin(), std::min<int64_t>(count, kMaxValues), values.host);
  }
  dispatch_floating(a.scalar_type(), "interpolate_bwd", [&]<typename T>() {
    const Backward of{data<T>(grad),
                      data<T>(a),
                      data<T>(b),
                      mutable_data_or_null<T>(grad_a),
                      mutable_data_or_null<T>(grad_b),
                      mutable_data_or_null<void>(grad_t),
                      grad_t && grad_t->dtype == ScalarType::Double,
                      numel,
                      static_cast<Mode>(mode)};
    run<T>(target, of, PartedVectors(p, n, q, m), values, ts);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) { m.impl("interpolate_bwd", LATENTFAST_BOX(interpolate_bwd)); }

}  // namespace latentfast::cuda
