// The direct door: from Python to the host functions of a native library, past torch's dispatcher.
//
// An operator call through the dispatcher costs several microseconds, more than the launch of its kernel. None of
// that is needed for plain tensors while torch has nothing to add to the call: no gradient is wanted and no mode,
// transform or tracer is active. For those calls each function here checks the arguments, makes the outputs,
// launches and returns the result. For all others it *declines*: it returns None before anything has happened, and
// latentfast/ops does the call in the ordinary way, which knows every case and every error message.
//
// Both ways end in the same host functions (common/view.h) with the same arguments, so they give the same bits.
//
// Only CPython's limited API and DLPack's C exchange API, which torch.Tensor offers from 2.10 on, are used: one binary
// serves every Python from 3.10 on and every such torch, and nothing of torch is linked.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <ATen/dlpack.h>  // the standard's own header, plain C
#include <Python.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <exception>
#include <limits>
#include <string>
#include <utility>

#include "../common/operators.h"

namespace latentfast {
namespace {

// What is needed of torch, looked up once by connect().
struct Torch {
  const DLPackExchangeAPI* exchange = nullptr;
  PyObject *tensor_type, *is_neg, *empty, *empty_like;
  PyObject *grad_enabled, *function_modes, *dispatch_modes, *transforms_active, *tracing_state;
  PyObject *device, *dtype, *requires_grad;  // names
  PyObject *float32, *float64;               // dtypes
  PyObject* norms;
} in_torch;

// The operators of a device type, null where the door is closed.
std::array<const Operators*, kDLCUDA + 1> operators{};

constexpr int kMostDims = 15;     // of latents: a direction has one more
constexpr int kMostNumbers = 64;  // in a list

// An owned reference.
class Object {
 public:
  explicit Object(PyObject* pointer = nullptr) : pointer_(pointer) {}
  ~Object() { Py_XDECREF(pointer_); }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;

  PyObject* get() const { return pointer_; }
  PyObject* release() { return std::exchange(pointer_, nullptr); }
  explicit operator bool() const { return pointer_ != nullptr; }

 private:
  PyObject* pointer_;
};

PyObject* decline() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

template <typename... Arguments>
Object call(PyObject* function, Arguments... arguments) {
  return Object(PyObject_CallFunctionObjArgs(function, arguments..., nullptr));
}

bool is(const Object& object, PyObject* expected) { return object.get() == expected; }

bool is_zero(const Object& number) { return number && PyLong_AsLong(number.get()) == 0; }

// Whether torch would do nothing beyond the kernel itself for a call on plain tensors.
bool nothing_intervenes() {
  return is_zero(call(in_torch.dispatch_modes)) && is_zero(call(in_torch.function_modes)) &&
         is(call(in_torch.transforms_active), Py_False) && is(call(in_torch.tracing_state), Py_None);
}

bool scalar_type_of(DLDataType type, ScalarType& out) {
  if (type.lanes != 1) return false;
  if (type.code == kDLBfloat && type.bits == 16) {
    out = ScalarType::BFloat16;
  } else if (type.code == kDLFloat && type.bits == 16) {
    out = ScalarType::Half;
  } else if (type.code == kDLFloat && type.bits == 32) {
    out = ScalarType::Float;
  } else if (type.code == kDLFloat && type.bits == 64) {
    out = ScalarType::Double;
  } else {
    return false;
  }
  return true;
}

bool is_contiguous(const DLTensor& x) {
  int64_t expected = 1;
  for (int d = x.ndim - 1; d >= 0; --d) {
    if (x.shape[d] != 1 && x.strides[d] != expected) return false;
    expected *= x.shape[d];
  }
  return true;
}

bool same_shape(const View& x, const View& y) {
  return x.dims == y.dims && std::equal(x.shape, x.shape + x.dims, y.shape);
}

bool broadcasts(const View& x, const int64_t* target, int dims) {
  if (x.dims > dims) return false;
  for (int d = 0; d < x.dims; ++d) {
    if (x.shape[d] != 1 && x.shape[d] != target[dims - x.dims + d]) return false;
  }
  return true;
}

// The tensors of one call.
class Call {
 public:
  // `differentiable`: a gradient may be wanted of the result, where grad mode is on.
  explicit Call(bool differentiable) : grad_(differentiable && !is(call(in_torch.grad_enabled), Py_False)) {}

  // The first tensor, which says where the call runs; false: decline.
  bool first(PyObject* object, View& out) {
    DLTensor x;
    if (!read(object, x, out)) return false;
    type_ = x.device.device_type;
    index_ = x.device.device_id;
    const auto type = static_cast<size_t>(type_);
    operators_ = type < operators.size() ? operators[type] : nullptr;
    return operators_ != nullptr && out.dims >= 1 && out.dims <= kMostDims && out.numel() > 0;
  }

