// edit: out = z + Σ_n strengths[n] · mask[n] · directions[n];  blend: out = base + mask·(edited − base).
// The specification is latentfast/reference/edit.py.
//
// Both are one pass that memory bounds: each thread reads vectors of 16 bytes, several before the first use,
// computes in float32 (float64 for double), rounds once and writes. What is worth a design is what broadcasts
// (walk.cuh has the terms):
//
// - Directions that all samples share, (N, 1, C, T, H, W): the step Σ_n strengths[n]·directions[n] at a
//   position does not depend on the sample. The thread makes it once, keeps it in registers and repeats over
//   the batch ("hoisted"), so that N directions cost one read in all.
// - A mask that channels share, (B, 1, T, H, W): where directions differ by sample the thread repeats over
//   the channels and finds the mask in L1; where the batch is walked, it takes a few channels at once.
// - Anything else (rows that are no multiple of a vector, unaligned pointers, double): the same walk, an
//   element at a time.
//
// The arithmetic of an element does not depend on which of these ran, nor on the batch: the step is summed
// first, in the order of n, each term with its own mask where there is one for each direction, then masked if
// there is one for all, and added to z.
#include <vector>

#include "../common/operators.h"
#include "columns.cuh"
#include "upload.cuh"
#include "walk.cuh"

namespace latentfast::cuda {
namespace {

constexpr int kHostStrengths = 32;  // handed to the kernel by value; more go through device memory
// Rows a thread takes with the step hoisted, where they share the mask: as many as the registers do.
template <typename T, typename M>
constexpr int kGroup = sizeof(M) > sizeof(T) ? 2 : 4;
enum MaskKind : int { kNoMask, kOneMask, kMaskEach };
enum Directions : int { kSingle, kSeveral };  // N == 1; any N
enum Operand : int { kZ, kDirection, kMask, kStrength };

// Never contracted: what is added may be a product here and a longer sum in another of the kernels.
__device__ __forceinline__ float rounded_sum(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double rounded_sum(double a, double b) { return __dadd_rn(a, b); }

template <typename T>
struct EditParams {
  using C = Wide<T>;
  const T* z;
  const T* directions;
  const void* mask;
  T* out;
  const C* strengths;                                             // on the device, or null: `host`
  int64_t count, direction_stride, mask_stride, strength_stride;  // N, and the steps from one n to the next
  int mask_kind;
  Walk<4> walk;
  C host[kHostStrengths];
};

template <typename T>
__device__ __forceinline__ Wide<T> strength_of(const EditParams<T>& p, const Spot<4>& spot, int64_t n,
                                               int64_t r) {
  return p.strengths == nullptr ? p.host[n]
                                : p.strengths[n * p.strength_stride + spot.offset[kStrength] +
                                              r * p.walk.repeat_stride[kStrength]];
}

// The step made once, for G rows that share the mask. Each pass of the loop uses what was loaded U repeats
// ago and loads what will be used in as many: the memory is never left without work. kPlain: no operand is
// constant along the row, so that nothing branches between the loads.
template <typename T, typename M, int V, bool kMasked, int G, bool kPlain>
__global__ void __launch_bounds__(kWalkThreads, kPlain ? 2 : 1)
    hoisted_kernel(const __grid_constant__ EditParams<T> p) {
  using C = Wide<T>;
  constexpr int U = kPlain ? 2 : 4;
  const Walk<4>& walk = p.walk;
  Spot<4> spot;
  if (!locate<V>(walk, spot)) return;

  const int64_t direction_inner = kPlain ? 1 : walk.inner_stride[kDirection];
  [[maybe_unused]] const int64_t mask_inner = kPlain ? 1 : walk.inner_stride[kMask];
  struct {
    Raw<T, V> z[G];
    Raw<M, V> mask;
  } ahead[U];
  const int64_t begin = spot.offset[kZ] + spot.first * walk.repeat_stride[kZ];
  const T* z = p.z + begin;
  T* out = p.out + begin;
  const M* mask = static_cast<const M*>(p.mask) + spot.offset[kMask] + spot.first * walk.repeat_stride[kMask];
  const auto load = [&](auto& to) {
#pragma unroll
    for (int g = 0; g < G; ++g) load_raw(to.z[g], z + g * walk.group_stride[kZ]);
    z += walk.repeat_stride[kZ];
    if constexpr (kMasked) {
      load_row(to.mask, mask, mask_inner);
      mask += walk.repeat_stride[kMask];
    }
  };
  const int repeats = static_cast<int>(spot.last - spot.first);
  // before the directions: memory answers both at once
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if (u < repeats) load(ahead[u]);
  }

  C step[G][V] = {};
  const T* directions = p.directions + spot.offset[kDirection];
#pragma unroll 4 / G
  for (int64_t n = 0; n < p.count; ++n) {
    Raw<T, V> raw[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      load_row(raw[g], directions + g * walk.group_stride[kDirection], direction_inner);
    }
    directions += p.direction_stride;
    const C s = strength_of(p, spot, n, 0);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      C d[V];
      fill_row(raw[g], direction_inner);
      widen_raw(raw[g], d);
#pragma unroll
      for (int v = 0; v < V; ++v) step[g][v] = fma(s, d[v], step[g][v]);
    }
  }

