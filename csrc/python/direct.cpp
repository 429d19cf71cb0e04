// The direct door: from Python to the host functions of a native library, past torch's dispatcher.
//
// An operator call through the dispatcher costs several microseconds, more than the launch of its kernel.
// None of that is needed for plain tensors while torch has nothing to add to the call: no gradient is wanted
// and no mode, transform or tracer is active. For those calls each function here checks the arguments, makes
// the outputs, launches and returns the result. For all others it *declines*: it returns None before anything
// has happened, and latentfast/ops does the call in the ordinary way, which knows every case and every error
// message.
//
// Both ways end in the same host functions (common/operators.h) with the same arguments, so they give the
// same bits.
//
// Only CPython's limited API and DLPack's C exchange API, which torch.Tensor offers from 2.10 on, are used:
// one binary serves every Python from 3.10 on and every such torch, and nothing of torch is linked.
#include <dlfcn.h>

#include "call.h"

namespace latentfast {
namespace {

// interpolate(a, b, t, kind, path): lerp, nlerp or slerp of whole samples at one t or, for a path, at a list
// of them.
PyObject* interpolate(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5 || !nothing_intervenes()) return decline();
  Call inputs(true);
  View a, b;
  Output out;
  if (!inputs.first(arguments[0], a) || !inputs.like(arguments[1], a, b)) return decline();
  Numbers ts;
  const bool path = arguments[4] == Py_True;
  ts.count = 1;
  if (path ? !ts.read(arguments[2]) || ts.count == 0 : !number(arguments[2], ts.values[0])) return decline();
  const long kind = PyLong_AsLong(arguments[3]);

  std::array<int64_t, kMostDims + 1> shape{static_cast<int64_t>(ts.count)};
  std::copy_n(a.shape, a.dims, shape.begin() + 1);
  if (!inputs.make(shape.data() + !path, a.dims + path, a.dtype, out)) return nullptr;
  const int64_t samples = a.dims > 1 ? a.shape[0] : 1, each = a.numel() / samples;
  const bool done = launch([&] {
    inputs.target().interpolate(a, b, std::nullopt, ts.span(), kind, samples, 1, 1, each, out.view);
  });
  return done ? out.tensor.release() : nullptr;
}

// edit(z, directions, strengths, mask)
PyObject* edit(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 4 || !nothing_intervenes()) return decline();
  Call inputs(true);
  View z, directions;
  OptionalView mask, device_strengths;
  Output out;
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
  std::array<int64_t, kMostDims + 1> target{device_strengths ? device_strengths->shape[0]
                                                             : static_cast<int64_t>(strengths.count)};
  std::copy_n(z.shape, z.dims, target.begin() + 1);
  if (target[0] == 0 || directions.dtype != z.dtype || directions.dims != z.dims + 1 ||
      !broadcasts(directions, target.data(), z.dims + 1) ||
      !inputs.mask(arguments[3], z.dtype, target.data(), z.dims + 1, mask)) {
    return decline();
  }
  if (!inputs.make_like(z, out)) return nullptr;
  const bool done = launch(
      [&] { inputs.target().edit(z, directions, device_strengths, strengths.span(), mask, out.view); });
  return done ? out.tensor.release() : nullptr;
}

// blend(base, edited, mask)
PyObject* blend(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !nothing_intervenes()) return decline();
  Call inputs(true);
  View base, edited;
  OptionalView mask;
  Output out;
  if (!inputs.first(arguments[0], base) || !inputs.like(arguments[1], base, edited) ||
      !inputs.mask(arguments[2], base.dtype, base.shape, base.dims, mask) || !mask) {
    return decline();
  }
  if (!inputs.make_like(base, out)) return nullptr;
  const bool done = launch([&] { inputs.target().blend(base, edited, *mask, out.view); });
  return done ? out.tensor.release() : nullptr;
}

