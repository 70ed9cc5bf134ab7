#include "ops/tape.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/saved_variable_hooks.h>

#include "base/check.h"
#include "base/thread_time.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace detail {

using Storage = c10::intrusive_ptr<c10::StorageImpl>;

static Storage storage_of(const at::Tensor& x) {
  return Storage::reclaim_copy(x.storage().unsafeGetStorageImpl());
}

/// Whether a tensor is told by its storage and its shape.
static bool plain(const at::Tensor& x) {
  return x.defined() && x.layout() == at::kStrided && x.has_storage() && !x.is_conj() &&
         !x.is_neg() && !x.is_inference();
}

/// A tensor without its storage.
struct View {
  c10::DispatchKeySet keys;
  caffe2::TypeMeta type;
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0;
  bool requires_grad = false;

  explicit View(const at::Tensor& x)
      : keys(x.key_set()),
        type(x.dtype()),
        sizes(x.sizes().vec()),
        strides(x.strides().vec()),
        offset(x.storage_offset()),
        requires_grad(x.requires_grad()) {}

  at::Tensor of(const Storage& storage) const {
    at::Tensor x = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), keys, type);
    x.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
    return x;
  }
  bool same_as(const at::Tensor& x) const {
    return x.dtype() == type && x.sizes() == at::IntArrayRef(sizes) &&
           x.strides() == at::IntArrayRef(strides) && x.storage_offset() == offset;
  }
};

/// What a tensor's values were when somebody took them.
struct Version {
  c10::VariableVersion counter;
  uint32_t at = 0;

  explicit Version(const at::Tensor& x)
      : counter(x.unsafeGetTensorImpl()->version_counter()), at(counter.current_version()) {}
  bool holds() const { return counter.current_version() == at; }
};

static uint64_t digest(const at::Tensor& x) {
  const at::NoGradGuard no_grad;
  const at::Tensor dense = x.detach().contiguous().cpu();
  const auto* bytes = static_cast<const char*>(dense.const_data_ptr());
  uint64_t value = 0x9e3779b97f4a7c15;
  for (size_t i = 0; i < dense.nbytes(); i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, std::min<size_t>(8, dense.nbytes() - i));
    value = (value ^ word) * 0xff51afd7ed558ccd;
    value ^= value >> 32;
  }
  return value;
}

/// The state of the CPU's generator.
struct RandomState {
  at::mt19937 engine;
  std::optional<float> next_float;
  std::optional<double> next_double;

  RandomState() : RandomState(generator()) {}
  void restore() const {
    at::CPUGeneratorImpl& g = generator();
    g.set_engine(engine);
    g.set_next_float_normal_sample(next_float);
    g.set_next_double_normal_sample(next_double);
  }
  bool same_as(const RandomState& other) const {
    const at::mt19937_data_pod a = engine.data(), b = other.engine.data();
    return a.seed_ == b.seed_ && a.left_ == b.left_ && a.next_ == b.next_ && a.state_ == b.state_ &&
           next_float == other.next_float && next_double == other.next_double;
  }

 private:
  explicit RandomState(at::CPUGeneratorImpl& g)
      : engine(g.engine()),
        next_float(g.next_float_normal_sample()),
        next_double(g.next_double_normal_sample()) {}
  static at::CPUGeneratorImpl& generator() {
    return *at::check_generator<at::CPUGeneratorImpl>(at::detail::getDefaultCPUGenerator());
  }
};

struct Function;

/// A result of a recorded function: one storage, whatever views of it there are.
struct Slot {
  int64_t number = 0;
  TensorLabel label;
  c10::weak_intrusive_ptr<c10::StorageImpl> seen;  ///< of the forward pass
  /// Kept for the backward pass: saved and not dropped, or computed again.
  Storage held;
  std::shared_ptr<Function> producer;  ///< until it ran again, or where the slot is kept
  Version version;
  bool dropped = false;
  int64_t saved = 0;  ///< times that nodes of the graph saved a view
  std::shared_ptr<TapeObserver> observer;

  Slot(const at::Tensor& x, TensorLabel name)
      : label(std::move(name)), seen(storage_of(x)), version(x) {}

