// effnet_fast._C.Watch: whether the Python objects that a packed network was made of are still what
// they were, asked at every call. About 4000 comparisons for B0, so by pointers and without Python
// code; torch's tensors are seen through two members of their type and the bytes behind them. A
// forward pass leaves none of these objects in a near cache, and one miss after the other would
// take 390 us: what the checks are going to read is asked for ahead of them.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bind.h"
#include "bindings/checksums.h"
#include "bindings/member.h"
#include "bindings/parts.h"
#include "bindings/tensor_bytes.h"

namespace effnet {
namespace {

class Watch {
 public:
  // An object, what stands under keys of its __dict__, and keys that it lacks.
  using Attributes = std::tuple<py::object, py::dict, std::vector<py::str>>;
  using Place = std::array<uint64_t, 3>;  // address, elements, bytes of one

  // owners: objects of the class, with the __dict__ and with the attributes that they have now;
  // listings: dicts whose entries are what they are now, in this order; empty: dicts without
  // entries; versioned: tensors whose counter has not moved; tensors: those whose memory and
  // layout are what they were, the latter as `layout` of a tensor tells, which is asked where the
  // bytes behind a tensor differ, or always unless `bytes_tell`; places: memory of which a
  // few values are compared; spans: memory of which every byte counts. Memory is read as long as
  // tensors are where it is, and lives as long as `kept`. types: classes of which nothing has been
  // set; constants: tensors that require no gradient; whole: objects with all that their __dict__
  // has, and no more; top: such an object that is not kept, which `holds` is given, or None.
  Watch(const std::vector<Attributes>& owners, const std::vector<py::dict>& listings,
        const std::vector<py::dict>& empty, const std::vector<py::object>& versioned,
        const std::vector<py::object>& tensors, const py::object& layout,
        const std::vector<Place>& places, const std::vector<Checksums::Span>& spans,
        const py::object& kept, const py::handle& tensor_type, bool bytes_tell,
        const std::vector<py::object>& types, const std::vector<py::object>& constants,
        const std::vector<py::object>& whole, const py::object& top)
      : bytes_tell_(bytes_tell),
        version_(tensor_type, "_version"),
        address_(tensor_type, "data_ptr"),
        requires_grad_(tensor_type, "requires_grad"),
        constants_(constants),
        checksums_(spans) {
    for (const auto& [object, present, absent] : owners)
      owners_.push_back(owner_of(object, present, absent));
    for (const py::dict& dict : listings) listings_.push_back(Listing(dict));
    for (const py::dict& dict : empty) empty_.push_back(dict);
    for (const py::object& tensor : versioned)
      versioned_.push_back({tensor, version_.of(tensor.ptr())});
    for (const py::object& tensor : tensors)
      tensors_.push_back({tensor, Py_TYPE(tensor.ptr()), address_.of(tensor.ptr()), layout(tensor),
                          Behind(tensor)});
    for (const auto& [address, elements, size] : places) {
      require(size == 2 || size == 4 || size == 8, "watch: an element has 2, 4 or 8 bytes");
      for (uint64_t part = 0; part < kSamples && elements > 0; part++)
        samples_.push_back({address + (elements - 1) * part / (kSamples - 1) * size, size});
    }
    for (const py::object& type : types) types_.push_back({type, version_of_type(type)});
    if (!top.is_none()) {
      top_ = whole_of(top);
      top_->object = py::object();
    }
    for (const py::object& object : whole) owners_.push_back(whole_of(object));
    layout_ = layout;
    kept_ = kept;
    digest_ = digest();
    read_all_ahead();
  }

  // Whether nothing has changed; in the order of what the next test relies on.
  bool holds(int threads, const py::object& top) {
    for (uint64_t line : ahead_) __builtin_prefetch(at<const void>(line), 0, 2);
    for (Listing& listing : listings_)
      if (!listing.holds()) return false;
    for (const py::object& dict : empty_)
      if (PyDict_Size(dict.ptr()) != 0) return false;
    for (Owner& owner : owners_)
      if (!owner.holds(owner.object)) return false;
    if (top_ && !top_->holds(top)) return false;
    for (const auto& [type, version] : types_)
      if (!version || version_of_type(type) != version) return false;
    if (!tensors_hold()) return false;
    for (Whereabouts& place : tensors_)
      if (!(bytes_tell_ && place.behind.is_unchanged()) && !is_laid_out_alike(place)) return false;
    if (digest() != digest_) return false;
    return !sums_ || checksums_.of_memory(best_isa(), threads) == *sums_;
  }

