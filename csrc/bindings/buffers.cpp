// Memory for the large results that every training step makes anew, kept from step to step.
//
// PyTorch's allocator hands large blocks back to the C library, and that hands what exceeds its
// threshold (in glibc never more than 32 MiB) back to the system: each step then pays a page fault
// for every 4 KiB again. Blocks here stay with the process and lie on pages of 2 MiB.
#include "bindings/bind.h"
#include "bindings/parts.h"
#include "bindings/tensors.h"

#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace effnet {
namespace {

struct Block {
  std::unique_ptr<Memory> memory;
  int64_t bytes = 0;
};

// Blocks that are in use, and idle ones in the order in which they came back. Tensors give theirs
// back from any thread, with or without the GIL.
class Buffers {
 public:
  explicit Buffers(int64_t limit) : limit_(limit) {}

  Block take(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Block block = fitting(bytes);
    if (!block.memory) {
      shrink(std::max(peak_, used_ + bytes) / kSlack * (kSlack + 1) - used_ - bytes);
      block = allocate(bytes);
      if (!block.memory) {
        shrink(0);
        block = allocate(bytes);
      }
      if (!block.memory) throw std::bad_alloc();
    }
    used_ += block.bytes;
    peak_ = std::max(peak_, used_);
    return block;
  }

  void give(Block block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block.bytes;
    idle_bytes_ += block.bytes;
    idle_.push_back(std::move(block));
    shrink(limit_);
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink(0);
    peak_ = used_;
  }
  void set_limit(int64_t limit) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = limit;
    shrink(limit_);
  }
  // (in use, idle)
  std::pair<int64_t, int64_t> bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {used_, idle_bytes_};
  }

 private:
  static constexpr int64_t kPage = 4096, kHuge = 2 << 20;
  static constexpr int64_t kSlack = 4;  // a quarter more than the most that was in use

  static Block allocate(int64_t bytes) {
    const int64_t page = bytes >= 2 * kHuge ? kHuge : kPage;
    Block block{std::make_unique<Memory>((bytes + page - 1) / page * page),
                (bytes + page - 1) / page * page};
    if (!block.memory->data()) block.memory.reset();
    return block;
  }

  // The smallest idle block that holds the bytes, unless most of it would lie idle; of equal ones
  // the last to come back, whose lines may still be in a cache.
  Block fitting(int64_t bytes) {
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if (it->bytes >= bytes && it->bytes <= 2 * bytes + kPage &&
          (best == idle_.end() || it->bytes <= best->bytes))
        best = it;
    if (best == idle_.end()) return {};
    Block block = std::move(*best);
    idle_.erase(best);
    idle_bytes_ -= block.bytes;
    return block;
  }

  // Frees idle blocks, those that have been idle for longest first, down to `most` bytes.
  void shrink(int64_t most) {
    while (!idle_.empty() && idle_bytes_ > most) {
      idle_bytes_ -= idle_.front().bytes;
      idle_.pop_front();
    }
  }

  std::mutex mutex_;
  std::list<Block> idle_;
  int64_t limit_, used_ = 0, idle_bytes_ = 0, peak_ = 0;
};

// What DLPack passes to torch, and the block of a tensor; ends with the tensor's storage.
struct Lease {
  ManagedTensor managed;
  std::shared_ptr<Buffers> owner;
  Block block;
  std::vector<int64_t> shape, strides;
};

class TensorBuffers {
 public:
  TensorBuffers(const py::handle& tensor, const py::handle& parameter, int64_t limit)
      : reader_(tensor, parameter), buffers_(std::make_shared<Buffers>(limit)) {}

  // An uninitialised tensor without gaps, channels_last where it has four dimensions.
  py::object empty(const std::vector<int64_t>& shape, bool is_bf16) const {
    int64_t count = is_bf16 ? 2 : 4;
    for (const int64_t size : shape)
      require(size > 0 && !__builtin_mul_overflow(count, size, &count),
              "buffers: every size must be positive, and the tensor must fit in memory");
    auto lease = std::make_unique<Lease>();
    lease->block = buffers_->take(count);
    lease->owner = buffers_;
    lease->shape = shape;
    lease->strides = strides_of(shape);
    lease->managed = {1, 0, lease.get(), &end, 0, {}};
    TensorView& view = lease->managed.tensor;
    view.data = lease->block.memory->data();
    view.device_type = kCpuDevice;
    view.dims = static_cast<int32_t>(shape.size());
    view.code = static_cast<uint8_t>((is_bf16 ? kBFloat16 : kFloat32) >> 8);
    view.bits = is_bf16 ? 16 : 32;
    view.lanes = 1;
    view.shape = lease->shape.data();
    view.strides = lease->strides.data();
    void* tensor = reader_.wrap(&lease->managed);
    lease.release();  // the tensor has it
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
  }

  Buffers& buffers() const { return *buffers_; }

 private:
  static void end(ManagedTensor* managed) {
    const std::unique_ptr<Lease> lease(static_cast<Lease*>(managed->context));
    lease->owner->give(std::move(lease->block));
  }
  static std::vector<int64_t> strides_of(const std::vector<int64_t>& s) {
    if (s.size() == 4) return {s[1] * s[2] * s[3], 1, s[1] * s[3], s[1]};
    std::vector<int64_t> strides(s.size(), 1);
    for (size_t i = s.size(); i-- > 1;) strides[i - 1] = strides[i] * s[i];
    return strides;
  }

  TensorReader reader_;
  std::shared_ptr<Buffers> buffers_;
};

}  // namespace

void bind_buffers(py::module_& m) {
  py::class_<TensorBuffers>(m, "Buffers", "Memory of tensors, kept for the next ones.")
      .def(py::init<py::handle, py::handle, int64_t>(), py::arg("tensor"), py::arg("parameter"),
           py::arg("limit"))
      .def("empty", &TensorBuffers::empty, py::arg("shape"), py::arg("is_bf16"),
           "An uninitialised tensor without gaps, channels_last where it has four dimensions.")
      .def(
          "release", [](const TensorBuffers& self) { self.buffers().release(); },
          "Frees what no tensor uses.")
      .def(
          "bytes", [](const TensorBuffers& self) { return self.buffers().bytes(); },
          "Bytes in use, and bytes that are kept for the next tensors.")
      .def(
          "set_limit",
          [](const TensorBuffers& self, int64_t limit) { self.buffers().set_limit(limit); },
          py::arg("limit"), "The most bytes that are kept.");
}

}  // namespace effnet
