// SPDX-License-Identifier: MIT
// The programs as functions of their arguments: what they print, what they write, and with which status they end.
#include <sstream>

#include <zamba/checkpoints/zamba.hpp>

#include <doctest/doctest.h>
#include <apps/eval.hpp>
#include <apps/generate.hpp>
#include <apps/info.hpp>
#include <tests/support/cases.hpp>
#include <tests/support/nets.hpp>

#include "small_models.hpp"

namespace {

using namespace zamba;
using zamba_test::contains;
using zamba_test::read_text;
using zamba_test::write_text;
using Arguments = std::vector<std::string>;

struct Result {
  int status;
  std::string out, err;
};

template <class Program>
Result run(Program&& program, const Arguments& arguments, const std::string& input = "") {
  static const Registry registry = zamba_apps::compiled_models();
  std::istringstream in(input);
  std::ostringstream out, err;
  zamba_apps::Console console{in, out, err};
  const int status = program(arguments, registry, console);
  return {status, out.str(), err.str()};
}

Result info(const Arguments& arguments) { return run(zamba_apps::info, arguments); }
Result generate(const Arguments& arguments, const std::string& input = "") {
  return run(zamba_apps::generate, arguments, input);
}
Result eval(const Arguments& arguments) { return run(zamba_apps::eval, arguments); }

/// A folder with a model of bytes, made once, and room for the files of a test.
const std::filesystem::path& folder() {
  static const zamba_test::TemporaryFolder folder;
  static const bool made = [] {
    save_huggingface(zamba_test::random_model<zamba_test::ByteNet, float>(), folder.path / "model");
    auto config = nlohmann::json::parse(read_text(folder.path / "model" / "config.json"));
    config["eos_token_id"] = nullptr;  // NUL alone ends a text
    write_text(folder.path / "model" / "config.json", config.dump());
    return true;
  }();
  REQUIRE(made);
  return folder.path;
}
const std::string& model_folder() {
  static const std::string path = (folder() / "model").string();
  return path;
}
const Model<zamba_test::ByteNet>& model() {
  static const auto model = load_huggingface<zamba_test::ByteNet>(model_folder());
  return model;
}
std::string file(const std::string& name, const std::string& text) {
  write_text(folder() / name, text);
  return (folder() / name).string();
}

std::vector<Token> bytes(std::string_view text) { return ByteTokenizer().encode(text); }

/// What greedy decoding adds to a prompt, a NUL that ends it among it; and the text of that.
std::vector<Token> continuation(const std::string& prompt, Index count) {
  auto state = model().new_state({.max_length = 512});
  return generate(model(), state, bytes(prompt),
                  {.sampling = {.temperature = 0}, .max_new_tokens = count, .stop_tokens = {0}});
}
std::string continued(const std::string& prompt, Index count) {
  std::vector<Token> tokens = continuation(prompt, count);
  if (!tokens.empty() && tokens.back() == 0) tokens.pop_back();
  return ByteTokenizer().decode(tokens);
}

/// A copy of the model's folder in which eos_token_id of both files is as given; null: the file has none.
std::string folder_with_ends(const std::string& name, const nlohmann::json& config,
                             const nlohmann::json& generation_config) {
  const auto to = folder() / name;
  std::filesystem::remove_all(to);
  std::filesystem::copy(model_folder(), to);
  auto object = nlohmann::json::parse(read_text(to / "config.json"));
  object["eos_token_id"] = config;
  write_text(to / "config.json", object.dump());
  if (!generation_config.is_null())
    write_text(to / "generation_config.json", nlohmann::json{{"eos_token_id", generation_config}}.dump());
  return to.string();
}

void refused(const Result& result, int status, const std::string& message) {
  CHECK(result.status == status);
  CHECK(result.out == "");
  CHECK_MESSAGE(contains(result.err, message), result.err);
}

}  // namespace

