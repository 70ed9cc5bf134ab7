// The table of subcommands. A new one: a file named as it is, a declaration and a line here.
#include "apps/command.h"
#include "apps/text_commands.h"

namespace hadal::apps {

const std::vector<Command>& commands() {
  static const std::vector<Command> table = {
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
      {"chat-parse", "a completion to a message (JSON); exit code 1 if it is malformed",
       "  hadal chat-parse --thinking-mode thinking completion.txt", define_chat_parse},
      {"tokenizer-cut", "make a small tokenizer from the merges a text uses",
       "  hadal tokenizer-cut --tokenizer DIR/tokenizer.json --vocab-size 8192 --min-count 5 \\\n"
       "    --out small.json books.txt",
       define_tokenizer_cut},
  };
  return table;
}

}  // namespace hadal::apps
