// effnet_fast._C.Network: a network for inference, and its layers, see cpu/network/args.h.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "bindings/network_checks.h"
#include "bindings/parts.h"
#include "cpu/isa_dispatch.h"
#include "cpu/network/args.h"

namespace effnet {
namespace {

// A layer whose pointers are still those of the caller's tensors, and the bytes of these.
template <typename Layer>
struct Described : Layer {
  Sizes bytes;
};

// The arguments by name of a layer's constructor; one that is missing, unknown or of another type
// is a TypeError.
class Fields {
 public:
  Fields(const char* layer, const py::kwargs& given) : layer_(layer), left_(given) {}
  void none_left() const {
    for (const auto& [name, value] : left_)
      throw py::type_error(layer_ + " has no " + name.cast<std::string>());
  }
  bool has(const char* name) const { return left_.contains(name); }
  template <typename T>
  T take(const char* name) {
    if (!has(name)) throw py::type_error(layer_ + " lacks " + name);
    try {
      return left_.attr("pop")(name).cast<T>();
    } catch (const py::cast_error&) {
      throw py::type_error(layer_ + "'s " + name + " is of a wrong type");
    }
  }
  int64_t size(const char* name) {
    const int64_t value = take<int64_t>(name);
    if (value < 1) throw std::invalid_argument(layer_ + "'s " + name + " is too small");
    return value;
  }
  // Sides left, right, top, bottom, or None for TensorFlow's rule.
  Padding padding() {
    using Sides = std::array<int64_t, 4>;
    const auto given = take<std::optional<Sides>>("padding");
    const Sides sides = given.value_or(Sides{});
    for (int64_t side : sides) require(side >= 0, "the padding must not be negative");
    return {!given, sides[0], sides[1], sides[2], sides[3]};
  }
  Activation activation(const char* name) { return activation_of(take<ActivationTuple>(name)); }
  // (address, bytes) of a packed tensor.
  template <typename Layer, typename T>
  void tensor(const char* name, Described<Layer>& layer, const T*& to) {
    const auto [address, bytes] = take<std::pair<Address, int64_t>>(name);
    to = at<const T>(address);
    layer.bytes[to] = bytes;
  }
  template <typename Layer>
  void product(const char* name, Described<Layer>& layer, Product& to) {
    const auto given = take<Described<Product>>(name);
    to = given;
    layer.bytes.insert(given.bytes.begin(), given.bytes.end());
  }

 private:
  std::string layer_;
  py::dict left_;
};

Described<Product> product_of(Fields& fields) {
  Described<Product> out = {};
  out.in_channels = fields.size("in_channels");
  out.out_channels = fields.size("out_channels");
  fields.tensor("weight", out, out.weight);
  fields.tensor("shift", out, out.shift);
  return out;
}

Described<HeadLayer> head_of(Fields& fields) {
  const Described<Product> product = product_of(fields);
  Described<HeadLayer> out = {};
  static_cast<Product&>(out) = product;
  out.bytes = product.bytes;
  out.activation = fields.activation("activation");
  return out;
}

bool are_finite(const float* weights, int64_t bytes) {
  return std::all_of(weights, weights + bytes / sizeof(float),
                     [](float weight) { return std::isfinite(weight); });
}

Described<StemLayer> stem_of(Fields& fields) {
  Described<StemLayer> out = {};
  out.in_channels = fields.size("in_channels");
  out.out_channels = fields.size("out_channels");
  out.kernel_h = fields.size("kernel_h");
  out.kernel_w = fields.size("kernel_w");
  out.stride = fields.size("stride");
  out.padding = fields.padding();
  out.activation = fields.activation("activation");
  fields.tensor("weight", out, out.weight);
  fields.tensor("shift", out, out.shift);
  out.finite = are_finite(out.weight, out.bytes.at(out.weight));
  return out;
}

Described<BlockLayer> block_of(Fields& fields) {
  Described<BlockLayer> out = {};
  out.in_channels = fields.size("in_channels");
  out.channels = fields.size("channels");
  out.out_channels = fields.size("out_channels");
  out.activation = fields.activation("activation");
  out.kernel = fields.size("kernel");
  out.stride = fields.size("stride");
  require(out.kernel <= kMaxKernel && out.stride <= 2, "network: kernel or stride is too large");
  out.padding = fields.padding();
  out.residual = fields.take<bool>("residual");
  out.tap = fields.take<int64_t>("tap");
  out.is_dense = fields.has("dense");
  if (out.is_dense) {
    fields.product("dense", out, out.dense);
    out.projects = fields.has("project");
    if (out.projects) fields.product("project", out, out.project);
    return out;
  }
  out.expands = fields.has("expand");
  if (out.expands) fields.product("expand", out, out.expand);
  require(out.expands || out.in_channels == out.channels,
          "network: a block without expansion keeps its channels");
  fields.tensor("filter", out, out.filter);
  fields.tensor("filter_shift", out, out.filter_shift);
  if (fields.has("se_channels")) {
    out.se_channels = fields.size("se_channels");
    out.se_activation = fields.activation("se_activation");
    out.gate_kind = gate_kind_of(fields.take<int>("gate_kind"));
    fields.tensor("se_reduce_weight", out, out.se_reduce_weight);
    fields.tensor("se_reduce_bias", out, out.se_reduce_bias);
    fields.tensor("se_expand_weight", out, out.se_expand_weight);
    fields.tensor("se_expand_bias", out, out.se_expand_bias);
  }
  fields.product("project", out, out.project);
  if (fields.has("project_master")) fields.tensor("project_master", out, out.project_master);
  return out;
}

// The packed weights of a network, one after another on cache lines.
class Weights {
 public:
  explicit Weights(int64_t bytes) : memory_(bytes), bytes_(bytes) {
    if (!memory_.data()) throw std::bad_alloc();
  }
  // Points to copies of what the pointers pointed to.
  template <typename Layer, typename... T>
  void copy(const Described<Layer>& layer, const T*&... pointers) {
    ((pointers = static_cast<const T*>(copied(pointers, layer.bytes.at(pointers)))), ...);
  }

