#include "ops/cache/cache_views.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::ops {
namespace {

at::Tensor line_numbers(size_t count, at::Device device) {
  return at::arange(static_cast<int64_t>(count), at::kInt).to(device);
}

}  // namespace

at::Tensor RingView::numbers(const at::Tensor& seq, const at::Tensor& pos) const {
  return slots.index_select(0, seq).to(at::kLong) * ring + pos.remainder(ring);
}

at::Tensor RingView::numbers(int64_t seq, int64_t from, int64_t to) const {
  const at::Tensor pos = at::arange(from, to, slots.options().dtype(at::kLong));
  return slots.narrow(0, seq, 1).to(at::kLong) * ring + pos.remainder(ring);
}

at::Tensor RingView::gather(int64_t seq, int64_t from, int64_t to) const {
  return dense_rows(rows.index_select(0, numbers(seq, from, to)), format);
}

RingView RingView::of_slots(const at::Tensor& rows,
                            const std::vector<int64_t>& slots,
                            int64_t ring) {
  return {.rows = rows,
          .slots = at::tensor(slots, at::kLong).to(at::kInt).to(rows.device()),
          .ring = ring};
}

std::vector<int64_t> BlockView::first_rows() const {
  HADAL_CHECK(page_blocks == INT64_MAX, "block view: blocks lie in pages");
  std::vector<int64_t> first;
  for (int64_t seq = 0; seq < slots.size(0); ++seq) first.push_back(table().row(seq, 0));
  return first;
}

BlockView BlockView::consecutive(const at::Tensor& rows, const std::vector<int64_t>& first_rows) {
  return {.rows = rows,
          .slots = line_numbers(first_rows.size(), rows.device()),
          .pages = at::tensor(first_rows, at::kLong).to(at::kInt).unsqueeze(1).to(rows.device())};
}

BlockView BlockView::paged(const at::Tensor& rows,
                           const std::vector<std::vector<int64_t>>& pages,
                           int64_t page_blocks) {
  size_t most = 1;
  for (const auto& line : pages) most = std::max(most, line.size());
  at::Tensor table = at::full({std::ssize(pages), static_cast<int64_t>(most)}, -1, at::kInt);
  for (size_t s = 0; s < pages.size(); ++s) {
    std::copy(pages[s].begin(), pages[s].end(), table.mutable_data_ptr<int32_t>() + s * most);
  }
  return {.rows = rows,
          .slots = line_numbers(pages.size(), rows.device()),
          .pages = table.to(rows.device()),
          .page_blocks = page_blocks,
          .page_rows = page_blocks};
}

at::Tensor BlockView::gather(int64_t seq, int64_t from, int64_t to) const {
  // On the CPU the tables can be read here, and rows of one page need no copy.
  if (rows.is_cpu() && from / page_blocks == (to - 1) / page_blocks)
    return dense_rows(rows.narrow(0, table().row(seq, from), to - from), format);
  const at::Tensor block = at::arange(from, to, slots.options().dtype(at::kLong));
  const at::Tensor line = pages.index_select(0, slots.narrow(0, seq, 1).to(at::kLong)).squeeze(0);
  const at::Tensor page = page_blocks == INT64_MAX
                              ? line.narrow(0, 0, 1)
                              : line.index_select(0, block.div(page_blocks, "floor"));
  const at::Tensor numbers = page.to(at::kLong) * page_rows + block.remainder(page_blocks);
  return dense_rows(rows.index_select(0, numbers), format);
}

}  // namespace hadal::ops
