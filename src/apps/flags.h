// What flags may hold: numbers that are numbers, ranges that a reader of the message understands.
//
// check_numbers() gives every option of a command tree what no command asks for by itself: no NaN,
// no infinity, whole numbers where whole ones are meant, no negative number that would wrap. The
// ranges below belong to single flags. All messages read "--flag: expected ..., found ...".
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>

#include "engine_core/answer/generation_defaults.h"

namespace hadal::apps {

CLI::Validator at_least(double least);
CLI::Validator above(double least);
CLI::Validator between(double least, double most);

/// Adds the checks of its kind to every option of the app and of its subcommands.
void check_numbers(CLI::App& app);

/// The flags of sampling; what is not given is the model's own.
struct SamplingFlags {
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<int64_t> top_k, max_tokens;
  uint64_t seed = 0;

  void define(CLI::App& app);
  Sampling over(Sampling model) const;
};

}  // namespace hadal::apps