TEST_SUITE("programs/programs") {
  TEST_CASE("the name that was meant") {
    using zamba_apps::nearest;
    CHECK(zamba_apps::edit_distance("promt", "prompt") == 1);
    CHECK(zamba_apps::edit_distance("", "abc") == 3);
    CHECK(zamba_apps::edit_distance("kitten", "sitting") == 3);
    CHECK(nearest("--tempreature", {"--prompt", "--temperature"}) == "--temperature");
    CHECK(nearest("--x", {"--prompt", "--temperature"}) == std::nullopt);
    CHECK(nearest("Zamba-7", {"Mamba-130M", "Zamba-7B-v1"}) == "Zamba-7B-v1");
  }

  TEST_CASE("numbers for people") {
    CHECK(zamba_apps::grouped(7232490496) == "7,232,490,496");
    CHECK(zamba_apps::grouped(999) == "999");
    CHECK(zamba_apps::grouped(-1000) == "-1,000");
    CHECK(zamba_apps::bytes_text(14.51e9) == "14.51 GB");
    CHECK(zamba_apps::bytes_text(999) == "999 B");
    CHECK(zamba_apps::bytes_text(999.96) == "1 kB");
    std::ostringstream out;
    zamba_apps::print_table(out, {{"a", "10"}, {"bcd", "7"}});
    CHECK(out.str() == "a    10\nbcd   7\n");
  }

  TEST_CASE("info: by name, by folder, as a table and as a picture") {
    using Net = zamba_test::CapitalsNet;
    static_assert(std::is_same_v<Net, zamba_test::ZambaCase>);
    const std::string picture = (folder() / "state.svg").string();
    const Result result = info({"Zamba-Case", "--lengths", "100,2000", "--svg", picture, "--dtype", "f32"});
    CHECK(result.status == 0);
    CHECK(result.err == "");
    CHECK(contains(result.out, "parameters                                              " +
                                   zamba_apps::grouped(parameter_count<Net>)));
    CHECK(contains(result.out, zamba_apps::grouped(active_parameter_count<Net>)));
    CHECK(contains(result.out, zamba_apps::grouped(flops_per_token<Net>)));
    for (const Index length : {100, 2000})
      for (const std::size_t bytes : {static_cast<std::size_t>(state_bytes<Net, float>(1, length)),
                                      Model<Net, float>::workspace_bytes({1, length})})
        CHECK(contains(result.out, zamba_apps::bytes_text(static_cast<double>(bytes))));
    CHECK(contains(read_text(picture), ">zamba-case</text>"));
    CHECK(info({zamba_test::case_path("zamba").string()}).out.starts_with("zamba-case, model_type zamba, 9 layers of"));
    CHECK(contains(info({"--list"}).out, "bytes"));
    const auto trained = [&](const std::string& shape) {
      return info({"zamba-case", "--dtype", "f32", "--train", shape}).out;
    };
    CHECK(contains(trained("2,100"), "Training with AdamW, micro-batches of 2 x 100 tokens"));
    CHECK(trained("2,100") == trained("2,100,everything"));
    CHECK(trained("2,100") != trained("2,100,costly"));
    CHECK(trained("2,100,layer_inputs") != trained("2,100,costly"));
    CHECK(contains(info({"--help"}).out, "Examples:"));
  }

  TEST_CASE("info: wrong input") {
    refused(info({}), 2, "zamba-info: MODEL is missing");
    refused(info({"--lits"}), 2, "zamba-info: --lits is no flag of zamba-info; did you mean --list?");
    refused(info({"zamba-case", "--train", "2"}), 2, "--train wants ROWS,LENGTH or ROWS,LENGTH,KEEP, came '2'");
    refused(info({"zamba-case", "--train", "2,x"}), 2, "--train: their length must be from 1 to");
    refused(info({"zamba-case", "--train", "2,5,most"}), 2,
            "--train: KEEP is everything, costly or layer_inputs, came 'most'");
    refused(info({"zamba-case", "more"}), 2, "'more' is one argument too many");
    refused(info({"zamba-case", "--lengths", "0"}), 2, "--lengths");
    refused(info({"zamba-cose"}), 1,
            "'zamba-cose' is no folder, and no model of that name is compiled in; did you mean zamba-case?");
    refused(info({zamba_test::case_path("zamba-gqa").string()}), 1,
            "describes none of the models that are compiled in");
    const Result result = info({"zamba-case", "--svg", (folder() / "absent" / "a.svg").string()});
    CHECK(result.status == 1);
    CHECK(contains(result.err, "cannot write"));
  }

  TEST_CASE("generate: a prompt, from the command line or a file") {
    const Arguments greedy{model_folder(), "-t", "0", "-n", "40"};
    Arguments arguments = greedy;
    arguments.insert(arguments.end(), {"--prompt", "hello"});
    Result result = generate(arguments);
    CHECK(result.status == 0);
    CHECK(result.out == continued("hello", 40) + "\n");
    CHECK(contains(result.err, "5 tokens read, "));
    CHECK(contains(result.err, "peak memory"));
    arguments = greedy;
    arguments.insert(arguments.end(), {"--prompt-file", file("prompt.txt", "hello"), "-q"});
    result = generate(arguments);
    CHECK(result.out == continued("hello", 40) + "\n");
    CHECK(result.err == "");
    // Draws follow the seed.
    const auto drawn = [&](const char* seed) {
      return generate({model_folder(), "--prompt", "hello", "-n", "60", "--seed", seed}).out;
    };
    CHECK(drawn("1") == drawn("1"));
    CHECK(drawn("1") != drawn("2"));
  }

  TEST_CASE("generate: turns over one state") {
    const Result result =
        generate({model_folder(), "--chat", "-t", "0", "-n", "12", "--turn", "{}\\n", "-q"}, "one\ntwo\n");
    CHECK(result.status == 0);
    auto state = model().new_state({.max_length = 512});
    const GenerationOptions options{.sampling = {.temperature = 0}, .max_new_tokens = 12, .stop_tokens = {0}};
    const auto first = zamba::generate(model(), state, bytes("one\n"), options);
    std::vector<Token> said{first.back()};
    for (const Token token : bytes("two\n")) said.push_back(token);
    const auto second = zamba::generate(model(), state, said, options);
    const auto shown = [](std::vector<Token> tokens) {
      if (tokens.back() == 0) tokens.pop_back();
      return ByteTokenizer().decode(tokens) + "\n";
    };
    CHECK(result.out == shown(first) + shown(second));
    refused(generate({model_folder(), "--chat", "--turn", "line"}, "one\n"), 2, "--turn must hold {}");
    const Result full = generate({model_folder(), "--chat", "--max-length", "6"}, "one\ntwo\n");
    CHECK(full.status == 1);
    CHECK(contains(full.err, "and --max-length is 6"));
  }

  TEST_CASE("generate: many prompts, as they are alone") {
    const std::string prompts = file("prompts.jsonl",
                                     "{\"id\": 7, \"prompt\": \"hello\"}\n\n{\"prompt\": \"a long one\"}\n"
                                     "{\"prompt\": \"x\"}\n");
    const std::string output = (folder() / "answers.jsonl").string();
    const Arguments arguments{model_folder(), "--batch", prompts, "-t", "0", "-n", "20", "--rows", "2"};
    const Result result = generate(arguments);
    CHECK(result.status == 0);
    std::istringstream lines(result.out);
    std::string line;
    for (const char* prompt : {"hello", "a long one", "x"}) {
      REQUIRE(std::getline(lines, line));
      const auto object = nlohmann::json::parse(line);
      CHECK(object["prompt"] == prompt);
      // Bytes that are no UTF-8 are replaced in JSON, as in the text here.
      CHECK(nlohmann::json(object["text"]).dump() ==
            nlohmann::json::parse(
                nlohmann::json(continued(prompt, 20)).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace))
                .dump());
      CHECK(object.contains("id") == (object["prompt"] == "hello"));
      CHECK(object["tokens"] == continuation(prompt, 20).size());
      CHECK(object["end"] == (continuation(prompt, 20).back() == 0 ? "stop" : "length"));
    }
    CHECK(!std::getline(lines, line));
    Arguments to_file = arguments;
    to_file.insert(to_file.end(), {"--output", output});
    CHECK(generate(to_file).out == "");
    CHECK(read_text(output) == result.out);
  }

  TEST_CASE("generate: every token that ends a text, of the tokenizer and of both files, ends it") {
    const std::string none = folder_with_ends("ends-none", nullptr, nullptr);
    const auto text = [](const std::string& m, const Arguments& more = {}) {
      Arguments arguments{m, "--prompt", "hello", "-t", "0", "-n", "30", "-q"};
      arguments.insert(arguments.end(), more.begin(), more.end());
      const Result result = generate(arguments);
      CHECK_MESSAGE(result.status == 0, result.err);
      return result.out;
    };
    const std::string whole = text(none);
    std::vector<Token> tokens = continuation("hello", 30);
    REQUIRE(whole == continued("hello", 30) + "\n");
    REQUIRE(tokens.size() > 8);
    const Token end = tokens[6];
    const auto first = static_cast<std::size_t>(std::find(tokens.begin(), tokens.end(), end) - tokens.begin());
    const std::string cut = ByteTokenizer().decode(std::span<const Token>(tokens).first(first)) + "\n";
    // Ids that greedy decoding does not draw here, beside the one that it does.
    Token other = 1;
    while (std::find(tokens.begin(), tokens.end(), other) != tokens.end()) ++other;
    using nlohmann::json;
    CHECK(text(folder_with_ends("ends", end, nullptr)) == cut);
    CHECK(text(folder_with_ends("ends", json{other, end}, nullptr)) == cut);
    CHECK(text(folder_with_ends("ends", nullptr, end)) == cut);
    CHECK(text(folder_with_ends("ends", other, json{end, other})) == cut);
    CHECK(text(folder_with_ends("ends", json::array(), nullptr)) == whole);
    CHECK(text(folder_with_ends("ends", other, nullptr)) == whole);
    const std::string m = folder_with_ends("ends", other, json{end});
    // Behind them it goes on if asked, and they are no text.
    std::string without;
    for (const Token token : tokens)
      if (token != end && token != 0 && token != other) without += static_cast<char>(token);
    CHECK(text(m, {"--ignore-end"}).starts_with(without));
    const Result lines =
        generate({m, "--batch", file("one.jsonl", "{\"prompt\": \"hello\"}\n"), "-t", "0", "-n", "30"});
    CHECK(nlohmann::json::parse(lines.out)["end"] == "stop");
    CHECK(nlohmann::json::parse(lines.out)["tokens"] == first + 1);
    const auto bad = [&](const json& config, const json& generation_config, const std::string& message) {
      refused(generate({folder_with_ends("bad-ends", config, generation_config), "--prompt", "a"}), 1, message);
    };
    bad("</s>", nullptr, "config.json: eos_token_id: wanted an integer of 0 to 255, came \"</s>\"");
    bad(256, nullptr, "config.json: eos_token_id: wanted an integer of 0 to 255, came 256");
    bad(nullptr, json{0, -1}, "generation_config.json: eos_token_id[1]: wanted an integer of 0 to 255, came -1");
    write_text(std::filesystem::path(m) / "generation_config.json", "{");
    refused(generate({m, "--prompt", "a"}), 1, "generation_config.json: not valid JSON");
  }

  TEST_CASE("generate: ids that stand for nothing are never drawn") {
    // A tokenizer of all bytes but the upper case letters, for a model of 256 tokens.
    nlohmann::json vocabulary;
    const auto& alphabet = detail::ByteAlphabet::get();
    for (int byte = 0; byte < 256; ++byte)
      if (byte < 'A' || byte > 'Z') vocabulary[alphabet.write(std::string(1, static_cast<char>(byte)))] = byte;
    const std::string m = folder_with_ends("holes", nullptr, nullptr);
    write_text(std::filesystem::path(m) / "tokenizer.json",
               nlohmann::json{{"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", nlohmann::json::array()}}},
                              {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
                              {"decoder", {{"type", "ByteLevel"}}}}
                   .dump());
    std::string prompts;
    for (int i = 0; i < 64; ++i) prompts += "{\"prompt\": \"hello " + std::to_string(i) + "\"}\n";
    const Result result = generate({m, "--batch", file("many.jsonl", prompts), "-t", "5", "-n", "30", "--top-p", "1"});
    CHECK_MESSAGE(result.status == 0, result.err);
    std::istringstream lines(result.out);
    int count = 0;
    for (std::string line; std::getline(lines, line); ++count)
      for (const char letter : nlohmann::json::parse(line)["text"].get<std::string>())
        REQUIRE((letter < 'A' || letter > 'Z'));
    CHECK(count == 64);
  }

  TEST_CASE("generate: a prompt whose logits are NaN is named, and the others are written") {
    using zamba_test::Transformer;  // of 29 bytes
    const auto whole = zamba_test::random_model<Transformer, float>();
    auto state = whole.new_state({.batch = 2, .max_length = 16});
    const std::vector<std::vector<Token>> prompts{{3, 1}, {4}};
    const auto free = zamba::generate(whole, state, prompts, {.sampling = {.temperature = 0}, .max_new_tokens = 5});
    Token bad = 5;  // one that these never read
    while (zamba_apps::is_one_of(free[0], bad) || zamba_apps::is_one_of(free[1], bad)) ++bad;
    const AnyModel model(zamba_test::nan_where_read<Transformer, float>(bad), "broken");
    std::string lines;
    for (const std::vector<Token>& prompt : {prompts[0], {bad}, prompts[1]})
      lines += nlohmann::json{{"prompt", ByteTokenizer().decode(prompt)}}.dump() + "\n";
    zamba_apps::GenerateOptions options;
    options.batch = file("some.jsonl", lines);
    options.output = (folder() / "some-answers.jsonl").string();
    options.max_new_tokens = 5;
    options.sampling = {.temperature = 0};
    std::istringstream in;
    std::ostringstream out, err;
    zamba_apps::Console console{in, out, err};
    zamba_apps::Statistics statistics;
    CHECK_THROWS_WITH_AS(
        zamba_apps::batch(model, zamba_apps::Text(folder() / "absent", 29), options, console, statistics),
        ("zamba: " + options.batch +
         ": the text of prompt 2 ended by an error; generate: 1 of 3 rows ended early: row 1, after 0 new tokens: "
         "argmax: the logit of token 0 is NaN")
            .c_str(),
        Error);
    std::istringstream written(read_text(options.output));
    for (const std::vector<Token>& tokens : {free[0], {}, free[1]}) {
      std::string line;
      REQUIRE(std::getline(written, line));
      const auto object = nlohmann::json::parse(line);
      CHECK(object["text"] == ByteTokenizer().decode(tokens));
      CHECK(object["end"] == (tokens.empty() ? "error" : "length"));
    }
  }

  TEST_CASE("the device is the wanted one") {
    const std::string& m = model_folder();
    const Arguments prompt{m, "--prompt", "hello", "-t", "0", "-n", "20", "-q"};
    const auto on = [](Arguments arguments, const char* device) {
      arguments.insert(arguments.end(), {"--device", device});
      return arguments;
    };
    CHECK(generate(on(prompt, "cpu")).out == continued("hello", 20) + "\n");
    const Arguments text{m, "--text", file("device.txt", "the quick brown fox jumps"), "--length", "16"};
    for (const Result& result : {generate(on(prompt, "gpu")), eval(on(text, "gpu")), info(on({"bytes"}, "gpu"))})
      refused(result, 2, "--device: gpu not in {cpu,cuda}");

    const auto models = zamba_apps::compiled_models();
    const bool compiled = std::any_of(models.models().begin(), models.models().end(),
                                      [](const ModelFacts& facts) { return facts.device == "cuda"; });
    CHECK(contains(info({"--list"}).out, " cuda ") == compiled);
    const Result written = generate(on(prompt, "cuda")), read = eval(on(text, "cuda")),
                 told = info(on({"bytes"}, "cuda"));
    CHECK(told.status == (compiled ? 0 : 1));
    if (!compiled) {
      for (const Result& result : {written, read, told})
        refused(result, 1, "--device cuda: this program was built without CUDA");
    } else if (written.status != 0) {  // there is no GPU
      const char* why =
          contains(written.err, "cudaErrorNoDevice") ? "cudaErrorNoDevice" : "cudaErrorInsufficientDriver";
      for (const Result& result : {written, read}) refused(result, 1, why);
    } else {
      CHECK(written.out == continued("hello", 20) + "\n");
      const LossSum loss = text_loss(model(), bytes("the quick brown fox jumps"), {.length = 16});
      const std::string name = "nats a token";
      CHECK(std::stod(read.out.substr(read.out.find(name) + name.size())) ==
            doctest::Approx(loss.mean()).epsilon(1e-3));
      refused(generate({zamba_test::case_path("zamba").string(), "--prompt", "A", "--device", "cuda"}), 1,
              "is wanted on cuda, but compiled in are:");
    }
  }

  TEST_CASE("generate: wrong input") {
    const std::string& m = model_folder();
    refused(generate({}), 2, "DIR is missing");
    refused(generate({m}), 2, "wanted one of --prompt, --prompt-file, --chat and --batch, came 0");
    refused(generate({m, "--chat", "--prompt", "a"}), 2, "came 2");
    refused(generate({m, "--promt", "a"}), 2, "--promt is no flag of zamba-generate; did you mean --prompt?");
    refused(generate({m, "--prompt", "a", "--top-p", "2"}), 2, "top_p must be above 0 and at most 1 (off), got 2");
    refused(generate({m, "--prompt", "a", "--top-k", "many"}), 2, "many");
    refused(generate({m, "--prompt", "a", "--dtype", "int8"}), 2, "int8");
    refused(generate({m, "--prompt", "a", "--threads", "-1"}), 2, "--threads");
    refused(generate({m, "--prompt", "a", "--dtype", "bf16"}), 1, "is wanted in BF16, but compiled in are");
    refused(generate({m, "--prompt", ""}), 1, "the prompt is empty");
    refused(generate({m, "--prompt", "hello", "--max-length", "4"}), 1, "the prompt has 5 tokens, over --max-length 4");
    refused(generate({m, "--prompt-file", (folder() / "absent").string()}), 1, "No such file or directory");
    refused(generate({(folder() / "absent").string(), "--prompt", "a"}), 1, "is not a folder");
    refused(generate({zamba_test::case_path("zamba").string(), "--prompt", "a"}), 1,
            "byte 0 of the text is 97, outside the model's vocabulary of 96");
    const std::string output = (folder() / "none.jsonl").string();
    const auto batch = [&](const std::string& lines) {
      return generate({m, "--batch", file("bad.jsonl", lines), "--output", output});
    };
    refused(batch("{\"prompt\": \"a\"}\n{\"prompt\": 3}\n"), 1,
            "bad.jsonl, line 2: field 'prompt': wanted a text, came 3");
    refused(batch("{\"prompt\": \"a\"}\n{\"prompt\": \"\"}\n"), 1, "bad.jsonl, prompt 2 is empty");
    refused(batch("{\"prompt\": \"a\", \"prompt\": \"b\"}"), 1, "line 1: key 'prompt' occurs twice");
    std::string keys;
    for (int i = 0; i < 2000; ++i) keys += ", \"" + std::to_string(i) + "\": 0";
    refused(batch("{\"prompt\": \"a\"" + keys + "}"), 1, "line 1: an object may have 1024 keys");
    refused(generate({std::string(300, 'x'), "--prompt", "a"}), 1, "is not a folder");
    CHECK(generate({m, "--batch", file("inf.jsonl", "{\"prompt\": \"a\", \"x\": Infinity}\n"), "-n", "1"}).status == 0);
    refused(info({std::string(300, 'x')}), 1, "is no folder");
    refused(batch("{}"), 1, "bad.jsonl, line 1: field 'prompt': wanted a text, came none");
    refused(batch("[\"a\"]"), 1, "bad.jsonl, line 1: wanted a JSON object, came array");
    refused(batch(""), 1, "holds no prompts");
    CHECK(!std::filesystem::exists(output));
  }

  TEST_CASE("text of a folder with a tokenizer.json") {
    const auto words = folder() / "words";
    std::filesystem::create_directory(words);
    std::filesystem::copy_file(zamba_test::case_path("tokenizer/llama.json"), words / "tokenizer.json",
                               std::filesystem::copy_options::overwrite_existing);
    const Tokenizer tokenizer = Tokenizer::load(words);
    const zamba_apps::Text text(words, tokenizer.vocabulary());
    CHECK(!text.of_bytes());
    CHECK(text.begin() == tokenizer.bos());
    CHECK(text.end() == tokenizer.eos());
    const std::string said = "A sentence, \u00fcber \u8a9e and <s>";
    CHECK(text.encode(said, true) == tokenizer.encode(said));
    const auto tokens = text.encode(said);  // a part of a text: nothing is added, and no name is taken for a token
    CHECK(tokens == tokenizer.encode(said, {.add_special = false, .find_special = false}));
    zamba_apps::Text::Stream stream(text);
    std::string shown;
    for (const Token token : tokens) shown += stream.push(token);
    CHECK(shown + stream.finish() == text.decode(tokens));
    CHECK(contains(text.decode(tokens), said));
    CHECK_THROWS_AS(zamba_apps::Text(words, tokenizer.vocabulary() - 1), Error);
  }

  TEST_CASE("Ctrl-C while a model loads") {
    zamba_apps::Interrupt::listen();
    std::raise(SIGINT);
    refused(generate({model_folder(), "--prompt", "a"}), 130, "zamba-generate: ");
    zamba_apps::Interrupt::listen();
    CHECK(generate({model_folder(), "--prompt", "a"}).status == 0);
  }

  TEST_CASE("eval: a text and its bits a byte") {
    const std::string text = "the quick brown fox jumps over the lazy dog, again and again";
    const Result result = eval({model_folder(), "--text", file("text.txt", text), "--length", "16", "--stride", "4"});
    CHECK(result.status == 0);
    const LossSum loss = text_loss(model(), bytes(text), {.length = 16, .stride = 4});
    CHECK(contains(result.out, "tokens judged     " + std::to_string(loss.count)));
    CHECK(contains(result.out, zamba_apps::rounded(perplexity(loss))));
    CHECK(contains(result.out, zamba_apps::rounded(bits_per_byte(loss))));
  }

  TEST_CASE("eval: questions") {
    std::string lines;
    for (int i = 0; i < 6; ++i)
      lines += R"({"goal": "To )" + std::to_string(i) + R"(,", "sol1": "do", "sol2": "do not", "label": )" +
               std::to_string(i % 2) + "}\n";
    const std::string items = file("items.jsonl", lines), output = (folder() / "scores.jsonl").string();
    const Result result = eval({model_folder(), "--items", items, "--n-shot", "2", "--limit", "3", "--output", output});
    CHECK(result.status == 0);
    const auto all = read_multiple_choice(items);
    const std::span asked(all.begin() + 2, all.begin() + 5);  // the first two are solved before each
    const auto wanted = multiple_choice(model(), bytes, asked, std::span(all).first(2), 2, {});
    CHECK(contains(result.out, zamba_apps::accuracy_text(accuracy(wanted))));
    std::istringstream scores(read_text(output));
    std::string line;
    for (std::size_t i = 0; i < 3; ++i) {
      REQUIRE(std::getline(scores, line));
      const auto object = nlohmann::json::parse(line);
      CHECK(object["item"] == asked[i].name);
      CHECK(object["choices"][1]["log_likelihood"].get<double>() == wanted[i].choices[1].log_likelihood);
      CHECK(object["pick"] == wanted[i].pick());
    }
    CHECK(!std::getline(scores, line));
    const Result shots = eval({model_folder(), "--items", items, "--n-shot", "2", "--limit", "3", "--shots", items});
    CHECK(contains(shots.out, zamba_apps::accuracy_text(
                                  accuracy(multiple_choice(model(), bytes, std::span(all).first(3), all, 2, {})))));
  }

  TEST_CASE("eval: wrong input leaves no file") {
    const std::string& m = model_folder();
    const std::string output = (folder() / "no-scores.jsonl").string();
    const auto items = [&](const std::string& lines, const Arguments& more = {}) {
      Arguments arguments{m, "--items", file("bad-items.jsonl", lines), "--output", output};
      arguments.insert(arguments.end(), more.begin(), more.end());
      return eval(arguments);
    };
    const std::string good = R"({"goal": "a", "sol1": "b", "sol2": "c", "label": 0})";
    refused(eval({m}), 2, "wanted --text or --items, came neither");
    refused(eval({m, "--itms", "a"}), 2, "--itms is no flag of zamba-eval; did you mean --items?");
    refused(items(""), 1, "bad-items.jsonl' holds no items");
    refused(items(good + "\n{\"goal\": \"a\", \"sol1\": \"b\", \"sol2\": \"c\"}"), 1,
            "bad-items.jsonl, line 2: field 'label' is missing");
    refused(items(good, {"--n-shot", "1"}), 1, "holds no items beside the 1 solved ones");
    refused(items(good, {"--n-shot", "-1"}), 2, "--n-shot");
    refused(eval({m, "--items", (folder() / "absent").string()}), 1, "No such file or directory");
    refused(eval({m, "--text", file("empty.txt", "")}), 1, "empty.txt' is empty");
    refused(eval({m, "--text", file("one.txt", "a")}), 1, "the text has 1 tokens, at least 2 are needed");
    refused(eval({m, "--text", model_folder()}), 1, "wanted a regular file, came a folder");
    CHECK(!std::filesystem::exists(output));
  }
}
