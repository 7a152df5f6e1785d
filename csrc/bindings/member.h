// Members of torch's classes, asked without Python code, and whether a class has changed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace effnet {

namespace py = pybind11;

// A member of a class written in C, called without the lookup by name that takes most of the time.
class Member {
 public:
  Member(const py::handle& type, const char* name) : owner_(type.attr(name)), name_(name) {
    PyObject* const member = owner_.ptr();
    if (Py_TYPE(member) == &PyGetSetDescr_Type)
      getset_ = reinterpret_cast<PyGetSetDescrObject*>(member)->d_getset;
    else if (Py_TYPE(member) == &PyMethodDescr_Type &&
             reinterpret_cast<PyMethodDescrObject*>(member)->d_method->ml_flags == METH_NOARGS)
      method_ = reinterpret_cast<PyMethodDescrObject*>(member)->d_method;
  }
  // The number that a property holds or a method returns.
  uint64_t of(PyObject* object) const {
    PyObject* found = nullptr;
    if (getset_)
      found = getset_->get(object, getset_->closure);
    else if (method_)
      found = method_->ml_meth(object, nullptr);
    else
      found = PyObject_GetAttrString(object, name_);
    if (found && PyCallable_Check(found)) {
      PyObject* const result = PyObject_CallNoArgs(found);
      Py_DECREF(found);
      found = result;
    }
    if (!found) throw py::error_already_set();
    const uint64_t value = PyLong_AsUnsignedLongLongMask(found);
    Py_DECREF(found);
    return value;
  }

 private:
  py::object owner_;
  const char* name_;
  const PyGetSetDef* getset_ = nullptr;
  const PyMethodDef* method_ = nullptr;
};

// Python's number of what a class and those above it have, which is another after every change; 0
// where it has none to give.
inline unsigned version_of_type(const pybind11::object& type) {
  auto* const object = reinterpret_cast<PyTypeObject*>(type.ptr());
  const auto number = [object]() -> unsigned {
#if PY_VERSION_HEX < 0x030C0000  // where a change may clear the flag alone
    if (!PyType_HasFeature(object, Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
    return object->tp_version_tag;
  };
  if (!number()) Py_XDECREF(PyObject_GetAttrString(type.ptr(), "__init__"));
  return number();
}

}  // namespace effnet