  // Takes the checksums of the spans, which count from now on: to be called before they are read.
  void remember(int threads) { sums_ = checksums_.of_memory(best_isa(), threads); }

  // For the garbage collector: what is watched may lead back to the watch.
  int traverse(visitproc visit, void* arg) const {
    for (const Listing& listing : listings_) {
      Py_VISIT(listing.dict.ptr());
      for (const py::object& value : listing.values) Py_VISIT(value.ptr());
    }
    for (const py::object& dict : empty_) Py_VISIT(dict.ptr());
    for (const Owner& owner : owners_) {
      Py_VISIT(owner.object.ptr());
      Py_VISIT(owner.dict.ptr());
      for (const auto& item : owner.items) Py_VISIT(item.second.ptr());
    }
    if (top_) {
      Py_VISIT(top_->dict.ptr());
      for (const auto& item : top_->items) Py_VISIT(item.second.ptr());
    }
    for (const auto& pair : types_) Py_VISIT(pair.first.ptr());
    for (const py::object& tensor : constants_) Py_VISIT(tensor.ptr());
    for (const auto& pair : versioned_) Py_VISIT(pair.first.ptr());
    for (const Whereabouts& place : tensors_) Py_VISIT(place.tensor.ptr());
    Py_VISIT(kept_.ptr());
    return 0;
  }
  void clear() {
    // Moved out first: letting go of an object may run code that comes back here.
    auto listings = std::move(listings_);
    auto empty = std::move(empty_);
    auto owners = std::move(owners_);
    auto versioned = std::move(versioned_);
    auto tensors = std::move(tensors_);
    auto types = std::move(types_);
    auto constants = std::move(constants_);
    auto top = std::move(top_);
    samples_.clear();
    checksums_ = Checksums({});
    const py::object kept = std::move(kept_);
  }

 private:
  static constexpr uint64_t kSamples = 3;              // values of a tensor, evenly spaced
  static constexpr uint64_t kLine = 64, kTensor = 32;  // bytes

  // A number that is another one after every change of a dict; 0 where this Python keeps none.
  static uint64_t version_of(const py::object& dict) {
#if PY_VERSION_HEX < 0x030c0000
    return reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_version_tag;
#else
    (void)dict;
    return 0;
#endif
  }
  // Every key and value of a dict whose order is its own, without references.
  static std::vector<std::pair<PyObject*, PyObject*>> entries_of(const py::object& dict) {
    std::vector<std::pair<PyObject*, PyObject*>> entries;
    Py_ssize_t place = 0;
    PyObject *key = nullptr, *value = nullptr;
    while (PyDict_Next(dict.ptr(), &place, &key, &value)) entries.push_back({key, value});
    return entries;
  }
  static bool has_entries(const py::object& dict,
                          const std::vector<std::pair<PyObject*, PyObject*>>& entries) {
    if (PyDict_Size(dict.ptr()) != static_cast<Py_ssize_t>(entries.size())) return false;
    Py_ssize_t place = 0;
    PyObject *key = nullptr, *value = nullptr;
    for (const auto& entry : entries)
      if (!PyDict_Next(dict.ptr(), &place, &key, &value) || key != entry.first ||
          value != entry.second)
        return false;
    return true;
  }

  struct Listing {
    explicit Listing(const py::dict& given)
        : dict(given), keys(given), entries(entries_of(given)), version(version_of(given)) {
      for (const auto& entry : entries)
        values.push_back(py::reinterpret_borrow<py::object>(entry.second));
    }
    bool holds() {
      // An OrderedDict has an order of its own, which may change by itself.
      if (!PyDict_CheckExact(dict.ptr()) && !py::list(dict).equal(keys)) return false;
      if (version && version == version_of(dict)) return true;
      if (!has_entries(dict, entries)) return false;
      version = version_of(dict);
      return true;
    }

