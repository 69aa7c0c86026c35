// SPDX-License-Identifier: MIT
// LinePlot: curves over an axis, such as losses over the tokens of a run with its phases, as an SVG picture.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include <zamba/error.hpp>
#include <zamba/io/file.hpp>
#include <zamba/number.hpp>

namespace zamba {

struct PlotPoint {
  double x = 0, value = 0;
};

/// Points in the order of x. One that is not finite interrupts the line.
struct PlotCurve {
  std::string name = {};
  std::vector<PlotPoint> points = {};
  bool markers = false;  // a dot on every point: for values measured now and then
};

/// A part of the x axis, shaded and named.
struct PlotBand {
  std::string name = {};
  double first = 0, last = 0;
};

struct LinePlot {
  std::string title = {};
  std::string x_label = {};
  std::string y_label = {};
  std::vector<PlotCurve> curves = {};
  std::vector<PlotBand> bands = {};
  int width = 960, height = 540;                             // pixels
  double y_limit = std::numeric_limits<double>::infinity();  // what lies above is cut off, so that the end is legible
  bool legend_left = false;                                  // for rising curves: the legend where they are not
};

namespace detail {

/// Draws one LinePlot. All numbers are written with std::to_chars: a locale with decimal commas changes nothing.
class LinePlotWriter {
 public:
  explicit LinePlotWriter(const LinePlot& plot) : plot_(plot), right_(plot.width - 28), bottom_(plot.height - 66) {
    require(plot.width >= 320 && plot.height >= 240, "LinePlot: a picture has at least 320 x 240 pixels, got ",
            plot.width, " x ", plot.height);
    find_ranges();
  }

  std::string svg() {
    const std::string width = number(plot_.width), height = number(plot_.height);
    out_ = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"" + width + "\" height=\"" + height +
           "\" viewBox=\"0 0 " + width + " " + height +
           "\" font-family=\"Inter, Helvetica, Arial, 'DejaVu Sans', sans-serif\">\n"
           "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n";
    text(left, 34, plot_.title, "font-size=\"20\" font-weight=\"600\" fill=\"#1c2430\"");
    bands();
    axes();
    // A dot on the frame is whole; above it is room only where nothing is cut off.
    const double clip = is_finite(plot_.y_limit) ? top : top - 6;
    out_ += "<clipPath id=\"plot\"><rect" + attribute("x", left - 6) + attribute("y", clip) +
            attribute("width", right_ - left + 12) + attribute("height", bottom_ + 6 - clip) + "/></clipPath>\n" +
            "<g clip-path=\"url(#plot)\">\n";
    for (std::size_t i = 0; i < plot_.curves.size(); ++i) curve(plot_.curves[i], colours[i % colours.size()]);
    out_ += "</g>\n";
    legend();
    return out_ + "</svg>\n";
  }

 private:
  static constexpr double left = 78, top = 82;
  // The palette of Okabe and Ito: distinct for colour-blind eyes, too.
  static constexpr std::array<const char*, 6> colours = {"#0072b2", "#d55e00", "#009e73",
                                                         "#cc79a7", "#56b4e9", "#e69f00"};

  static bool drawable(const PlotPoint& point) { return is_finite(point.x) && is_finite(point.value); }

  void find_ranges() {
    constexpr double inf = std::numeric_limits<double>::infinity();
    x_min_ = y_min_ = inf;
    x_max_ = y_max_ = -inf;
    for (const PlotCurve& curve : plot_.curves) {
      for (const PlotPoint& point : curve.points) {
        if (!drawable(point)) continue;
        x_min_ = std::min(x_min_, point.x), x_max_ = std::max(x_max_, point.x);
        y_min_ = std::min(y_min_, point.value), y_max_ = std::max(y_max_, point.value);
      }
    }
    require(y_min_ <= y_max_, "LinePlot '", plot_.title, "': there is no finite point to draw");
    require(plot_.y_limit > y_min_, "LinePlot '", plot_.title, "': nothing lies below the limit of ", plot_.y_limit);
    y_max_ = std::min(y_max_, plot_.y_limit);
    for (const PlotBand& band : plot_.bands) {
      require(is_finite(band.first) && is_finite(band.last) && band.first <= band.last, "LinePlot: band '", band.name,
              "' goes from ", band.first, " to ", band.last);
      x_min_ = std::min(x_min_, band.first), x_max_ = std::max(x_max_, band.last);
    }
    if (!wide(x_min_, x_max_)) x_max_ = x_min_ + std::max(1., 1e-3 * std::abs(x_min_));
    if (!wide(y_min_, y_max_)) {
      const double room = std::max(0.5, 1e-3 * std::abs(y_min_));
      y_min_ -= room, y_max_ += room;
    }
    // The y axis ends on ticks, the x axis where the run does.
    y_step_ = tick_step(y_max_ - y_min_, 6), x_step_ = tick_step(x_max_ - x_min_, 8);
    y_min_ = std::floor(y_min_ / y_step_) * y_step_, y_max_ = std::ceil(y_max_ / y_step_) * y_step_;
  }

