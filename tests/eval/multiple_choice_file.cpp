// SPDX-License-Identifier: MIT
#include <zamba/eval/multiple_choice_file.hpp>

#include <doctest/doctest.h>

#include "tests/support/temporary_folder.hpp"

namespace {

using namespace zamba;

const zamba_test::TemporaryFolder& folder() {
  static const zamba_test::TemporaryFolder folder;
  return folder;
}

std::vector<MultipleChoiceItem> read(const std::string& text) {
  const auto path = folder().path / "items.jsonl";
  zamba_test::write_text(path, text);
  return read_multiple_choice(path);
}

/// The message for a text, without the path of the file.
std::string problem(const std::string& text) {
  try {
    read(text);
  } catch (const Error& error) {
    const std::string message = error.what(), place = folder().path.string() + "/";
    const std::size_t at = message.find(place);
    return at == message.npos ? message : message.substr(0, at) + message.substr(at + place.size());
  }
  return "none";
}

// Items made up for this test, in the shapes of the releases.
const std::string arc = R"({"id": "a1", "question": "What melts?", "choices": {"text": ["ice", "sand", "air"], )"
                        R"("label": ["1", "2", "3"]}, "answerKey": "2"})";
const std::string hellaswag =
    R"({"ind": 4, "activity_label": "Baking", "ctx_a": "A bowl stands there. [header] It", "ctx_b": "is Full and", )"
    R"("ctx": "", "endings": [" falls [title] Down [sub] then", "sings.", "c", "d"], "label": "3", "split": "val"})";
const std::string mmlu =
    R"({"question": " How many legs? ", "subject": "animal_facts", "choices": ["2", "3", "4", "5"], "answer": 2})";
const std::string piqa = R"({"goal": "To open a jar,", "sol1": "turn it", "sol2": "sing", "label": 1})";
const std::string winogrande = R"({"sentence": "The cup fell off the table because _ was small.", )"
                               R"("option1": "it", "option2": "the table", "answer": "2"})";

}  // namespace

