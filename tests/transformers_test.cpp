// Checkpoints as transformers writes them (tests/transformers/README.md), through the commands; and
// what hadal writes for transformers.
#include <map>
#include <regex>

#include <ATen/ATen.h>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/file.h"
#include "checkpoint/convert.h"
#include "checkpoint/official.h"
#include "cli_fixture.h"
#include "testing/tiny_tokenizer.h"

namespace hadal {
namespace {

namespace fs = std::filesystem;
using checkpoint::OfficialCheckpoint;
using checkpoint::TensorReader;

const std::string kFixtures = HADAL_SOURCE_DIR "/tests/transformers/";
const std::string kNano = HADAL_SOURCE_DIR "/models/hadal-nano";

class Transformers : public CliFixture {
 protected:
  std::string path(const std::string& name) const { return folder_ / name; }

  /// Largest difference between what `hadal logits` says and what transformers computed.
  double logit_error(const std::string& model, const std::string& recorded) const {
    const std::string out = path("logits.safetensors");
    const CliResult result =
        run(concat("logits --model ", model, " --ids ", recorded, " --out ", out));
    EXPECT_EQ(result.code, 0) << result.error;
    const at::Tensor wanted = TensorReader::open(recorded).tensor("logits");
    return (TensorReader::open(out).tensor("logits") - wanted).abs().max().item<double>();
  }