  /// Whether ticks can divide a range: values that are equal, or differ by roundings, have none.
  bool wide(double least, double largest) const {
    const double size = std::max(std::abs(least), std::abs(largest));
    require(size < 4e307, "LinePlot '", plot_.title, "': values of ", size, " are too large to draw");
    return largest - least > std::max(1e-9 * size, 1e-300);
  }

  /// 1, 2 or 5 times a power of ten: about `count` steps in the range.
  static double tick_step(double range, int count) {
    const double raw = range / count, power = std::pow(10, std::floor(std::log10(raw)));
    for (const double factor : {1., 2., 5.})
      if (raw <= factor * power * (1 + 1e-9)) return factor * power;
    return 10 * power;
  }

  double x_at(double x) const { return left + (x - x_min_) / (x_max_ - x_min_) * (right_ - left); }
  double y_at(double y) const { return bottom_ - (y - y_min_) / (y_max_ - y_min_) * (bottom_ - top); }

  void bands() {
    for (std::size_t i = 0; i < plot_.bands.size(); ++i) {
      const PlotBand& band = plot_.bands[i];
      const double from = x_at(band.first), to = x_at(band.last);
      out_ += "<rect" + attribute("x", from) + attribute("y", top) + attribute("width", to - from) +
              attribute("height", bottom_ - top) + " fill=\"" + (i % 2 ? "#fdf1e3" : "#eef3f8") + "\"/>\n";
      text((from + to) / 2, top - 10, band.name, "font-size=\"14\" fill=\"#4a5565\" text-anchor=\"middle\"");
    }
  }

  void axes() {
    // Multiples of the step, not sums: no error adds up. The slack admits a tick at the very end.
    for (double k = std::ceil(y_min_ / y_step_ - 1e-6); k * y_step_ <= y_max_ + 1e-6 * y_step_; ++k) {
      const double y = y_at(k * y_step_);
      line(left, y, right_, y, "#d5dae1");
      text(left - 10, y + 5, label(k * y_step_, 1, ""), "font-size=\"14\" fill=\"#4a5565\" text-anchor=\"end\"");
    }
    double scale = 1;
    const char* unit = "";
    for (const char* next : {" k", " M", " B", " T"}) {
      if (std::max(std::abs(x_min_), std::abs(x_max_)) < 2000 * scale) break;
      scale *= 1000;
      unit = next;
    }
    for (double k = std::ceil(x_min_ / x_step_ - 1e-6); k * x_step_ <= x_max_ + 1e-6 * x_step_; ++k) {
      const double x = x_at(k * x_step_);
      line(x, bottom_, x, bottom_ + 5, "#4a5565");
      text(x, bottom_ + 23, label(k * x_step_, scale, unit),
           "font-size=\"14\" fill=\"#4a5565\" text-anchor=\"middle\"");
    }
    line(left, bottom_, right_, bottom_, "#4a5565");
    const std::string style = "font-size=\"15\" fill=\"#1c2430\" text-anchor=\"middle\"";
    text((left + right_) / 2, bottom_ + 50, plot_.x_label, style);
    const double middle = (top + bottom_) / 2;
    text(24, middle, plot_.y_label, style + " transform=\"rotate(-90 24 " + number(middle) + ")\"");
  }

  void curve(const PlotCurve& curve, const char* colour) {
    std::string path;
    bool pen_down = false;
    const std::vector<PlotPoint> points = curve.markers ? curve.points : thinned(curve.points);
    for (const PlotPoint& point : points) {
      if (drawable(point)) path += (pen_down ? " L" : " M") + number(x_at(point.x)) + " " + number(y_at(point.value));
      pen_down = drawable(point);
    }
    out_ += std::string("<path fill=\"none\" stroke=\"") + colour + "\" stroke-width=\"" +
            (curve.markers ? "2.2" : "1.6") + "\" stroke-linejoin=\"round\" stroke-linecap=\"round\" d=\"" + path +
            "\"/>\n";
    for (const PlotPoint& point : points)
      if (curve.markers && drawable(point)) dot(x_at(point.x), y_at(point.value), colour);
  }