// temporal_loss(z, ref, mask, first, second, norm, eps, frame_dim, reduction, with_gradient) -> (B,), or ()
// where the mean of one sample is wanted; or the pair of it and its gradient, scaled for the reduction.
PyObject* temporal_loss(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 10 || !nothing_intervenes()) return decline();
  const bool with_gradient = arguments[9] == Py_True;
  Call inputs(!with_gradient);  // the pair is detached
  View z;
  OptionalView ref, mask;
  Output loss, gradient;
  double first, second, eps;
  if (!inputs.first(arguments[0], z)) return decline();
  if (arguments[1] != Py_None) {
    ref.emplace();
    if (!inputs.like(arguments[1], z, *ref)) return decline();
  }
  PyObject* const norm_code = PyDict_GetItemWithError(in_torch.norms, arguments[5]);  // borrowed
  if (!inputs.mask(arguments[2], z.dtype, z.shape, z.dims, mask) || norm_code == nullptr ||
      !finite(arguments[3], kLowest, first) || !finite(arguments[4], kLowest, second) ||
      !finite(arguments[6], 0.0, eps) || !PyLong_CheckExact(arguments[7]) ||
      !PyUnicode_CheckExact(arguments[8])) {
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
  const ScalarType loss_type = z.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (!inputs.make(z.shape, mean && batch == 1 ? 0 : 1, loss_type, loss)) return nullptr;
  if (with_gradient && !inputs.make_like(z, gradient)) return nullptr;
  const bool done = launch([&] {
    inputs.target().temporal_loss(z, ref, mask, first, second, norm, eps,
                                  mean && with_gradient ? 1.0 / static_cast<double>(batch) : 1.0, frame_dim,
                                  loss.view, with_gradient ? OptionalView(gradient.view) : std::nullopt);
  });
  if (!done) return nullptr;
  return with_gradient ? PyTuple_Pack(2, loss.tensor.get(), gradient.tensor.get()) : loss.tensor.release();
}

// scaled(x, coefficients): each sample of x (B, …) times its number, (B,) or one for all, as an autograd
// engine hands them to a loss's backward pass.
PyObject* scaled(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !nothing_intervenes()) return decline();
  Call inputs(true);
  View x, coefficients;
  Output out;
  if (!inputs.first(arguments[0], x) || !inputs.next(arguments[1], coefficients)) return decline();
  const int64_t rows = coefficients.numel(), samples = rows == 1 ? 1 : x.shape[0], each = x.numel() / samples;
  const ScalarType wide = x.dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  if (coefficients.dtype != wide || coefficients.dims > 1 || rows != samples) return decline();
  if (!inputs.make_like(x, out)) return nullptr;
  const int64_t stack[] = {1, x.numel()}, shape[] = {1, rows, 1};
  x.shape = stack;
  x.dims = 2;
  coefficients.shape = shape;
  coefficients.dims = 3;
  const bool done =
      launch([&] { inputs.target().vector_mix(x, coefficients, samples, 1, 1, each, out.view); });
  return done ? out.tensor.release() : nullptr;
}

// The options of guide and guided_step, from `mode` to `zero_init`.
struct GuideOptions {
  static constexpr int kCount = 9;
  long kind = -1;
  double rescale, eta, norm_threshold, alpha;
  bool original;

  // `guided`: there is an unconditional prediction; if not, `scale` becomes 1. A momentum is left to the
  // ordinary way, which tells autograd that the buffer changes.
  bool read(PyObject* const* arguments, bool guided, double& scale) {
    static constexpr const char* kModes[] = {"cfg", "apg", "cfg_zero", "tcfg", "magnitude_aware"};
    constexpr long kCfg = 0, kCfgZero = 2, kZero = 5;
    double momentum;
    if (!PyUnicode_CheckExact(arguments[0])) return false;
    for (int i = 0; i < 5 && kind < 0; ++i) {
      if (PyUnicode_CompareWithASCIIString(arguments[0], kModes[i]) == 0) kind = i;
    }
    if (kind < 0 || !flag(arguments[2], original) || !finite(arguments[1], 0.0, rescale) || rescale > 1.0 ||
        !finite(arguments[3], kLowest, eta) || !finite(arguments[4], 0.0, norm_threshold) ||
        !number(arguments[5], momentum) || momentum != 0.0 || arguments[6] != Py_None ||
        !finite(arguments[7], 0.0, alpha)) {
      return false;
    }
    bool zero;
    if (!flag(arguments[8], zero) || (zero && kind != kCfgZero)) return false;
    if (zero) {
      kind = kZero;
    } else if (!guided) {
      kind = kCfg;
      original = false;
      scale = 1.0;
      rescale = 0.0;
    }
    return true;
  }
};

// guide(cond, uncond, scale, mode, rescale, original, eta, norm_threshold, momentum, momentum_buffer, alpha,
// zero_init)
PyObject* guide(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 + GuideOptions::kCount || !nothing_intervenes()) return decline();
  Call inputs(true);
  View cond, uncond;
  Output out;
  double scale;
  GuideOptions options;
  const bool guided = arguments[1] != Py_None;
  if (!inputs.first(arguments[0], cond) || cond.dims < 2 || !finite(arguments[2], kLowest, scale) ||
      !options.read(arguments + 3, guided, scale) || (guided && !inputs.like(arguments[1], cond, uncond))) {
    return decline();
  }
  if (!guided) uncond = cond;
  if (!inputs.make_like(cond, out)) return nullptr;
  const bool done = launch([&] {
    inputs.target().guide(cond, uncond, std::nullopt, std::nullopt, std::nullopt, std::nullopt, options.kind,
                          options.original, scale, options.rescale, options.eta, options.norm_threshold, 0.0,
                          options.alpha, 0.0, 0.0, out.view, std::nullopt);
  });
  return done ? out.tensor.release() : nullptr;
}

