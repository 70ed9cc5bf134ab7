// The table of subcommands. A new one: a file named as it is, a declaration and a line here.
#include "apps/command.h"
#include "apps/text_commands.h"

namespace hadal::apps {

std::function<int()> define_verify(CLI::App& app);
std::function<int()> define_logits(CLI::App& app);
std::function<int()> define_generate(CLI::App& app);
std::function<int()> define_serve(CLI::App& app);
std::function<int()> define_eval(CLI::App& app);
std::function<int()> define_chat(CLI::App& app);
std::function<int()> define_convert(CLI::App& app);
std::function<int()> define_inspect(CLI::App& app);
std::function<int()> define_plan(CLI::App& app);
std::function<int()> define_plot(CLI::App& app);
std::function<int()> define_doctor(CLI::App& app);
std::function<int()> define_train(CLI::App& app);
std::function<int()> define_bench(CLI::App& app);

const std::vector<Command>& commands() {
  static const std::vector<Command> table = {
      {"generate", "continue a text",
       "  hadal generate --prompt 'Call me' --max-tokens 64 --temperature 0.7 --seed 1",
       define_generate},
      {"chat", "talk to a model",
       "  hadal chat --thinking-mode thinking --temperature 0.7 --seed 1\n"
       "  printf 'Who are you?\\nAnd who am I?\\n' | hadal chat --json",
       define_chat},
      {"serve", "answer requests of OpenAI's and Anthropic's clients, with a page to chat",
       "  hadal serve --port 8000\n"
       "  curl localhost:8000/v1/chat/completions -d '{\"messages\": [{\"role\": \"user\", "
       "\"content\": \"Hi\"}]}'",
       define_serve},
      {"eval", "how well a model predicts a text", "  hadal eval perplexity book.txt --model DIR",
       define_eval},
      {"verify", "compare a checkpoint's outputs with recorded ones",
       "  hadal verify tests/golden/ideal --gradients", define_verify},
      {"logits", "logits of every position of given token ids",
       "  hadal logits --model DIR --ids ids.safetensors --out logits.safetensors --chunk 64\n"
       "  hadal logits --ids ids.safetensors --out card.safetensors --as hopper",
       define_logits},
      {"convert", "a checkpoint to another storage or to transformers' names",
       "  hadal convert --in DeepSeek-V4-Flash --out flash-bf16 --to bf16", define_convert},
      {"inspect", "layers, parameters and bytes of a checkpoint or config",
       "hadal inspect --config config.json", define_inspect},
      {"plan", "FLOPs and KV bytes per token against V3.2",
       "hadal plan --config config.json --context 1000000 --svg cost.svg", define_plan},
      {"train", "train a model; stopped at any moment, the same command goes on",
       "  hadal train nano.json\n  hadal train v4-pro --plan --ranks 512", define_train},
      {"plot", "curves of a run as SVG",
       "  hadal plot runs/nano/metrics.jsonl --out curve.svg --keys loss/main,validation/loss "
       "--smooth 20",
       define_plot},
      {"doctor", "what this machine has, and which models fit on it", "  hadal doctor --json",
       define_doctor},
      {"bench", "memory bandwidth, the CPU's matrix kernel, and a server under load",
       "  hadal bench gemm --gib 1\n  hadal bench read --json\n"
       "  hadal bench serve --url http://127.0.0.1:8000 --rate 2 --duration 60",
       define_bench},
      {"tokenize", "text to token ids",
       "  echo 'Call me Ishmael.' | hadal tokenize --tokenizer DIR/tokenizer.json\n"
       "  hadal tokenize --tokenizer DIR/tokenizer.json --jsonl texts.jsonl > ids.jsonl",
       define_tokenize},
      {"detokenize", "token ids to text",
       "  echo 19923 3 | hadal detokenize --tokenizer DIR/tokenizer.json", define_detokenize},
      {"chat-encode", "messages (JSON) to the prompt of the chat encoding",
       "  echo '[{\"role\": \"user\", \"content\": \"Hello\"}]' | hadal chat-encode "
       "--thinking-mode chat",
       define_chat_encode},
      {"chat-parse", "a completion to a message (JSON); exit code 1 if something of it is missing",
       "  hadal chat-parse --thinking-mode thinking completion.txt", define_chat_parse},
      {"tokenizer-cut", "make a small tokenizer from the merges a text uses",
       "  hadal tokenizer-cut --tokenizer DIR/tokenizer.json --vocab-size 8192 --min-count 5 \\\n"
       "    --out small.json books.txt",
       define_tokenizer_cut},
  };
  return table;
}

}  // namespace hadal::apps
