#include "base/check.h"
#include "ops/cache/kv_rows.h"
#include "ops/cache/rows_sm90.h"

namespace hadal::ops {
namespace {

/// Rows that went through their round trip, packed.
void pack(const uint16_t* x,
          int64_t stride,
          const RowFormat& format,
          const int64_t* place,
          uint8_t* out,
          int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t to = place != nullptr ? place[row] : row;
    if (to < 0) continue;
    HADAL_CHECK(pack_row(x + row * stride, format, out + to * format.bytes()), "pack_rows: row ",
                row, " did not go through its round trip");
  }
}

}  // namespace

void latent_rows_twin(const LatentRowsSm90Params& p) {
  HADAL_CHECK(p.weight == nullptr && p.cos_sin == nullptr,
              "latent_rows: no twin of norm and rotation");
  const RowFormat format{.kind = RowKind::kLatent, .width = p.width, .rotary = kRotaryDim};
  pack(p.x, p.stride, format, p.place, p.out, p.rows);
}

void index_rows_twin(const IndexRowsSm90Params& p) {
  HADAL_CHECK(p.weight == nullptr && p.cos_sin == nullptr,
              "index_rows: no twin of norm and rotation");
  pack(p.x, 128, {.kind = RowKind::kIndexKey, .width = 128}, p.place, p.out, p.rows);
}

}  // namespace hadal::ops
