// plan_moments, plan_coefficients and plan_run. What they mean is said in latentfast/_operators.py and
// common/plan.h; how a plan is walked, in plan_walk.h.
#include <vector>

#include "cpu/plan_walk.h"
#include "cpu/preview.h"

namespace latentfast {
namespace {

// Elements of a channel whose moments are summed up together: theirs are added in order.
constexpr int64_t kMomentPiece = 16 * kPlanRow;
// Rows of pixels that a task has. The rows of latents at its ends go through all instructions twice.
constexpr int64_t kPlanBand = 160;

// Rows in double precision: widened, what is not.
const double* in_double(const double* x, int, double*) { return x; }
const double* in_double(const float* x, int n, double* buffer) {
  loops().to_double(x, n, buffer);
  return buffer;
}

template <typename T>
class Moments {
 public:
  using C = Working<T>;

  Moments(const PlanWalk<T>& walk, const PlanValues& values, double* out)
      : walk_(walk),
        values_(values),
        sums_(values.count + values.count * (values.count + 1) / 2),
        pieces_(ceil_div(walk.elements(), kMomentPiece)),
        out_(out) {}

  void run() const {
    const int64_t vectors = walk_.batch * walk_.channels;
    std::vector<double> partial(vectors * pieces_ * sums_);
    parallel(vectors * pieces_, std::min(kMomentPiece, walk_.elements()) * values_.count,
             [&](int64_t begin, int64_t end) {
               std::vector<Room> room(1);
               for (int64_t i = begin; i < end; ++i)
                 add_piece(i / pieces_, i % pieces_, room[0], partial.data() + i * sums_);
             });
    for (int64_t v = 0; v < vectors; ++v) {
      double* const to = out_ + v * plan_moment_count(values_.count);
      double* const totals = to + 2 * values_.count;
      std::fill_n(totals, sums_, 0.0);
      for (int64_t i = 0; i < pieces_; ++i) {
        for (int s = 0; s < sums_; ++s) totals[s] += partial[(v * pieces_ + i) * sums_ + s];
      }
      std::vector<Room> room(1);
      for (int i = 0; i < values_.count; ++i) {
        to[i] = *row(i, v, 0, 1, room[0]);
        to[values_.count + i] = *row(i, v, walk_.elements() - 1, 1, room[0]);
      }
    }
  }

 private:
  struct Room {
    typename PlanWalk<T>::Room walk;
    C wide[kPlanRow];
    double widened[kPlanRow];
    double rest[kMostPlanValues][kPlanRow];  // what is left of the values without their first elements
  };

  const C* row(int i, int64_t vector, int64_t at, int n, Room& room) const {
    const int64_t b = vector / walk_.channels, c = vector % walk_.channels;
    return i == 0 ? walk_.read(b, c, at, n, room.walk) : walk_.tensor(values_.at[i], b, c, at, n, room.wide);
  }

  void add_piece(int64_t vector, int64_t piece, Room& room, double* sums) const {
    const auto& loop = loops_of<double>();
    const int m = values_.count;
    double first[kMostPlanValues];
    for (int i = 0; i < m; ++i) first[i] = *row(i, vector, 0, 1, room);
    std::vector<double> lanes(sums_ * kLanes, 0.0);
    const int64_t stop = std::min((piece + 1) * kMomentPiece, walk_.elements());
    for (int64_t at = piece * kMomentPiece; at < stop; at += kPlanRow) {
      const int n = static_cast<int>(std::min<int64_t>(kPlanRow, stop - at));
      double* lane = lanes.data();
      for (int i = 0; i < m; ++i, lane += kLanes) {
        const double* const x = in_double(row(i, vector, at, n, room), n, room.widened);
        loop.affine(x, n, first[i], 1.0, 0.0, room.rest[i]);
        loop.sum(room.rest[i], n, lane);
      }
      for (int i = 0; i < m; ++i) {
        for (int j = i; j < m; ++j, lane += kLanes) loop.dot(room.rest[i], room.rest[j], n, lane);
      }
    }
    for (int s = 0; s < sums_; ++s) sums[s] = add_lanes(lanes.data() + s * kLanes);
  }

