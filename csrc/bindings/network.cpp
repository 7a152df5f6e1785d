// effnet_fast._C.Network: a network for inference, see cpu/network/args.h.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "bindings/parts.h"
#include "cpu/instruction_sets.h"
#include "cpu/network/args.h"

namespace effnet {
namespace {

// The packed weights of a network, one after another on cache lines.
class Weights {
 public:
  Weights(int64_t bytes) : memory_(bytes), bytes_(bytes) {
    if (!memory_.data()) throw std::bad_alloc();
  }
  const void* copy(Address from, int64_t bytes) {
    require(used_ + bytes <= bytes_, "network: more weights than announced");
    char* const to = static_cast<char*>(memory_.data()) + used_;
    std::memcpy(to, at(from), static_cast<size_t>(bytes));
    used_ += (bytes + 63) / 64 * 64;
    return to;
  }

 private:
  Memory memory_;
  int64_t bytes_, used_ = 0;
};

template <typename T>
T field(const py::dict& layer, const char* name) {
  if (!layer.contains(name)) throw std::invalid_argument(std::string("a layer lacks ") + name);
  return layer[name].cast<T>();
}
// A field that is (address, bytes) of a packed tensor.
template <typename T>
const T* take(Weights& weights, const py::dict& layer, const char* name) {
  const auto [address, bytes] = field<std::pair<Address, int64_t>>(layer, name);
  return static_cast<const T*>(weights.copy(address, bytes));
}
int64_t size(const py::dict& layer, const char* name, int64_t least = 1) {
  const int64_t value = field<int64_t>(layer, name);
  if (value < least)
    throw std::invalid_argument(std::string("a layer's ") + name + " is too small");
  return value;
}

Padding padding_of(const py::dict& layer) {
  const auto sides = field<std::array<int64_t, 4>>(layer, "padding");
  for (int64_t side : sides) require(side >= 0, "the padding must not be negative");
  return {field<bool>(layer, "same"), sides[0], sides[1], sides[2], sides[3]};
}

Product product_of(Weights& weights, const py::dict& layer) {
  return {size(layer, "in_channels"), size(layer, "out_channels"),
          take<void>(weights, layer, "weight"), take<float>(weights, layer, "shift")};
}

StemLayer stem_of(Weights& weights, const py::dict& layer) {
  return {size(layer, "in_channels"),
          size(layer, "out_channels"),
          size(layer, "kernel_h"),
          size(layer, "kernel_w"),
          size(layer, "stride"),
          padding_of(layer),
          take<float>(weights, layer, "weight"),
          take<float>(weights, layer, "shift")};
}

BlockLayer block_of(Weights& weights, const py::dict& layer) {
  BlockLayer out = {};
  out.in_channels = size(layer, "in_channels");
  out.channels = size(layer, "channels");
  out.out_channels = size(layer, "out_channels");
  out.se_channels = size(layer, "se_channels");
  out.kernel = size(layer, "kernel");
  out.stride = size(layer, "stride");
  require(out.kernel <= kMaxKernel && out.stride <= 2, "network: kernel or stride is too large");
  out.padding = padding_of(layer);
  out.residual = field<bool>(layer, "residual");
  out.expands = layer.contains("expand");
  if (out.expands) out.expand = product_of(weights, field<py::dict>(layer, "expand"));
  require(out.expands || out.in_channels == out.channels,
          "network: a block without expansion keeps its channels");
  out.filter = take<float>(weights, layer, "filter");
  out.filter_shift = take<float>(weights, layer, "filter_shift");
  out.se_reduce_weight = take<float>(weights, layer, "se_reduce_weight");
  out.se_reduce_bias = take<float>(weights, layer, "se_reduce_bias");
  out.se_expand_weight = take<float>(weights, layer, "se_expand_weight");
  out.se_expand_bias = take<float>(weights, layer, "se_expand_bias");
  out.project = product_of(weights, field<py::dict>(layer, "project"));
  if (layer.contains("project_master"))
    out.project_master = take<float>(weights, layer, "project_master");
  out.tap = field<int64_t>(layer, "tap");
  return out;
}

// Bytes of a core's L2 cache; asked once, for before glibc 2.33 every question runs CPUID.
int64_t l2_cache() {
  constexpr int64_t kOtherwise = 512 << 10;
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return found > 0 ? found : kOtherwise;
#else
  return kOtherwise;
#endif
}

class Network {
 public:
  // bytes: of all packed weights, each rounded up to a cache line.
  Network(const std::string& isa, bool bf16, int64_t bytes, const py::dict& stem, int64_t stem_tap,
          const std::vector<py::dict>& blocks, const py::object& head, const py::object& classifier)
      : isa_(isa_for(isa)),
        bf16_(bf16),
        weights_(bytes),
        stem_tap_(stem_tap),
        stem_(stem_of(weights_, stem)) {
    require(!bf16 || isa_.has_bf16_products, "network: this instruction set has no bf16 products");
    std::vector<int64_t> taps;
    if (stem_tap >= 0) taps.push_back(stem_tap);
    for (const py::dict& block : blocks) {
      blocks_.push_back(block_of(weights_, block));
      if (blocks_.back().tap >= 0) taps.push_back(blocks_.back().tap);
    }
    taps_ = taps.size();
    std::sort(taps.begin(), taps.end());
    for (size_t i = 0; i < taps_; i++)
      require(taps[i] == static_cast<int64_t>(i),
              "network: taps must be 0, 1, 2, ... in any order, each once");
    if (!head.is_none()) head_.push_back(product_of(weights_, head.cast<py::dict>()));
    if (!classifier.is_none())
      classifier_.push_back(product_of(weights_, classifier.cast<py::dict>()));
    require(classifier_.empty() || !head_.empty(), "network: a classifier needs a head before it");
  }

