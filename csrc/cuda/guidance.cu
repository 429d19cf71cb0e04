// guide on CUDA. The specification is latentfast/reference/guidance.py.
//
// guide makes p = c·cond + d·(cond − uncond) + m·momentum of each sample, steps with it and blends
// (guidance.cuh). The coefficients follow from the sample's inner products, in float64
// (common/guidance_coefficients.h); cfg without rescaling needs none. The kernels:
//
//   no sums needed                      one pass
//   samples of more than 16 KB that
//     start at 16 bytes, no momentum,
//     no float64, sm_90                 guidance_streamed.cu: one cooperative launch, predictions read once
//   anything else                       the sums (vector_sums.cuh), in two launches, then the same pass: its
//                                       blocks begin by making the coefficients of their sample
//
// The momentum is updated in the pass, by the threads that read it there.
#include <algorithm>

#include "../common/operators.h"
#include "guidance.cuh"

namespace latentfast::cuda {
namespace {

// Small blocks: several of them are on a multiprocessor, each at another point between loads and stores.
constexpr int kPassThreads = 128;

// The sums of a sample: those of c and d, with momentum those of m too.
template <typename T, bool kMomentum>
struct GuidanceJob {
  static constexpr int kInputs = 2, kSums = kMomentum ? 9 : 5;
  Guided<T> p;

  __device__ const T* input(int i) const { return i == 0 ? p.cond : p.uncond; }
  __device__ int64_t slot(int s, int64_t vector) const { return vector * kSums + s; }

  __device__ __forceinline__ void add(const Wide<T> (&x)[2][kPack<T>], double (&sums)[kSums], int64_t at,
                                      int64_t left) const {
    Wide<T> d[kPack<T>];
#pragma unroll
    for (int i = 0; i < kPack<T>; ++i) {
      d[i] = x[0][i] - x[1][i];
      sums[0] += x[0][i];
      sums[1] += d[i];
    }
    sums[2] = add_products<T>(x[0], x[0], sums[2]);
    sums[3] = add_products<T>(x[0], d, sums[3]);
    sums[4] = add_products<T>(d, d, sums[4]);
    if constexpr (kMomentum) {
      Wide<T> m[kPack<T>] = {};
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) {
        Wide<T> before[1];
        if (i >= left) continue;
        read_momentum(p, at + i, before);
        m[i] = with_momentum(d[i], p.beta, before[0]);
        sums[5] += m[i];
      }
      sums[6] = add_products<T>(x[0], m, sums[6]);
      sums[7] = add_products<T>(d, m, sums[7]);
      sums[8] = add_products<T>(m, m, sums[8]);
    }
  }
  __device__ static GuidanceSums named(const double* s) {
    if constexpr (kMomentum) {
      return {.c = s[0],
              .d = s[1],
              .m = s[5],
              .cc = s[2],
              .cd = s[3],
              .dd = s[4],
              .cm = s[6],
              .dm = s[7],
              .mm = s[8]};
    } else {
      return {.c = s[0],
              .d = s[1],
              .m = s[1],
              .cc = s[2],
              .cd = s[3],
              .dd = s[4],
              .cm = s[3],
              .dm = s[4],
              .mm = s[4]};
    }
  }
};

template <typename T>
struct Pass {
  Guided<T> p;
  const double* sums;  // of each sample, or null: the weights are known
  GuidanceWeights<Wide<T>> weights;
  unsigned tiles;  // blocks a sample
  int64_t tile;    // elements of a block
};

// V elements a thread at a time, U times. kPlain: no momentum, no mask, one result. kSums: weights are made
// of sums, where there are any.
template <typename T, int V, bool kPlain, bool kSample, bool kSums>
__global__ void __launch_bounds__(kPassThreads) pass_kernel(const __grid_constant__ Pass<T> pass) {
  using C = Wide<T>;
  constexpr int U = kPlain ? 2 : 1, kStep = kPassThreads * V;
  const Guided<T>& p = pass.p;
  __shared__ GuidanceWeights<C> shared;
  GuidanceWeights<C> weights = pass.weights;
  const int64_t sample = blockIdx.x / pass.tiles, begin = blockIdx.x % pass.tiles * pass.tile;
  const int64_t end = min(begin + pass.tile, p.each), base = sample * p.each;
  const bool predicted = kPlain || p.reads_predictions();
  const bool steps = kPlain ? kSample : p.sample != nullptr;
  bool waiting = kSums && pass.sums != nullptr;
  // the same number of times in all threads: they meet in the first
  for (int64_t first = begin; first < end; first += U * kStep) {
    const int64_t e = first + static_cast<int64_t>(threadIdx.x) * V;
    Raw<T, V> c[U], u[U], x[U];
#pragma unroll
    for (int i = 0; i < U; ++i) {
      const int64_t at = base + e + i * kStep;
      if (e + i * kStep >= end) continue;
      if (predicted) {
        load_raw(c[i], p.cond + at);
        load_raw(u[i], p.uncond + at);
      }
      if (steps) load_raw(x[i], p.sample + at);
    }
    if (kSums && waiting) {
      if (threadIdx.x == 0) {
        const GuidanceSums sums = !kPlain && p.momentum != nullptr
                                      ? GuidanceJob<T, true>::named(pass.sums + sample * 9)
                                      : GuidanceJob<T, false>::named(pass.sums + sample * 5);
        shared = GuidanceWeights<C>::of(guidance_coefficients(p.options, sums));
      }
      __syncthreads();
      weights = shared;
      waiting = false;
    }
#pragma unroll
    for (int i = 0; i < U; ++i) {
      if (e + i * kStep >= end) continue;
      C guided[V] = {};
      if (predicted) {
        C conds[V], d[V];
        widen_raw(c[i], conds);
        widen_raw(u[i], d);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          d[v] = conds[v] - d[v];
          guided[v] = weights(conds[v], d[v]);
        }
        if constexpr (!kPlain) {
          if (p.momentum != nullptr) {
            C m[V];
            read_momentum(p, base + e + i * kStep, m);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              m[v] = with_momentum(d[v], p.beta, m[v]);
              guided[v] = fma(weights.m, m[v], guided[v]);
            }
            write_momentum(p, base + e + i * kStep, m);
          }
        }
      }
      if constexpr (!kPlain) {
        write_guided(p, sample, e + i * kStep, guided, x[i]);
      } else {
        if constexpr (kSample) {
          C before[V];
          widen_raw(x[i], before);
#pragma unroll
          for (int v = 0; v < V; ++v) guided[v] = fma(p.dt, guided[v], before[v]);
        }
        store_narrow(p.out + base + e + i * kStep, guided);
      }
    }
  }
}