  const PlanWalk<T>& walk_;
  const PlanValues& values_;
  int sums_;
  int64_t pieces_;
  double* out_;
};

void plan_moments(std::span<const View> inputs, std::span<const int64_t> code, int64_t start,
                  std::span<const int64_t> values, const View& coefficients, const View& moments) {
  check_plan_inputs(inputs);
  check_contiguous(moments, "moments");
  if (inputs[0].numel() == 0) return;
  const PlanValues chosen(values, static_cast<int64_t>(inputs.size()));
  const PlanProgram program(code, static_cast<int64_t>(inputs.size()), INT32_MAX, INT32_MAX);
  dispatch_floating(inputs[0].scalar_type(), "plan_moments", [&]<typename T>() {
    const PlanWalk<T> walk(inputs, program, coefficients, static_cast<int>(start));
    Moments<T>(walk, chosen, mutable_data<double>(moments)).run();
  });
}

// One sample's coefficients.
template <typename C>
void make_coefficients(const PlanProgram& program, int start, int stop, const PlanValues& values,
                       int64_t elements, int64_t b, int64_t batch, int64_t channels, const double* sliders,
                       const double* statistics, const double* moments, PlanCoefficients<C>* out) {
  std::vector<PlanChannel> x(values.count > 0 ? channels : 0);
  for (PlanChannel& channel : x) start_channel(channel);
  const auto moments_at = [&](int64_t c) {
    return PlanMoments{moments + (b * channels + c) * plan_moment_count(values.count), values.count,
                       static_cast<double>(elements)};
  };
  for (int k = start; k < stop; ++k) {
    const PlanInstruction& own = program.at[k];
    PlanCoefficients<C>* const to = out + (k * batch + b) * channels;
    const double slider = own.slider < 0 ? 0.0 : sliders[own.slider];
    const int j = own.operand < 0 ? -1 : values.find(own.operand);
    const auto statistic = [&](int64_t c) {
      return own.row < 0 ? nullptr : statistics + ((own.row * batch + b) * channels + c) * 2;
    };
    if (own.operation == PlanOperation::slerp || own.operation == PlanOperation::nlerp) {
      Sums sums{0.0, 0.0, 0.0};
      std::vector<double> squares(channels);
      for (int64_t c = 0; c < channels; ++c) {
        const Sums part = products_with(x[c], moments_at(c), j);
        squares[c] = part.aa;
        sums = {sums.aa + part.aa, sums.bb + part.bb, sums.ab + part.ab};
      }
      const double last = channels > 0 ? last_of(x[channels - 1], moments_at(channels - 1)) : 0.0;
      const PlanWeights w = plan_weights(own.operation, slider, sums, channels * elements, last);
      for (int64_t c = 0; c < channels; ++c) {
        to[c] = {{static_cast<C>(w.a), static_cast<C>(w.b), static_cast<C>(w.turn), C(0)}};
        mix_channel(x[c], w.a, w.b, j, w.turn, squares[c]);
      }
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double* const known = statistic(c);
      if (own.operation == PlanOperation::adain) {
        to[c] = restyling_of<C>(x[c], moments_at(c), slider, known[0], known[1]);
      } else {
        to[c] = plain_coefficients<C>(own.operation, slider, known == nullptr ? 0.0 : known[0],
                                      known == nullptr ? 0.0 : known[1]);
      }
      if (!x.empty()) follow(x[c], own, to[c], slider, j);
    }
  }
}

void plan_coefficients(std::span<const int64_t> code, int64_t start, int64_t stop,
                       std::span<const int64_t> values, int64_t elements, std::span<const double> given,
                       const View& statistics, const View& moments, const View& sliders,
                       const View& coefficients) {
  STD_TORCH_CHECK(coefficients.dim() == 4 && coefficients.size(3) == 4 && statistics.dim() == 4,
                  "plan_coefficients takes statistics (R, B, C, 2) and coefficients (K, B, C, 4)");
  const PlanValues chosen(values, kMostPlanTensors);
  const PlanProgram program(code, kMostPlanTensors, sliders.numel(), statistics.size(0));
  STD_TORCH_CHECK(program.count == coefficients.size(0) && stop <= program.count &&
                      (given.empty() || static_cast<int64_t>(given.size()) == sliders.numel()),
                  "plan_coefficients: the sizes of the program and of its tensors differ");
  std::copy(given.begin(), given.end(), mutable_data<double>(sliders));
  if (coefficients.numel() == 0 || elements == 0) return;
  dispatch_wide(coefficients.scalar_type(), "plan_coefficients", [&]<typename C>() {
    for (int64_t b = 0; b < coefficients.size(1); ++b) {
      make_coefficients<C>(program, static_cast<int>(start), static_cast<int>(stop), chosen, elements, b,
                           coefficients.size(1), coefficients.size(2), data<double>(sliders),
                           data<double>(statistics), data<double>(moments),
                           mutable_data<PlanCoefficients<C>>(coefficients));
    }
  });
}

template <typename T>
void write_latents(const PlanWalk<T>& walk, const View& out) {
  const Output<T> to(mutable_data<T>(out), out.numel());
  constexpr int64_t kPiece = 8 * kPlanRow;
  const int64_t pieces = ceil_div(walk.elements(), kPiece);
  parallel(walk.batch * walk.channels * pieces, std::min(kPiece, walk.elements()),
           [&](int64_t begin, int64_t end) {
             typename PlanWalk<T>::Room room;
             for (int64_t i = begin; i < end; ++i) {
               const int64_t vector = i / pieces, first = i % pieces * kPiece;
               const int64_t last = std::min(first + kPiece, walk.elements());
               for (int64_t at = first; at < last; at += kPlanRow) {
                 const int n = static_cast<int>(std::min<int64_t>(kPlanRow, last - at));
                 to.finish(walk.read(vector / walk.channels, vector % walk.channels, at, n, room), n,
                           vector * walk.elements() + at);
               }
             }
           });
}

template <typename Source>
void show(const Source& source, const View& weight, const View& bias, const View& rgb) {
  using C = typename Source::C;
  STD_TORCH_CHECK(rgb.scalar_type() == ScalarType::Byte, "plan_run: rgb must be uint8");
  Preview<Source, uint8_t>(source, data<C>(weight), data<C>(bias), rgb, kPlanBand).run();
}

void plan_run(std::span<const View> inputs, std::span<const int64_t> code, const View&, const View&,
              const View& coefficients, const OptionalView& weight, const OptionalView& bias,
              const OptionalView& latents, const OptionalView& rgb) {
  check_plan_inputs(inputs);
  check_contiguous(coefficients, "coefficients");
  const View& source = inputs[0];
  const PlanProgram program(code, static_cast<int64_t>(inputs.size()), INT32_MAX, INT32_MAX);
  STD_TORCH_CHECK(!rgb || (weight && bias), "plan_run: rgb needs weight and bias");
  const bool shows = rgb && check_preview(source, *weight, *bias, *rgb, "plan_run");
  dispatch_floating(source.scalar_type(), "plan_run", [&]<typename T>() {
    if (latents) {
      check_contiguous(*latents, "latents");
      if (latents->numel() == 0) return;
      write_latents(PlanWalk<T>(inputs, program, coefficients, program.count), *latents);
    }
    if (!shows) return;
    if (latents) {  // of what was written: a plan of nothing
      const PlanProgram nothing({}, 1, 0, 0);
      show(PlanWalk<T>(std::span<const View>(&*latents, 1), nothing, coefficients, 0), *weight, *bias, *rgb);
    } else {
      show(PlanWalk<T>(inputs, program, coefficients, program.count), *weight, *bias, *rgb);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(latentfast, CPU, m) {
  m.impl("plan_moments", LATENTFAST_BOX(plan_moments));
  m.impl("plan_coefficients", LATENTFAST_BOX(plan_coefficients));
  m.impl("plan_run", LATENTFAST_BOX(plan_run));
}

}  // namespace latentfast