  for (int r = 0; r < repeats; r += U) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (r + u >= repeats) return;
      C x[G][V], w[V];
      if constexpr (kMasked) {
        fill_row(ahead[u].mask, mask_inner);
        widen_raw(ahead[u].mask, w);
      }
#pragma unroll
      for (int g = 0; g < G; ++g) {
        widen_raw(ahead[u].z[g], x[g]);
#pragma unroll
        for (int v = 0; v < V; ++v)
          x[g][v] = kMasked ? fma(w[v], step[g][v], x[g][v]) : rounded_sum(x[g][v], step[g][v]);
      }
      if (r + u + U < repeats) load(ahead[u]);
#pragma unroll
      for (int g = 0; g < G; ++g) store_narrow(out + g * walk.group_stride[kZ], x[g]);
      out += walk.repeat_stride[kZ];
    }
  }
}

template <typename T, typename M, int V, int kMaskKind, int kDirections>
__global__ void __launch_bounds__(kWalkThreads) edit_kernel(const __grid_constant__ EditParams<T> p) {
  using C = Wide<T>;
  constexpr int U = V == 1 ? 4 : 2;  // repeats whose loads are in flight together
  const Walk<4>& walk = p.walk;
  Spot<4> spot;
  if (!locate<V>(walk, spot)) return;
  // the general kernel (V == 1) learns at run time what kind of mask there is
  const int kind = V == 1 ? p.mask_kind : kMaskKind;
  const M* const mask = static_cast<const M*>(p.mask) + spot.offset[kMask];
  const T* const directions = p.directions + spot.offset[kDirection];

  for (int64_t r0 = spot.first; r0 < spot.last; r0 += U) {
    const auto inside = [&](int u) {
      return r0 + u < spot.last && spot.position + (r0 + u) * walk.repeat_step < walk.inner;
    };
    Raw<T, V> z[U];
    Raw<M, V> m[U];
    [[maybe_unused]] Raw<T, V> single[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!inside(u)) continue;
      load_raw(z[u], p.z + spot.offset[kZ] + (r0 + u) * walk.repeat_stride[kZ]);
      if (kDirections == kSingle) {
        load_row(single[u], directions + (r0 + u) * walk.repeat_stride[kDirection],
                 walk.inner_stride[kDirection]);
      }
      if (kind == kOneMask) {
        load_row(m[u], mask + (r0 + u) * walk.repeat_stride[kMask], walk.inner_stride[kMask]);
      }
    }
    [[maybe_unused]] C step[U][V];
    if constexpr (kDirections == kSeveral) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) step[u][v] = 0;
      }
