#include "server/view_store.h"

#include "base/json.h"

namespace hadal::server {

void ViewStore::put(const std::string& id, const engine_core::ContextView& view) {
  JsonWriter json;
  json.begin_object()
      .field("id", id)
      .field("tokens", view.tokens)
      .field("window", view.window)
      .field("index_topk", view.index_topk)
      .key("layers")
      .begin_array();
  for (const engine_core::ContextView::Layer& layer : view.layers) {
    json.begin_object()
        .field("layer", layer.layer)
        .field("kind", layer.ratio == 0 ? "window" : (layer.selects ? "csa" : "hca"))
        .field("ratio", layer.ratio)
        .field("blocks", layer.blocks)
        .field("selected", layer.selected)
        .end_object();
  }
  json.end_array().end_object();
  std::string text = json.str();
  const std::lock_guard lock(mutex_);
  views_.emplace_back(id, std::move(text));
  if (views_.size() > capacity_) views_.pop_front();
}

std::optional<std::string> ViewStore::find(const std::string& id) const {
  const std::lock_guard lock(mutex_);
  for (auto view = views_.rbegin(); view != views_.rend(); ++view) {
    if (view->first == id) return view->second;
  }
  return std::nullopt;
}

}  // namespace hadal::server
