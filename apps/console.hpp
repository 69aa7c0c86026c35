// SPDX-License-Identifier: MIT
// What every program shares: its streams, its exit status, its command line, and the end by Ctrl-C.
#pragma once

#include <algorithm>
#include <csignal>
#include <exception>
#include <iostream>
#include <numeric>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <zamba/error.hpp>

namespace zamba_apps {

/// The status with which a program ends.
enum Exit : int {
  success = 0,
  failure = 1,        // a file, a model or an input is not as it must be
  wrong_usage = 2,    // the command line is not
  interrupted = 130,  // Ctrl-C, as shells have it: 128 + SIGINT
};

struct Console {
  std::istream& in;
  std::ostream& out;
  std::ostream& err;
  bool in_terminal = false, err_terminal = false;

  static Console standard() { return {std::cin, std::cout, std::cerr, ::isatty(0) == 1, ::isatty(2) == 1}; }
};

/// Ctrl-C: noted the first time, so that work ends where nothing is half done; the second one ends the program at once.
class Interrupt {
 public:
  static void listen() {
    came_ = 0;
    struct sigaction action {};
    action.sa_handler = [](int) { came_ = 1; };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    ::sigaction(SIGINT, &action, nullptr);
  }
  static bool came() { return came_ != 0; }

 private:
  inline static volatile std::sig_atomic_t came_ = 0;
};

/// A line of progress, where messages go to a terminal; it disappears at the end of its scope. What it returns says
/// whether to go on: not after Ctrl-C.
class Watch {
 public:
  Watch(Console& console, std::string what) : console_(console), what_(std::move(what)) {}
  ~Watch() {
    if (console_.err_terminal) console_.err << "\r\x1b[K" << std::flush;
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  template <class Number>
  bool operator()(Number done, Number all) const {
    if (console_.err_terminal && all > 0) {
      const auto percent = 100. * static_cast<double>(done) / static_cast<double>(all);
      console_.err << "\r" << what_ << " " << static_cast<int>(percent) << " %\x1b[K" << std::flush;
    }
    return !Interrupt::came();
  }

 private:
  Console& console_;
  std::string what_;
};

/// How many letters must be added, left out or replaced to make b of a.
inline std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), 0);
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

/// The name that was probably meant, if any is near: at most every third letter is another; else one that begins so.
inline std::optional<std::string> nearest(std::string_view typed, const std::vector<std::string>& names) {
  std::optional<std::string> best;
  std::size_t least = std::max<std::size_t>(2, typed.size() / 3) + 1;
  for (const std::string& name : names) {
    if (const std::size_t distance = edit_distance(typed, name); distance < least) {
      least = distance;
      best = name;
    }
  }
  if (best || typed.empty()) return best;
  const auto begins = [&](const std::string& name) { return name.starts_with(typed); };
  const auto found = std::find_if(names.begin(), names.end(), begins);
  return found != names.end() ? std::optional(*found) : std::nullopt;
}

/// What is wrong with a command line.
class UsageError : public zamba::Error {
 public:
  using Error::Error;
};

/// "--promt is no flag of zamba-generate; did you mean --prompt?", for the first of what no option took.
inline std::string surplus_message(const CLI::App& app, const std::vector<std::string>& surplus) {
  const auto is_flag = [](const std::string& word) { return word.size() > 1 && word[0] == '-'; };
  const auto flag = std::find_if(surplus.begin(), surplus.end(), is_flag);
  if (flag == surplus.end()) return "'" + surplus.front() + "' is one argument too many for " + app.get_name();
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  const std::string typed = flag->substr(0, flag->find('='));
  const auto meant = nearest(typed, names);
  return typed + " is no flag of " + app.get_name() + (meant ? "; did you mean " + *meant + "?" : "");
}

/// The message without the "zamba: " of the library: the program's name stands there.
inline std::string_view without_prefix(const std::exception& error) {
  std::string_view message = error.what();
  if (message.starts_with("zamba: ")) message.remove_prefix(7);
  return message;
}

/// Reads the command line and does the work; gives the exit status, with one message for whatever is wrong.
template <class Work>
int run(CLI::App& app, std::vector<std::string> arguments, Console& console, Work&& work) {
  app.allow_extras();
  try {
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 takes them
    app.parse(std::move(arguments));
    if (const auto surplus = app.remaining(); !surplus.empty()) throw UsageError(surplus_message(app, surplus));
    work();
    console.out << std::flush;
    zamba::require(console.out.good(), "cannot write the output");
    return Interrupt::came() ? interrupted : success;
  } catch (const CLI::CallForHelp&) {
    console.out << app.help();
    return success;
  } catch (const CLI::ParseError& error) {
    console.err << app.get_name() << ": " << error.what() << "\n" << app.get_name() << " --help shows how.\n";
    return wrong_usage;
  } catch (const UsageError& error) {
    console.err << app.get_name() << ": " << without_prefix(error) << "\n" << app.get_name() << " --help shows how.\n";
    return wrong_usage;
  } catch (const std::bad_alloc&) {
    console.err << app.get_name() << ": there is not enough memory\n";
    return failure;
  } catch (const std::exception& error) {
    console.err << app.get_name() << ": " << without_prefix(error) << "\n";
    return Interrupt::came() ? interrupted : failure;
  }
}

inline std::vector<std::string> arguments_of(int argc, char** argv) { return {argv + 1, argv + argc}; }

}  // namespace zamba_apps