#pragma unroll 2
      for (int64_t n = 0; n < p.count; ++n) {
        Raw<T, V> raw[U];
        Raw<M, V> each[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (!inside(u)) continue;
          load_row(raw[u], directions + n * p.direction_stride + (r0 + u) * walk.repeat_stride[kDirection],
                   walk.inner_stride[kDirection]);
          if (kind == kMaskEach) {
            load_row(each[u], mask + n * p.mask_stride + (r0 + u) * walk.repeat_stride[kMask],
                     walk.inner_stride[kMask]);
          }
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (!inside(u)) continue;
          C d[V];
          fill_row(raw[u], walk.inner_stride[kDirection]);
          widen_raw(raw[u], d);
          const C s = strength_of(p, spot, n, r0 + u);
          if (kind == kMaskEach) {
            C w[V];
            fill_row(each[u], walk.inner_stride[kMask]);
            widen_raw(each[u], w);
#pragma unroll
            for (int v = 0; v < V; ++v) step[u][v] = fma(w[v] * s, d[v], step[u][v]);
          } else {
#pragma unroll
            for (int v = 0; v < V; ++v) step[u][v] = fma(s, d[v], step[u][v]);
          }
        }
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!inside(u)) continue;
      C x[V], move[V];
      [[maybe_unused]] C w[V];
      widen_raw(z[u], x);
      if (kind == kOneMask) {
        fill_row(m[u], walk.inner_stride[kMask]);
        widen_raw(m[u], w);
      }
      if constexpr (kDirections == kSingle) {
        fill_row(single[u], walk.inner_stride[kDirection]);
        widen_raw(single[u], move);
        const C s = strength_of(p, spot, 0, r0 + u);
#pragma unroll
        for (int v = 0; v < V; ++v)
          move[v] = fma(s, move[v], C(0));  // as the sums of the other kernels begin
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) move[v] = step[u][v];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        x[v] = kind == kOneMask ? fma(w[v], move[v], x[v]) : rounded_sum(x[v], move[v]);
      }
      store_narrow(p.out + spot.offset[kZ] + (r0 + u) * walk.repeat_stride[kZ], x);
    }
  }
}

template <typename T>
struct BlendParams {
  const T* base;
  const T* edited;
  const void* mask;
  T* out;
  Walk<2> walk;
};

template <typename T, typename M, int V>
__global__ void __launch_bounds__(kWalkThreads) blend_kernel(const __grid_constant__ BlendParams<T> p) {
  using C = Wide<T>;
  constexpr int U = V == 1 ? 4 : 2;
  const Walk<2>& walk = p.walk;
  Spot<2> spot;
  if (!locate<V>(walk, spot)) return;
  const M* const mask = static_cast<const M*>(p.mask) + spot.offset[1];
  for (int64_t r0 = spot.first; r0 < spot.last; r0 += U) {
    const auto inside = [&](int u) {
      return r0 + u < spot.last && spot.position + (r0 + u) * walk.repeat_step < walk.inner;
    };
    Raw<T, V> base[U], edited[U];
    Raw<M, V> m[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!inside(u)) continue;
      const int64_t at = spot.offset[0] + (r0 + u) * walk.repeat_stride[0];
      load_raw(base[u], p.base + at);
      load_raw(edited[u], p.edited + at);
      load_row(m[u], mask + (r0 + u) * walk.repeat_stride[1], walk.inner_stride[1]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (!inside(u)) continue;
      C x[V], y[V], w[V], mixed[V];
      widen_raw(base[u], x);
      widen_raw(edited[u], y);
      fill_row(m[u], walk.inner_stride[1]);
      widen_raw(m[u], w);
#pragma unroll
      for (int v = 0; v < V; ++v) mixed[v] = fma(w[v], y[v] - x[v], x[v]);
      store_selected(p.out + spot.offset[0] + (r0 + u) * walk.repeat_stride[0], base[u], edited[u], w, mixed);
    }
  }
}

// The longest dimension outside the rows along which all of `operands` are constant, or -1.
template <int N>
int longest_constant(const Joined<N>& joined, std::initializer_list<int> operands) {
  int found = -1;
  for (int d = 0; d + 1 < joined.dims; ++d) {
    const bool constant =
        std::all_of(operands.begin(), operands.end(), [&](int k) { return joined.stride[k][d] == 0; });
    if (constant && (found < 0 || joined.size[d] > joined.size[found])) found = d;
  }
  return found;
}

