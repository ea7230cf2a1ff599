// The Python module potstill._CUDA, built with -DPOTSTILL_CUDA=ON. Private; called from potstill.ops.cuda only.
#include <pybind11/pybind11.h>

#include "../tensor.h"
#include "int8_24.h"

namespace {

// The stream on which torch queues work of this device now.
void* current_stream(py::handle tensor, dlpack::Device device) {
  const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(tensor.ptr()));
  void* stream = nullptr;
  if (api->current_work_stream == nullptr || api->current_work_stream(device.type, device.id, &stream) != 0) {
    PyErr_Clear();
    throw std::runtime_error("torch tells no current stream of CUDA device " + std::to_string(device.id));
  }
  return stream;
}

// On the device of the first that was taken.
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}
  TensorView take(py::handle object, const char* name) {
    TensorView view(object, op_, name, dlpack::kCuda);
    if (device_ < 0) device_ = view.device().id;
    if (view.device().id != device_) view.fail("is on another device", "expected that of the other arguments");
    return view;
  }

 private:
  const char* op_;
  int device_ = -1;
};

int8_24::Float float_of(const TensorView& view) {
  if (view.is(dlpack::kFloat, 32)) return int8_24::Float::f32;
  if (view.is(dlpack::kBfloat, 16)) return int8_24::Float::bf16;
  if (view.is(dlpack::kFloat, 16)) return int8_24::Float::f16;
  view.fail("has another dtype", "expected float32, bfloat16 or float16");
}

void check_aligned(const TensorView& view) {
  if (reinterpret_cast<uintptr_t>(view.data()) % 16 != 0) {
    view.fail("does not begin at a multiple of 16 bytes", "call .clone() on it");
  }
}

int extent(const TensorView& view, int64_t size, int64_t most) {
  if (size > most) view.fail("has the size " + std::to_string(size), "at most " + std::to_string(most) + " works");
  return static_cast<int>(size);
}

void int8_24_linear(py::handle x, py::handle x_scale, py::handle weight, py::handle scale, py::handle bias,
                    py::handle y) {
  namespace k24 = int8_24;
  Arguments arguments("int8_24_linear");
  TensorView xv = arguments.take(x, "x"), wv = arguments.take(weight, "weight"), sv = arguments.take(scale, "scale");
  TensorView xsv = arguments.take(x_scale, "x_scale"), yv = arguments.take(y, "y");
  if (xv.rank() != 2) xv.fail("has rank " + std::to_string(xv.rank()), "expected [rows, in_features]");
  k24::Linear p{};
  p.m = extent(xv, xv.size(0), INT32_MAX - k24::kRows);
  p.n = extent(sv, sv.contiguous().numel(), INT32_MAX - k24::kOutputs);
  p.k = extent(xv, xv.size(1), k24::kMaxInputs);
  p.x = xv.i8(), p.x_stride = p.m > 1 ? xv.stride(0) : p.k;
  if (p.k == 0 || p.k % 16 != 0 || p.x_stride % 16 != 0 || xv.stride(1) != 1) {
    xv.fail("has rows of " + std::to_string(p.k) + " numbers or gaps between them",
            "expected dense rows of a multiple of 16 numbers, each at a multiple of 16 bytes");
  }
  p.x_scale = xsv.contiguous().shape({p.m}).f32();
  p.scale = sv.shape({p.n}).f32();
  int64_t blocks = int64_t{k24::tiles_of(p.n, k24::kOutputs)} * k24::kBlocks;
  int64_t steps = int64_t{k24::tiles_of(p.k, k24::kInputs)} * k24::kSteps;
  p.weight = wv.contiguous().shape({blocks, steps, k24::kStepBytes}).u8();
  check_aligned(xv), check_aligned(wv);
  if (!bias.is_none()) {
    TensorView bv = arguments.take(bias, "bias");
    p.bias_type = float_of(bv.contiguous().shape({p.n}));
    p.bias = bv.data();
  }
  p.y_type = float_of(yv.contiguous().shape({p.m, p.n}));
  p.y = yv.data();
  void* stream = current_stream(x, xv.device());
  const char* error = nullptr;
  {
    py::gil_scoped_release nogil;
    error = k24::launch(p, stream);
  }
  if (error != nullptr) throw std::runtime_error(std::string("int8_24_linear: ") + error);
}

}  // namespace

PYBIND11_MODULE(_CUDA, m) { m.def("int8_24_linear", &int8_24_linear); }
