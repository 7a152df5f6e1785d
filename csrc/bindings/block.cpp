// effnet_fast._C.BlockPasses: a whole MBConv in training, its passes in one call per direction and
// without the GIL. The order of the passes and what leaves one out are those of
// effnet_fast/ops/mbconv_training.py, which tests compare bit by bit; this file takes tensors that
// kernels read as they are, and no others.
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings/bind.h"
#include "bindings/gate.h"
#include "bindings/mbconv.h"

namespace effnet {
namespace {

using Flags = std::array<bool, 3>;  // of expansion, depthwise and projection
// Of a BatchNorm whose running statistics move: the factor to the unbiased variance, the momentum.
using Move = std::optional<std::array<double, 2>>;
using Moves = std::array<Move, 3>;
using Excite = std::array<Seen::Tensor, 4>;  // weight and bias of both layers

// Memory for vectors between two passes.
class Floats {
 public:
  explicit Floats(int64_t count) : memory_(new float[static_cast<size_t>(count)]) {}
  Address address() const { return reinterpret_cast<Address>(memory_.get()); }
  float* data() const { return memory_.get(); }

 private:
  std::unique_ptr<float[]> memory_;
};

// Gives the tensors in the order of the rules.
class Order {
 public:
  explicit Order(const Seen& seen) : next_(seen.tensors.data()) {}
  Seen::Tensor tensor() { return *next_++; }
  Address address() { return tensor().address; }

 private:
  const Seen::Tensor* next_;
};

// A convolution's weight and its BatchNorm's vectors.
struct Layer {
  explicit Layer(Order* order) : weight(order->tensor()) {
    for (Address& vector : bn) vector = order->address();
  }
  bool has_statistics() const { return bn[2] && bn[3]; }
  BatchNorm normalised_by(bool batch) const { return batch ? BatchNorm{bn[0], bn[1], 0, 0} : bn; }

  Seen::Tensor weight;
  BatchNorm bn = {};
};

// What is decided about a call beside its tensors.
struct Kinds {
  std::string isa;
  ActivationTuple activation, se_activation;
  int gate;
  int threads;
};
using KindsTuple = std::tuple<std::string, ActivationTuple, ActivationTuple, int, int>;

// n images of c channels come in, o come out, e are those between; r in squeeze-and-excite.
struct Sizes {
  explicit Sizes(const Seen& s)
      : n(s.of('N')),
        c(s.of('C')),
        e(s.of('E')),
        o(s.of('O')),
        r(s.of('R')),
        pixels(s.of('H') * s.of('W')),
        out_pixels(s.of('P') * s.of('Q')),
        filter({n, e, s.of('H'), s.of('W'), s.of('P'), s.of('Q'), s.of('K'), s.stride, s.padding[0],
                s.padding[2]}),
        bf16(s.image_bf16) {}
  bool are_positive() const {
    return n > 0 && c > 0 && e > 0 && o > 0 && r != 0 && pixels > 0 && out_pixels > 0;
  }

  int64_t n, c, e, o, r, pixels, out_pixels;
  ShapeTuple filter;
  bool bf16;
};

const ActivationTuple kIdentity = {kClamp, std::nanf(""), std::nanf("")};

bool have_one_dtype(const Excite& tensors) {
  for (const Seen::Tensor& tensor : tensors)
    if (tensor.address && tensor.is_bf16 != tensors[0].is_bf16) return false;
  return true;
}

// The tensors of a forward.
struct Forward {
  explicit Forward(Order o)
      : x(o.address()),
        row_scale(o.address()),
        expand(&o),
        depthwise(&o),
        excite({o.tensor(), o.tensor(), o.tensor(), o.tensor()}),
        project(&o),
        z1(o.address()),
        z2(o.address()),
        z3(o.address()),
        y(o.address()),
        norm1(o.address()),
        norm2(o.address()),
        norm3(o.address()),
        pooled(o.address()),
        slopes(o.address()),
        hidden(o.address()),
        gate(o.address()) {}
  bool expands() const { return expand.weight.address; }
  bool excites() const { return excite[0].address; }
  // Whether what belongs together is there.
  bool fits(const Flags& by_batch, const Moves& moves) const {
    const Layer* const layers[] = {&expand, &depthwise, &project};
    for (size_t i = 0; i < 3; i++) {
      const bool is_there = i > 0 || expands();
      if (moves[i] && !(is_there && layers[i]->has_statistics())) return false;
      if (is_there && !by_batch[i] && !layers[i]->has_statistics()) return false;
    }
    const bool excited = pooled && slopes && hidden && gate && excite[2].address;
    return expands() == (z1 && norm1) && excites() == excited && have_one_dtype(excite);
  }

