// SPDX-License-Identifier: MIT
// Multiple-choice items from JSON-lines files with the fields of their Hugging Face releases, in the prompts of
// EleutherAI's lm-evaluation-harness.
//
//   format      fields read                                        prompt, and what is judged
//   arc         question, choices.{text, label}, answerKey         "Question: Q\nAnswer:", each choices.text
//   hellaswag   activity_label, ctx_a, ctx_b, endings, label       "activity: ctx_a Ctx_b", each ending
//   mmlu        question, subject, choices, answer                 "Q\nA. a\nB. b\n...\nAnswer:", each letter
//   piqa        goal, sol1, sol2, label                            "Question: goal\nAnswer:", sol1 and sol2
//   winogrande  sentence, option1, option2, answer                 the sentence up to its blank _ and each option;
//                                                                  the rest of the sentence (partial evaluation)
//
// The format is told from the fields. Every item must have its answer: the test splits of some releases have none.
#pragma once

#include <algorithm>
#include <cctype>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>
#include <zamba/eval/multiple_choice.hpp>
#include <zamba/io/json.hpp>
#include <zamba/io/json_lines.hpp>
#include <zamba/text/replace_all.hpp>

namespace zamba {

namespace detail {

/// The fields of one line, and its place for messages.
class ItemReader {
 public:
  ItemReader(std::string_view line, std::string origin)
      : origin_(std::move(origin)), fields_(parse_object(line, origin_)) {}

  MultipleChoiceItem read() const {
    MultipleChoiceItem item;
    if (has("endings")) {
      item = hellaswag();
    } else if (has("sol1")) {
      item = piqa();
    } else if (has("option1")) {
      item = winogrande();
    } else if (has("answerKey")) {
      item = arc();
    } else if (has("choices") && has("answer")) {
      item = mmlu();
    } else {
      fail(origin_,
           ": wanted the fields of an item of ARC (answerKey), HellaSwag (endings), MMLU (choices, answer), PIQA "
           "(sol1) or Winogrande (option1), came ",
           names());
    }
    // Each choice is read behind all of the prompt.
    require(item.choices.size() <= most_choices, origin_, ": wanted at most ", most_choices, " choices, came ",
            item.choices.size());
    item.name = origin_;
    return item;
  }

 private:
  using json = nlohmann::json;

  static constexpr std::size_t most_choices = 26;  // they have letters

  MultipleChoiceItem arc() const {
    MultipleChoiceItem item{.context = "Question: " + text("question") + "\nAnswer:"};
    const json& choices = field("choices");
    require(choices.is_object() && choices.contains("text") && choices.contains("label"), origin_,
            ": field 'choices': wanted an object of 'text' and 'label', came ", value_text(choices));
    for (const std::string& choice : texts(choices["text"], "choices.text")) item.choices.push_back({choice});
    const auto labels = texts(choices["label"], "choices.label");
    require(labels.size() == item.choices.size(), origin_, ": field 'choices': ", item.choices.size(), " texts but ",
            labels.size(), " labels");
    const auto at = std::find(labels.begin(), labels.end(), text("answerKey"));
    require(at != labels.end(), origin_, ": field 'answerKey': wanted one of the labels ", value_text(choices["label"]),
            ", came ", value_text(field("answerKey")));
    item.answer = at - labels.begin();
    return item;
  }

  MultipleChoiceItem hellaswag() const {
    std::string second = text("ctx_b");
    for (std::size_t i = 0; i < second.size(); ++i)  // a capital and small letters, of ASCII
      second[i] = static_cast<char>(i ? std::tolower(static_cast<unsigned char>(second[i]))
                                      : std::toupper(static_cast<unsigned char>(second[i])));
    MultipleChoiceItem item{.context = plain(text("activity_label") + ": " + text("ctx_a") + " " + second)};
    for (const std::string& ending : texts(field("endings"), "endings")) item.choices.push_back({plain(ending)});
    item.answer = number("label", 0, item.choices.size());
    return item;
  }