template <typename T, int V, bool kPlain, bool kSample, bool kSums = true>
void launch_pass(const Target& target, Pass<T> pass) {
  const Guided<T>& p = pass.p;
  constexpr int64_t kOnce = static_cast<int64_t>(kPassThreads) * V * (kPlain ? 2 : 1);
  // Where blocks begin with coefficients they go several times round, if that leaves enough of them.
  int64_t rounds = pass.sums == nullptr ? 1 : 16;
  const int64_t wanted = 16 * static_cast<int64_t>(target.device.multiprocessors);
  while (rounds > 1 && p.samples * ceil_div(p.each, rounds * kOnce) < wanted) rounds /= 2;
  pass.tile = rounds * kOnce;
  const int64_t tiles = ceil_div(p.each, pass.tile);
  STD_TORCH_CHECK(p.samples <= INT32_MAX / tiles, "guide: ", p.samples, " samples of ", p.each,
                  " elements are too many");
  pass.tiles = static_cast<unsigned>(tiles);
  pass_kernel<T, V, kPlain, kSample, kSums>
      <<<static_cast<unsigned>(p.samples * tiles), kPassThreads, 0, target.stream>>>(pass);
  check_launch("guide");
}

template <typename T>
void run_pass(const Target& target, const Pass<T>& pass) {
  const Guided<T>& p = pass.p;
  constexpr int V = kPack<T>;
  if (in_packs(p)) {
    if (p.momentum == nullptr && p.mask == nullptr && p.x0 == nullptr && p.reads_predictions()) {
      if (pass.sums != nullptr) {
        return p.sample == nullptr ? launch_pass<T, V, true, false, true>(target, pass)
                                   : launch_pass<T, V, true, true, true>(target, pass);
      }
      return p.sample == nullptr ? launch_pass<T, V, true, false, false>(target, pass)
                                 : launch_pass<T, V, true, true, false>(target, pass);
    }
    if constexpr (sizeof(T) < 8) return launch_pass<T, V, false, true>(target, pass);
  }
  launch_pass<T, 1, false, true>(target, pass);
}

template <typename T, bool kMomentum>
void pass_with_sums(const Target& target, Pass<T>& pass) {
  using Job = GuidanceJob<T, kMomentum>;
  const Guided<T>& p = pass.p;
  const PartedVectors vectors(p.samples, 1, 1, p.each);
  const int64_t count = p.samples * Job::kSums, scratch = scratch_for_sums(vectors, Job::kSums);
  const Workspace workspace(target, (scratch + count) * static_cast<int64_t>(sizeof(double)));
  double* const sums = static_cast<double*>(workspace.data());
  make_sums<T>(target, Job{p}, vectors, in_packs(p), 1, Job::kSums, sums + count, sums, "guide");
  pass.sums = sums;
  run_pass(target, pass);
}