  // Another one, on the same device.
  bool next(PyObject* object, View& out) const {
    DLTensor x;
    return read(object, x, out) && x.device.device_type == type_ && x.device.device_id == index_;
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

  const Operators& target() const { return *operators_; }

 private:
  bool read(PyObject* object, DLTensor& x, View& out) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != in_torch.tensor_type) return false;
    if (in_torch.exchange->dltensor_from_py_object_no_sync(object, &x) != 0) return false;
    if (x.data == nullptr || x.byte_offset != 0 || !scalar_type_of(x.dtype, out.dtype) || !is_contiguous(x)) return false;
    // A tensor's negation may be pending: its memory then holds the opposite of its values.
    if (!is(call(in_torch.is_neg, object), Py_False)) return false;
    if (grad_ && !is(Object(PyObject_GetAttr(object, in_torch.requires_grad)), Py_False)) return false;
    out.pointer = x.data;
    out.shape = x.shape;
    out.dims = x.ndim;
    out.device = x.device.device_id;
    out.contiguous = true;
    return true;
  }

  bool grad_;
  DLDeviceType type_{};
  int32_t index_ = 0;
  const Operators* operators_ = nullptr;
};

// A tensor that the door made itself.
bool view_output(const Object& tensor, View& out) {
  DLTensor x;
  if (!tensor || in_torch.exchange->dltensor_from_py_object_no_sync(tensor.get(), &x) != 0) return false;
  scalar_type_of(x.dtype, out.dtype);
  out.pointer = x.data;
  out.shape = x.shape;
  out.dims = x.ndim;
  out.device = x.device.device_id;
  out.contiguous = true;
  return true;
}

// in_torch.empty(shape, dtype=…, device=…) on the device of `like`.
Object empty(const int64_t* shape, int dims, PyObject* dtype, PyObject* like) {
  Object sizes(PyTuple_New(dims));
  for (int d = 0; sizes && d < dims; ++d) {
    if (PyTuple_SetItem(sizes.get(), d, PyLong_FromLongLong(shape[d])) != 0) return Object();
  }
  const Object device(PyObject_GetAttr(like, in_torch.device)), keywords(PyDict_New());
  const Object arguments(sizes ? PyTuple_Pack(1, sizes.get()) : nullptr);
  if (!device || !keywords || !arguments || dtype == nullptr || PyDict_SetItem(keywords.get(), in_torch.dtype, dtype) != 0 ||
      PyDict_SetItem(keywords.get(), in_torch.device, device.get()) != 0) {
    return Object();
  }
  return Object(PyObject_Call(in_torch.empty, arguments.get(), keywords.get()));
}

// Runs an operator without Python's lock, which a full launch queue would hold up; false with Python's error set.
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

bool number(PyObject* object, double& out) {
  if (PyFloat_CheckExact(object)) {
    out = PyFloat_AsDouble(object);
    return true;
  }
  if (!PyLong_CheckExact(object)) return false;
  out = PyLong_AsDouble(object);
  return out != -1.0 || PyErr_Occurred() == nullptr;
}

bool finite(PyObject* object, double low, double& out) {
  return number(object, out) && std::isfinite(out) && out >= low;
}

// A list or tuple of numbers.
struct Numbers {
  std::array<double, kMostNumbers> values;
  size_t count = 0;

  bool read(PyObject* object) {
    const bool is_list = PyList_CheckExact(object);
    if (!is_list && !PyTuple_CheckExact(object)) return false;
    const Py_ssize_t size = is_list ? PyList_Size(object) : PyTuple_Size(object);
    if (size > kMostNumbers) return false;
    for (count = 0; count < static_cast<size_t>(size); ++count) {
      const auto i = static_cast<Py_ssize_t>(count);
      if (!number(is_list ? PyList_GetItem(object, i) : PyTuple_GetItem(object, i), values[count])) return false;
    }
    return true;
  }
  std::span<const double> span() const { return {values.data(), count}; }
};

// interpolate(a, b, t, kind, path): lerp, nlerp or slerp of whole samples at one t or, for a path, at a list of them.
PyObject* interpolate(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5 || !nothing_intervenes()) return decline();
  Call inputs(true);
  View a, b, out;
  if (!inputs.first(arguments[0], a) || !inputs.like(arguments[1], a, b)) return decline();
  Numbers ts;
  const bool path = arguments[4] == Py_True;
  ts.count = 1;
  if (path ? !ts.read(arguments[2]) || ts.count == 0 : !number(arguments[2], ts.values[0])) return decline();
  const long kind = PyLong_AsLong(arguments[3]);