  Address x, row_scale;
  Layer expand, depthwise;
  Excite excite;
  Layer project;
  Address z1, z2, z3, y, norm1, norm2, norm3, pooled, slopes, hidden, gate;
};

void run_forward(const Forward& f, const Sizes& s, bool residual, const std::array<double, 3>& eps,
                 const Flags& by_batch, const Kinds& k) {
  if (f.expands())
    mbconv_pointwise(k.isa, {s.n, s.pixels, s.c, s.e}, s.bf16, f.expand.weight.is_bf16, f.x, 0, 0,
                     f.expand.weight.address, f.expand.normalised_by(by_batch[0]), eps[0], f.z1,
                     f.norm1, kIdentity, k.threads);
  mbconv_depthwise(k.isa, s.filter, s.bf16, f.depthwise.weight.is_bf16, f.expands() ? f.z1 : f.x,
                   f.norm1, f.depthwise.weight.address, f.depthwise.normalised_by(by_batch[1]),
                   eps[1], f.z2, f.norm2, k.activation, k.threads);
  if (f.excites()) {
    mbconv_squeeze(k.isa, {s.n, s.out_pixels, s.e}, s.bf16, f.z2, f.norm2, f.pooled, f.slopes,
                   k.activation, k.threads);
    excite(k.isa, s.n, s.e, s.r, f.excite[0].is_bf16, f.pooled, f.excite[0].address,
           f.excite[1].address, f.excite[2].address, f.excite[3].address, f.hidden, f.gate,
           k.se_activation, k.gate, k.threads);
  }
  mbconv_pointwise(k.isa, {s.n, s.out_pixels, s.e, s.o}, s.bf16, f.project.weight.is_bf16, f.z2,
                   f.norm2, f.gate, f.project.weight.address, f.project.normalised_by(by_batch[2]),
                   eps[2], f.z3, f.norm3, k.activation, k.threads);
  mbconv_finish(k.isa, {s.n, s.out_pixels, s.o}, s.bf16, f.z3, f.norm3, f.row_scale,
                residual ? f.x : 0, f.y, k.threads);
}

void move_all(const Forward& f, const Sizes& s, const Moves& moves) {
  const Layer* const layers[] = {&f.expand, &f.depthwise, &f.project};
  const Address norms[] = {f.norm1, f.norm2, f.norm3};
  for (size_t i = 0; i < 3; i++) {
    if (!moves[i]) continue;
    const int64_t c = i == 2 ? s.o : s.e;
    const float* const rows = at<float>(norms[i]);
    move_statistics(c, reinterpret_cast<Address>(rows + 2 * c),
                    reinterpret_cast<Address>(rows + 4 * c), layers[i]->bn[2], layers[i]->bn[3],
                    (*moves[i])[0], (*moves[i])[1]);
  }
}

// The tensors of a backward; what is null is not wanted.
struct Backward {
  explicit Backward(Order o)
      : grad_y(o.address()),
        row_scale(o.address()),
        x(o.address()),
        z1(o.address()),
        z2(o.address()),
        z3(o.address()),
        norm1(o.address()),
        norm2(o.address()),
        norm3(o.address()),
        pooled(o.address()),
        slopes(o.address()),
        hidden(o.address()),
        gate(o.address()),
        expand(o.tensor()),
        gamma1(o.address()),
        depthwise(o.tensor()),
        excite({o.tensor(), {}, o.tensor(), {}}),
        project(o.tensor()),
        grad_x(o.address()),
        grad_expand(o.address()),
        sums1(o.address()),
        grad_depthwise(o.address()),
        sums2(o.address()),
        grad_excite({o.address(), o.address(), o.address(), o.address()}),
        grad_project(o.address()),
        sums3(o.address()),
        e(o.address()),
        f(o.address()) {}
  bool expands() const { return expand.address; }
  bool excites() const { return excite[0].address; }
  // Whether what belongs together is there.
  bool fits(bool again) const {
    const bool excited = pooled && slopes && hidden && gate && excite[2].address;
    if (expands() != (norm1 != 0) || excites() != excited) return false;
    if (!have_one_dtype(excite) || (again && !expands())) return false;
    if (expands() && !z1 && (f || grad_depthwise)) return false;
    if (!e != !sums2 || (!e && (grad_x || grad_depthwise || f))) return false;
    for (Address grad : grad_excite)
      if (!grad && e && excites()) return false;
    if (!expands()) return !f && !sums1 && !grad_expand;
    return !f == !sums1 && (f || !(grad_x || grad_expand));
  }

