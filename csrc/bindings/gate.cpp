// effnet_fast._C.gate: what every registered op asks of its arguments before a kernel gets their
// addresses, under a microsecond a call. See gate_rules.h for what an op declares. Some letters of
// shapes have a meaning: H by W are an image, K by L a kernel, P by Q what comes out, C and O the
// channels of what a residual adds and of what it is added to.
#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "bindings/bind.h"
#include "bindings/gate.h"
#include "bindings/gate_rules.h"

namespace effnet {
namespace {

struct Refused {
  PyObject* type;
  std::string text;
};

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

}  // namespace

class Gate {
 public:
  // rules: by the arguments' names, in order; of "any" where there are none.
  Gate(const std::string& op, const py::dict& rules, const std::vector<std::string>& devices,
       const std::vector<std::string>& dtypes, const TensorReader& reader)
      : op_(op), reader_(reader) {
    for (const auto& [name, rule] : rules) {
      rules_.push_back(rule_of(name.cast<std::string>(), py::reinterpret_borrow<py::object>(rule)));
      const auto partner = std::find_if(rules_.begin(), rules_.end(), [&](const Rule& other) {
        return other.name == rules_.back().with;
      });
      if (partner != rules_.end()) rules_.back().partner = partner - rules_.begin();
    }
    for (const std::string& name : devices) {
      std::vector<int32_t> types;
      require(take(kDevices, name, &types), "gate: an unknown device");
      devices_.insert(devices_.end(), types.begin(), types.end());
      device_names_ += (device_names_.empty() ? "" : " or ") + name;
    }
    for (const std::string& name : dtypes) {
      int dtype = 0;
      require(take(kDtypes, name, &dtype), "gate: an unknown dtype");
      dtypes_.push_back(dtype);
      dtype_names_ += (dtype_names_.empty() ? "" : " or ") + name;
    }
  }

  // Throws Refused for arguments that no kernel may see.
  void check(PyObject* const* args, Py_ssize_t count, Seen* seen = nullptr) const {
    if (count != static_cast<Py_ssize_t>(rules_.size()))
      refuse(PyExc_TypeError,
             "takes " + std::to_string(rules_.size()) + " arguments, not " + std::to_string(count));
    Call call;
    call.seen = seen;
    for (size_t i = 0; i < rules_.size(); i++) {
      const Rule& rule = rules_[i];
      if (rule.partner >= 0 && (args[rule.partner] == Py_None) != (args[i] == Py_None))
        refuse(PyExc_ValueError,
               rules_[rule.partner].name + " and " + rule.name + " are given together or not");
      check_one(rule, args[i], &call);
    }
    check_size(&call);
    if (!seen) return;
    seen->sizes = call.sizes;
    seen->image_bf16 = call.image == kBFloat16;
    seen->stride = call.stride[0];
    std::copy(call.padding, call.padding + 4, seen->padding.begin());
    seen->residual = call.residual;
  }

 private:
  struct Call {
    Seen* seen = nullptr;  // where the tensors are told
    std::array<int64_t, 26> sizes;
    const TensorView* first = nullptr;  // a tensor, to whose device the others go
    TensorView view;                    // that tensor
    int image = 0;                      // the images' dtype
    int64_t stride[2] = {0, 0};
    const int64_t* sides = nullptr;
    int64_t padding[4];
    bool residual = false;
    Call() { sizes.fill(-1); }
    int64_t& of(char letter) { return sizes[letter - 'A']; }
  };

  [[noreturn]] void refuse(PyObject* type, const std::string& text) const {
    throw Refused{type, op_ + ": " + text};
  }
  [[noreturn]] void refuse(PyObject* type, const Rule& rule, const std::string& text) const {
    refuse(type, rule.name + " " + text);
  }

