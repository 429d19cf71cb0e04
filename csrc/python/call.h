// What a call through the direct door is made of: the objects of torch, the arguments, the outputs, the
// launch.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <ATen/dlpack.h>  // the standard's own header, plain C
#include <Python.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <span>
#include <string>
#include <utility>

#include "../common/operators.h"

namespace latentfast {

// What is needed of torch, looked up once by connect().
struct Torch {
  const DLPackExchangeAPI* exchange = nullptr;
  PyObject *tensor_type, *parameter_type, *is_neg, *empty;
  PyObject *grad_enabled, *function_modes, *dispatch_modes, *transforms_active, *tracing;
  PyObject *device, *dtype, *requires_grad;  // names
  PyObject* norms;
  PyObject* current_cuda_device;  // null in a torch without CUDA
  // What Inductor's generated code allocates with: (sizes, strides, dtype) on the current device, for a third
  // of the cost of torch.empty. It is not public: null where a torch does not have it.
  std::array<PyObject*, kDLCUDA + 1> empty_strided{};
};
inline Torch in_torch;

// The dtypes of latents: in DLPack, in the operators and in Python.
struct Dtype {
  DLDataType dlpack;
  ScalarType type;
  const char* name;
  PyObject* object;
};
inline Dtype dtypes[] = {{{kDLBfloat, 16, 1}, ScalarType::BFloat16, "bfloat16", nullptr},
                         {{kDLFloat, 16, 1}, ScalarType::Half, "float16", nullptr},
                         {{kDLFloat, 32, 1}, ScalarType::Float, "float32", nullptr},
                         {{kDLFloat, 64, 1}, ScalarType::Double, "float64", nullptr}};

inline const Dtype& row_of(ScalarType type) {
  return *std::find_if(std::begin(dtypes), std::end(dtypes),
                       [&](const Dtype& row) { return row.type == type; });
}

// Of a torch.dtype; null if latents cannot have it.
inline const Dtype* row_of(PyObject* dtype) {
  const Dtype* const row = std::find_if(std::begin(dtypes), std::end(dtypes),
                                        [&](const Dtype& candidate) { return candidate.object == dtype; });
  return row == std::end(dtypes) ? nullptr : row;
}

// The operators of a device type, null where the door is closed.
inline std::array<const Operators*, kDLCUDA + 1> operators{};

constexpr int kMostDims = 15;     // of latents: a direction has one more
constexpr int kMostNumbers = 64;  // in a list

// An owned reference.
class Object {
 public:
  explicit Object(PyObject* pointer = nullptr) : pointer_(pointer) {}
  ~Object() { Py_XDECREF(pointer_); }
  Object(Object&& other) noexcept : pointer_(other.release()) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(pointer_, other.pointer_);
    return *this;
  }

  PyObject* get() const { return pointer_; }
  PyObject* release() { return std::exchange(pointer_, nullptr); }
  explicit operator bool() const { return pointer_ != nullptr; }

 private:
  PyObject* pointer_;
};

inline PyObject* decline() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

inline Object call(PyObject* function) { return Object(PyObject_CallNoArgs(function)); }
template <typename... Arguments>
Object call(PyObject* function, Arguments... arguments) {
  return Object(PyObject_CallFunctionObjArgs(function, arguments..., nullptr));
}

inline bool is(const Object& object, PyObject* expected) { return object.get() == expected; }

inline bool is_zero(const Object& number) { return number && PyLong_AsLong(number.get()) == 0; }

// Whether torch would do nothing beyond the kernel itself for a call on plain tensors.
inline bool nothing_intervenes() {
  return is_zero(call(in_torch.dispatch_modes)) && is_zero(call(in_torch.function_modes)) &&
         is(call(in_torch.transforms_active), Py_False) && is(call(in_torch.tracing), Py_False);
}

inline bool is_contiguous(const DLTensor& x) {
  int64_t expected = 1;
  for (int d = x.ndim - 1; d >= 0; --d) {
    if (x.shape[d] != 1 && x.strides[d] != expected) return false;
    expected *= x.shape[d];
  }
  return true;
}