// Without dimension 0 where there is one more than the target has.
Shape without_count(const View& x, int dims) {
  const Shape shape = shape_of(x);
  return shape.dims > dims ? Shape{shape.sizes + 1, dims} : shape;
}

// The step from one n to the next in a contiguous tensor whose leading dimension is n (or that lacks it: 0).
int64_t count_stride(const View& x, int dims) {
  return x.dim() > dims && x.size(0) > 1 ? x.numel() / x.size(0) : 0;
}

}  // namespace
}  // namespace latentfast::cuda

void latentfast::edit(const View& z, const View& directions, const OptionalView& strengths,
                      std::span<const double> host_strengths, const OptionalView& given_mask,
                      const View& out) {
  using namespace cuda;
  const int64_t numel = z.numel();
  if (numel == 0) return;
  check_contiguous(z, "z");
  check_contiguous(directions, "directions");
  check_contiguous(out, "out");
  const Shape shape = shape_of(z);
  const int64_t count = strengths ? strengths->size(0) : static_cast<int64_t>(host_strengths.size());
  const OptionalView mask = count == 0 ? std::nullopt : given_mask;
  if (mask) {
    check_contiguous(*mask, "mask");
    check_companion(*mask, z, "mask");
  }
  const Shape direction = without_count(directions, shape.dims);
  std::vector<int64_t> by_sample(shape.dims, 1);  // how strengths (N, B) lie along the latents
  const bool each_sample = strengths && strengths->dim() == 2;
  if (each_sample && shape.dims > 0) by_sample[0] = strengths->size(1);
  Joined<4> joined;
  const bool fits = join_dims<4>(shape, 0, shape.dims,
                                 {shape, direction, mask ? without_count(*mask, shape.dims) : shape,
                                  Shape{by_sample.data(), shape.dims}},
                                 joined);
  STD_TORCH_CHECK(fits, "edit: too many dimensions that broadcast differently");
  if (joined.stride[kStrength][joined.dims - 1] !=
      0) {  // strengths along the rows: rows of one element instead
    STD_TORCH_CHECK(joined.dims < kMaxDims, "edit: too many dimensions that broadcast differently");
    joined.size[joined.dims] = 1;
    for (int k = 0; k < 4; ++k) joined.stride[k][joined.dims] = 0;
    ++joined.dims;
  }

  const Target target(z);
  const int64_t mask_stride = mask ? count_stride(*mask, shape.dims) : 0;
  const int kind = !mask ? kNoMask : mask_stride == 0 ? kOneMask : kMaskEach;
  dispatch_floating(z.scalar_type(), "edit", [&]<typename T>() {
    dispatch_mask<T>(mask, [&]<typename M>() {
      using C = Wide<T>;
      EditParams<T> p;
      p.z = data<T>(z);
      p.directions = data<T>(directions);
      p.mask = mask ? mask->const_data_ptr() : nullptr;
      p.out = mutable_data<T>(out);
      p.count = count;
      p.direction_stride = count_stride(directions, shape.dims);
      p.mask_stride = mask_stride;
      p.strength_stride = each_sample ? strengths->size(1) : 1;
      p.mask_kind = kind;
      const bool upload_strengths = !strengths && count > kHostStrengths;
      const Workspace uploaded(target, upload_strengths ? count * static_cast<int64_t>(sizeof(C)) : 0);
      if (upload_strengths) upload(host_strengths, static_cast<C*>(uploaded.data()), target.stream);
      p.strengths = upload_strengths ? static_cast<const C*>(uploaded.data()) : data_or_null<C>(strengths);
      for (int64_t n = 0; p.strengths == nullptr && n < count; ++n)
        p.host[n] = static_cast<C>(host_strengths[n]);

      constexpr int V = kPack<T>;
      [[maybe_unused]] const bool vectors = joined.size[joined.dims - 1] % V == 0 && aligned16(p.z) &&
                                            aligned16(p.out) && aligned16(p.directions) && aligned16(p.mask);
      const int hoist =
          kind == kMaskEach || count == 0 ? -1 : longest_constant(joined, {kDirection, kStrength});
      const int share = kind == kNoMask ? -1 : longest_constant(joined, {kMask});
      dim3 grid, block;
      const auto launch = [&](auto kernel, int repeat_dim, int vec, bool shared_rows, uint32_t chunk,
                              int group = 1) {
        p.walk = make_walk(joined, repeat_dim, vec, shared_rows, chunk, target.device, grid, block, group);
        kernel<<<grid, block, 0, target.stream>>>(p);
        check_launch("edit");
      };
      if constexpr (sizeof(T) < 8) {
        const auto moves = [&](int operand) { return joined.stride[operand][joined.dims - 1] != 0; };
        const bool plain = moves(kDirection) && moves(kMask);
        if (vectors && hoist >= 0) {
          if (kind == kNoMask) return launch(hoisted_kernel<T, T, V, false, 1, false>, hoist, V, false, 16);
          const int row_dim = joined.dims - 2 - (hoist == joined.dims - 2);  // the last one besides `hoist`
          if (plain && row_dim >= 0 && joined.stride[kMask][row_dim] == 0 &&
              joined.stride[kStrength][row_dim] == 0 && joined.size[row_dim] % kGroup<T, M> == 0)
            return launch(hoisted_kernel<T, M, V, true, kGroup<T, M>, true>, hoist, V, true, 8, kGroup<T, M>);
          return launch(hoisted_kernel<T, M, V, true, 1, false>, hoist, V, share >= 0, 8);
        }
        if (vectors) {
          const bool single = count == 1;
          if (kind == kNoMask && single)
            return launch(edit_kernel<T, T, V, kNoMask, kSingle>, share, V, false, 8);
          if (kind == kNoMask) return launch(edit_kernel<T, T, V, kNoMask, kSeveral>, share, V, false, 8);
          if (kind == kOneMask && single)
            return launch(edit_kernel<T, M, V, kOneMask, kSingle>, share, V, false, 8);
          if (kind == kOneMask) return launch(edit_kernel<T, M, V, kOneMask, kSeveral>, share, V, false, 8);
          return launch(edit_kernel<T, M, V, kMaskEach, kSeveral>, share, V, false, 8);
        }
      }
      launch(edit_kernel<T, M, 1, kNoMask, kSeveral>, share, 1, false, 8);
    });
  });
}