  void check_one(const Rule& rule, PyObject* given, Call* call) const {
    switch (rule.kind) {
      case Kind::kAny:
        return;
      case Kind::kTensor:
        if (given != Py_None) return check_tensor(rule, given, call);
        if (!rule.optional) refuse(PyExc_TypeError, rule, "must not be None");
        if (call->seen) call->seen->tensors.push_back({});
        return;
      case Kind::kLayers:
        return check_layers(rule, given, call);
      case Kind::kFlags:
        if (PySequence_Size(given) != rule.size)
          refuse(PyExc_ValueError, rule, "must have " + std::to_string(rule.size) + " flags");
        return;
      case Kind::kName:
        return check_name(rule, given);
      case Kind::kCount:
        if (integer(given) < 0) refuse(PyExc_ValueError, rule, "must not be negative");
        return;
      case Kind::kResidual:
        call->residual = PyObject_IsTrue(given) == 1;
        return;
      case Kind::kStride:
        call->stride[0] = call->stride[1] = integer(given);
        if (call->stride[0] != 1 && call->stride[0] != 2)
          refuse(PyExc_ValueError, rule,
                 "is " + std::to_string(call->stride[0]) + ", allowed are 1 and 2");
        return;
      case Kind::kStrides:
        return read_integers(rule, given, 2, 1, call->stride);
      case Kind::kSides:
        read_integers(rule, given, 4, 0, call->padding);
        call->sides = call->padding;
    }
  }

  void check_name(const Rule& rule, PyObject* given) const {
    std::string allowed;
    for (const std::string& name : rule.names) {
      if (PyUnicode_Check(given) && PyUnicode_CompareWithASCIIString(given, name.c_str()) == 0)
        return;
      allowed += (allowed.empty() ? "" : ", ") + name;
    }
    const auto shown = py::repr(py::reinterpret_borrow<py::object>(given)).cast<std::string>();
    refuse(PyExc_ValueError, rule, "is " + shown + ", allowed are " + allowed);
  }

  void read_integers(const Rule& rule, PyObject* given, Py_ssize_t count, int64_t least,
                     int64_t* out) const {
    constexpr int64_t kMost = int64_t{1} << 31;
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(given, "no sequence"));
    if (!items) throw py::error_already_set();
    if (PySequence_Fast_GET_SIZE(items.ptr()) != count)
      refuse(PyExc_ValueError, rule, "must have " + std::to_string(count) + " numbers");
    for (Py_ssize_t i = 0; i < count; i++) {
      out[i] = integer(PySequence_Fast_GET_ITEM(items.ptr(), i));
      if (out[i] < least || out[i] > kMost)
        refuse(PyExc_ValueError, rule,
               "is " + shown(out, i + 1) + ", allowed are " + std::to_string(least) + " to 2^31");
    }
  }

  void check_layers(const Rule& rule, PyObject* given, Call* call) const {
    const auto items = py::reinterpret_steal<py::object>(PySequence_Fast(given, "no sequence"));
    if (!items) throw py::error_already_set();
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
    if (count == 0 && rule.optional) {
      if (call->seen) call->seen->tensors.resize(call->seen->tensors.size() + rule.below.size());
      return bind(rule, rule.shape[0], call->of(rule.shape[1]), call, nullptr);
    }
    if (count != static_cast<Py_ssize_t>(rule.below.size()))
      refuse(PyExc_ValueError, rule,
             "has " + std::to_string(count) + " tensors, not " + std::to_string(rule.below.size()));
    for (Py_ssize_t i = 0; i < count; i++)
      check_one(rule.below[i], PySequence_Fast_GET_ITEM(items.ptr(), i), call);
  }

  void bind(const Rule& rule, char letter, int64_t size, Call* call, const TensorView* view) const {
    int64_t& bound = call->of(letter);
    if (bound < 0) bound = size;
    if (bound == size) return;
    const std::string given = view ? shown(view->shape, view->dims) : "an empty list";
    std::string known;
    for (char other : rule.shape)
      if (other >= 'A' && call->of(other) >= 0 && known.find(other) == std::string::npos)
        known += std::string(known.empty() ? "" : ", ") + other + " = " +
                 std::to_string(call->of(other));
    refuse(PyExc_ValueError, rule,
           "is " + given + ", allowed is " + shown(rule.shape) + " with " + known);
  }

