// The little that the kernels use of torch's stable ABI: tensors, registration, errors, dtype dispatch.
//
// Nothing outside of torch's C shim is referenced, so one binary runs with every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "view.h"

namespace latentfast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The helpers below take a Tensor or a View, X.
template <typename T, typename X>
const T* data(const X& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <typename T, typename X>
T* mutable_data(const X& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <typename T, typename X>
const T* data_or_null(const std::optional<X>& x) {
  return x.has_value() ? data<T>(*x) : nullptr;
}

template <typename T, typename X>
T* mutable_data_or_null(const std::optional<X>& x) {
  return x.has_value() ? mutable_data<T>(*x) : nullptr;
}

// The shape of a tensor, borrowed: valid as long as the tensor is.
inline Shape shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.data(), static_cast<int>(sizes.size())};
}

// Shapes, dtypes and contiguity were validated by the Python layer (latentfast/ops); this guards the raw
// operators.
template <typename X>
void check_contiguous(const X& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

// The pointer is the one for writing, for inputs too: a view does not know what it is for. (They differ for
// copy-on-write tensors alone, which this makes real ones.)
inline View view_of(const Tensor& x) {
  const Shape shape = shape_of(x);
  return {x.mutable_data_ptr(), shape.sizes,     shape.dims,
          x.get_device_index(), x.scalar_type(), x.is_contiguous()};
}

inline OptionalView view_of(const OptionalTensor& x) {
  return x.has_value() ? OptionalView(view_of(*x)) : std::nullopt;
}

inline std::vector<View> view_of(const std::vector<Tensor>& list) {
  std::vector<View> views;
  views.reserve(list.size());
  for (const Tensor& x : list) views.push_back(view_of(x));
  return views;
}

template <typename T>
const T& view_of(const T& x) {  // any other argument goes through as it is
  return x;
}

template <typename T>
struct FromDispatcher {
  using type = T;
};
template <>
struct FromDispatcher<const View&> {
  using type = Tensor;
};
template <>
struct FromDispatcher<const OptionalView&> {
  using type = OptionalTensor;
};
template <>
struct FromDispatcher<std::span<const View>> {
  using type = std::vector<Tensor>;
};
template <>
struct FromDispatcher<std::span<const double>> {
  using type = std::vector<double>;
};
template <>
struct FromDispatcher<std::span<const int64_t>> {
  using type = std::vector<int64_t>;
};

template <typename Function, Function* kOperator>
struct OnTensors;
template <typename... Arguments, void (*kOperator)(Arguments...)>
struct OnTensors<void(Arguments...), kOperator> {
  static void call(typename FromDispatcher<Arguments>::type... arguments) {
    kOperator(view_of(arguments)...);
  }
};

// TORCH_BOX for an operator on views: it gets views of the tensors that the dispatcher brings.
#define LATENTFAST_BOX(kOperator) TORCH_BOX((&::latentfast::OnTensors<decltype(kOperator), &kOperator>::call))

// Call f.operator()<T>() with the C++ type of a floating dtype:
//   dispatch_floating(x.scalar_type(), "edit", [&]<typename T>() { … });
template <typename F>
void dispatch_floating(ScalarType dtype, const char* name, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Half:
      return f.template operator()<Half>();
    case ScalarType::BFloat16:
      return f.template operator()<BFloat16>();
    case ScalarType::Double:
      return f.template operator()<double>();
    default:
      STD_TORCH_CHECK(false, name, ": no kernel for dtype ", torch::headeronly::toString(dtype));
  }
}

// The same with float32 and float64 only: scalars on the device, losses, masks of their own dtype.
template <typename F>
void dispatch_wide(ScalarType dtype, const char* name, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    default:
      STD_TORCH_CHECK(false, name, ": float32 or float64 expected, got ", torch::headeronly::toString(dtype));
  }
}

}  // namespace latentfast
