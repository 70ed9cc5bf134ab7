#include "ops/rows/embedding.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/op.h"
#include "ops/rows/gather.h"

namespace hadal::ops {

at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table) {
  check_shape(ids, {-1}, "embedding: ids");
  check_shape(table, {-1, -1}, "embedding: table");
  if (ids.is_cpu()) {
    const int64_t* id = ids.const_data_ptr<int64_t>();
    for (int64_t token = 0; token < ids.size(0); ++token) {
      HADAL_CHECK(id[token] >= 0 && id[token] < table.size(0), "embedding: token ", token,
                  " has id ", id[token], ", the vocabulary ", table.size(0), " entries");
    }
  }
  return gather_rows(table, ids);
}

at::Tensor embedding(const at::Tensor& ids, const at::Tensor& table, const at::Tensor& master) {
  const bool trains = at::GradMode::is_enabled() && master.defined() && master.requires_grad();
  if (!trains || table.is_same(master)) return ops::embedding(ids, table);
  check_shape(master, {table.size(0), table.size(1)}, "embedding: master");
  return straight_through(ops::embedding(ids, table.detach()), gather_rows(master, ids));
}

}  // namespace hadal::ops