  void check_tensor(const Rule& rule, PyObject* given, Call* call) const {
    if (!reader_.is_plain(given))
      refuse(PyExc_TypeError, rule,
             std::string("is a ") + Py_TYPE(given)->tp_name +
                 ", allowed is a torch.Tensor and no subclass of it (subclasses with memory of "
                 "their own: .as_subclass(torch.Tensor))");
    TensorView view;
    if (!reader_.read(given, &view)) {
      const py::error_already_set error;  // takes the error
      refuse(PyExc_TypeError, rule,
             std::string("has no memory that kernels read: ") + error.what());
    }
    check_device(rule, view, call);
    check_numbers(rule, view, call);
    check_shape(rule, view, call);
    if (!has_layout(view, rule.layout))
      refuse(PyExc_ValueError, rule,
             "has shape " + shown(view.shape, view.dims) + " and strides " +
                 shown(view.strides, view.dims) + ", allowed is " + layout_of(rule));
    if (!view.data && std::find(view.shape, view.shape + view.dims, 0) == view.shape + view.dims)
      refuse(PyExc_RuntimeError, rule,
             "has no memory: its storage is empty or it stands for zeros");
    if (!call->seen) return;
    if (reader_.is_negative(given))
      refuse(PyExc_ValueError, rule, "has a sign that only the dispatcher resolves");
    call->seen->tensors.push_back(
        {reinterpret_cast<Address>(view.data) + view.byte_offset, view.dtype() == kBFloat16});
  }

  static std::string layout_of(const Rule& rule) {
    if (rule.layout == Layout::kDense) return "a tensor without gaps: .contiguous()";
    return std::string("channels_last") + (rule.layout == Layout::kNhwc ? " without gaps" : "") +
           ": .contiguous(memory_format=torch.channels_last)";
  }

  void check_device(const Rule& rule, const TensorView& view, Call* call) const {
    if (!call->first) {
      call->view = view, call->first = &call->view;
      if (std::find(devices_.begin(), devices_.end(), view.device_type) == devices_.end())
        refuse(PyExc_RuntimeError, rule, "is on another device than " + device_names_);
    }
    if (view.device_type != call->view.device_type || view.device_index != call->view.device_index)
      refuse(PyExc_RuntimeError, rule, "is on another device than the tensors before it");
  }

  void check_numbers(const Rule& rule, const TensorView& view, Call* call) const {
    const int dtype = view.dtype();
    std::string allowed;
    if (rule.numbers == Numbers::kFp32) {
      if (dtype == kFloat32) return;
      allowed = "float32";
    } else if (rule.numbers == Numbers::kFloats) {
      if (dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16 || dtype == kFloat64) return;
      allowed = "a floating point dtype";
    } else if (rule.numbers == Numbers::kNative) {
      if (dtype == kFloat32 || dtype == call->image) return;
      allowed = "float32 or the image's dtype";
    } else {
      const bool known = std::find(dtypes_.begin(), dtypes_.end(), dtype) != dtypes_.end();
      if (call->image == 0 && known) call->image = dtype;
      if (known && call->image == dtype) return;
      allowed =
          call->image ? name_of(call->image, view) + " like the image before it" : dtype_names_;
    }
    refuse(PyExc_TypeError, rule, "is " + name_of(dtype, view) + ", allowed is " + allowed);
  }

  void check_shape(const Rule& rule, const TensorView& view, Call* call) const {
    const int64_t dims = static_cast<int64_t>(rule.shape.size());
    bool fits = view.dims == dims || (rule.ones_follow && view.dims > dims);
    for (int64_t i = dims; fits && i < view.dims; i++) fits = view.shape[i] == 1;
    for (int64_t i = 0; fits && i < dims; i++)
      if (rule.shape[i] <= '9') fits = view.shape[i] == rule.shape[i] - '0';
    if (!fits)
      refuse(PyExc_ValueError, rule,
             "is " + shown(view.shape, view.dims) + ", allowed is " + shown(rule.shape) +
                 (rule.ones_follow ? " with any number of sizes of 1 after it" : ""));
    for (int64_t i = 0; i < dims; i++)
      if (rule.shape[i] >= 'A') bind(rule, rule.shape[i], view.shape[i], call, &view);
  }