// guided_step(sample, cond, uncond, scale, sigma, sigma_next, the options of guide, mask, known, return_x0)
// -> the next sample, or the pair of it and x0
PyObject* guided_step(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 9 + GuideOptions::kCount || !nothing_intervenes()) return decline();
  Call inputs(true);
  View sample, cond, uncond;
  OptionalView mask, known;
  Output out, x0;
  double scale, sigma, sigma_next;
  bool with_x0;
  GuideOptions options;
  PyObject* const* const rest = arguments + 6 + GuideOptions::kCount;
  const bool guided = arguments[2] != Py_None;
  if (!inputs.first(arguments[0], sample) || sample.dims < 2 || !inputs.like(arguments[1], sample, cond) ||
      (guided && !inputs.like(arguments[2], sample, uncond)) || !finite(arguments[3], kLowest, scale) ||
      !finite(arguments[4], kLowest, sigma) || !finite(arguments[5], kLowest, sigma_next) ||
      !options.read(arguments + 6, guided, scale) || (rest[0] == Py_None) != (rest[1] == Py_None) ||
      !inputs.mask(rest[0], sample.dtype, sample.shape, sample.dims, mask) || !flag(rest[2], with_x0)) {
    return decline();
  }
  if (mask) {
    known.emplace();
    if (!inputs.like(rest[1], sample, *known)) return decline();
  }
  if (!guided) uncond = cond;
  if (!inputs.make_like(sample, out) || (with_x0 && !inputs.make_like(sample, x0))) return nullptr;
  const bool done = launch([&] {
    inputs.target().guide(cond, uncond, sample, std::nullopt, mask, known, options.kind, options.original,
                          scale, options.rescale, options.eta, options.norm_threshold, 0.0, options.alpha,
                          sigma, sigma_next - sigma, out.view,
                          with_x0 ? OptionalView(x0.view) : std::nullopt);
  });
  if (!done) return nullptr;
  return with_x0 ? PyTuple_Pack(2, out.tensor.get(), x0.tensor.get()) : out.tensor.release();
}

// The rows of combine's coefficients: a list of numbers is one row, a list of lists are several.
struct Rows {
  Numbers numbers;
  size_t count = 1;
  bool several = false;

  bool read(PyObject* object, size_t tensors) {
    const Sequence rows(object);
    if (!rows || rows.size() == 0) return false;
    several = static_cast<bool>(Sequence(rows[0]));
    if (!several) return numbers.read(object) && numbers.count == tensors && finite();
    if (rows.size() > kMostCombinations) return false;
    count = rows.size();
    for (size_t k = 0; k < count; ++k) {
      Numbers row;
      if (!row.read(rows[k]) || row.count != tensors) return false;
      std::copy_n(row.values.begin(), tensors, numbers.values.begin() + k * tensors);
    }
    numbers.count = count * tensors;
    return finite();
  }

 private:
  bool finite() const {
    return std::all_of(numbers.values.begin(), numbers.values.begin() + numbers.count,
                       [](double x) { return std::isfinite(x); });
  }
};

// combine(tensors, coefficients, dtypes, precise) -> one result or, for several rows of coefficients, a tuple
// of them
PyObject* combine(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  bool precise;
  if (count != 4 || !flag(arguments[3], precise) || !nothing_intervenes()) return decline();
  const Sequence terms(arguments[0]), dtypes(arguments[2]);
  Rows rows;
  if (!terms || terms.size() == 0 || terms.size() > kMostCombined || !rows.read(arguments[1], terms.size()) ||
      (dtypes && dtypes.size() != rows.count)) {
    return decline();
  }
  Call inputs(true);
  std::array<View, kMostCombined> tensors;
  std::array<Object, kMostCombined> kept;  // a list may lose them while the operator runs
  for (size_t i = 0; i < terms.size(); ++i) {
    PyObject* const x = terms[i];
    if (x == nullptr) return decline();
    Py_INCREF(x);
    kept[i] = Object(x);
    if (i == 0 ? !inputs.first(x, tensors[0])
               : !inputs.next(x, tensors[i]) || !same_shape(tensors[i], tensors[0])) {
      return decline();
    }
  }
  std::array<Output, kMostCombinations> outs;
  std::array<ScalarType, kMostCombinations> types;
  for (size_t k = 0; k < rows.count; ++k) {
    types[k] = tensors[0].dtype;
    PyObject* const wanted = dtypes ? dtypes[k] : arguments[2];
    if (wanted == Py_None && !dtypes) continue;
    const Dtype* const row = row_of(wanted);
    if (row == nullptr || (!dtypes && rows.several)) return decline();
    types[k] = row->type;
  }
  for (size_t k = 0; k < rows.count; ++k) {
    if (!inputs.make(tensors[0].shape, tensors[0].dims, types[k], outs[k])) return nullptr;
  }
  const auto later = [&](size_t k) { return k < rows.count ? OptionalView(outs[k].view) : std::nullopt; };
  const bool done = launch([&] {
    inputs.target().combine({tensors.data(), terms.size()}, rows.numbers.span(), precise, outs[0].view,
                            later(1), later(2), later(3));
  });
  if (!done) return nullptr;
  if (!rows.several) return outs[0].tensor.release();
  Object results(PyTuple_New(static_cast<Py_ssize_t>(rows.count)));
  for (size_t k = 0; results && k < rows.count; ++k) {
    PyTuple_SetItem(results.get(), static_cast<Py_ssize_t>(k), outs[k].tensor.release());
  }
  return results.release();
}

