// Rows of training data whose samples have unequal lengths.
#pragma once

#include "train/objective.h"

namespace hadal::testing {

/// Rows [from, from + count) of an endless batch, each of `length` tokens below 128 in two samples;
/// a row is the same whatever it is asked for with. One token of row 0 is not scored.
train::PackedRows packed_rows(int64_t from, int64_t count, int64_t length);

}  // namespace hadal::testing