  // What a convolution makes of H and W, and whether a residual fits it.
  void check_size(Call* call) const {
    if (!call->sides) return;
    const int64_t *sides = call->sides, high = call->of('K');
    const int64_t wide = call->of('L') < 0 ? high : call->of('L');
    const int64_t h = call->of('H') + sides[2] + sides[3], w = call->of('W') + sides[0] + sides[1];
    const int64_t out[] = {(h - high) / call->stride[0] + 1, (w - wide) / call->stride[1] + 1};
    if (h < high || w < wide || high < 1 || wide < 1)
      refuse(PyExc_ValueError, "a kernel of " + std::to_string(high) + "x" + std::to_string(wide) +
                                   " does not fit into padded images of " + std::to_string(h) +
                                   "x" + std::to_string(w));
    if (call->of('P') >= 0 && (call->of('P') != out[0] || call->of('Q') != out[1]))
      refuse(PyExc_ValueError, "images of " + std::to_string(out[0]) + "x" +
                                   std::to_string(out[1]) + " come out of this convolution, not " +
                                   std::to_string(call->of('P')) + "x" +
                                   std::to_string(call->of('Q')));
    if (call->residual &&
        (call->of('O') != call->of('C') || out[0] != call->of('H') || out[1] != call->of('W')))
      refuse(PyExc_ValueError, "a residual needs an output of the input's shape");
  }

  std::string op_, device_names_, dtype_names_;
  std::vector<Rule> rules_;
  std::vector<int32_t> devices_;
  std::vector<int> dtypes_;
  TensorReader reader_;
};

std::shared_ptr<const Gate> gate_of(const std::string& op, const py::dict& rules,
                                    const std::vector<std::string>& devices,
                                    const std::vector<std::string>& dtypes,
                                    const py::handle& tensor, const py::handle& parameter) {
  return std::make_shared<const Gate>(op, rules, devices, dtypes, TensorReader(tensor, parameter));
}

bool passes(const Gate& gate, const py::tuple& args, Seen* seen) {
  try {
    gate.check(PySequence_Fast_ITEMS(args.ptr()), static_cast<Py_ssize_t>(args.size()), seen);
    return true;
  } catch (const Refused&) {
    return false;
  }
}

namespace {

constexpr char kCapsule[] = "effnet_fast.gate";

// A call of pybind11's own costs as much as the check.
PyObject* check(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  try {
    static_cast<const Gate*>(PyCapsule_GetPointer(self, kCapsule))->check(args, count);
    Py_RETURN_NONE;
  } catch (const Refused& refused) {
    PyErr_SetString(refused.type, refused.text.c_str());
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef kCheck = {"check", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(check)),
                      METH_FASTCALL, "Raises for arguments that no kernel may see."};

py::object make_gate(const std::string& op, const py::dict& rules,
                     const std::vector<std::string>& devices,
                     const std::vector<std::string>& dtypes, const py::handle& tensor,
                     const py::handle& parameter) {
  auto* const gate = new Gate(op, rules, devices, dtypes, TensorReader(tensor, parameter));
  const auto self =
      py::reinterpret_steal<py::object>(PyCapsule_New(gate, kCapsule, [](PyObject* capsule) {
        delete static_cast<Gate*>(PyCapsule_GetPointer(capsule, kCapsule));
      }));
  if (!self) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(PyCFunction_New(&kCheck, self.ptr()));
}

}  // namespace

void bind_gate(py::module_& m) {
  m.def("argument_gate", &make_gate,
        "The check of an op's arguments: a function that raises TypeError, ValueError or "
        "RuntimeError.");
}

}  // namespace effnet