    py::object dict;
    py::list keys;                                         // in order
    std::vector<std::pair<PyObject*, PyObject*>> entries;  // alive by keys and values
    std::vector<py::object> values;
    uint64_t version;
  };
  static py::object dict_of(const py::object& object) {
    PyObject* const dict = PyObject_GenericGetDict(object.ptr(), nullptr);
    if (!dict) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(dict);
  }
  struct Owner {
    py::object object, type, dict;
    std::vector<std::pair<py::object, py::object>> items;  // value: null where there must be none
    // All that stood in the dict when the items were last compared. To see that it is the same is
    // quicker than to look them up; it may change in ways that mean nothing.
    std::vector<std::pair<PyObject*, PyObject*>> seen;
    uint64_t version = 0;
    bool is_whole = false;  // whether nothing may come to it, and the items are all there are

    void look() {
      version = version_of(dict);
      seen = entries_of(dict);
    }
    bool holds(const py::object& now) {
      if (py::type::handle_of(now).ptr() != type.ptr() || dict_of(now).ptr() != dict.ptr())
        return false;
      if (version && version == version_of(dict)) return true;
      if ((is_whole || !version) && has_entries(dict, seen)) {
        version = version_of(dict);
        return true;
      }
      if (is_whole) return false;
      for (const auto& [key, value] : items)
        if (PyDict_GetItemWithError(dict.ptr(), key.ptr()) != value.ptr()) return false;
      look();
      return true;
    }
  };
  static Owner owner_of(const py::object& object, const py::dict& present,
                        const std::vector<py::str>& absent) {
    Owner owner = {object,
                   py::reinterpret_borrow<py::object>(py::type::handle_of(object)),
                   dict_of(object),
                   {},
                   {},
                   0};
    for (const auto& [key, value] : present)
      owner.items.push_back(
          {py::reinterpret_borrow<py::object>(key), py::reinterpret_borrow<py::object>(value)});
    for (const py::str& key : absent) owner.items.push_back({key, py::object()});
    owner.look();
    return owner;
  }
  static Owner whole_of(const py::object& object) {
    Owner owner = owner_of(object, py::dict(dict_of(object)), {});
    owner.is_whole = true;
    return owner;
  }
  struct Sample {
    uint64_t address, size;
  };

  struct Whereabouts {
    py::object tensor;
    PyTypeObject* type;
    uint64_t address;
    py::object layout;
    Behind behind;
  };

  // Whether no counter or address has moved; a tensor that can no longer tell has changed.
  bool tensors_hold() const {
    try {
      for (const auto& [tensor, value] : versioned_)
        if (version_.of(tensor.ptr()) != value) return false;
      for (const Whereabouts& place : tensors_)
        if (Py_TYPE(place.tensor.ptr()) != place.type ||
            address_.of(place.tensor.ptr()) != place.address)
          return false;
      for (const py::object& tensor : constants_)
        if (requires_grad_.of(tensor.ptr())) return false;
    } catch (const py::error_already_set&) {
      return false;
    }
    return true;
  }

  bool is_laid_out_alike(Whereabouts& place) const {
    if (!layout_(place.tensor).equal(place.layout)) return false;
    place.behind = Behind(place.tensor);
    return true;
  }

