#include "testing/json_mutator.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "text/python_json.h"
#include "text/utf8.h"

extern "C" __attribute__((weak)) size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max);

namespace hadal::testing {
namespace {

using text::PyJson;

class Mutation {
 public:
  Mutation(PyJson& root, unsigned seed, const JsonPool& pool) : random_(seed + 1), pool_(pool) {
    collect(root);
  }

  void apply() {
    PyJson& node = *nodes_[pick(nodes_.size())];
    switch (pick(6)) {
      case 0:
        node = value();
        break;
      case 1: {
        const PyJson other = *nodes_[pick(nodes_.size())];
        node = other;
        break;
      }
      case 2:
        shrink(node);
        break;
      case 3:
        if (node.is_string()) {
          node = PyJson::string(mutate_text(node.text()));
          break;
        }
        [[fallthrough]];
      default:
        grow(node);
    }
  }

 private:
  size_t pick(size_t count) { return random_() % count; }
  PyJson value() { return PyJson::parse(pool_.values[pick(pool_.values.size())], "pool"); }

  void collect(PyJson& node) {
    nodes_.push_back(&node);
    for (PyJson& item : node.items()) collect(item);
    for (const auto& [key, unused] : node.members()) collect(*node.find(key));
  }
  static void shrink_list(std::vector<PyJson>& items, size_t at) {
    items.erase(items.begin() + static_cast<std::ptrdiff_t>(at));
  }
  void shrink(PyJson& node) {
    if (!node.items().empty()) {
      shrink_list(node.items(), pick(node.items().size()));
    } else if (!node.members().empty()) {
      node.erase(std::string(node.members()[pick(node.members().size())].first));
    } else {
      node = PyJson();
    }
  }
  void grow(PyJson& node) {
    if (node.is_object()) {
      node.set(pool_.keys[pick(pool_.keys.size())],
               pick(3) == 0 ? PyJson(*nodes_[pick(nodes_.size())]) : value());
    } else if (node.is_array()) {
      node.items().push_back(node.items().empty() || pick(2) == 0
                                 ? value()
                                 : PyJson(node.items()[pick(node.items().size())]));
    } else {
      node = value();
    }
  }
  std::string mutate_text(std::string text) {
    const size_t size = text.size();
    text.resize(size + 32);
    text.resize(LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(text.data()), size, text.size()));
    return text::repair_utf8(text);
  }

  std::minstd_rand random_;
  const JsonPool& pool_;
  std::vector<PyJson*> nodes_;
};

}  // namespace

size_t mutate_json(
    uint8_t* data, size_t size, size_t max_size, unsigned seed, const JsonPool& pool) {
  // Bytes, now and then, and where there is no JSON.
  if (seed % 8 == 0) return LLVMFuzzerMutate(data, size, max_size);
  try {
    PyJson root = PyJson::parse(std::string_view(reinterpret_cast<char*>(data), size), "input");
    for (unsigned i = 0; i <= seed / 8 % 4 / 2; ++i) Mutation(root, seed + i, pool).apply();
    const std::string text = root.dump();
    if (text.size() <= max_size) {
      std::ranges::copy(text, data);
      return text.size();
    }
  } catch (const InputError&) {
    return LLVMFuzzerMutate(data, size, max_size);  // bytes may become JSON again
  }
  return LLVMFuzzerMutate(data, size, max_size);
}

}  // namespace hadal::testing
