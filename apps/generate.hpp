// SPDX-License-Identifier: MIT
// zamba-generate: a model continues a prompt, the turns of a conversation, or a file of prompts.
#pragma once

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>
#include <zamba/generate/generator.hpp>
#include <zamba/io/json.hpp>
#include <zamba/io/json_lines.hpp>

#include "end_tokens.hpp"
#include "models.hpp"
#include "numbers.hpp"
#include "text.hpp"

namespace zamba_apps {

inline bool is_one_of(const std::vector<Token>& tokens, Token token) {
  return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

struct GenerateOptions {
  ModelOptions model;
  std::string prompt, prompt_file, batch, output, turn = "{}\n";
  bool chat = false, quiet = false, ignore_end = false;
  Index max_new_tokens = 128, max_length = 0, rows = 8;
  std::uint64_t seed = 0;
  std::vector<Token> ends;  // the tokens that end a text, known when the model is
  zamba::SamplerOptions sampling{.temperature = 0.8, .top_p = 0.95};
  bool has_prompt = false;  // an empty one is one too

  /// Tokens that stand for nothing are never drawn, unless they end a text.
  zamba::GenerationOptions generation(const Text& text) const {
    zamba::GenerationOptions options{.sampling = sampling, .max_new_tokens = max_new_tokens, .seed = {seed}};
    if (!ignore_end) options.stop_tokens = ends;
    options.excluded_tokens = text.without_text();
    std::erase_if(options.excluded_tokens, [&](Token token) { return is_one_of(options.stop_tokens, token); });
    return options;
  }
};

inline void add_generate_flags(CLI::App& app, GenerateOptions& o) {
  o.model.add_to(app);
  app.add_option("-p,--prompt", o.prompt, "text to continue");
  app.add_option("--prompt-file", o.prompt_file, "file with the text to continue");
  app.add_flag("--chat", o.chat, "each line of the input is a turn; the model reads it after all that was said before");
  app.add_option("--batch", o.batch, "file of JSON lines, each an object with a \"prompt\"; JSON lines come out");
  app.add_option("--output", o.output, "with --batch: the file to write, whole or not at all, instead of the screen");
  app.add_option("--turn", o.turn, "with --chat: what the model reads for a line {}; \\n is a new line");
  app.add_option("-n,--max-new-tokens", o.max_new_tokens, "tokens to write at most, per prompt or turn")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--max-length", o.max_length, "tokens that a sequence may have; 0: as needed, in a chat 4096")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--rows", o.rows, "with --batch: prompts computed together")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("-t,--temperature", o.sampling.temperature, "0: always the likeliest token")->capture_default_str();
  app.add_option("--top-k", o.sampling.top_k, "draw from the k likeliest; 0: all")->capture_default_str();
  app.add_option("--top-p", o.sampling.top_p, "draw from the likeliest that have this share; 1: all")
      ->capture_default_str();
  app.add_option("--min-p", o.sampling.min_p, "leave out what is less than this times as likely as the likeliest")
      ->capture_default_str();
  app.add_option("--repetition-penalty", o.sampling.repetition_penalty, "makes what was said less likely; 1: off")
      ->capture_default_str();
  app.add_option("--seed", o.seed, "the same seed draws the same text")->capture_default_str();
  app.add_flag("--ignore-end", o.ignore_end, "go on behind the tokens that end a text");
  app.add_flag("-q,--quiet", o.quiet, "no speed and memory at the end");
  app.footer(
      "\nThe text goes to the standard output as it comes, everything else to the standard error.\n"
      "Ctrl-C ends the text after the present token, a second one the program.\n"
      "\nExamples:\n"
      "  zamba-generate my-model --prompt 'Once upon a time' -n 200\n"
      "  zamba-generate my-model --prompt-file question.txt --temperature 0\n"
      "  zamba-generate my-model --device cuda --prompt 'Once upon a time'\n"
      "  zamba-generate my-model --chat --turn 'User: {}\\nAssistant:'\n"
      "  zamba-generate my-model --batch prompts.jsonl --output answers.jsonl --rows 16");
}

/// What was done, and how long it took.
class Statistics {
 public:
  template <class F>
  auto time(double& seconds, F&& work) {
    const auto begin = std::chrono::steady_clock::now();
    auto result = work();
    seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return result;
  }

  void print(std::ostream& err) const {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    err << prompt_tokens << " tokens read, " << new_tokens << " written in " << rounded(seconds) << " s ("
        << rounded(static_cast<double>(new_tokens) / std::max(seconds, 1e-9)) << " tokens/s), state "
        << bytes_text(static_cast<double>(state_bytes)) << " reserved, peak memory "
        << bytes_text(1024. * static_cast<double>(usage.ru_maxrss)) << "\n";
  }