  Address grad_y, row_scale, x, z1, z2, z3, norm1, norm2, norm3, pooled, slopes, hidden, gate;
  Seen::Tensor expand;
  Address gamma1;  // BatchNorm's weight behind the expansion
  Seen::Tensor depthwise;
  Excite excite;
  Seen::Tensor project;
  Address grad_x, grad_expand, sums1, grad_depthwise, sums2;
  std::array<Address, 4> grad_excite;
  Address grad_project, sums3, e, f;
};

// sums2 [2,C] from the sums [3,N,C] of the projection's backward, in double.
void sum_images(const float* sums, const Sizes& s, float* out) {
  for (int64_t row = 0; row < 2; row++)
    for (int64_t c = 0; c < s.e; c++) {
      double sum = 0.0;
      for (int64_t i = 0; i < s.n; i++) sum += sums[((row + 1) * s.n + i) * s.e + c];
      out[row * s.e + c] = static_cast<float>(sum);
    }
}

// z1 of x once more, by the statistics that it had.
void expand_again(const Backward& b, const Sizes& s, double eps, const Kinds& k) {
  const Floats norm(5 * s.e);
  const float* const rows = at<float>(b.norm1);
  const BatchNorm bn = {b.gamma1, 0, reinterpret_cast<Address>(rows + 2 * s.e),
                        reinterpret_cast<Address>(rows + 4 * s.e)};
  mbconv_pointwise(k.isa, {s.n, s.pixels, s.c, s.e}, s.bf16, b.expand.is_bf16, b.x, 0, 0,
                   b.expand.address, bn, eps, b.z1, norm.address(), kIdentity, k.threads);
}

// What of a BatchNorm's sums is inside dz.
Address inner(Address sums, bool by_batch) { return by_batch ? sums : 0; }

void run_backward(const Backward& b, const Sizes& s, bool residual, double eps,
                  const Flags& by_batch, bool again, const Kinds& k) {
  const Floats sums(3 * s.n * s.e), q(s.n * s.e);
  const Address added = residual ? b.grad_y : 0;
  mbconv_finish_backward(k.isa, {s.n, s.out_pixels, s.o}, s.bf16, b.grad_y, b.row_scale, b.z3,
                         b.norm3, b.sums3, k.threads);
  if (b.e || b.grad_project)
    mbconv_project_backward(k.isa, {s.n, s.out_pixels, s.e, s.o}, s.bf16, b.project.is_bf16,
                            b.grad_y, b.row_scale, b.z3, b.norm3, inner(b.sums3, by_batch[2]),
                            b.project.address, b.z2, b.norm2, b.gate, b.e, sums.address(),
                            b.grad_project, k.activation, k.threads);
  if (!b.e) return;
  if (b.excites()) {
    excite_backward(k.isa, s.n, s.e, s.r, b.excite[0].is_bf16, b.pooled, b.hidden, b.gate,
                    sums.address(), b.excite[0].address, b.excite[2].address, b.grad_excite[0],
                    b.grad_excite[1], b.grad_excite[2], b.grad_excite[3], q.address(),
                    k.se_activation, k.gate, k.threads);
    mbconv_excite_sums(s.n, s.e, s.out_pixels, q.address(), b.gate, sums.address(), b.slopes,
                       b.sums2);
  } else {
    sum_images(sums.data(), s, at<float>(b.sums2));
  }
  const Address f = b.expands() ? b.f : b.grad_x;
  if (!f && !b.grad_depthwise) return;
  if (again) expand_again(b, s, eps, k);
  mbconv_depthwise_backward(k.isa, s.filter, s.bf16, b.depthwise.is_bf16, b.e, b.gate,
                            b.excites() ? q.address() : 0, b.z2, b.norm2,
                            inner(b.sums2, by_batch[1]), b.expands() ? b.z1 : b.x, b.norm1,
                            b.expands() ? 0 : added, b.depthwise.address, f, b.grad_depthwise,
                            b.sums1, k.activation, k.threads);
  if (!b.expands() || !(b.grad_x || b.grad_expand)) return;
  mbconv_expand_backward(k.isa, {s.n, s.pixels, s.c, s.e}, s.bf16, b.expand.is_bf16, b.f, b.z1,
                         b.norm1, inner(b.sums1, by_batch[0]), b.expand.address, b.x, added,
                         b.grad_x, b.grad_expand, k.threads);
}

Kinds kinds_of(const KindsTuple& given) {
  const auto& [isa, activation, se_activation, gate, threads] = given;
  return {isa, activation, se_activation, gate, threads};
}

class BlockPasses {
 public:
  BlockPasses(const py::dict& forward, const py::dict& backward, const py::handle& tensor,
              const py::handle& parameter)
      : forward_(made("mbconv_forward", forward, tensor, parameter)),
        backward_(made("mbconv_backward", backward, tensor, parameter)) {}