  static uint64_t address_of(const py::object& object) {
    return reinterpret_cast<uint64_t>(object.ptr());
  }
  void read_ahead(uint64_t address, uint64_t bytes) {
    for (uint64_t line = address / kLine * kLine; line < address + bytes; line += kLine)
      ahead_.push_back(line);
  }
  void read_all_ahead() {
    for (const Whereabouts& place : tensors_) {
      read_ahead(address_of(place.tensor), kTensor);
      if (!place.behind.address) continue;
      // What it points to, such as the version counter, is read as well. A word that is no pointer
      // does no harm: asking for a line ahead of time touches nothing.
      for (uint64_t i = 0; i < kLine / sizeof(uint64_t); i++)
        if (const uint64_t word = at<const uint64_t>(place.behind.address)[i]) read_ahead(word, 1);
      read_ahead(place.behind.address, Behind::kBytes);
    }
    for (const Sample& sample : samples_) read_ahead(sample.address, sample.size);
    for (const Listing& listing : listings_) read_ahead(listing.dict);
    for (const py::object& dict : empty_) read_ahead(address_of(dict), sizeof(PyDictObject));
    for (const Owner& owner : owners_) {
      read_ahead(address_of(owner.object) - 32, kLine);  // the pointer to a dict stands before it
      read_ahead(owner.dict);
    }
    std::sort(ahead_.begin(), ahead_.end());
    ahead_.erase(std::unique(ahead_.begin(), ahead_.end()), ahead_.end());
  }
  // A dict, and the tables of its keys and values.
  void read_ahead(const py::object& dict) {
    const auto* const object = reinterpret_cast<const PyDictObject*>(dict.ptr());
    read_ahead(address_of(dict), sizeof(PyDictObject));
    const uint64_t bytes = 96 + 16 * static_cast<uint64_t>(object->ma_used);
    for (const void* table :
         {static_cast<const void*>(object->ma_keys), static_cast<const void*>(object->ma_values)})
      if (table) read_ahead(reinterpret_cast<uint64_t>(table), bytes);
  }

  uint64_t digest() const {
    uint64_t sum = 0;
    for (const Sample& sample : samples_) {
      uint64_t bits = 0;
      std::memcpy(&bits, at(sample.address), sample.size);
      sum = (sum ^ bits) * 0x9e3779b97f4a7c15u;
      sum ^= sum >> 32;
    }
    return sum;
  }

  bool bytes_tell_;
  Member version_, address_, requires_grad_;
  std::vector<Listing> listings_;
  std::vector<py::object> empty_;
  std::vector<Owner> owners_;
  std::optional<Owner> top_;  // without its object
  std::vector<std::pair<py::object, unsigned>> types_;
  std::vector<py::object> constants_;
  std::vector<std::pair<py::object, uint64_t>> versioned_;
  std::vector<Whereabouts> tensors_;
  std::vector<Sample> samples_;
  Checksums checksums_;
  std::vector<uint64_t> ahead_;  // cache lines
  py::object layout_, kept_;
  uint64_t digest_ = 0;
  std::optional<std::vector<uint64_t>> sums_;
};

}  // namespace

void bind_watch(py::module_& m) {
  // A cycle through a watch can be collected only if Python sees what it holds.
  const auto collected = py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject* const type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      if (!py::detail::is_holder_constructed(self)) return 0;
      return py::cast<const Watch&>(py::handle(self)).traverse(visit, arg);
    };
    type->tp_clear = [](PyObject* self) {
      if (py::detail::is_holder_constructed(self)) py::cast<Watch&>(py::handle(self)).clear();
      return 0;
    };
  });
  py::class_<Watch>(m, "Watch", collected)
      .def(py::init<const std::vector<Watch::Attributes>&, const std::vector<py::dict>&,
                    const std::vector<py::dict>&, const std::vector<py::object>&,
                    const std::vector<py::object>&, const py::object&,
                    const std::vector<Watch::Place>&, const std::vector<Checksums::Span>&,
                    const py::object&, const py::handle&, bool, const std::vector<py::object>&,
                    const std::vector<py::object>&, const std::vector<py::object>&,
                    const py::object&>(),
           py::kw_only(), py::arg("owners"), py::arg("listings"), py::arg("empty"),
           py::arg("versioned"), py::arg("tensors"), py::arg("layout"), py::arg("places"),
           py::arg("spans"), py::arg("kept"), py::arg("tensor_type"), py::arg("bytes_tell"),
           py::arg("types") = std::vector<py::object>(),
           py::arg("constants") = std::vector<py::object>(),
           py::arg("whole") = std::vector<py::object>(), py::arg("top") = py::none())
      .def("holds", &Watch::holds, py::arg("threads"), py::arg("top") = py::none())
      .def("remember", &Watch::remember);
  m.def(
      "checksums",
      [](const std::string& isa, const std::vector<Checksums::Span>& spans, int threads) {
        return Checksums(spans).of_memory(isa_for(isa), threads);
      },
      "Checksums of the chunks of memory that spans (address, bytes) make one after another.");
}

}  // namespace effnet
