// SPDX-License-Identifier: MIT
// Draws the pictures of docs/benchmarks.md from what zamba_cuda_bench wrote with --benchmark_out.
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <zamba/io/line_plot.hpp>

namespace {

using namespace zamba;
using nlohmann::json;

/// The runs whose names match: the pattern's group is the place on the x axis.
struct Runs {
  std::string curve, pattern;
};

struct Picture {
  const char *file, *title, *x_label, *y_label;
  double (*value)(const json& run, double x);
  bool legend_left;
  std::vector<Runs> curves;
};

double milliseconds(const json& run) {
  static const std::map<std::string, double> units = {{"ns", 1e-6}, {"us", 1e-3}, {"ms", 1}, {"s", 1e3}};
  return run.at("real_time").get<double>() * units.at(run.at("time_unit"));
}

double time_of(const json& run, double) { return milliseconds(run); }
double tokens_a_second(const json& run, double tokens) { return tokens / milliseconds(run) * 1e3; }
double thousand_tokens_a_second(const json& run, double tokens) { return tokens / milliseconds(run); }
double of_ceiling(const json& run, double) { return run.at("of_ceiling").get<double>(); }

std::vector<Runs> models(const std::string& before, const std::string& behind) {
  std::vector<Runs> curves;
  for (const std::string name : {"Zamba-7B", "Zamba2-2.7B", "Llama-2-7B"})
    curves.push_back({name, before + std::regex_replace(name, std::regex("\\."), "\\.") + behind});
  return curves;
}

const std::vector<Picture> pictures = {
    {"cuda_decode.svg", "A token, batch 1, bf16", "context, tokens", "milliseconds", time_of, true,
     models("decode/", R"(/batch:1/context:(\d+)/.*)")},
    {"cuda_batch.svg", "Tokens of all rows, context 512, bf16", "rows", "tokens a second", tokens_a_second, true,
     models("decode/", R"(/batch:(\d+)/context:512/.*)")},
    {"cuda_prefill.svg", "A prompt, bf16", "tokens", "thousand tokens a second", thousand_tokens_a_second, false,
     models("prefill/", R"(/tokens:(\d+)/.*)")},
    {"cuda_ceiling.svg",
     "Operators over one row, bf16",
     "tokens",
     "share of the ceiling",
     of_ceiling,
     true,
     {{"attention, 16 heads of 464", R"(attention/prefill/.*head_dim:464/rows:1/tokens:(\d+)/past:0/.*)"},
      {"attention, 32 heads of 128", R"(attention/prefill/.*/kv_heads:32/head_dim:128/rows:1/tokens:(\d+)/past:0/.*)"},
      {"causal_conv1d", R"(causal_conv1d/.*/rows:1/tokens:(\d+)/.*)"},
      {"selective_scan", R"(selective_scan/.*/rows:1/tokens:(\d+)/.*)"},
      {"ssd, 80 heads of 64", R"(ssd/prefill/rows:1/tokens:(\d+)/H:80/.*)"}}},
};

PlotCurve curve_of(const Runs& wanted, const Picture& picture, const json& runs) {
  const std::regex pattern(wanted.pattern);
  std::map<double, double> points;
  for (const json& run : runs) {
    const std::string name = run.at("name");
    std::smatch parts;
    if (run.contains("error_occurred") || !std::regex_match(name, parts, pattern)) continue;
    const double x = std::stod(parts[1]);
    points[x] = picture.value(run, x);
  }
  PlotCurve curve{.name = wanted.curve, .markers = true};
  for (const auto& [x, value] : points) curve.points.push_back({x, value});
  return curve;
}

/// Without curves that no run is of.
LinePlot draw(const Picture& picture, const json& runs) {
  LinePlot plot;
  plot.title = picture.title;
  plot.x_label = picture.x_label;
  plot.y_label = picture.y_label;
  plot.legend_left = picture.legend_left;
  for (const Runs& wanted : picture.curves) {
    PlotCurve curve = curve_of(wanted, picture, runs);
    if (!curve.points.empty()) plot.curves.push_back(std::move(curve));
  }
  return plot;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Draws what zamba_cuda_bench --benchmark_out=FILE measured.");
  std::vector<std::filesystem::path> files;
  std::filesystem::path folder = ".";
  app.add_option("files", files, "What --benchmark_out wrote, of one run or several")
      ->required()
      ->check(CLI::ExistingFile);
  app.add_option("--folder", folder, "Where the pictures go")->capture_default_str()->check(CLI::ExistingDirectory);
  CLI11_PARSE(app, argc, argv);
  try {
    json runs = json::array();
    for (const std::filesystem::path& file : files) {
      std::ifstream in(file);
      const json parsed = json::parse(in);
      for (const json& run : parsed.at("benchmarks")) runs.push_back(run);
    }
    for (const Picture& picture : pictures) {
      const LinePlot plot = draw(picture, runs);
      if (plot.curves.empty())
        std::fprintf(stderr, "%s: left out, there is no run for it\n", picture.file);
      else
        write_line_plot(folder / picture.file, plot);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