inline bool same_shape(const View& x, const View& y) {
  return x.dims == y.dims && std::equal(x.shape, x.shape + x.dims, y.shape);
}

inline bool broadcasts(const View& x, const int64_t* target, int dims) {
  if (x.dims > dims) return false;
  for (int d = 0; d < x.dims; ++d) {
    if (x.shape[d] != 1 && x.shape[d] != target[dims - x.dims + d]) return false;
  }
  return true;
}

// A view of a tensor of a known dtype that is contiguous; false: anything else.
inline bool borrow(PyObject* tensor, DLTensor& x, View& out) {
  if (in_torch.exchange->dltensor_from_py_object_no_sync(tensor, &x) != 0) return false;
  const Dtype* const row = std::find_if(std::begin(dtypes), std::end(dtypes), [&](const Dtype& candidate) {
    return std::memcmp(&candidate.dlpack, &x.dtype, sizeof(DLDataType)) == 0;
  });
  if (row == std::end(dtypes) || x.data == nullptr || x.byte_offset != 0 || !is_contiguous(x)) return false;
  out.dtype = row->type;
  out.pointer = x.data;
  out.shape = x.shape;
  out.dims = x.ndim;
  out.device = x.device.device_id;
  out.contiguous = true;
  return true;
}

inline Object tuple_of(const int64_t* values, int count) {
  Object tuple(PyTuple_New(count));
  for (int i = 0; tuple && i < count; ++i) {
    PyObject* const value = PyLong_FromLongLong(values[i]);
    if (value == nullptr || PyTuple_SetItem(tuple.get(), i, value) != 0) return Object();
  }
  return tuple;
}

// A tensor that the door makes.
struct Output {
  Object tensor;
  View view;
};

// The tensors of one call.
class Call {
 public:
  // `differentiable`: a gradient may be wanted of the result, where grad mode is on.
  explicit Call(bool differentiable) : grad_(differentiable && !is(call(in_torch.grad_enabled), Py_False)) {}

  // The first tensor, which says where the call runs; false: decline.
  bool first(PyObject* object, View& out) {
    DLTensor x;
    if (!read(object, x, out)) return false;
    first_ = object;
    type_ = x.device.device_type;
    index_ = x.device.device_id;
    operators_ = type_ < operators.size() ? operators[type_] : nullptr;
    return operators_ != nullptr && out.dims >= 1 && out.dims <= kMostDims && out.numel() > 0;
  }

  // Another one, on the same device.
  bool next(PyObject* object, View& out) const {
    DLTensor x;
    return read(object, x, out) && static_cast<size_t>(x.device.device_type) == type_ &&
           x.device.device_id == index_;
  }

  bool like(PyObject* object, const View& other, View& out) const {
    return next(object, out) && out.dtype == other.dtype && same_shape(out, other);
  }

  // A mask beside latents of `dtype`; None is no mask.
  bool mask(PyObject* object, ScalarType dtype, const int64_t* target, int dims, OptionalView& out) const {
    if (object == Py_None) return true;
    View view;
    if (!next(object, view) || !broadcasts(view, target, dims)) return false;
    if (view.dtype != dtype && (view.dtype != ScalarType::Float || dtype == ScalarType::Double)) return false;
    out = view;
    return true;
  }

  // A new contiguous tensor on the inputs' device; false with Python's error set.
  bool make(const int64_t* shape, int dims, ScalarType type, Output& out) const {
    PyObject* const dtype = row_of(type).object;
    const Object sizes = tuple_of(shape, dims);
    if (!sizes) return false;
    if (on_current_device() && in_torch.empty_strided[type_] != nullptr) {
      int64_t strides[kMostDims + 1], stride = 1;
      for (int d = dims - 1; d >= 0; --d) {
        strides[d] = stride;
        stride *= shape[d];
      }
      const Object steps = tuple_of(strides, dims);
      if (!steps) return false;
      out.tensor = call(in_torch.empty_strided[type_], sizes.get(), steps.get(), dtype);
    } else {
      const Object arguments(PyTuple_Pack(1, sizes.get())), keywords(PyDict_New());
      const Object device(PyObject_GetAttr(first_, in_torch.device));
      if (!device || !keywords || !arguments || PyDict_SetItem(keywords.get(), in_torch.dtype, dtype) != 0 ||
          PyDict_SetItem(keywords.get(), in_torch.device, device.get()) != 0) {
        return false;
      }
      out.tensor = Object(PyObject_Call(in_torch.empty, arguments.get(), keywords.get()));
    }
    DLTensor x;
    if (!out.tensor || borrow(out.tensor.get(), x, out.view)) return static_cast<bool>(out.tensor);
    PyErr_SetString(PyExc_RuntimeError, "torch made a tensor that cannot be written to");
    return false;
  }