 private:
  const void* copied(const void* from, int64_t bytes) {
    require(bytes >= 0 && used_ + bytes <= bytes_, "network: more weights than announced");
    char* const to = static_cast<char*>(memory_.data()) + used_;
    std::memcpy(to, from, static_cast<size_t>(bytes));
    used_ += (bytes + 63) / 64 * 64;
    return to;
  }
  Memory memory_;
  int64_t bytes_, used_ = 0;
};

template <typename Layer>  // Product, HeadLayer or StemLayer
Layer copied(Weights& weights, Described<Layer> layer) {
  weights.copy(layer, layer.weight, layer.shift);
  return layer;
}

BlockLayer copied(Weights& weights, Described<BlockLayer> layer) {
  if (layer.is_dense) {
    weights.copy(layer, layer.dense.weight, layer.dense.shift);
    if (layer.projects) weights.copy(layer, layer.project.weight, layer.project.shift);
    return layer;
  }
  if (layer.expands) weights.copy(layer, layer.expand.weight, layer.expand.shift);
  weights.copy(layer, layer.filter, layer.filter_shift);
  if (layer.se_channels > 0)
    weights.copy(layer, layer.se_reduce_weight, layer.se_reduce_bias, layer.se_expand_weight,
                 layer.se_expand_bias);
  weights.copy(layer, layer.project.weight, layer.project.shift);
  if (layer.project_master) weights.copy(layer, layer.project_master);
  return layer;
}

// Whether all weights of the convolution that reads padding are finite.
bool is_finite(const Described<BlockLayer>& layer, bool bf16) {
  if (!layer.is_dense) return are_finite(layer.filter, layer.bytes.at(layer.filter));
  const void* const weight = layer.dense.weight;
  const int64_t bytes = layer.bytes.at(weight);
  if (!bf16) return are_finite(static_cast<const float*>(weight), bytes);
  constexpr uint16_t kExponent = 0x7f80;
  const uint16_t* const first = static_cast<const uint16_t*>(weight);
  return std::all_of(first, first + bytes / sizeof(uint16_t),
                     [](uint16_t bits) { return (bits & kExponent) != kExponent; });
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
  Network(const std::string& isa, bool bf16, int64_t bytes, const Described<StemLayer>& stem,
          int64_t stem_tap, const std::vector<Described<BlockLayer>>& blocks,
          const std::optional<Described<HeadLayer>>& head,
          const std::optional<Described<Product>>& classifier)
      : isa_(isa_for(isa)),
        bf16_(bf16),
        weights_(bytes),
        stem_tap_(stem_tap),
        stem_(copied(weights_, stem)) {
    require(!bf16 || isa_.has_bf16_products, "network: this instruction set has no bf16 products");
    check(stem, blocks, head, classifier);
    std::vector<int64_t> taps;
    if (stem_tap >= 0) taps.push_back(stem_tap);
    for (const auto& block : blocks) {
      blocks_.push_back(copied(weights_, block));
      blocks_.back().finite = is_finite(block, bf16);
      if (blocks_.back().tap >= 0) taps.push_back(blocks_.back().tap);
    }
    taps_ = taps.size();
    std::sort(taps.begin(), taps.end());
    for (size_t i = 0; i < taps_; i++)
      require(taps[i] == static_cast<int64_t>(i),
              "network: taps must be 0, 1, 2, ... in any order, each once");
    if (head) head_ = copied(weights_, *head);
    if (classifier) classifier_ = copied(weights_, *classifier);
    require(!classifier_ || head_, "network: a classifier needs a head before it");
  }

  // y and taps: address and bytes; y may be 0: only taps are wanted.
  void run(const std::array<int64_t, 4>& shape, Address x, bool x_bf16,
           const std::array<int64_t, 4>& x_strides, const std::pair<Address, int64_t>& y,
           const std::vector<std::pair<Address, int64_t>>& taps, int threads) const {
    const auto [n, channels, h, w] = shape;
    require_possible(n, h, w);
    require(x != 0 && channels == stem_.in_channels, "network: the images have other channels");
    require(taps.size() == taps_, "network: an output is missing");
    require(y.first == 0 || head_, "network: without a head there is no output but the taps");
    std::vector<float*> tap_data(taps_);
    MapSize size = {h, w};
    const auto tap = [&](int64_t index, int64_t depth) {
      if (index < 0) return;
      const auto [address, bytes] = taps[static_cast<size_t>(index)];
      tap_data[static_cast<size_t>(index)] =
          Result{address, bytes}.data(n, depth * size.h * size.w);
    };
    size.pass(stem_.kernel_h, stem_.kernel_w, stem_.stride, stem_.padding);
    tap(stem_tap_, stem_.out_channels);
    for (const BlockLayer& block : blocks_) {
      size.pass(block.kernel, block.kernel, block.stride, block.padding);
      tap(block.tap, block.out_channels);
    }
    NetworkArgs args = {};
    args.stem = &stem_;
    args.blocks = blocks_.data();
    args.block_count = static_cast<int64_t>(blocks_.size());
    args.head = head_ ? &*head_ : nullptr;
    args.classifier = classifier_ ? &*classifier_ : nullptr;
    args.bf16 = bf16_;
    args.amx = bf16_ && isa_.amx;
    args.l2 = l2_cache();
    args.n = n, args.h = h, args.w = w;
    args.x = at(x);
    args.x_dtype = dtype_of(x_bf16);
    std::copy(x_strides.begin(), x_strides.end(), args.x_strides);
    if (y.first)
      args.y = Result{y.first, y.second}.data(
          n, classifier_ ? classifier_->out_channels : head_->out_channels);
    args.taps = tap_data.data();
    args.stem_tap = stem_tap_;
    args.workspace = workspace;
    args.threads = thread_count(threads);
    launch(isa_.kernels->network, args);
  }

 private:
  // Before anything is copied from the caller's memory.
  void check(const Described<StemLayer>& stem, const std::vector<Described<BlockLayer>>& blocks,
             const std::optional<Described<HeadLayer>>& head,
             const std::optional<Described<Product>>& classifier) const {
    const NetworkChecks checks(bf16_);
    checks.stem(stem, stem.bytes);
    int64_t channels = stem.out_channels;
    for (const auto& block : blocks) {
      checks.block(block, block.bytes);
      require(block.in_channels == channels, "network: a block does not fit what is before it");
      channels = block.out_channels;
    }
    if (head) checks.product(*head, head->bytes), checks.follows(*head, channels, 0);
    if (head && classifier) {
      checks.product(*classifier, classifier->bytes);
      checks.follows(*classifier, head->out_channels, 0);
    }
  }

  const Isa& isa_;
  bool bf16_;
  Weights weights_;
  int64_t stem_tap_;
  size_t taps_;
  StemLayer stem_;
  std::vector<BlockLayer> blocks_;
  std::optional<HeadLayer> head_;
  std::optional<Product> classifier_;
};

// A class of Python whose constructor takes a layer's fields by name.
template <typename Layer>
void bind_layer(py::module_& m, const char* name, Described<Layer> (*read)(Fields&)) {
  py::class_<Described<Layer>>(m, name).def(py::init([=](const py::kwargs& given) {
    Fields fields(name, given);
    const auto layer = read(fields);
    fields.none_left();
    return layer;
  }));
}

}  // namespace

void bind_network(py::module_& m) {
  m.def(
      "network_tile_units",
      [](const std::string& isa) { return isa_for(isa).kernels->network_tile_units(); },
      "Units of 16 output channels in a panel of packed weights.");
  m.def(
      "network_has_bf16", [](const std::string& isa) { return isa_for(isa).has_bf16_products; },
      "Whether the instruction set multiplies pairs of bf16.");
  bind_layer(m, "Product", product_of);
  bind_layer(m, "HeadLayer", head_of);
  bind_layer(m, "StemLayer", stem_of);
  bind_layer(m, "BlockLayer", block_of);
  py::class_<Network>(m, "Network")
      .def(py::init<const std::string&, bool, int64_t, const Described<StemLayer>&, int64_t,
                    const std::vector<Described<BlockLayer>>&,
                    const std::optional<Described<HeadLayer>>&,
                    const std::optional<Described<Product>>&>())
      .def("run", &Network::run);
}

}  // namespace effnet