  // y may be 0: only taps are wanted.
  void run(int64_t n, int64_t h, int64_t w, Address x, bool x_bf16,
           const std::array<int64_t, 4>& x_strides, Address y, const std::vector<Address>& taps,
           int threads) const {
    require(n > 0 && h > 0 && w > 0, "network: every size must be positive");
    require(taps.size() == taps_, "network: an output is missing");
    require(y == 0 || !head_.empty(), "network: without a head there is no output but the taps");
    std::vector<float*> tap_data;
    for (Address tap : taps) tap_data.push_back(at<float>(tap));
    NetworkArgs args = {};
    args.stem = &stem_;
    args.blocks = blocks_.data();
    args.block_count = static_cast<int64_t>(blocks_.size());
    args.head = head_.empty() ? nullptr : head_.data();
    args.classifier = classifier_.empty() ? nullptr : classifier_.data();
    args.bf16 = bf16_;
    args.amx = bf16_ && isa_.amx;
    args.l2 = l2_cache();
    args.n = n, args.h = h, args.w = w;
    args.x = at(x);
    args.x_dtype = dtype_of(x_bf16);
    std::copy(x_strides.begin(), x_strides.end(), args.x_strides);
    args.y = at<float>(y);
    args.taps = tap_data.data();
    args.stem_tap = stem_tap_;
    args.workspace = workspace;
    args.threads = thread_count(threads);
    launch(isa_.kernels->network, args);
  }

 private:
  const Isa& isa_;
  bool bf16_;
  Weights weights_;
  int64_t stem_tap_;
  size_t taps_;
  StemLayer stem_;
  std::vector<BlockLayer> blocks_;
  std::vector<Product> head_, classifier_;  // none or one
};

}  // namespace

void bind_network(py::module_& m) {
  m.def(
      "network_tile_units",
      [](const std::string& isa) { return isa_for(isa).kernels->network_tile_units(); },
      "Units of 16 output channels in a panel of packed weights.");
  m.def(
      "network_has_bf16", [](const std::string& isa) { return isa_for(isa).has_bf16_products; },
      "Whether the instruction set multiplies pairs of bf16.");
  py::class_<Network>(m, "Network")
      .def(py::init<const std::string&, bool, int64_t, const py::dict&, int64_t,
                    const std::vector<py::dict>&, const py::object&, const py::object&>())
      .def("run", &Network::run);
}

}  // namespace effnet
