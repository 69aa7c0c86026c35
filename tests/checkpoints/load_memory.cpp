// SPDX-License-Identifier: MIT
// Loading a model takes its own memory and little more, whatever its file is: at most a tenth. What is beyond the model
// is one piece of a file, converted and not, and the pages around it.
#include <zamba/checkpoints/huggingface.hpp>
#include <zamba/checkpoints/llama.hpp>
#include <zamba/checkpoints/mamba.hpp>
#include <zamba/checkpoints/zamba.hpp>

#include <cstring>
#include <fstream>
#include <sstream>

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <zamba/testing/sanitized.hpp>

#include <tests/support/temporary_folder.hpp>

namespace {

using namespace zamba;
using zamba_test::TemporaryFolder;

/// 106 million parameters: 213 MB in bf16.
using Net = LanguageModel<32000, PatternStack<"mmhmmmmhmm", MambaBlock<MambaConfig{.d_model = 1024, .n_heads = 2}>,
                                              SharedAttention<SharedAttentionConfig{.d_model = 1024, .n_heads = 16}>>>;

/// A line of /proc/self/status, in bytes.
double status(const std::string& name) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);)
    if (line.starts_with(name + ":")) return 1024 * std::stod(line.substr(name.size() + 1));
  return 0;
}

template <class T>
double model_bytes() {
  double bytes = 0;
  for (const ParameterEntry& entry : detail::list_parameters<Net, T>())
    bytes += static_cast<double>(entry.size) * (entry.precise ? sizeof(compute_t<T>) : sizeof(T));
  return bytes;
}

template <class T>
void save(const std::filesystem::path& folder, std::uint64_t max_shard_bytes) {
  Model<Net, T> model{Uninitialised{}};
  for (const ParameterEntry& entry : model.entries()) std::memset(model.data(entry), 0x3c, model.bytes(entry));
  save_huggingface(model, folder, {.max_shard_bytes = max_shard_bytes});
}

/// The greatest resident memory of a load as bf16 in a process of its own, beyond what it began with, and how much of
/// it is left that is not the model's: pages of the files.
struct Peak {
  double greatest = 0, of_files = 0;
};

[[maybe_unused]] Peak peak_of_load(const std::filesystem::path& folder) {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    Peak peak;
    try {
      const double before = status("VmRSS"), files_before = status("RssFile");
      const auto model = load_huggingface<Net, bf16>(folder);
      peak = {status("VmHWM") - before, status("RssFile") - files_before};
    } catch (...) {
    }
    ::_exit(::write(ends[1], &peak, sizeof peak) == sizeof peak ? 0 : 1);
  }
  ::close(ends[1]);
  Peak peak;
  CHECK(::read(ends[0], &peak, sizeof peak) == sizeof peak);
  ::close(ends[0]);
  REQUIRE(::waitpid(child, nullptr, 0) == child);
  return peak;
}

template <class T>
void check_peak(std::uint64_t max_shard_bytes) {
  const TemporaryFolder folder;
  save<T>(folder.path, max_shard_bytes);
  const double wanted = model_bytes<bf16>();
  const auto [greatest, of_files] = peak_of_load(folder.path);
  MESSAGE("the model has ", wanted / 1e6, " MB, the peak is ", greatest / wanted, " of it; ", of_files / 1e6,
          " MB of pages are left of files");
  CHECK(wanted > 200e6);
  CHECK(greatest > wanted);
  CHECK(greatest < 1.1 * wanted);
  CHECK(of_files < 0.05 * wanted);
}

}  // namespace

#if !defined(ZAMBA_TEST_SANITIZED)
TEST_CASE("load_memory: float32 files into a bf16 model") { check_peak<float>(0); }
TEST_CASE("load_memory: bf16 files into a bf16 model") { check_peak<bf16>(0); }
TEST_CASE("load_memory: shards of float32 into a bf16 model") { check_peak<float>(50'000'000); }
#else
TEST_CASE("load_memory: a sanitizer's own memory is not measured") { CHECK(model_bytes<bf16>() > 200e6); }
#endif