  MultipleChoiceItem mmlu() const {
    MultipleChoiceItem item{.context = stripped(text("question"))};
    const auto choices = texts(field("choices"), "choices");
    require(choices.size() <= most_choices, origin_, ": field 'choices': wanted at most ", most_choices, ", came ",
            choices.size());
    for (std::size_t c = 0; c < choices.size(); ++c) {
      const std::string letter(1, static_cast<char>('A' + c));
      item.context += "\n" + letter + ". " + choices[c];
      item.choices.push_back({letter});
    }
    item.context += "\nAnswer:";
    item.answer = number("answer", 0, item.choices.size());
    if (has("subject")) {
      std::string subject = text("subject");
      std::replace(subject.begin(), subject.end(), '_', ' ');
      item.heading = "The following are multiple choice questions (with answers) about " + subject + ".\n\n";
    }
    return item;
  }

  MultipleChoiceItem piqa() const {
    return {.context = "Question: " + text("goal") + "\nAnswer:",
            .choices = {{text("sol1")}, {text("sol2")}},
            .answer = number("label", 0, 2)};
  }

  MultipleChoiceItem winogrande() const {
    const std::string sentence = text("sentence");
    const std::size_t blank = sentence.find('_');
    require(blank != sentence.npos, origin_, ": field 'sentence': wanted a text with a blank _, came ",
            value_text(field("sentence")));
    const std::string rest = stripped(sentence.substr(blank + 1));
    require(!rest.empty(), origin_, ": field 'sentence': wanted a text that goes on after its blank, came ",
            value_text(field("sentence")));
    MultipleChoiceItem item;
    for (const char* option : {"option1", "option2"})
      item.choices.push_back({rest, sentence.substr(0, blank) + text(option)});
    item.answer = number("answer", 1, 2);
    return item;
  }

  bool has(const char* name) const { return fields_.contains(name); }

  const json& field(const char* name) const {
    require(has(name), origin_, ": field '", name, "' is missing");
    return fields_[name];
  }

  std::string text(const char* name) const {
    const json& value = field(name);
    require(value.is_string(), origin_, ": field '", name, "': wanted a text, came ", value_text(value));
    return value;
  }

  std::vector<std::string> texts(const json& value, const char* name) const {
    const auto is_text = [](const json& one) { return one.is_string() && !one.get_ref<const std::string&>().empty(); };
    require(value.is_array() && value.size() >= 2 && std::all_of(value.begin(), value.end(), is_text), origin_,
            ": field '", name, "': wanted a list of at least 2 texts, none of them empty, came ", value_text(value));
    return value;
  }

  /// The place of an answer that is written as a number or its digits, counted from `first`.
  Index number(const char* name, Index first, std::size_t count) const {
    const json& value = field(name);
    const Index last = first + static_cast<Index>(count) - 1;
    for (Index i = first; i <= last; ++i)
      if (value == i || value == std::to_string(i)) return i - first;
    fail(origin_, ": field '", name, "': wanted ", first, " to ", last, ", came ", value_text(value),
         "; is this a file without answers?");
  }

  std::string names() const {
    std::string list;
    for (const auto& entry : fields_.items()) list += (list.empty() ? "" : ", ") + entry.key();
    return list.empty() ? "none" : quote(list);
  }

  static std::string stripped(const std::string& text) {
    const char* space = " \t\n\r\f\v";
    const std::size_t first = text.find_first_not_of(space);
    return first == text.npos ? "" : text.substr(first, text.find_last_not_of(space) + 1 - first);
  }

  /// HellaSwag's texts without the marks of the pages they come from: " [title]" ends a sentence, other brackets go.
  static std::string plain(const std::string& marked) {
    const std::string text = replace_all(stripped(marked), " [title]", ". ");
    std::string kept;
    std::size_t at = 0;
    for (std::size_t open = text.find('['); open != text.npos; open = text.find('[', at)) {
      const std::size_t close = text.find(']', open);
      if (close == text.npos) break;
      kept.append(text, at, open - at);
      at = close + 1;
    }
    kept.append(text, at);
    return replace_all(kept, "  ", " ");
  }

  std::string origin_;
  json fields_;
};

}  // namespace detail

/// All items of a file. Throws for the first line that is no item, naming file, line and field.
inline std::vector<MultipleChoiceItem> read_multiple_choice(const std::filesystem::path& path) {
  std::vector<MultipleChoiceItem> items;
  for_each_json_line(path, [&](std::string_view line, const std::string& place) {
    items.push_back(detail::ItemReader(line, place).read());
  });
  require(!items.empty(), "'", path.string(), "' holds no items");
  return items;
}

}  // namespace zamba