  void restore();
};

/// What a function was given: a result, or a storage that is kept.
struct Input {
  std::shared_ptr<Slot> slot;
  Storage kept;
  std::optional<View> view;  ///< none: no tensor
  std::optional<Version> version;
};

struct Result {
  std::weak_ptr<Slot> slot;
  std::optional<View> view;
  uint64_t digest = 0;
};

struct Function {
  int64_t number = 0;
  const char* name = "";
  TensorFunction f;
  std::vector<Input> inputs;
  std::vector<Result> results;
  std::optional<RandomState> random;  ///< before the first run, where that drew numbers
  bool reference = false, hopper = false, verify = false;
  std::shared_ptr<TapeObserver> observer;

  std::vector<at::Tensor> run_again(const std::vector<at::Tensor>& x) const {
    const at::AutoGradMode as_the_first_time(true);
    std::optional<ReferenceGuard> with_reference;
    if (reference) with_reference.emplace();
    std::optional<AsHopperGuard> with_hopper;
    if (hopper) with_hopper.emplace();
    if (!random) return f(x);
    const RandomState now;
    random->restore();
    std::vector<at::Tensor> made = f(x);
    now.restore();
    return made;
  }

  void restore() {
    std::vector<at::Tensor> x;
    for (const Input& input : inputs) {
      if (!input.view) {
        x.emplace_back();
        continue;
      }
      if (input.slot) input.slot->restore();
      HADAL_CHECK(input.version->holds(), "recompute: an input of ", name,
                  " was changed in place after the forward pass used it");
      x.push_back(input.view->of(input.slot ? input.slot->held : input.kept));
      if (input.view->requires_grad) x.back().set_requires_grad(true);
    }
    if (observer) observer->runs_again(number);
    const auto start = thread_time();
    std::vector<at::Tensor> made = run_again(x);
    const std::chrono::duration<double> seconds = thread_time() - start;
    x.clear();
    HADAL_CHECK(made.size() == results.size(), "recompute: ", name, " gave ", results.size(),
                " tensors, and ", made.size(), " when it ran again");
    for (size_t i = 0; i < made.size(); ++i) {
      if (!results[i].view) continue;
      const std::shared_ptr<Slot> slot = results[i].slot.lock();
      if (!slot || slot->held) continue;
      HADAL_CHECK(results[i].view->same_as(made[i]), "recompute: ", to_string(slot->label), " is ",
                  made[i].sizes(), ", and was ", at::IntArrayRef(results[i].view->sizes));
      HADAL_CHECK(!verify || digest(made[i]) == results[i].digest,
                  "recompute: ", to_string(slot->label), " has other bits than the first time");
      slot->held = slot->seen.lock();
      if (!slot->held) slot->held = storage_of(made[i]);
    }
    made.clear();
    // Nothing that it was made of is needed again for it.
    f = nullptr;
    inputs.clear();
    if (observer) observer->ran_again(number, seconds.count());
  }
};

void Slot::restore() {
  if (held) return;
  held = seen.lock();
  if (held) return;
  HADAL_CHECK(producer != nullptr, "recompute: ", to_string(label), " is gone");
  const std::shared_ptr<Function> from = std::move(producer);
  from->restore();
  HADAL_CHECK(held.defined(), "recompute: ", to_string(label), " was not made again");
}

class SavedThroughTape;

}  // namespace detail

using detail::Slot;

namespace {

thread_local Tape* current = nullptr;        // records
thread_local Tape::State* saving = nullptr;  // what autograd saves goes through it

}  // namespace

struct Tape::State {
  TapeOptions options;
  std::unordered_map<const c10::StorageImpl*, std::shared_ptr<Slot>> slots;
  std::map<std::pair<int64_t, std::string>, int64_t> ordinals;
  int64_t block = 0, next_slot = 0, next_function = 0;
  /// What was saved since the function began that runs now: some of it may be its results.
  std::vector<detail::SavedThroughTape*> recent;