  bool make_like(const View& other, Output& out) const {
    return make(other.shape, other.dims, other.dtype, out);
  }

  const Operators& target() const { return *operators_; }

 private:
  bool read(PyObject* object, DLTensor& x, View& out) const {
    const auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != in_torch.tensor_type && type != in_torch.parameter_type) return false;  // it may do more
    if (!borrow(object, x, out)) return false;
    // A tensor's negation may be pending: its memory then holds the opposite of its values.
    if (!is(call(in_torch.is_neg, object), Py_False)) return false;
    return !grad_ || is(Object(PyObject_GetAttr(object, in_torch.requires_grad)), Py_False);
  }

  bool on_current_device() const {
    if (type_ == kDLCPU) return true;
    if (in_torch.current_cuda_device == nullptr) return false;
    const Object current = call(in_torch.current_cuda_device);
    return current && PyLong_AsLong(current.get()) == index_;
  }

  bool grad_;
  PyObject* first_ = nullptr;  // borrowed
  size_t type_ = 0;            // DLPack's number of the device type
  int32_t index_ = 0;
  const Operators* operators_ = nullptr;
};

// Runs an operator without Python's lock, which a full launch queue would hold up; false with Python's error
// set.
template <typename F>
bool launch(F&& operation) {
  std::string failure;
  bool failed = false;
  PyThreadState* const state = PyEval_SaveThread();
  try {
    operation();
  } catch (const std::exception& error) {
    failed = true;
    failure = error.what();
  }
  PyEval_RestoreThread(state);
  if (failed) PyErr_SetString(PyExc_RuntimeError, failure.c_str());
  return !failed;
}

inline bool number(PyObject* object, double& out) {
  if (PyFloat_CheckExact(object)) {
    out = PyFloat_AsDouble(object);
    return true;
  }
  if (!PyLong_CheckExact(object)) return false;
  out = PyLong_AsDouble(object);
  return out != -1.0 || PyErr_Occurred() == nullptr;
}

constexpr double kLowest = std::numeric_limits<double>::lowest();

inline bool finite(PyObject* object, double low, double& out) {
  return number(object, out) && std::isfinite(out) && out >= low;
}

inline bool flag(PyObject* object, bool& out) {
  out = object == Py_True;
  return out || object == Py_False;
}

// A list or tuple, whose items are borrowed; false: it is neither.
class Sequence {
 public:
  explicit Sequence(PyObject* object)
      : object_(object), is_list_(PyList_CheckExact(object)), is_(is_list_ || PyTuple_CheckExact(object)) {}
  explicit operator bool() const { return is_; }
  size_t size() const { return static_cast<size_t>(is_list_ ? PyList_Size(object_) : PyTuple_Size(object_)); }
  PyObject* operator[](size_t i) const {
    const auto at = static_cast<Py_ssize_t>(i);
    return is_list_ ? PyList_GetItem(object_, at) : PyTuple_GetItem(object_, at);
  }

 private:
  PyObject* object_;
  bool is_list_, is_;
};

// A list or tuple of numbers.
struct Numbers {
  std::array<double, kMostNumbers> values;
  size_t count = 0;

  bool read(PyObject* object) {
    const Sequence items(object);
    if (!items || items.size() > kMostNumbers) return false;
    const size_t size = items.size();
    for (count = 0; count < size; ++count) {
      PyObject* const item = items[count];
      if (item == nullptr || !number(item, values[count])) return false;
    }
    return true;
  }
  std::span<const double> span() const { return {values.data(), count}; }
};

}  // namespace latentfast
