#include "apps/loaded_model.h"

#include <ATen/Parallel.h>

#include "apps/model_folder.h"
#include "base/check.h"
#include "base/memory.h"

namespace hadal::apps {

LoadedModel load_with_tokenizer(const std::string& folder_flag,
                                const std::string& numerics_flag,
                                at::Device device) {
  // The work is in hadal's own kernels, which have their own threads; LibTorch's would only wait
  // busily for the few operations between them, at the expense of everything else on the machine.
  at::set_num_threads(1);
  const std::string folder = model_folder(folder_flag);
  const auto source = checkpoint::OfficialCheckpoint::open(folder);
  const ops::Numerics numerics = numerics_flag.empty() ? checkpoint::default_numerics(source)
                                                       : ops::parse_numerics(numerics_flag);
  text::Tokenizer tokenizer = text::Tokenizer::from_file(folder + "/tokenizer.json");
  HADAL_INPUT_CHECK(tokenizer.vocab_size() <= source.config().vocab_size, folder,
                    ": the tokenizer knows ", tokenizer.vocab_size(),
                    " ids, the model's vocabulary is ", source.config().vocab_size);
  LoadedModel loaded{
      .folder = folder,
      .numerics = numerics,
      .model = checkpoint::load_model(source, numerics, checkpoint::serving_target(device)),
      .tokenizer = std::move(tokenizer),
      .defaults = engine_core::load_generation_defaults(folder),
      .effort = choose_effort_levels(folder, source.config(), "")};
  drop_file_pages();  // what the start needed once, the files of packed weights among it
  return loaded;
}

const char* finish_name(Finish finish) {
  switch (finish) {
    case Finish::kStop:
      return "stop";
    case Finish::kLength:
      return "length";
    case Finish::kInterrupted:
      return "interrupted";
  }
  return "unknown";
}

}  // namespace hadal::apps
