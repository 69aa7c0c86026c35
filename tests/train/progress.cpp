// SPDX-License-Identifier: MIT
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <cmath>
#include <limits>
#include <sstream>

#include <doctest/doctest.h>
#include <tests/support/temporary_folder.hpp>
#include <zamba/train/progress.hpp>

using zamba::ProgressLine;
using zamba::StepLog;
using zamba_test::read_text;
using zamba_test::write_text;

TEST_SUITE("train/progress") {
  TEST_CASE("durations") {
    CHECK(zamba::format_duration(0) == "0 s");
    CHECK(zamba::format_duration(59.4) == "59 s");
    CHECK(zamba::format_duration(59.6) == "1 min 00 s");
    CHECK(zamba::format_duration(185) == "3 min 05 s");
    CHECK(zamba::format_duration(3599.9) == "1 h 00 min");
    CHECK(zamba::format_duration(3725) == "1 h 02 min");
    CHECK(zamba::format_duration(86399) == "23 h 59 min");
    CHECK(zamba::format_duration(2 * 86400 + 3 * 3600 + 59) == "2 d 03 h");
    for (const double unknown : {-1.0, std::nan(""), std::numeric_limits<double>::infinity()})
      CHECK(zamba::format_duration(unknown) == "?");
  }

  TEST_CASE("counts") {
    CHECK(zamba::format_count(0) == "0");
    CHECK(zamba::format_count(999.4) == "999");
    CHECK(zamba::format_count(999.6) == "1.0 k");
    CHECK(zamba::format_count(12345) == "12.3 k");
    CHECK(zamba::format_count(999'949) == "999.9 k");
    CHECK(zamba::format_count(999'950) == "1.0 M");
    CHECK(zamba::format_count(1'200'000) == "1.2 M");
    CHECK(zamba::format_count(7'232'490'496) == "7.2 B");
    CHECK(zamba::format_count(1.5e12) == "1.5 T");
    CHECK(zamba::format_count(1.5e16) == "15000.0 T");
    CHECK(zamba::format_count(-1234) == "-1.2 k");
    CHECK(zamba::format_count(std::nan("")) == "?");
  }

  TEST_CASE("the progress line is rewritten in place on a terminal, and absent elsewhere") {
    std::ostringstream out;
    {
      ProgressLine line(out, true, std::chrono::seconds(0));
      line.update({.step = 1, .steps = 20, .loss = 5.54321, .tokens_per_second = 12345, .seconds_left = 185});
      line.update({.step = 2, .steps = 20, .loss = 5, .tokens_per_second = 950, .seconds_left = 18});
      CHECK(out.str() ==
            "\rstep 1/20  loss 5.5432  12.3 k tokens/s  3 min 05 s left\x1b[K"
            "\rstep 2/20  loss 5.0000  950 tokens/s  18 s left\x1b[K");
      line.finish();
      line.finish();
    }
    CHECK(out.str().ends_with("\x1b[K\n"));
    CHECK(out.str().find('\n') == out.str().size() - 1);  // one end, though finished twice and destroyed

    std::ostringstream silent;
    {
      ProgressLine line(silent, false, std::chrono::seconds(0));
      line.update({.step = 1, .steps = 2});
      ProgressLine asked(silent, -1);  // no descriptor, so no terminal
      asked.update({.step = 1, .steps = 2});
    }
    CHECK(silent.str().empty());
  }

  TEST_CASE("a pseudo-terminal is recognised") {
    const int fd = ::posix_openpt(O_RDWR | O_NOCTTY);
    if (fd < 0) return;  // a machine without them
    REQUIRE(::grantpt(fd) == 0);
    REQUIRE(::unlockpt(fd) == 0);
    const int terminal = ::open(::ptsname(fd), O_RDWR | O_NOCTTY);
    REQUIRE(terminal >= 0);
    std::ostringstream out;
    ProgressLine(out, terminal).update({.step = 1, .steps = 2});
    ::close(terminal);
    ::close(fd);
    CHECK(out.str().starts_with("\rstep 1/2  "));
  }

  TEST_CASE("updates closer than the interval are left out, the last step never") {
    std::ostringstream out;
    ProgressLine line(out, true, std::chrono::hours(1));
    for (zamba::Index step = 1; step <= 10; ++step) line.update({.step = step, .steps = 10});
    const std::string text = out.str();
    CHECK(text.find("step 1/10") != std::string::npos);
    CHECK(text.find("step 5/10") == std::string::npos);
    CHECK(text.find("step 10/10") != std::string::npos);
  }

  TEST_CASE("the log: one object a line, in the order of its fields, readable at once") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "log.jsonl";
    StepLog log(path);
    log.append({{"step", 1}, {"loss", 5.5}, {"a", 0.1}});
    log.append({{"step", 2}, {"loss", std::nan("")}});
    CHECK(read_text(path) == "{\"step\":1,\"loss\":5.5,\"a\":0.1}\n{\"step\":2,\"loss\":null}\n");
    const double third = 1.0 / 3;
    log.append({{"x", third}});
    const std::string text = read_text(path);
    CHECK(nlohmann::json::parse(text.substr(text.find("{\"x")))["x"].get<double>() == third);
    CHECK_THROWS_WITH(log.append(nlohmann::ordered_json(3)),
                      ("zamba: StepLog '" + path.string() + "': a record is a JSON object, got 3").c_str());
    CHECK(read_text(path) == text);
  }

  TEST_CASE("truncate_after keeps the steps up to one, and records without a step") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "log.jsonl";
    StepLog log(path);
    log.append({{"model", "a"}});
    for (int step = 1; step <= 5; ++step) log.append({{"step", step}});
    log.append({{"step", 3}, {"held_out", 1.5}});
    log.truncate_after(3);
    const std::string kept =
        "{\"model\":\"a\"}\n{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":3,\"held_out\":1.5}\n";
    CHECK(read_text(path) == kept);
    log.append({{"step", 4}});
    CHECK(read_text(path) == kept + "{\"step\":4}\n");
    log.truncate_after(0);
    CHECK(read_text(path) == "{\"model\":\"a\"}\n");
  }

  TEST_CASE("a torn last line is dropped, a whole one without its end is kept, rubbish elsewhere is an error") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "log.jsonl";
    for (const char* torn : {"{\"step\":2,\"lo", "{", "{\"step\":2,\"loss\":1"}) {
      write_text(path, "{\"step\":1}\n" + std::string(torn));
      StepLog log(path);
      log.append({{"step", 7}});
      CHECK(read_text(path) == "{\"step\":1}\n{\"step\":7}\n");
    }
    write_text(path, "{\"step\":1}\n{\"step\":2}");
    StepLog(path).append({{"step", 3}});
    CHECK(read_text(path) == "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
    write_text(path, "{\"step\":1}\nrubbish\n{\"step\":2}\n");
    CHECK_THROWS_WITH(StepLog{path}, ("zamba: StepLog '" + path.string() + "': line 2 is not a JSON object").c_str());
    CHECK(read_text(path) == "{\"step\":1}\nrubbish\n{\"step\":2}\n");
    write_text(path, "");
    CHECK_NOTHROW(StepLog{path});
    CHECK_THROWS_AS(StepLog(folder.path / "absent" / "log.jsonl"), zamba::Error);
    CHECK_THROWS_AS(StepLog{folder.path}, zamba::Error);
  }

  TEST_CASE("text that is not UTF-8 is written with replacement characters") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "log.jsonl";
    StepLog log(path);
    log.append({{"step", 1}, {"phase", "caf\xe9"}});
    CHECK(read_text(path) == "{\"step\":1,\"phase\":\"caf\xef\xbf\xbd\"}\n");
    CHECK_THROWS_AS(log.append(nlohmann::ordered_json("\xe9")), zamba::Error);
    CHECK_NOTHROW(StepLog{path});
  }

  TEST_CASE("a log that is removed or replaced while it is written to is missed at sync, and begun anew") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "log.jsonl";
    StepLog log(path);
    log.append({{"step", 1}});
    CHECK_NOTHROW(log.sync());
    for (const bool replaced : {false, true}) {
      std::filesystem::remove(path);
      if (replaced) write_text(path, "{\"step\":0}\n");
      log.append({{"step", 2}});
      CHECK_THROWS_WITH(
          log.sync(),
          ("zamba: StepLog: '" + path.string() + "' was removed or replaced while it was written to").c_str());
      log.append({{"step", 3}});
      CHECK_NOTHROW(log.sync());
      CHECK(read_text(path) == (replaced ? "{\"step\":0}\n{\"step\":3}\n" : "{\"step\":3}\n"));
    }
  }

  TEST_CASE("only a regular file is a log") {
    const zamba_test::TemporaryFolder folder;
    std::filesystem::create_symlink("/dev/null", folder.path / "null");
    CHECK_THROWS_AS(StepLog{folder.path / "null"}, zamba::Error);
    CHECK_THROWS_AS(StepLog{folder.path}, zamba::Error);
  }

  TEST_CASE("what was appended survives SIGKILL") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "log.jsonl";
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      StepLog log(path);
      for (int step = 1; step <= 100; ++step) log.append({{"step", step}});
      ::kill(::getpid(), SIGKILL);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFSIGNALED(status));
    CHECK(read_text(path).ends_with("{\"step\":99}\n{\"step\":100}\n"));
  }

  TEST_CASE("a line that does not fit on the disk is an error") {
    const zamba_test::TemporaryFolder folder;
    const auto path = folder.path / "log.jsonl";
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {  // a limit on the size of files does as a full disk would
      const rlimit limit{50, 50};
      ::signal(SIGXFSZ, SIG_IGN);
      ::setrlimit(RLIMIT_FSIZE, &limit);
      int appended = 0;
      try {
        StepLog log(path);
        for (; appended < 100; ++appended) log.append({{"step", 1000}});
      } catch (const zamba::Error&) {
        ::_exit(appended);
      }
      ::_exit(255);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 3);  // three lines of 14 bytes fit into 50
    StepLog(path).append({{"step", 1}});
    CHECK(read_text(path) == "{\"step\":1000}\n{\"step\":1000}\n{\"step\":1000}\n{\"step\":1}\n");
  }
}