// Where elements of the mask lie.
template <typename T>
void place_mask(Guided<T>& p, const View& shape, const View& mask) {
  const int first = p.samples == shape.size(0) ? 1 : 0;  // 0: all samples are taken for one
  const bool fits = join_dims<1>(shape_of(shape), first, shape.dims, {shape_of(mask)}, p.mask_dims);
  STD_TORCH_CHECK(fits, "guide: mask has too many dimensions that broadcast differently");
  p.mask = mask.const_data_ptr();
  p.mask_is_float = mask.scalar_type() == ScalarType::Float && !std::is_same_v<T, float>;
  p.mask_sample_stride = first == 0 ? 0 : broadcast_stride(shape_of(mask), 0, shape.dims);
  p.mask_in_packs = p.mask_dims.size[p.mask_dims.dims - 1] % kPack<T> == 0 && aligned16(p.mask);
}

void check_like(const View& x, const View& cond, const char* name) {
  check_contiguous(x, name);
  STD_TORCH_CHECK(x.numel() == cond.numel() && x.dtype == cond.dtype, name,
                  " must have the elements and the dtype of cond");
}

}  // namespace
}  // namespace latentfast::cuda

void latentfast::guide(const View& cond, const View& uncond, const OptionalView& sample,
                       const OptionalView& momentum, const OptionalView& mask, const OptionalView& known,
                       int64_t kind, int64_t original, double scale, double rescale, double eta,
                       double norm_threshold, double beta, double alpha, double sigma, double dt,
                       const View& out, const OptionalView& x0) {
  using namespace cuda;
  if (cond.numel() == 0) return;
  check_contiguous(cond, "cond");
  STD_TORCH_CHECK(cond.dim() >= 2, "guide: cond must have a dimension of samples and others");
  check_like(uncond, cond, "uncond");
  check_like(out, cond, "out");
  if (sample) check_like(*sample, cond, "sample");
  if (known) check_like(*known, cond, "known");
  if (x0) check_like(*x0, cond, "x0");
  STD_TORCH_CHECK(mask.has_value() == known.has_value() && (sample || (!mask && !x0)),
                  "guide: mask and known come together, and they and x0 with a sample");
  const bool has_momentum = momentum && kind == static_cast<int64_t>(Guidance::apg);
  if (has_momentum) {
    check_contiguous(*momentum, "momentum");
    check_companion(*momentum, cond, "momentum");
    STD_TORCH_CHECK(momentum->numel() == cond.numel(), "momentum must have the elements of cond");
  }
  if (mask) {
    check_contiguous(*mask, "mask");
    check_companion(*mask, cond, "mask");
  }
  const int64_t samples = cond.size(0), each = cond.numel() / samples;
  const GuidanceOptions options{.kind = static_cast<int>(kind),
                                .original = original != 0,
                                .has_momentum = has_momentum,
                                .scale = scale,
                                .rescale = rescale,
                                .eta = eta,
                                .norm_threshold = norm_threshold,
                                .alpha = alpha,
                                .elements = each};
  const bool needs_sums = guidance_needs_sums(options);

  const Target target(cond);
  dispatch_floating(cond.scalar_type(), "guide", [&]<typename T>() {
    using C = Wide<T>;
    Pass<T> pass{};
    Guided<T>& p = pass.p;
    p.cond = data<T>(cond);
    p.uncond = data<T>(uncond);
    p.sample = data_or_null<T>(sample);
    p.known = data_or_null<T>(known);
    p.out = mutable_data<T>(out);
    p.x0 = mutable_data_or_null<T>(x0);
    p.samples = needs_sums ? samples : 1;  // without sums, where a sample ends does not matter
    p.each = needs_sums ? each : cond.numel();
    p.beta = static_cast<C>(beta);
    p.sigma = static_cast<C>(sigma);
    p.dt = static_cast<C>(dt);
    p.options = options;
    if (mask) place_mask(p, cond, *mask);
    if (has_momentum) {
      p.momentum = momentum->mutable_data_ptr();
      p.momentum_is_float = momentum->scalar_type() == ScalarType::Float && !std::is_same_v<T, float>;
    }
    if (!needs_sums) {
      pass.weights = GuidanceWeights<C>::of(guidance_coefficients(options, GuidanceSums{}));
      run_pass(target, pass);
    } else if (has_momentum) {
      pass_with_sums<T, true>(target, pass);
    } else {
      if constexpr (sizeof(T) < 8) {
        if (guide_streamed(target, p)) return;
      }
      pass_with_sums<T, false>(target, pass);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) { m.impl("guide", LATENTFAST_BOX(latentfast::guide)); }