  /// Where there are more points than pixels, the mean of each pixel column: the file stays small, the noise legible.
  std::vector<PlotPoint> thinned(const std::vector<PlotPoint>& points) const {
    if (static_cast<double>(points.size()) <= right_ - left) return points;
    std::vector<PlotPoint> result;
    for (std::size_t i = 0; i < points.size();) {
      if (!drawable(points[i])) {
        result.push_back(points[i++]);
        continue;
      }
      const double column = std::floor(x_at(points[i].x));
      PlotPoint sum;
      double count = 0;
      for (; i < points.size() && drawable(points[i]) && std::floor(x_at(points[i].x)) == column; ++i, ++count) {
        sum.x += points[i].x;
        sum.value += points[i].value;
      }
      result.push_back({sum.x / count, sum.value / count});
    }
    return result;
  }

  /// In the upper corner that the curves leave free.
  void legend() {
    std::size_t longest = 0;
    for (const PlotCurve& curve : plot_.curves) longest = std::max(longest, curve.name.size());
    const double width = 52 + 8.2 * static_cast<double>(longest);
    const double x = plot_.legend_left ? left + 12 : right_ - width - 12;
    const double height = 12 + 24 * static_cast<double>(plot_.curves.size());
    out_ += "<rect" + attribute("x", x) + attribute("y", top + 12) + attribute("width", width) +
            attribute("height", height) + " rx=\"4\" fill=\"#ffffff\" fill-opacity=\"0.9\" stroke=\"#d5dae1\"/>\n";
    for (std::size_t i = 0; i < plot_.curves.size(); ++i) {
      const double y = top + 30 + 24 * static_cast<double>(i);
      const char* colour = colours[i % colours.size()];
      line(x + 12, y, x + 36, y, colour, "2.2");
      if (plot_.curves[i].markers) dot(x + 24, y, colour);
      text(x + 44, y + 5, plot_.curves[i].name, "font-size=\"14\" fill=\"#1c2430\"");
    }
  }

  void line(double x1, double y1, double x2, double y2, const char* colour, const char* width = "1") {
    out_ += "<line" + attribute("x1", x1) + attribute("y1", y1) + attribute("x2", x2) + attribute("y2", y2) +
            " stroke=\"" + colour + "\" stroke-width=\"" + width + "\"/>\n";
  }

  void dot(double x, double y, const char* colour) {
    out_ += "<circle" + attribute("cx", x) + attribute("cy", y) + " r=\"4\" fill=\"" + colour +
            "\" stroke=\"#ffffff\" stroke-width=\"1.2\"/>\n";
  }

  void text(double x, double y, std::string_view content, const std::string& style) {
    out_ += "<text" + attribute("x", x) + attribute("y", y) + " " + style + ">";
    for (const char c : content) {
      if (c == '&') {
        out_ += "&amp;";
      } else if (c == '<') {
        out_ += "&lt;";
      } else if (c == '>') {
        out_ += "&gt;";
      } else if (static_cast<unsigned char>(c) >= 32) {  // XML has no other control characters worth a label
        out_ += c;
      }
    }
    out_ += "</text>\n";
  }

  static std::string attribute(const char* name, double value) {
    return std::string(" ") + name + "=\"" + number(value) + "\"";
  }

  /// To a tenth of a pixel.
  static std::string number(double value) {
    char buffer[400];  // the longest double has 309 digits before the point
    return {buffer, std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::fixed, 1).ptr};
  }

  static std::string label(double value, double scale, const char* unit) {
    if (value == 0) return "0";
    char buffer[32];
    return std::string(
               buffer,
               std::to_chars(buffer, buffer + sizeof buffer, value / scale, std::chars_format::general, 6).ptr) +
           unit;
  }

  const LinePlot& plot_;
  double right_, bottom_;
  double x_min_ = 0, x_max_ = 0, y_min_ = 0, y_max_ = 0, x_step_ = 0, y_step_ = 0;
  std::string out_;
};

}  // namespace detail

/// The picture as SVG text.
inline std::string svg(const LinePlot& plot) { return detail::LinePlotWriter(plot).svg(); }

/// Writes the picture; the file is replaced whole or not at all.
inline void write_line_plot(const std::filesystem::path& path, const LinePlot& plot) {
  const std::string text = svg(plot);
  replace_file(path, [&](FileWriter& out) { out.write(std::string_view(text)); });
}

}  // namespace zamba