  std::array<int64_t, kMostDims + 1> shape{static_cast<int64_t>(ts.count)};
  std::copy_n(a.shape, a.dims, shape.begin() + 1);
  Object result = path ? empty(shape.data(), a.dims + 1, Object(PyObject_GetAttr(arguments[0], in_torch.dtype)).get(), arguments[0])
                       : call(in_torch.empty_like, arguments[0]);
  if (!view_output(result, out)) return nullptr;
  const int64_t samples = a.dims > 1 ? a.shape[0] : 1, each = a.numel() / samples;
  const bool done =
      launch([&] { inputs.target().interpolate(a, b, std::nullopt, ts.span(), kind, samples, 1, 1, each, out); });
  return done ? result.release() : nullptr;
}

// edit(z, directions, strengths, mask)
PyObject* edit(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4 || !nothing_intervenes()) return decline();
  Call inputs(true);
  View z, directions, out;
  OptionalView mask, device_strengths;
  if (!inputs.first(arguments[0], z) || !inputs.next(arguments[1], directions)) return decline();
  Numbers strengths;
  if (!strengths.read(arguments[2])) {
    View view;
    const ScalarType wide = z.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    if (!inputs.next(arguments[2], view) || view.dtype != wide) return decline();
    if (view.dims != 1 && (view.dims != 2 || view.shape[1] != z.shape[0])) return decline();
    device_strengths = view;
    strengths.count = 0;
  }
  std::array<int64_t, kMostDims + 1> target{
      device_strengths ? device_strengths->shape[0] : static_cast<int64_t>(strengths.count)};
  std::copy_n(z.shape, z.dims, target.begin() + 1);
  if (target[0] == 0 || directions.dtype != z.dtype || directions.dims != z.dims + 1 ||
      !broadcasts(directions, target.data(), z.dims + 1) ||
      !inputs.mask(arguments[3], z.dtype, target.data(), z.dims + 1, mask)) {
    return decline();
  }
  Object result = call(in_torch.empty_like, arguments[0]);
  if (!view_output(result, out)) return nullptr;
  const bool done =
      launch([&] { inputs.target().edit(z, directions, device_strengths, strengths.span(), mask, out); });
  return done ? result.release() : nullptr;
}

// blend(base, edited, mask)
PyObject* blend(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !nothing_intervenes()) return decline();
  Call inputs(true);
  View base, edited, out;
  OptionalView mask;
  if (!inputs.first(arguments[0], base) || !inputs.like(arguments[1], base, edited) ||
      !inputs.mask(arguments[2], base.dtype, base.shape, base.dims, mask) || !mask) {
    return decline();
  }
  Object result = call(in_torch.empty_like, arguments[0]);
  if (!view_output(result, out)) return nullptr;
  const bool done = launch([&] { inputs.target().blend(base, edited, *mask, out); });
  return done ? result.release() : nullptr;
}

// temporal_loss(z, ref, mask, first, second, norm, eps, frame_dim, reduction, with_gradient) -> (B,), or () where the
// mean of one sample is wanted; or the pair of it and its gradient, scaled for the reduction.
PyObject* temporal_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 10 || !nothing_intervenes()) return decline();
  const bool with_gradient = arguments[9] == Py_True;
  Call inputs(!with_gradient);  // the pair is detached
  View z, loss_view, gradient_view;
  OptionalView ref, mask;
  double first, second, eps;
  if (!inputs.first(arguments[0], z)) return decline();
  if (arguments[1] != Py_None) {
    ref.emplace();
    if (!inputs.like(arguments[1], z, *ref)) return decline();
  }
  PyObject* const norm_code = PyDict_GetItemWithError(in_torch.norms, arguments[5]);  // borrowed
  if (!inputs.mask(arguments[2], z.dtype, z.shape, z.dims, mask) || norm_code == nullptr ||
      !finite(arguments[3], -std::numeric_limits<double>::infinity(), first) ||
      !finite(arguments[4], -std::numeric_limits<double>::infinity(), second) || !finite(arguments[6], 0.0, eps) ||
      !PyLong_CheckExact(arguments[7]) || !PyUnicode_CheckExact(arguments[8])) {
    return decline();
  }
  const long frame_dim = PyLong_AsLong(arguments[7]);
  const long norm = PyLong_AsLong(norm_code);
  const bool mean = PyUnicode_CompareWithASCIIString(arguments[8], "mean") == 0;
  if (frame_dim < 1 || frame_dim >= z.dims ||
      (!mean && PyUnicode_CompareWithASCIIString(arguments[8], "none") != 0)) {
    return decline();
  }
  const int64_t batch = z.shape[0];
  Object loss = empty(z.shape, mean && batch == 1 ? 0 : 1, z.dtype == ScalarType::Double ? in_torch.float64 : in_torch.float32,
                      arguments[0]);
  if (!view_output(loss, loss_view)) return nullptr;
  const Object gradient = with_gradient ? call(in_torch.empty_like, arguments[0]) : Object();
  if (with_gradient && !view_output(gradient, gradient_view)) return nullptr;
  const bool done = launch([&] {
    inputs.target().temporal_loss(z, ref, mask, first, second, norm, eps,
                                  mean && with_gradient ? 1.0 / static_cast<double>(batch) : 1.0, frame_dim, loss_view,
                                  with_gradient ? OptionalView(gradient_view) : std::nullopt);
  });
  if (!done) return nullptr;
  return with_gradient ? PyTuple_Pack(2, loss.get(), gradient.get()) : loss.release();
}

