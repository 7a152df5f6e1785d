// What an op declares of an argument, in a few words, and what of a tensor is compared with it.
//
// "image NCHW inner", "floats? C with mean", "fp32 5C": numbers, a question mark where None may
// stand, shape, layout, and the argument with which it is None. Letters of a shape stand for sizes
// that are the same wherever they occur in a call; a last * for any number of sizes of 1. A list
// has the rules of its tensors; "?EC" in front of them allows an empty list, without which E is C.
// "name silu relu" is a string, one of these words.
#pragma once

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "bindings/parts.h"
#include "bindings/tensors.h"

namespace effnet {
namespace {  // of gate.cpp alone, so that the library exports nothing of it

enum class Kind {
  kAny,       // not looked at
  kTensor,    // see Rule
  kLayers,    // a list of tensors
  kFlags,     // booleans, `size` of them
  kCount,     // an integer of at least 0
  kStride,    // 1 or 2, in both directions
  kStrides,   // height and width, of at least 1
  kSides,     // left, right, top, bottom padding
  kResidual,  // whether x is added to what comes out
  kName,      // one of `names`
};
enum class Numbers {
  kImage,   // the same for all images of a call, one of the backend's
  kFloats,  // any floating point numbers, which launchers convert
  kNative,  // fp32 or those of the call's images, which kernels read as they are
  kFp32,
};
enum class Layout {
  kAny,    // which launchers copy where they must
  kInner,  // [N,C,H,W] with C innermost
  kNhwc,   // [N,C,H,W] in NHWC order without gaps
  kDense,  // without gaps
};

struct Rule {
  std::string name, text;
  Kind kind = Kind::kAny;
  Numbers numbers = Numbers::kImage;
  Layout layout = Layout::kAny;
  bool optional = false, ones_follow = false;
  std::string shape;
  std::string with;      // the name of an earlier argument, or of none
  int64_t partner = -1;  // its place
  int64_t size = 0;
  std::vector<Rule> below;
  std::vector<std::string> names;
};

template <typename T>
using Words = std::vector<std::pair<const char*, T>>;

template <typename T>
bool take(const Words<T>& words, const std::string& word, T* out) {
  for (const auto& [name, value] : words)
    if (word == name) return *out = value, true;
  return false;
}

const Words<Numbers> kNumbers = {{"image", Numbers::kImage},
                                 {"floats", Numbers::kFloats},
                                 {"native", Numbers::kNative},
                                 {"fp32", Numbers::kFp32}};
const Words<Layout> kLayouts = {{"any", Layout::kAny},
                                {"inner", Layout::kInner},
                                {"nhwc", Layout::kNhwc},
                                {"dense", Layout::kDense}};
const Words<Kind> kKinds = {{"any", Kind::kAny},       {"count", Kind::kCount},
                            {"stride", Kind::kStride}, {"strides", Kind::kStrides},
                            {"sides", Kind::kSides},   {"residual", Kind::kResidual},
                            {"flags", Kind::kFlags},   {"name", Kind::kName}};
const Words<int> kDtypes = {{"float32", kFloat32}, {"bfloat16", kBFloat16}, {"float16", kFloat16}};
const Words<std::vector<int32_t>> kDevices = {{"cpu", {1}}, {"cuda", {2, 10}}};  // 10: ROCm

Rule rule_of(const std::string& name, const py::handle& given) {
  Rule rule;
  rule.name = name;
  rule.text = py::str(given);
  if (!py::isinstance<py::str>(given)) {
    rule.kind = Kind::kLayers;
    for (const py::handle& item : given) {
      const std::string text = item.cast<std::string>();
      if (text[0] == '?')
        rule.optional = true, rule.shape = text.substr(1);
      else
        rule.below.push_back(rule_of(name + "[" + std::to_string(rule.below.size()) + "]", item));
    }
    require(!rule.optional || rule.shape.size() == 2, "gate: two letters follow a question mark");
    return rule;
  }
  std::istringstream words(rule.text);
  std::string word;
  words >> word;
  if (take(kKinds, word, &rule.kind)) {
    if (rule.kind == Kind::kName)
      while (words >> word) rule.names.push_back(word);
    else
      words >> rule.size;
    return rule;
  }
  rule.optional = word.back() == '?';
  if (rule.optional) word.pop_back();
  rule.kind = Kind::kTensor;
  require(take(kNumbers, word, &rule.numbers), "gate: an unknown kind of argument");
  words >> rule.shape;
  rule.ones_follow = !rule.shape.empty() && rule.shape.back() == '*';
  if (rule.ones_follow) rule.shape.pop_back();
  for (char size : rule.shape)
    require((size >= 'A' && size <= 'Z') || (size >= '0' && size <= '9'), "gate: a strange shape");
  if (rule.numbers == Numbers::kFp32 || rule.numbers == Numbers::kNative)
    rule.layout = Layout::kDense;
  while (words >> word)
    if (word == "with")
      words >> rule.with;
    else
      require(take(kLayouts, word, &rule.layout), "gate: an unknown layout");
  return rule;
}

std::string shown(const int64_t* sizes, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; i++) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

// "NCHW" as "[N, C, H, W]".
std::string shown(const std::string& letters) {
  std::string text = "[";
  for (char letter : letters) text += (text.size() > 1 ? ", " : "") + std::string(1, letter);
  return text + "]";
}

std::string name_of(int dtype, const TensorView& view) {
  for (const auto& [name, value] : kDtypes)
    if (value == dtype) return name;
  if (dtype == kFloat64) return "float64";
  const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  return (view.code < 7 ? kinds[view.code] : "type") + std::to_string(view.bits);
}

// Whether the strides are those of sizes in this order without gaps; a size of 1 may have any.
bool is_dense(const TensorView& view, const int* order) {
  int64_t expected = 1;
  for (int i = view.dims - 1; i >= 0; i--) {
    const int at = order ? order[i] : i;
    if (view.shape[at] != 1 && view.strides[at] != expected) return false;
    expected *= view.shape[at];
  }
  return true;
}

constexpr int kNhwcOrder[] = {0, 2, 3, 1};

bool has_layout(const TensorView& view, Layout layout) {
  if (layout == Layout::kAny ||
      std::find(view.shape, view.shape + view.dims, 0) != view.shape + view.dims)
    return true;
  if (layout == Layout::kDense) return is_dense(view, nullptr);
  if (layout == Layout::kNhwc) return is_dense(view, kNhwcOrder);
  const int64_t *size = view.shape, *stride = view.strides;
  return size[1] == 1 ||
         (stride[1] == 1 && (size[2] * size[3] == 1 || std::min(stride[2], stride[3]) >= 1));
}

}  // namespace
}  // namespace effnet