  Index prompt_tokens = 0, new_tokens = 0;
  std::size_t state_bytes = 0;
  double seconds = 0;
};

/// The tokens of a prompt that begins a sequence. There must be one at least.
inline std::vector<Token> prompt_tokens(const Text& text, std::string_view prompt, const std::string& name) {
  std::vector<Token> tokens = text.encode(prompt, true);
  zamba::require(!prompt.empty() || text.begin(), name, " is empty, and this model has no token that begins a text");
  if (tokens.empty() && text.begin()) tokens.push_back(*text.begin());
  return tokens;
}

/// Room for so many tokens, or what the user allows.
inline Index length_for(const GenerateOptions& options, Index prompt, const std::string& name) {
  zamba::require(options.max_length == 0 || prompt <= options.max_length, name, " has ", prompt,
                 " tokens, over --max-length ", options.max_length);
  if (options.max_length) return options.max_length;
  return prompt + std::min(options.max_new_tokens, std::numeric_limits<Index>::max() - prompt);
}

/// One prompt, or one turn: the text of the new tokens goes out as they come, but for tokens that end it.
inline std::vector<Token> stream(const zamba::AnyModel& model, zamba::AnyState& state, const std::vector<Token>& prompt,
                                 const zamba::GenerationOptions& generation, const std::vector<Token>& ends,
                                 const Text& text, Console& console, Statistics& statistics) {
  Text::Stream words(text);
  const auto show = [&](Index, Token token) {
    if (!is_one_of(ends, token)) console.out << words.push(token) << std::flush;
    return console.out.good() && !Interrupt::came();
  };
  std::vector<Token> tokens;
  try {
    tokens =
        statistics.time(statistics.seconds, [&] { return zamba::generate(model, state, prompt, generation, show); });
  } catch (const zamba::GenerationError&) {
    console.out << words.finish() << "\n" << std::flush;
    throw;
  }
  console.out << words.finish() << "\n" << std::flush;
  statistics.prompt_tokens += static_cast<Index>(prompt.size());
  statistics.new_tokens += static_cast<Index>(tokens.size());
  statistics.state_bytes = state.bytes();
  return tokens;
}

inline void chat(const zamba::AnyModel& model, const Text& text, const GenerateOptions& options, Console& console,
                 Statistics& statistics) {
  std::string around = options.turn;
  for (std::size_t at; (at = around.find("\\n")) != around.npos;) around.replace(at, 2, "\n");
  const std::size_t place = around.find("{}");
  if (place == around.npos) throw UsageError("--turn must hold {}, where the line stands; came '" + options.turn + "'");
  auto state = model.new_state({.batch = 1, .max_length = options.max_length ? options.max_length : 4096});
  zamba::GenerationOptions generation = options.generation(text);
  std::vector<Token> pending;  // the last new token, which the state does not hold yet
  std::string line;
  for (;; ++generation.stream) {
    if (console.in_terminal) console.err << "> " << std::flush;
    if (Interrupt::came() || !std::getline(console.in, line)) break;
    const std::string turn = around.substr(0, place) + line + around.substr(place + 2);
    std::vector<Token> prompt = std::exchange(pending, {});
    const bool first = state.length() == 0 && prompt.empty();
    const auto said = first ? prompt_tokens(text, turn, "the first turn") : text.encode(turn);
    prompt.insert(prompt.end(), said.begin(), said.end());
    zamba::require(!prompt.empty(), "the turn is empty");
    const Index length = state.length() + static_cast<Index>(prompt.size());
    zamba::require(length < state.max_length(), "the conversation has ", length, " tokens, and --max-length is ",
                   state.max_length());
    const auto tokens = stream(model, state, prompt, generation, options.ends, text, console, statistics);
    if (!tokens.empty()) pending = {tokens.back()};
  }
}

/// The objects of a file of JSON lines, each with a text "prompt", their fields in their order.
inline std::vector<nlohmann::ordered_json> read_prompts(const std::string& path) {
  std::vector<nlohmann::ordered_json> prompts;
  zamba::for_each_json_line(path, [&](std::string_view line, const std::string& place) {
    auto object = zamba::detail::parse_object<nlohmann::ordered_json>(line, place);
    zamba::require(object.contains("prompt") && object["prompt"].is_string(), place,
                   ": field 'prompt': wanted a text, came ",
                   object.contains("prompt") ? zamba::detail::value_text(object["prompt"]) : "none");
    prompts.push_back(std::move(object));
  });
  zamba::require(!prompts.empty(), "'", path, "' holds no prompts");
  return prompts;
}

inline void batch(const zamba::AnyModel& model, const Text& text, const GenerateOptions& options, Console& console,
                  Statistics& statistics) {
  auto prompts = read_prompts(options.batch);
  std::vector<std::vector<Token>> tokens;
  Index longest = 1;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const std::string name = options.batch + ", prompt " + std::to_string(i + 1);
    tokens.push_back(prompt_tokens(text, prompts[i]["prompt"].get<std::string>(), name));
    longest = std::max(longest, length_for(options, static_cast<Index>(tokens[i].size()), name));
  }
  std::string written, failures, why;  // failures: the prompts whose text ended by an error; why: the last of them
  zamba::GenerationOptions generation = options.generation(text);
  for (std::size_t first = 0; first < prompts.size(); first += static_cast<std::size_t>(options.rows)) {
    const std::size_t end = std::min(prompts.size(), first + static_cast<std::size_t>(options.rows));
    const std::vector<std::vector<Token>> rows(tokens.begin() + static_cast<std::ptrdiff_t>(first),
                                               tokens.begin() + static_cast<std::ptrdiff_t>(end));
    auto state = model.new_state({.batch = static_cast<Index>(rows.size()), .max_length = longest});
    generation.stream = first;
    std::vector<Index> failed;
    const auto output = statistics.time(statistics.seconds, [&] {
      try {
        return zamba::generate(model, state, rows, generation, [](Index, Token) { return !Interrupt::came(); });
      } catch (const zamba::GenerationError& error) {
        failed = error.rows();
        for (const Index row : failed)
          failures += (failures.empty() ? "" : ", ") + std::to_string(static_cast<Index>(first) + row + 1);
        why = without_prefix(error);
        return error.tokens();
      }
    });
    zamba::require(!Interrupt::came(), "ended by Ctrl-C after ", first, " of ", prompts.size(), " prompts",
                   options.output.empty() ? "" : "; nothing was written");
    statistics.state_bytes = state.bytes();
    std::string lines;
    for (std::size_t r = 0; r < rows.size(); ++r) {
      statistics.prompt_tokens += static_cast<Index>(rows[r].size());
      statistics.new_tokens += static_cast<Index>(output[r].size());
      auto& object = prompts[first + r];
      const bool ended = !output[r].empty() && is_one_of(generation.stop_tokens, output[r].back());
      const bool error = std::find(failed.begin(), failed.end(), static_cast<Index>(r)) != failed.end();
      object["text"] = text.decode(std::span<const Token>(output[r]).first(output[r].size() - ended));
      object["tokens"] = output[r].size();
      object["end"] = error ? "error" : ended ? "stop" : "length";
      lines += object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
    }
    if (options.output.empty())
      console.out << lines << std::flush;
    else
      written += lines;
  }
  if (!options.output.empty())
    zamba::replace_file(options.output, [&](zamba::FileWriter& out) { out.write(std::string_view(written)); });
  zamba::require(failures.empty(), options.batch, ": the text of prompt ", failures, " ended by an error; ", why);
}