TEST_SUITE("eval/multiple_choice_file") {
  TEST_CASE("each format becomes its prompt, its choices and its answer") {
    const auto items = read(arc + "\n" + hellaswag + "\n\n" + mmlu + "\r\n" + piqa + "\n" + winogrande);
    REQUIRE(items.size() == 5);
    CHECK(items[0].context == "Question: What melts?\nAnswer:");
    REQUIRE(items[0].choices.size() == 3);
    CHECK(items[0].choices[2].text == "air");
    CHECK(items[0].answer == 1);
    CHECK(items[0].heading.empty());

    CHECK(items[1].context == "Baking: A bowl stands there. It Is full and");
    CHECK(items[1].choices[0].text == "falls. Down then");
    CHECK(items[1].choices[1].text == "sings.");
    CHECK(items[1].answer == 3);

    CHECK(items[2].context == "How many legs?\nA. 2\nB. 3\nC. 4\nD. 5\nAnswer:");
    CHECK(items[2].heading == "The following are multiple choice questions (with answers) about animal facts.\n\n");
    CHECK(items[2].choices[3].text == "D");
    CHECK(items[2].answer == 2);
    CHECK(items[2].name == (folder().path / "items.jsonl").string() + ", line 4");  // the empty line counts

    CHECK(items[3].context == "Question: To open a jar,\nAnswer:");
    CHECK(items[3].choices[1].text == "sing");
    CHECK(items[3].answer == 1);

    CHECK(items[4].context.empty());
    CHECK(items[4].choices[1].beginning == "The cup fell off the table because the table");
    CHECK(items[4].choices[1].text == "was small.");
    CHECK(items[4].answer == 1);
  }

  TEST_CASE("long texts take linear time, and a line has at most as many choices as there are letters") {
    // Replaced in place, each of these would take minutes.
    std::string marked, spaces, wanted;
    for (int i = 0; i < 400'000; ++i) {
      marked += "x [title]";
      spaces += "x  ";
      wanted += "x. ";
    }
    const auto item = [](const std::string& context) {
      return R"({"activity_label": "A", "ctx_a": ")" + context +
             R"(", "ctx_b": "b", "endings": ["c", "d"], "label": 0})";
    };
    CHECK((read(item(marked))[0].context == "A: " + wanted + "B"));
    CHECK(read(item(spaces))[0].context.size() == 3 + 800'000 + 2);
    std::string endings = "\"a\"";
    for (int i = 1; i < 26; ++i) endings += ", \"a\"";
    const auto line = [&](const std::string& all) {
      return R"({"activity_label": "A", "ctx_a": "a", "ctx_b": "b", "label": 25, "endings": [)" + all + "]}";
    };
    CHECK(read(line(endings))[0].choices.size() == 26);
    CHECK(problem(line(endings + ", \"a\"")) == "zamba: items.jsonl, line 1: wanted at most 26 choices, came 27");
  }

  TEST_CASE("what is no item is refused by file, line and field") {
    const auto replaced = [](std::string line, const std::string& from, const std::string& to) {
      const std::size_t at = line.find(from);
      REQUIRE(at != line.npos);
      return line.replace(at, from.size(), to);
    };
    const std::string at = "zamba: items.jsonl, line 2: ";
    const auto second = [&](const std::string& line) { return problem(arc + "\n" + line + "\n"); };
    CHECK(second(replaced(arc, "answerKey\": \"2", "answerKey\": \"E")) ==
          at + R"(field 'answerKey': wanted one of the labels ["1","2","3"], came "E")");
    CHECK(second(replaced(arc, "\"question\"", "\"q\"")) == at + "field 'question' is missing");
    CHECK(second(replaced(arc, "\"ice\", ", "")) == at + "field 'choices': 2 texts but 3 labels");
    CHECK(second(replaced(arc, "\"ice\"", "7")) ==
          at + R"(field 'choices.text': wanted a list of at least 2 texts, none of them empty, came [7,"sand","air"])");
    CHECK(second(replaced(arc, "\"label\"", "\"l\"")).starts_with(at + "field 'choices': wanted an object of"));
    CHECK(second(replaced(hellaswag, "label\": \"3", "label\": \"")) ==
          at + R"(field 'label': wanted 0 to 3, came ""; is this a file without answers?)");
    CHECK(second(replaced(piqa, "\"label\": 1", "\"label\": -1")) ==
          at + "field 'label': wanted 0 to 1, came -1; is this a file without answers?");
    CHECK(second(replaced(piqa, "\"turn it\"", "null")) == at + "field 'sol1': wanted a text, came null");
    CHECK(second(replaced(mmlu, "\"answer\": 2", "\"answer\": 4")) ==
          at + "field 'answer': wanted 0 to 3, came 4; is this a file without answers?");
    CHECK(second(replaced(mmlu, "[\"2\", \"3\", \"4\", \"5\"]", "\"2\"")) ==
          at + R"(field 'choices': wanted a list of at least 2 texts, none of them empty, came "2")");
    CHECK(second(replaced(winogrande, "_", "it")).starts_with(at + "field 'sentence': wanted a text with a blank _"));
    CHECK(
        second(replaced(winogrande, " was small.", " ")).starts_with(at + "field 'sentence': wanted a text that goes"));
    CHECK(second(replaced(winogrande, "\"answer\": \"2\"", "\"answer\": \"\"")) ==
          at + R"(field 'answer': wanted 1 to 2, came ""; is this a file without answers?)");
    CHECK(second(R"({"text": "a", "n": 1})") ==
          at + "wanted the fields of an item of ARC (answerKey), HellaSwag (endings), MMLU (choices, answer), PIQA "
               "(sol1) or Winogrande (option1), came 'n, text'");
    CHECK(second("[1]") == at + "wanted a JSON object, came array");
    CHECK(second("{\"a\": ").starts_with(at + "not valid JSON: "));
    CHECK(problem("") == "zamba: 'items.jsonl' holds no items");
    CHECK(problem(" \n\r\n") == "zamba: 'items.jsonl' holds no items");
    CHECK_THROWS_WITH_AS(read_multiple_choice("absent.jsonl"),
                         "zamba: cannot open 'absent.jsonl': No such file or directory", Error);
  }
}
