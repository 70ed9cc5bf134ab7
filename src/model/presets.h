// The released models as values: what config.json of V4-Flash and V4-Pro says (model.md 1).
#pragma once

#include "model/config.h"

namespace hadal::model {

ModelConfig deepseek_v4_flash();
ModelConfig deepseek_v4_pro();

}  // namespace hadal::model