inline int generate(std::vector<std::string> arguments, const zamba::Registry& registry, Console& console) {
  GenerateOptions options;
  CLI::App app("A model continues a prompt, a conversation, or many prompts at once.", "zamba-generate");
  add_generate_flags(app, options);
  return run(app, std::move(arguments), console, [&] {
    const auto modes = app.count("--prompt") + app.count("--prompt-file") + app.count("--chat") + app.count("--batch");
    if (options.model.directory.empty()) throw UsageError("DIR is missing, the folder of the model");
    if (modes != 1)
      throw UsageError("wanted one of --prompt, --prompt-file, --chat and --batch, came " + std::to_string(modes));
    try {
      options.sampling.check();
    } catch (const zamba::Error& error) {
      throw UsageError(error.what());
    }
    if (app.count("--prompt-file")) options.prompt = read_text_file(options.prompt_file);
    if (app.count("--batch")) read_prompts(options.batch);  // before the weights, which take a while
    const zamba::AnyModel model = options.model.load(registry, console);
    const Text text(options.model.directory, model.vocabulary());
    if (text.of_bytes() && !options.quiet) console.err << "no tokenizer.json: a byte is a token\n";
    options.ends = end_tokens(options.model.directory, text, model.vocabulary());
    Statistics statistics;
    if (options.chat) {
      chat(model, text, options, console, statistics);
    } else if (!options.batch.empty()) {
      batch(model, text, options, console, statistics);
    } else {
      const auto prompt = prompt_tokens(text, options.prompt, "the prompt");
      const Index length = length_for(options, static_cast<Index>(prompt.size()), "the prompt");
      auto state = model.new_state({.batch = 1, .max_length = std::max<Index>(1, length)});
      stream(model, state, prompt, options.generation(text), options.ends, text, console, statistics);
    }
    if (!options.quiet) statistics.print(console.err);
  });
}

}  // namespace zamba_apps