  std::shared_ptr<Slot> find(const at::Tensor& x) const {
    if (!detail::plain(x)) return nullptr;
    const auto found = slots.find(x.storage().unsafeGetStorageImpl());
    return found == slots.end() ? nullptr : found->second;
  }
  /// Forgets results whose storage is gone and that nobody asks for again.
  void sweep() {
    std::erase_if(slots, [](const auto& entry) { return entry.second->seen.expired(); });
  }
  std::shared_ptr<Slot> add(const at::Tensor& x, const char* name);
};

namespace detail {

/// A tensor that a node of the graph saved while a tape recorded.
class SavedThroughTape final : public torch::autograd::SavedVariableHooks {
 public:
  explicit SavedThroughTape(Tape::State& tape) : tape_(&tape) {}
  ~SavedThroughTape() override {
    if (tape_ != nullptr) std::erase(tape_->recent, this);
    if (!slot_ || --slot_->saved > 0) return;
    if (slot_->observer) slot_->observer->released(slot_->number);
  }
  SavedThroughTape(const SavedThroughTape&) = delete;
  SavedThroughTape& operator=(const SavedThroughTape&) = delete;

  void call_pack_hook(const at::Tensor& x) override {
    Tape::State& tape = *std::exchange(tape_, nullptr);
    if (!plain(x)) {
      other_ = x.detach();
      return;
    }
    view_.emplace(x);
    version_.emplace(x);
    slot_ = tape.find(x);
    if (!slot_) {
      kept_ = storage_of(x);
      if (current == nullptr) {
        tape_ = &tape;
        tape.recent.push_back(this);
      }
      return;
    }
    HADAL_CHECK(!slot_->dropped || slot_->version.holds(), "recompute: ", to_string(slot_->label),
                " is annotated and was changed in place");
    if (!slot_->dropped) slot_->held = storage_of(x);
    ++slot_->saved;
  }

  /// Within a function: the tensor is its result.
  void found(const std::shared_ptr<Slot>& slot) {
    if (slot_ || !kept_.defined() || kept_.get() != slot->seen._unsafe_get_target()) return;
    slot_ = slot;
    slot_->held = std::move(kept_);
    ++slot_->saved;
  }
  void function_ended() { tape_ = nullptr; }

  at::Tensor call_unpack_hook() override {
    if (other_.defined()) return other_;
    HADAL_CHECK(version_->holds(),
                "recompute: a tensor that the backward pass needs was changed in place");
    if (!slot_) return view_->of(kept_);
    if (slot_->observer) slot_->observer->needed(slot_->number);
    slot_->restore();
    return view_->of(slot_->held);
  }

 private:
  Tape::State* tape_;  ///< until it packed, and while the function runs within which that was
  std::shared_ptr<Slot> slot_;
  Storage kept_;
  std::optional<View> view_;
  std::optional<Version> version_;
  at::Tensor other_;
};

}  // namespace detail

namespace {

/// LibTorch asks its engine how tensors are saved; only Python's knows more than one way.
struct TapeEngine final : torch::autograd::Engine {
  ~TapeEngine() override { stop(); }
  std::unique_ptr<torch::autograd::SavedVariableHooks> get_default_saved_variable_hooks() override;
  static torch::autograd::Engine& the() {
    // Never destroyed: its threads may outlive main().
    static auto* const engine = new TapeEngine;
    return *engine;
  }
};

std::unique_ptr<torch::autograd::SavedVariableHooks>
TapeEngine::get_default_saved_variable_hooks() {
  return saving != nullptr ? std::make_unique<detail::SavedThroughTape>(*saving) : nullptr;
}

}  // namespace

std::string to_string(const TensorLabel& label) {
  return concat("block ", label.block, ": ", label.name, ' ', label.ordinal);
}

std::shared_ptr<Slot> Tape::State::add(const at::Tensor& x, const char* name) {
  auto slot = std::make_shared<Slot>(
      x, TensorLabel{.block = block, .name = name, .ordinal = ordinals[{block, name}]++});
  slot->number = next_slot++;
  slot->observer = options.observer;
  slots[x.storage().unsafeGetStorageImpl()] = slot;
  return slot;
}

Tape::Tape(TapeOptions options) : state_(std::make_shared<State>()) {
  HADAL_CHECK(current == nullptr, "tape: another one records on this thread");
  static std::once_flag installed;
  std::call_once(installed, [] { torch::autograd::set_default_engine_stub(&TapeEngine::the); });
  state_->options = std::move(options);
  current = this;
  saving = state_.get();
}

