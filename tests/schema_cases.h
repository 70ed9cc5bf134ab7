// Random JSON schemas with a bound on everything, and a validator of its own for exactly their
// keywords: what constrained answers are held to.
#pragma once

#include <cstdint>
#include <random>

#include <nlohmann/json_fwd.hpp>

namespace hadal::testing {

/// A schema whose answers are short. `root_object`: an object at the top, as tools want.
nlohmann::json random_schema(std::mt19937_64& random, bool root_object);

/// Whether the value is what the schema says. Errors: Error for a keyword it does not know.
bool validates(const nlohmann::json& value, const nlohmann::json& schema);

}  // namespace hadal::testing
