// Python object -> checked view of its memory. With module.cpp and cuda/module.cpp the only file that knows Python.
//
// Views are borrowed: valid while the argument is alive, so get them with the GIL held and keep the caller's
// reference. They see raw memory: conj/neg bits, gradients and subclasses are the dispatcher's business, which is why
// only implementations registered with torch.library may call in.
#pragma once
#include <pybind11/pybind11.h>

#include <string>

#include "dlpack.h"
#include "kernels/types.h"

namespace py = pybind11;

// The exchange API that a tensor's class offers; throws if there is none.
inline const dlpack::ExchangeApi* find_exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    throw py::type_error(std::string("is a ") + type->tp_name + ", expected a torch.Tensor of torch >= 2.11");
  }
  auto header = static_cast<dlpack::Header*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) header = header->previous;
  auto api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  if (api == nullptr || api->tensor_from_py_object_no_sync == nullptr) {
    PyErr_Clear();
    throw py::type_error("offers no DLPack 1.x exchange; install torch >= 2.11");
  }
  return api;
}

// The look-up costs more than a small kernel, so the first types seen are remembered (torch.Tensor and nn.Parameter,
// in practice); the reference keeps a remembered type alive, so that its address stays its own.
inline const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  static Entry remembered[4] = {};
  for (Entry& e : remembered) {
    if (e.type == type) return e.api;
    if (e.type == nullptr) {
      e.api = find_exchange_api(type);
      Py_INCREF(type);
      e.type = type;
      return e.api;
    }
  }
  return find_exchange_api(type);
}

class TensorView {
 public:
  TensorView(py::handle object, const char* op, const char* argument, int32_t device = dlpack::kCpu)
      : op_(op), argument_(argument) {
    const dlpack::ExchangeApi* api;
    try {
      api = exchange_api(Py_TYPE(object.ptr()));
    } catch (const py::type_error& error) {
      throw py::type_error(name() + " " + error.what());
    }
    if (api->tensor_from_py_object_no_sync(object.ptr(), &t_) != 0) {
      PyErr_Clear();
      fail("has no dense memory", "expected a plain strided tensor");
    }
    if (t_.device.type != device) {
      if (device == dlpack::kCpu) fail("is not on the CPU", "move it with .cpu()");
      fail("is not on a CUDA device", "move it with .cuda()");
    }
    if (t_.data == nullptr && numel() != 0) fail("has no memory", "expected a real tensor, not a fake or meta one");
  }

  int32_t rank() const { return t_.ndim; }
  int64_t size(int32_t d) const { return t_.shape[d]; }
  int64_t stride(int32_t d) const { return t_.strides[d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int32_t d = 0; d < t_.ndim; ++d) n *= t_.shape[d];
    return n;
  }

  const TensorView& contiguous() const {
    int64_t expected = 1;
    for (int32_t d = t_.ndim - 1; d >= 0; --d) {
      if (t_.shape[d] != 1 && t_.strides[d] != expected && numel() != 0) {
        fail("is not contiguous", "call .contiguous() on it");
      }
      expected *= t_.shape[d];
    }
    return *this;
  }

  const TensorView& shape(std::initializer_list<int64_t> expected) const {
    bool same = t_.ndim == static_cast<int32_t>(expected.size());
    for (int32_t d = 0; same && d < t_.ndim; ++d) same = t_.shape[d] == expected.begin()[d];
    if (!same) fail("has shape " + text(t_.shape, t_.ndim), "expected " + text(expected.begin(), expected.size()));
    return *this;
  }

  const TensorView& same_shape(const TensorView& other, const char* argument) const {
    bool same = t_.ndim == other.t_.ndim;
    for (int32_t d = 0; same && d < t_.ndim; ++d) same = t_.shape[d] == other.t_.shape[d];
    if (!same) {
      fail("has shape " + text(t_.shape, t_.ndim),
           "expected that of " + std::string(argument) + ", " + text(other.t_.shape, other.t_.ndim));
    }
    return *this;
  }

  FloatPtr floats() const {
    if (is(dlpack::kFloat, 32)) return {data(), Type::f32};
    if (is(dlpack::kBfloat, 16)) return {data(), Type::bf16};
    fail("has another dtype", "expected float32 or bfloat16");
  }
  float* f32() const { return static_cast<float*>(typed(dlpack::kFloat, 32, "expected float32")); }
  int8_t* i8() const { return static_cast<int8_t*>(typed(dlpack::kInt, 8, "expected int8")); }
  uint8_t* u8() const { return static_cast<uint8_t*>(typed(dlpack::kUInt, 8, "expected uint8")); }
  bf16* b16() const { return static_cast<bf16*>(typed(dlpack::kBfloat, 16, "expected bfloat16")); }
  int64_t* i64() const { return static_cast<int64_t*>(typed(dlpack::kInt, 64, "expected int64")); }

  dlpack::Device device() const { return t_.device; }
  void* data() const { return static_cast<char*>(t_.data) + t_.byte_offset; }
  bool is(uint8_t code, uint8_t bits) const {
    return t_.dtype.code == code && t_.dtype.bits == bits && t_.dtype.lanes == 1;
  }
  bool is_bool() const { return is(dlpack::kBool, 8); }
  uint8_t* boolean() const { return static_cast<uint8_t*>(typed(dlpack::kBool, 8, "expected bool")); }

  [[noreturn]] void fail(const std::string& given, const std::string& expected) const {
    throw py::value_error(name() + " " + given + "; " + expected);
  }

 private:
  std::string name() const { return std::string(op_) + ": " + argument_; }
  void* typed(uint8_t code, uint8_t bits, const char* expected) const {
    if (!is(code, bits)) fail("has another dtype", expected);
    return data();
  }
  static std::string text(const int64_t* sizes, size_t n) {
    std::string s = "[";
    for (size_t i = 0; i < n; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
    return s + "]";
  }

  dlpack::Tensor t_{};
  const char* op_;
  const char* argument_;
};