// connect(torch): looks up what is needed; an error where this torch does not have it.
PyObject* connect(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "connect(torch, norms)");
    return nullptr;
  }
  const auto find = [&](PyObject*& out, std::initializer_list<const char*> path) {
    PyObject* found = arguments[0];
    Py_INCREF(found);
    for (const char* name : path) {
      PyObject* const next = found == nullptr ? nullptr : PyObject_GetAttrString(found, name);
      Py_XDECREF(found);
      found = next;
    }
    out = found;  // kept for the life of the process
    return found != nullptr;
  };
  PyObject* capsule;
  if (!find(capsule, {"Tensor", "__dlpack_c_exchange_api__"})) return nullptr;
  const auto* exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (exchange == nullptr) return nullptr;
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION || exchange->dltensor_from_py_object_no_sync == nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "torch offers another version of DLPack's exchange API");
    return nullptr;
  }
  if (!find(in_torch.tensor_type, {"Tensor"}) || !find(in_torch.is_neg, {"_C", "TensorBase", "is_neg"}) ||
      !find(in_torch.empty, {"empty"}) || !find(in_torch.empty_like, {"empty_like"}) ||
      !find(in_torch.grad_enabled, {"is_grad_enabled"}) || !find(in_torch.function_modes, {"_C", "_len_torch_function_stack"}) ||
      !find(in_torch.dispatch_modes, {"_C", "_len_torch_dispatch_stack"}) ||
      !find(in_torch.transforms_active, {"_C", "_are_functorch_transforms_active"}) ||
      !find(in_torch.tracing_state, {"_C", "_get_tracing_state"}) || !find(in_torch.float32, {"float32"}) ||
      !find(in_torch.float64, {"float64"})) {
    return nullptr;
  }
  in_torch.device = PyUnicode_InternFromString("device");
  in_torch.dtype = PyUnicode_InternFromString("dtype");
  in_torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  in_torch.norms = arguments[1];
  Py_INCREF(in_torch.norms);
  in_torch.exchange = exchange;
  Py_RETURN_NONE;
}

// open(device type's number in DLPack, path of the native library or None) -> whether the door is open there now. It
// stays closed to a library that has no table of operators.
PyObject* open(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const long type = count == 2 ? PyLong_AsLong(arguments[0]) : -1;
  if (type != kDLCPU && type != kDLCUDA) {
    PyErr_SetString(PyExc_TypeError, "open(1 or 2, path)");
    return nullptr;
  }
  const Operators* found = nullptr;
  if (arguments[1] != Py_None) {
    const Object path(PyUnicode_EncodeFSDefault(arguments[1]));
    if (!path) return nullptr;
    void* const library = dlopen(PyBytes_AsString(path.get()), RTLD_NOW);
    if (library == nullptr) {
      PyErr_SetString(PyExc_ImportError, dlerror());
      return nullptr;
    }
    found = static_cast<const Operators*>(dlsym(library, kOperatorsSymbol));
  }
  if (in_torch.exchange == nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "connect() comes first");
    return nullptr;
  }
  operators[type] = found;
  return PyBool_FromLong(found != nullptr);
}

#define LATENTFAST_METHOD(name) {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {LATENTFAST_METHOD(interpolate),
                         LATENTFAST_METHOD(edit),
                         LATENTFAST_METHOD(blend),
                         LATENTFAST_METHOD(temporal_loss),
                         LATENTFAST_METHOD(connect),
                         LATENTFAST_METHOD(open),
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace latentfast

PyMODINIT_FUNC PyInit__native_direct() { return PyModule_Create(&latentfast::module); }