Tape::~Tape() { close(); }

void Tape::close() {
  if (current != this) return;
  current = nullptr;
  saving = nullptr;
  for (const auto& [storage, slot] : state_->slots) {
    // What is kept needs nothing that it was made of.
    if (slot->held && !slot->dropped) slot->producer.reset();
  }
  state_->slots.clear();
}

void Tape::enter_block(int64_t block) {
  state_->block = block;
  state_->sweep();
}

Tape* Tape::recording() { return at::GradMode::is_enabled() ? current : nullptr; }

std::vector<at::Tensor> Tape::run(const char* name,
                                  TensorFunction f,
                                  const std::vector<at::Tensor>& inputs) {
  using detail::Function, detail::Input, detail::plain, detail::RandomState, detail::Result,
      detail::SavedThroughTape;
  State& state = *state_;
  const RandomState before;
  std::vector<at::Tensor> made;
  {
    // Functions within this one are part of it.
    current = nullptr;
    struct Back {
      Tape* tape;
      ~Back() { current = tape; }
    } back{this};
    made = f(inputs);
  }
  const std::vector<SavedThroughTape*> recent = std::exchange(state.recent, {});
  const auto function = std::make_shared<Function>();
  function->number = state.next_function++;
  function->name = name;
  function->f = std::move(f);
  function->reference = reference_forced();
  function->hopper = as_hopper();
  function->verify = state.options.verify;
  function->observer = state.options.observer;
  if (!before.same_as(RandomState())) function->random = before;
  std::vector<int64_t> input_slots;
  for (const at::Tensor& x : inputs) {
    Input input;
    HADAL_CHECK(!x.defined() || plain(x), "recompute: ", name, " takes a tensor of another kind");
    if (x.defined()) {
      input.view.emplace(x);
      input.version.emplace(x);
      const std::shared_ptr<Slot> slot = state.find(x);
      // What was changed in place is not what its function makes.
      if (slot && slot->version.holds()) {
        input.slot = slot;
        input_slots.push_back(slot->number);
      } else {
        input.kept = detail::storage_of(x);
      }
    }
    function->inputs.push_back(std::move(input));
  }
  std::vector<TapeObserver::Result> told;
  for (const at::Tensor& x : made) {
    Result result;
    // What shares its storage with something known, as a view of an input, needs no function.
    const bool alias = plain(x) && std::ranges::any_of(inputs, [&](const at::Tensor& input) {
                         return input.defined() && input.is_alias_of(x);
                       });
    if (plain(x) && !alias && !state.find(x)) {
      const std::shared_ptr<Slot> slot = state.add(x, name);
      slot->producer = function;
      for (SavedThroughTape* saved : recent) saved->found(slot);
      result.slot = slot;
      result.view.emplace(x);
      if (function->verify) result.digest = detail::digest(x);
      told.push_back({.slot = slot->number,
                      .label = slot->label,
                      .bytes = static_cast<int64_t>(x.storage().nbytes()),
                      .data = x.storage().data()});
    }
    function->results.push_back(std::move(result));
  }
  for (SavedThroughTape* saved : recent) saved->function_ended();
  if (state.options.observer) state.options.observer->ran(function->number, input_slots, told);
  return made;
}

void Tape::annotate(const at::Tensor& x) {
  const std::shared_ptr<Slot> slot = state_->find(x);
  HADAL_CHECK(slot != nullptr,
              "recompute: an annotated tensor is no result of a recorded function, but an input");
  HADAL_CHECK(slot->version.holds(), "recompute: ", to_string(slot->label),
              " is annotated and was changed in place");
  if (state_->options.observer) state_->options.observer->annotated(slot->number);
  if (state_->options.drops && !state_->options.drops(slot->label)) return;
  slot->dropped = true;
  slot->held.reset();
}

at::Tensor checkpointed(at::Tensor x) {
  if (Tape* const tape = Tape::recording()) tape->annotate(x);
  return x;
}

}  // namespace hadal::ops