void latentfast::blend(const View& base, const View& edited, const View& mask, const View& out) {
  using namespace cuda;
  if (base.numel() == 0) return;
  check_contiguous(base, "base");
  check_contiguous(edited, "edited");
  check_contiguous(mask, "mask");
  check_companion(mask, base, "mask");
  check_contiguous(out, "out");
  const Shape shape = shape_of(base);
  Joined<2> joined;
  const bool fits = join_dims<2>(shape, 0, shape.dims, {shape, shape_of(mask)}, joined);
  STD_TORCH_CHECK(fits, "blend: too many dimensions that broadcast differently");
  const Target target(base);
  dispatch_floating(base.scalar_type(), "blend", [&]<typename T>() {
    dispatch_mask<T>(OptionalView(mask), [&]<typename M>() {
      BlendParams<T> p;
      p.base = data<T>(base);
      p.edited = data<T>(edited);
      p.mask = mask.const_data_ptr();
      p.out = mutable_data<T>(out);
      constexpr int V = kPack<T>;
      [[maybe_unused]] const bool vectors = joined.size[joined.dims - 1] % V == 0 && aligned16(p.base) &&
                                            aligned16(p.edited) && aligned16(p.mask) && aligned16(p.out);
      const int share = longest_constant(joined, {1});
      dim3 grid, block;
      const auto launch = [&](auto kernel, int vec) {
        p.walk = make_walk(joined, share, vec, false, 8, target.device, grid, block);
        kernel<<<grid, block, 0, target.stream>>>(p);
        check_launch("blend");
      };
      if constexpr (sizeof(T) < 8) {
        if (vectors) return launch(blend_kernel<T, M, V>, V);
      }
      launch(blend_kernel<T, M, 1>, 1);
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("edit", LATENTFAST_BOX(latentfast::edit));
  m.impl("blend", LATENTFAST_BOX(latentfast::blend));
}