  /// The same tensors with the same values in the same types, name by name.
  static void expect_same_values(const std::string& a, const std::string& b) {
    const auto left = OfficialCheckpoint::open(a), right = OfficialCheckpoint::open(b);
    EXPECT_EQ(left.config().compress_ratios, right.config().compress_ratios);
    for (const checkpoint::TensorSpec& spec : checkpoint::tensor_table(left.config())) {
      const at::Tensor x = left.get(spec.name).data, y = right.get(spec.name).data;
      EXPECT_TRUE(at::equal(x.to(at::kDouble), y.to(at::kDouble))) << spec.name;
    }
  }
};

TEST_F(Transformers, SavedModelsAreInspectedAndComputeWhatTransformersDoes) {
  const CliResult saved = run("inspect " + kFixtures + "f32");
  EXPECT_EQ(saved.code, 0) << saved.error;
  EXPECT_NE(saved.out.find("4 layers (1 window, 2 CSA, 1 HCA), 0 MTP"), std::string::npos)
      << saved.out;
  EXPECT_NE(saved.out.find("names as transformers' save_pretrained writes them"), std::string::npos)
      << saved.out;
  const CliResult stacked = run("inspect " + kFixtures + "bf16-stacked");
  EXPECT_NE(stacked.out.find("transformers' module names"), std::string::npos) << stacked.out;
  EXPECT_NE(stacked.error.find("tensors that the release keeps in F32 are stored in less"),
            std::string::npos)
      << stacked.error;
  for (const char* name : {"f32", "bf16-stacked"})
    EXPECT_LT(logit_error(kFixtures + name, kFixtures + name + "/logits.safetensors"), 2e-5)
        << name;
}

TEST_F(Transformers, RoundTripsKeepEveryValue) {
  for (const auto& [name, official, hf] :
       {std::tuple{"f32", "f32", "hf-f32"}, std::tuple{"bf16-stacked", "bf16", "hf-bf16"}}) {
    const std::string there = path(concat(name, "-official")), back = path(concat(name, "-hf")),
                      again = path(concat(name, "-again"));
    const auto convert = [&](const std::string& in, const std::string& out, const char* to) {
      const CliResult result = run(concat("convert --in ", in, " --out ", out, " --to ", to));
      EXPECT_EQ(result.code, 0) << result.error;
      EXPECT_NE(result.out.find("lossless"), std::string::npos) << result.out;
    };
    convert(kFixtures + name, there, official);
    convert(there, back, hf);
    convert(back, again, official);
    expect_same_values(kFixtures + name, there);
    expect_same_values(there, back);
    EXPECT_EQ(read_file(there + "/model.safetensors"), read_file(again + "/model.safetensors"));
    EXPECT_EQ(read_file(there + "/config.json"), read_file(again + "/config.json"));
    EXPECT_LT(logit_error(there, kFixtures + name + "/logits.safetensors"), 2e-5);
    // The config in the official form on one side and in transformers' on the other.
    EXPECT_NE(read_file(there + "/config.json").find("compress_ratios"), std::string::npos);
    EXPECT_NE(read_file(back + "/config.json").find("mlp_layer_types"), std::string::npos);
  }
}

TEST_F(Transformers, AFloat32ModelInBf16IsSaidToBeRounded) {
  const CliResult result =
      run(concat("convert --in ", kFixtures, "f32 --out ", path("bf16"), " --to bf16"));
  EXPECT_EQ(result.code, 0) << result.error;
  EXPECT_NE(result.out.find("lossy"), std::string::npos) << result.out;
}

TEST_F(Transformers, TheShippedModelWritesTheSameTextAsOne) {
  // A model with a tokenizer: the shipped one as transformers would have it.
  CliResult result = run(concat("convert --in ", kNano, " --out ", path("hf"), " --to hf-bf16"));
  ASSERT_EQ(result.code, 0) << result.error;
  const std::string prompt = " --prompt 'It was a bright cold' --max-tokens 12 --temperature 0";
  const CliResult ours = run("generate --model " + kNano + prompt);
  const CliResult theirs = run("generate --model " + path("hf") + " --numerics released" + prompt);
  EXPECT_EQ(ours.code, 0) << ours.error;
  EXPECT_EQ(ours.out, theirs.out);
  // What AutoTokenizer and generate() need.
  const auto settings = nlohmann::json::parse(read_file(path("hf/tokenizer_config.json")));
  EXPECT_EQ(settings["bos_token"], "<｜begin▁of▁sentence｜>");
  EXPECT_EQ(settings["eos_token"], "<｜end▁of▁sentence｜>");
  EXPECT_EQ(settings["pad_token"], "<｜end▁of▁sentence｜>");
  const auto generation = nlohmann::json::parse(read_file(path("hf/generation_config.json")));
  EXPECT_EQ(generation["eos_token_id"], 1);
  EXPECT_TRUE(fs::exists(path("hf/chat_template.jinja")));
}

TEST_F(Transformers, SettingsThatExistStay) {
  const std::string in = path("in");
  fs::copy(kFixtures + "f32", in);
  write("in/tokenizer.json", testing::byte_tokenizer_json());
  write("in/tokenizer_config.json", R"({"pad_token": "<|mine|>", "chat_template": "mine"})");
  const CliResult result = run("convert --in " + in + " --out " + path("hf") + " --to hf-f32");
  ASSERT_EQ(result.code, 0) << result.error;
  const auto settings = nlohmann::json::parse(read_file(path("hf/tokenizer_config.json")));
  EXPECT_EQ(settings["pad_token"], "<|mine|>");
  EXPECT_EQ(settings["bos_token"], "<｜begin▁of▁sentence｜>");
  EXPECT_FALSE(fs::exists(path("hf/chat_template.jinja")));
}

TEST_F(Transformers, ATrainingRunStartsFromOne) {
  // The fixture's vocabulary is smaller than a tokenizer's: its config, with weights of ours.
  const std::string text = write("text.jsonl", R"({"text": "one two three four five six"})"
                                               "\n");
  const std::string config = read_file(kFixtures + "f32/config.json");
  const std::string sized =
      std::regex_replace(config, std::regex("\"vocab_size\": 48"),
                         concat("\"vocab_size\": ", testing::byte_tokenizer_size()));
  write("config.json", sized);
  write("tokenizer.json", testing::byte_tokenizer_json());
  const auto train = [&](const std::string& name, const std::string& init) {
    write(name + ".json",
          concat(R"({"model": ")", path("config.json"), R"(", "tokenizer": ")",
                 path("tokenizer.json"), R"(", "out": ")", path(name), R"(", "device": "cpu", )",
                 init, R"("sources": [{"name": "a", "files": [")", text, R"("]}],
      "stages": [{"name": "s", "tokens": 128, "row_length": 32, "attention": "sparse",
                  "numerics": "ideal", "mix": {"a": 1}}],
      "batch": [{"tokens": 64}], "learning_rate": {"peak": 0.001}})"));
    const CliResult result = run("train " + path(name + ".json"));
    EXPECT_EQ(result.code, 0) << result.error;
  };
  train("first", "");
  ASSERT_TRUE(fs::exists(path("first/model/config.json")));
  const CliResult there =
      run("convert --in " + path("first/model") + " --out " + path("hf") + " --to hf-bf16");
  EXPECT_EQ(there.code, 0) << there.error;
  train("second", concat(R"("init": {"checkpoint": ")", path("hf"), R"("}, )"));
  EXPECT_EQ(OfficialCheckpoint::open(path("second/model")).config().n_mtp_layers, 1);
  // As save_pretrained leaves it: without the MTP block that the config names.
  const TensorReader reader = TensorReader::open(path("hf"));
  std::vector<checkpoint::NamedTensor> main;
  for (const std::string& tensor : reader.names())
    if (!tensor.starts_with("mtp."))
      main.push_back({.name = tensor, .tensor = reader.tensor(tensor)});
  fs::create_directories(path("saved"));
  checkpoint::write_safetensors(path("saved/model.safetensors"), main);
  fs::copy(path("hf/config.json"), path("saved/config.json"));
  train("third", concat(R"("init": {"checkpoint": ")", path("saved"), R"("}, )"));
  EXPECT_EQ(OfficialCheckpoint::open(path("third/model")).config().n_mtp_layers, 0);
}

}  // namespace
}  // namespace hadal
