// lerp, nlerp and slerp on CUDA: the operator, and the choice of its kernels.
//
//   out_k = w_a · a + w_b · b,   w from |a|², |b|², a·b of each vector and t_k
//   (csrc/common/interpolation_weights.h)
//
// The tensors are seen as (p, n, q, m), vectors running over n and m: see latentfast/_operators.py. The
// kernels, by what the vectors look like (interpolate.cuh says how they are cut up and summed):
//
//   lerp, any layout                     interpolate_straight.cu   one pass
//   runs of one element (m = 1)          interpolate_columns.cu    a thread walks along its vectors
//   up to 8 pieces of 2 KB               interpolate_rows.cu       a warp or a block a vector, one launch
//   longer, in runs of 512 bytes or more
//     that start at 16 bytes, sm_90      interpolate_streamed.cu   one cooperative launch, read once
//   anything else                        interpolate_rows.cu       three launches
//
// The kernels for rows give the same bits: which of them runs shows in the time alone.
#include <algorithm>

#include "../common/operators.h"
#include "interpolate.cuh"

namespace latentfast::cuda {
namespace {

// Runs shorter than this leave most of a warp without work; the streamed kernel, with one block a
// multiprocessor, suffers more.
constexpr int64_t kStreamedRunBytes = 512;

template <typename T>
void run(const Target& target, const Arguments& arguments) {
  const Vectors& vectors = arguments.vectors;
  if (arguments.mode == Mode::lerp) {
    interpolate_straight<T>(target, arguments);
  } else if (vectors.m == 1 && vectors.q > 1) {
    interpolate_columns<T>(target, arguments);
  } else if (vectors.pieces > kShortPieces && target.device.capability >= 90 && rows_aligned<T>(arguments) &&
             vectors.m * static_cast<int64_t>(sizeof(T)) >= kStreamedRunBytes) {
    interpolate_streamed<T>(target, arguments);
  } else {
    interpolate_rows<T>(target, arguments);
  }
}

}  // namespace
}  // namespace latentfast::cuda

void latentfast::interpolate(const View& a, const View& b, const OptionalView& t, std::span<const double> ts,
                             int64_t mode, int64_t p, int64_t n, int64_t q, int64_t m, const View& out) {
  using namespace cuda;
  check_contiguous(a, "a");
  check_contiguous(b, "b");
  check_contiguous(out, "out");
  const int64_t numel = p * n * q * m;
  const int64_t count = t.has_value() ? t->size(0) : static_cast<int64_t>(ts.size());
  STD_TORCH_CHECK(a.numel() == numel && b.numel() == numel && out.numel() == count * numel,
                  "interpolate: a, b and out must have ", numel, ", ", numel, " and ", count * numel,
                  " elements");
  if (numel == 0 || count == 0) return;

  const Target target(a);
  dispatch_floating(a.scalar_type(), "interpolate", [&]<typename T>() {
    Arguments arguments{};
    arguments.a = a.const_data_ptr();
    arguments.b = b.const_data_ptr();
    arguments.numel = numel;
    arguments.mode = static_cast<Mode>(mode);
    arguments.vectors = make_vectors<T>(p, n, q, m, target.device.multiprocessors);
    T* const results = mutable_data<T>(out);
    for (int64_t first = 0; first < count; first += kMaxValues) {  // a launch takes a few values of t
      Values& values = arguments.values;
      values.count = static_cast<int>(std::min<int64_t>(kMaxValues, count - first));
      if (t.has_value()) {
        check_contiguous(*t, "t");
        values.device_is_double = t->scalar_type() == ScalarType::Double;
        STD_TORCH_CHECK(values.device_is_double || t->scalar_type() == ScalarType::Float,
                        "interpolate: t must be float32 or float64");
        values.per_vector = t->size(1);
        STD_TORCH_CHECK(values.per_vector == 1 || values.per_vector == p * q,
                        "interpolate: t must have 1 or ", p * q, " columns, got ", values.per_vector);
        values.device =
            static_cast<const unsigned char*>(t->const_data_ptr()) +
            first * values.per_vector * (values.device_is_double ? sizeof(double) : sizeof(float));
      } else {
        std::copy_n(ts.begin() + first, values.count, values.host);
      }
      arguments.out = results + first * numel;
      run<T>(target, arguments);
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(latentfast, CUDA, m) {
  m.impl("interpolate", LATENTFAST_BOX(latentfast::interpolate));
}