  // Whether it ran. by_batch: whether the batch's statistics count.
  bool forward(const py::tuple& given, const std::array<double, 3>& eps, const Flags& by_batch,
               const Moves& moves, const KindsTuple& kinds) const {
    Seen seen;
    if (!passes(*forward_, given, &seen)) return false;
    const Sizes sizes(seen);
    const Forward tensors{Order(seen)};
    if (!sizes.are_positive() || !tensors.fits(by_batch, moves)) return false;
    const Kinds k = kinds_of(kinds);
    const py::gil_scoped_release release;
    run_forward(tensors, sizes, seen.residual, eps, by_batch, k);
    move_all(tensors, sizes, moves);
    return true;
  }

  // Whether it ran. eps: the expansion's; again: z1 is memory for what is to be computed again.
  bool backward(const py::tuple& given, double eps, const Flags& by_batch, bool again,
                const KindsTuple& kinds) const {
    Seen seen;
    if (!passes(*backward_, given, &seen)) return false;
    const Sizes sizes(seen);
    const Backward tensors{Order(seen)};
    if (!sizes.are_positive() || !tensors.fits(again)) return false;
    const Kinds k = kinds_of(kinds);
    const py::gil_scoped_release release;
    run_backward(tensors, sizes, seen.residual, eps, by_batch, again, k);
    return true;
  }

 private:
  static std::shared_ptr<const Gate> made(const char* name, const py::dict& rules,
                                          const py::handle& tensor, const py::handle& parameter) {
    return gate_of(name, rules, {"cpu"}, {"float32", "bfloat16"}, tensor, parameter);
  }

  std::shared_ptr<const Gate> forward_, backward_;
};

}  // namespace

void bind_block(py::module_& m) {
  py::class_<BlockPasses>(m, "BlockPasses")
      .def(py::init<const py::dict&, const py::dict&, const py::handle&, const py::handle&>())
      .def("forward", &BlockPasses::forward)
      .def("backward", &BlockPasses::backward);
}

}  // namespace effnet
