// The operators that have a direct door past the dispatcher. Each native library defines them, and
// operators.cpp, which is compiled into each, hands them out.
#pragma once

#include <cstddef>
#include <span>

#include "view.h"

namespace latentfast {

// Tensors that one call of combine takes, and results that it gives.
constexpr size_t kMostCombined = 8, kMostCombinations = 4;

// With the signatures of latentfast/_operators.py.
struct Operators {
  using Interpolate = void(const View& a, const View& b, const OptionalView& t, std::span<const double> ts,
                           int64_t kind, int64_t p, int64_t n, int64_t q, int64_t m, const View& out);
  using Edit = void(const View& z, const View& directions, const OptionalView& strengths,
                    std::span<const double> host_strengths, const OptionalView& mask, const View& out);
  using Blend = void(const View& base, const View& edited, const View& mask, const View& out);
  using TemporalLoss = void(const View& z, const OptionalView& ref, const OptionalView& mask, double first,
                            double second, int64_t norm, double eps, double grad_scale, int64_t frame_dim,
                            const View& loss, const OptionalView& grad);

  using VectorMix = void(const View& x, const View& coefficients, int64_t p, int64_t n, int64_t q, int64_t m,
                         const View& out);
  using Guide = void(const View& cond, const View& uncond, const OptionalView& sample,
                     const OptionalView& momentum, const OptionalView& mask, const OptionalView& known,
                     int64_t kind, int64_t original, double scale, double rescale, double eta,
                     double norm_threshold, double beta, double alpha, double sigma, double dt,
                     const View& out, const OptionalView& x0);
  using Combine = void(std::span<const View> tensors, std::span<const double> coefficients, int64_t precise,
                       const View& out, const OptionalView& out1, const OptionalView& out2,
                       const OptionalView& out3);

  size_t size;  // of this table, so that libraries of different builds do not take each other's for theirs
  Interpolate* interpolate;
  Edit* edit;
  Blend* blend;
  TemporalLoss* temporal_loss;
  VectorMix* vector_mix;
  Guide* guide;
  Combine* combine;
};

// The table's name in a library: its one exported symbol.
constexpr const char* kOperatorsSymbol = "latentfast_operators";

Operators::Interpolate interpolate;
Operators::Edit edit;
Operators::Blend blend;
Operators::TemporalLoss temporal_loss;
Operators::VectorMix vector_mix;
Operators::Guide guide;
Operators::Combine combine;

}  // namespace latentfast