// connect(objects): takes the objects of torch that the door uses, by name. None is one that this torch
// lacks, where the door can do without.
PyObject* connect(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  const struct {
    const char* name;
    PyObject** place;
  } wanted[] = {{"Tensor", &in_torch.tensor_type},
                {"Parameter", &in_torch.parameter_type},
                {"is_neg", &in_torch.is_neg},
                {"empty", &in_torch.empty},
                {"is_grad_enabled", &in_torch.grad_enabled},
                {"function_modes", &in_torch.function_modes},
                {"dispatch_modes", &in_torch.dispatch_modes},
                {"transforms_active", &in_torch.transforms_active},
                {"is_tracing", &in_torch.tracing},
                {"norms", &in_torch.norms},
                {"empty_strided_cpu", &in_torch.empty_strided[kDLCPU]},
                {"empty_strided_cuda", &in_torch.empty_strided[kDLCUDA]},
                {"current_cuda_device", &in_torch.current_cuda_device},
                {dtypes[0].name, &dtypes[0].object},
                {dtypes[1].name, &dtypes[1].object},
                {dtypes[2].name, &dtypes[2].object},
                {dtypes[3].name, &dtypes[3].object}};
  PyObject* const capsule = count == 1 ? PyDict_GetItemString(arguments[0], "dlpack_exchange_api") : nullptr;
  const auto* exchange = static_cast<const DLPackExchangeAPI*>(
      capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (exchange == nullptr || exchange->header.version.major != DLPACK_MAJOR_VERSION ||
      exchange->dltensor_from_py_object_no_sync == nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "torch does not offer DLPack's exchange API in version 1");
    return nullptr;
  }
  for (const auto& [name, place] : wanted) {
    PyObject* const object = PyDict_GetItemString(arguments[0], name);  // borrowed
    if (object == nullptr) {
      PyErr_Format(PyExc_TypeError, "connect() lacks %s", name);
      return nullptr;
    }
    if (object == Py_None) continue;
    Py_INCREF(object);  // for the life of the process
    *place = object;
  }
  in_torch.device = PyUnicode_InternFromString("device");
  in_torch.dtype = PyUnicode_InternFromString("dtype");
  in_torch.requires_grad = PyUnicode_InternFromString("requires_grad");
  in_torch.exchange = exchange;
  Py_RETURN_NONE;
}

// open(device type's number in DLPack, path of the native library or None) -> whether the door is open there
// now. It stays closed to a library that has no table of operators,
// or another build's.
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
    if (found != nullptr && found->size != sizeof(Operators)) found = nullptr;
  }
  if (in_torch.exchange == nullptr) {
    PyErr_SetString(PyExc_RuntimeError, "connect() comes first");
    return nullptr;
  }
  operators[type] = found;
  return PyBool_FromLong(found != nullptr);
}

#define LATENTFAST_METHOD(name) \
  {#name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(name)), METH_FASTCALL, nullptr}
PyMethodDef methods[] = {
    LATENTFAST_METHOD(interpolate),   LATENTFAST_METHOD(edit),       LATENTFAST_METHOD(blend),
    LATENTFAST_METHOD(temporal_loss), LATENTFAST_METHOD(scaled),     LATENTFAST_METHOD(guide),
    LATENTFAST_METHOD(guided_step),   LATENTFAST_METHOD(combine),    LATENTFAST_METHOD(connect),
    LATENTFAST_METHOD(open),          {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native_direct", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace latentfast

PyMODINIT_FUNC PyInit__native_direct() { return PyModule_Create(&latentfast::module); }
