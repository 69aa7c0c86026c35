// SPDX-License-Identifier: MIT
#include <cmath>
#include <string>
#include <vector>

#include <doctest/doctest.h>
#include <tests/support/temporary_folder.hpp>
#include <zamba/io/line_plot.hpp>

namespace {

using zamba::LinePlot;
using zamba::PlotCurve;

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

bool has(const std::string& text, const std::string& part) { return count(text, part) > 0; }

/// Every element is closed, in order: as much of an XML parser as the pictures need.
bool well_formed(const std::string& text) {
  std::vector<std::string> open;
  for (std::size_t at = text.find('<'); at != std::string::npos; at = text.find('<', at + 1)) {
    const std::size_t end = text.find('>', at);
    if (end == std::string::npos) return false;
    const std::string tag = text.substr(at + 1, end - at - 1);
    if (has(tag, "<") || count(tag, "\"") % 2 != 0) return false;
    if (tag[0] == '/') {
      if (open.empty() || open.back() != tag.substr(1)) return false;
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(tag.substr(0, tag.find_first_of(" \n")));
    }
  }
  return open.empty();
}

}  // namespace

TEST_SUITE("io/line_plot") {
  TEST_CASE("points lie where the axes say") {
    // The frame of 960 x 540 goes from (78, 82) to (932, 474). y runs from 1 to 3 by 0.5, x from 0 to 100.
    const LinePlot plot{.title = "t", .x_label = "step", .curves = {{"a", {{0, 3}, {50, 2}, {100, 1}}, false}}};
    const std::string text = zamba::svg(plot);
    CHECK(well_formed(text));
    CHECK(has(text, "d=\" M78.0 82.0 L505.0 278.0 L932.0 474.0\""));
    for (const char* label : {">1<", ">1.5<", ">2<", ">2.5<", ">3<", ">0<", ">20<", ">100<", ">step<", ">t<", ">a<"})
      CHECK_MESSAGE(count(text, label) == 1, label);
    CHECK(!has(text, "<circle"));
    CHECK(!has(text, "nan"));
  }

  TEST_CASE("bands are shaded over their part and named") {
    const LinePlot plot{.curves = {{"a", {{0, 3}, {80e6, 1}}, true}},
                        .bands = {{"pretraining", 0, 75e6}, {"annealing", 75e6, 100e6}}};
    const std::string text = zamba::svg(plot);
    CHECK(well_formed(text));
    CHECK(has(text, "<rect x=\"78.0\" y=\"82.0\" width=\"640.5\" height=\"392.0\""));
    CHECK(has(text, "<rect x=\"718.5\" y=\"82.0\" width=\"213.5\" height=\"392.0\""));
    CHECK(has(text, ">pretraining<"));
    CHECK(has(text, ">annealing<"));
    CHECK(has(text, ">20 M<"));
    CHECK(has(text, ">100 M<"));
    CHECK(count(text, "<circle") == 3);  // two points and the legend's
  }

  TEST_CASE("a point that is not finite interrupts the line") {
    const double nan = std::nan("");
    LinePlot plot{.curves = {{"a", {{0, 3}, {1, 2}, {2, nan}, {3, INFINITY}, {4, 1}, {5, 1.5}}, false}}};
    const std::string text = zamba::svg(plot);
    CHECK(count(text, " M") == 2);
    CHECK(count(text, " L") == 2);
    CHECK(!has(text, "nan"));
    CHECK(!has(text, "inf"));
    plot.curves[0].points = {{0, nan}};
    CHECK_THROWS_WITH(zamba::svg(plot), "zamba: LinePlot '': there is no finite point to draw");
    plot.curves.clear();
    CHECK_THROWS_AS(zamba::svg(plot), zamba::Error);
  }

  TEST_CASE("one point, equal values, large and small ranges") {
    for (const double scale : {1e-30, 1e-3, 1., 1e6, 1e300}) {
      const LinePlot plot{.curves = {{"a", {{0, scale}, {scale, 2 * scale}}, true}}};
      const std::string text = zamba::svg(plot);
      CHECK(well_formed(text));
      CHECK(has(text, "M78.0 474.0 L932.0 82.0"));
      CHECK(count(text, "text-anchor=\"end\"") >= 3);  // ticks of y
      CHECK(count(text, "text-anchor=\"end\"") <= 12);
    }
    CHECK(well_formed(zamba::svg({.curves = {{"a", {{5, 2}}, true}}})));
    CHECK(has(zamba::svg({.curves = {{"a", {{0, 2}, {1, 2}}, false}}}), "M78.0 278.0 L932.0 278.0"));
  }

  TEST_CASE("values that differ by roundings, and values beyond drawing, end") {
    // Ticks at multiples of a step that is lost beside the value would never reach the end of the axis.
    for (const double value : {2., 1e17, -3e40}) {
      const double next = std::nextafter(value, 1e300);
      CHECK(well_formed(zamba::svg({.curves = {{"a", {{0, value}, {1, next}}}}})));
      CHECK(well_formed(zamba::svg({.curves = {{"a", {{value, 0}, {next, 1}}}}})));
    }
    CHECK(well_formed(zamba::svg({.curves = {{"a", {{0, 1e-320}, {1, -5e-321}}}}})));
    CHECK_THROWS_WITH(zamba::svg({.title = "t", .curves = {{"a", {{0, -1e308}, {1, 1e308}}}}}),
                      "zamba: LinePlot 't': values of 1e+308 are too large to draw");
  }

  TEST_CASE("more points than pixels become the mean of each pixel column") {
    PlotCurve curve{"a", {}, false};
    for (int i = 0; i < 100'000; ++i) curve.points.push_back({i / 1000., i % 2 ? 1.5 : 2.5});
    curve.points.push_back({100, 1});
    curve.points.push_back({100, 3});
    const std::string text = zamba::svg({.curves = {curve}});
    CHECK(count(text, " L") <= 855);
    CHECK(count(text, " L") >= 850);
    // The mean of 117 points is 2 to 0.5 / 117, which is within a pixel of the middle of the frame at 278.
    CHECK(count(text, " 277.") + count(text, " 278.") >= 850);
    curve.markers = true;  // each is shown
    CHECK(count(zamba::svg({.curves = {curve}}), "<circle") == 100'003);
  }

  TEST_CASE("a limit cuts off what lies above, inside the frame") {
    const LinePlot plot{.curves = {{"a", {{0, 9}, {50, 2}, {100, 1}}, false}}, .y_limit = 3};
    const std::string text = zamba::svg(plot);
    CHECK(has(text, "L505.0 278.0 L932.0 474.0"));
    CHECK(!has(text, ">9<"));
    CHECK(has(text, "<clipPath id=\"plot\"><rect x=\"72.0\" y=\"82.0\""));
    CHECK_THROWS_WITH(zamba::svg({.title = "t", .curves = plot.curves, .y_limit = 1}),
                      "zamba: LinePlot 't': nothing lies below the limit of 1");
  }

  TEST_CASE("the legend stands in the corner that is asked for") {
    LinePlot plot{.curves = {{"a", {{0, 1}, {1, 2}}, false}}};
    const std::string box = "\" y=\"94.0\" width=\"60.2\"";  // 52 and 8.2 a letter
    CHECK(has(zamba::svg(plot), "<rect x=\"859.8" + box));
    plot.legend_left = true;
    CHECK(has(zamba::svg(plot), "<rect x=\"90.0" + box));
  }

  TEST_CASE("names are text, whatever is in them") {
    const std::string text = zamba::svg({.title = "a < b & \"c\"\n>", .curves = {{"<x/>", {{0, 1}}, false}}});
    CHECK(well_formed(text));
    CHECK(has(text, ">a &lt; b &amp; \"c\"&gt;</text>"));
    CHECK(has(text, ">&lt;x/&gt;</text>"));
  }

  TEST_CASE("writing a file, and pictures that cannot be") {
    const zamba_test::TemporaryFolder folder;
    const LinePlot plot{.curves = {{"a", {{0, 1}, {1, 2}}, false}}};
    zamba::write_line_plot(folder.path / "loss.svg", plot);
    CHECK(zamba_test::read_text(folder.path / "loss.svg") == zamba::svg(plot));
    CHECK_THROWS_AS(zamba::write_line_plot(folder.path / "absent" / "loss.svg", plot), zamba::Error);
    CHECK_THROWS_WITH(zamba::svg({.curves = plot.curves, .width = 100}),
                      "zamba: LinePlot: a picture has at least 320 x 240 pixels, got 100 x 540");
    CHECK_THROWS_WITH(zamba::svg({.curves = plot.curves, .bands = {{"p", 2, 1}}}),
                      "zamba: LinePlot: band 'p' goes from 2 to 1");
  }
}
