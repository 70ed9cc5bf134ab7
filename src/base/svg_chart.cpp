#include "base/svg_chart.h"

#include <algorithm>
#include <array>
#include <cmath>

#include <fmt/format.h>

#include "base/progress.h"

namespace hadal {
namespace {

// Told apart in print and by most colour-blind readers.
constexpr std::array kColours = {"#1f6fb4", "#c8442b", "#2f8f4e", "#8757b0", "#b8860b", "#3a9ca3"};
constexpr double kLeft = 86, kRight = 24, kTop = 58, kBottom = 58;
constexpr double kCharWidth = 7.2;  // of the legend's text, on average
constexpr size_t kMaxPoints = 3000;

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '<') {
      out += "&lt;";
    } else if (c == '&') {
      out += "&amp;";
    } else {
      out += c;
    }
  }
  return out;
}

struct Range {
  double low = INFINITY, high = -INFINITY;
  void add(double value) {
    if (!std::isfinite(value)) return;
    low = std::min(low, value);
    high = std::max(high, value);
  }
  double size() const { return high - low; }
};

/// Of a long series the lowest and the highest point of every bucket: what the eye would see.
std::vector<std::pair<double, double>> thinned(const std::vector<std::pair<double, double>>& all) {
  if (all.size() <= kMaxPoints) return all;
  const size_t buckets = kMaxPoints / 2;
  std::vector<std::pair<double, double>> out;
  for (size_t bucket = 0; bucket < buckets; ++bucket) {
    const auto begin = all.begin() + static_cast<ptrdiff_t>(all.size() * bucket / buckets);
    const auto end = all.begin() + static_cast<ptrdiff_t>(all.size() * (bucket + 1) / buckets);
    auto [low, high] = std::minmax_element(
        begin, end, [](const auto& a, const auto& b) { return a.second < b.second; });
    if (high < low) std::swap(low, high);
    out.push_back(*low);
    if (high != low) out.push_back(*high);
  }
  return out;
}

class Drawing {
 public:
  Drawing(const Chart& chart, double left) : chart_(chart), left_(left + kLeft) {
    right_ = left + chart.width - kRight;
    bottom_ = chart.height - kBottom;
    for (const Series& series : chart.series)
      for (const auto& [px, py] : series.points) {
        x_.add(px);
        y_.add(py);
        whole_x_ = whole_x_ && px == std::floor(px);
      }
    if (chart.from_zero) y_.add(0.0);
    if (x_.size() < 0) x_ = {0.0, 1.0};
    if (y_.size() < 0) y_ = {0.0, 1.0};
    if (x_.size() == 0) x_.high = x_.low + 1.0;
    if (y_.size() == 0) y_.high = y_.low + std::max(1e-3, std::abs(y_.low) * 0.1);
    const double margin = 0.04 * y_.size();
    if (!chart.from_zero) y_.low -= margin;
    y_.high += margin;
  }

  std::string draw() {
    text(left_, 26, "start", chart_.title, "#222", "font-weight='600' font-size='15'");
    axes();
    marks();
    size_t colour = 0;
    for (const Series& series : chart_.series) {
      line(series, kColours[colour % kColours.size()]);
      if (!series.faint) ++colour;
    }
    legend();
    return out_;
  }

 private:
  double place_x(double value) const {
    const bool log = chart_.x_scale == XScale::kLog2;
    const double low = log ? std::log2(x_.low) : x_.low, high = log ? std::log2(x_.high) : x_.high;
    return left_ + (right_ - left_) * ((log ? std::log2(value) : value) - low) / (high - low);
  }
  double place_y(double value) const {
    return bottom_ - (bottom_ - kTop) * (value - y_.low) / y_.size();
  }

  void text(double x,
            double y,
            const char* anchor,
            const std::string& content,
            const char* colour = "#444",
            const std::string& more = "") {
    out_ += fmt::format("<text x='{:.1f}' y='{:.1f}' text-anchor='{}' fill='{}' {}>{}</text>\n", x,
                        y, anchor, colour, more, escaped(content));
  }
  void segment(double x1, double y1, double x2, double y2, const char* style) {
    out_ += fmt::format("<path d='M{:.1f} {:.1f}L{:.1f} {:.1f}' {}/>\n", x1, y1, x2, y2, style);
  }

  void axes() {
    const std::vector<double> y_ticks = round_ticks(y_.low, y_.high, 6);
    const double y_step = y_ticks.size() > 1 ? y_ticks[1] - y_ticks[0] : 1.0;
    for (const double value : y_ticks) {
      segment(left_, place_y(value), right_, place_y(value), "stroke='#e4e4e4'");
      text(left_ - 8, place_y(value) + 4, "end", y_text(value, y_step));
    }
    for (const auto& [value, label] : x_ticks()) {
      segment(place_x(value), bottom_, place_x(value), bottom_ + 5, "stroke='#444'");
      text(place_x(value), bottom_ + 20, "middle", label);
    }
    segment(left_, bottom_, right_, bottom_, "stroke='#444'");
    segment(left_, kTop, left_, bottom_, "stroke='#444'");
    text((left_ + right_) / 2, bottom_ + 42, "middle", chart_.x_label);
    const double middle = (kTop + bottom_) / 2, edge = left_ - kLeft + 16;
    text(edge, middle, "middle", chart_.y_label, "#444",
         fmt::format("transform='rotate(-90 {:.1f} {:.1f})'", edge, middle));
  }

  static std::string y_text(double value, double step) {
    if (std::abs(value) >= 10000 || step >= 1000) return short_number(value);
    const int decimals =
        std::clamp(static_cast<int>(std::ceil(-std::log10(step) - 1e-9)) + 0, 0, 12);
    if (step < 1e-4) return fmt::format("{:.3g}", value);
    const double scaled = step * std::pow(10, decimals);
    const bool half = std::abs(scaled - std::round(scaled)) > 1e-6;  // 2.5, 0.25
    return fmt::format("{:.{}f}", std::abs(value) < step * 1e-6 ? 0.0 : value,
                       decimals + (half ? 1 : 0));
  }

  std::vector<std::pair<double, std::string>> x_ticks() const {
    std::vector<std::pair<double, std::string>> ticks;
    if (chart_.x_scale == XScale::kLinear) {
      for (const double value : round_ticks(x_.low, x_.high, 7, whole_x_))
        ticks.emplace_back(value, short_number(value));
      return ticks;
    }
    for (double power = std::ceil(std::log2(x_.low)); power <= std::log2(x_.high); power += 2) {
      const double value = std::exp2(power);
      const double units = value >= 1048576 ? value / 1048576
                           : value >= 1024  ? value / 1024
                                            : value;
      ticks.emplace_back(value, fmt::format("{:g}{}", units,
                                            value >= 1048576 ? "M"
                                            : value >= 1024  ? "K"
                                                             : ""));
    }
    return ticks;
  }

  /// Labels stand above the plot; one that would run into its neighbour is raised to a second row.
  void marks() {
    constexpr double kLabelWidth = 56.0, kRow = 14.0;
    double row_end[2] = {-1e9, -1e9};
    for (const ChartMark& mark : chart_.marks) {
      if (mark.x < x_.low || mark.x > x_.high) continue;
      const double x = place_x(mark.x);
      const int row = x - row_end[0] < kLabelWidth ? 1 : 0;
      row_end[row] = x;
      segment(x, kTop, x, bottom_, "stroke='#888' stroke-dasharray='5 4'");
      text(x, kTop - 6 - kRow * row, "middle", mark.label, "#666", "font-size='12'");
    }
  }

  void line(const Series& series, const char* colour) {
    std::string path;
    bool pen_down = false;
    size_t count = 0;
    const auto points = thinned(series.points);
    for (const auto& [px, py] : points) {
      if (!std::isfinite(py) || !std::isfinite(px)) {
        pen_down = false;
        continue;
      }
      path += fmt::format("{}{:.1f} {:.1f}", pen_down ? "L" : "M", place_x(px), place_y(py));
      pen_down = true;
      ++count;
    }
    out_ += fmt::format(
        "<path fill='none' stroke='{}' stroke-width='{}' stroke-opacity='{}' "
        "stroke-linejoin='round' d='{}'/>\n",
        colour, series.faint ? 1.0 : 2.0, series.faint ? 0.25 : 1.0, path);
    if (count == 0 || count > 40 || series.faint) return;
    for (const auto& [px, py] : points) {
      if (!std::isfinite(py)) continue;
      out_ += fmt::format("<circle cx='{:.1f}' cy='{:.1f}' r='3' fill='{}'/>\n", place_x(px),
                          place_y(py), colour);
    }
  }

  /// In the corner where the curves leave the most room.
  void legend() {
    size_t count = 0, longest = 0;
    for (const Series& series : chart_.series) {
      if (series.faint) continue;
      ++count;
      longest = std::max(longest, series.label.size());
    }
    if (count == 0) return;
    const double width = 46 + kCharWidth * static_cast<double>(longest);
    const double height = 12 + 19 * static_cast<double>(count);
    const double x_left = left_ + 12, x_right = right_ - width - 8;
    const double y_top = kTop + 6, y_bottom = bottom_ - height - 26;
    double x = x_right, y = y_top;
    size_t fewest = covered(x, y, width, height);
    for (const auto& [cx, cy] :
         {std::pair{x_left, y_top}, std::pair{x_left, y_bottom}, std::pair{x_right, y_bottom}}) {
      const size_t hits = covered(cx, cy, width, height);
      if (hits >= fewest) continue;
      fewest = hits;
      x = cx;
      y = cy;
    }
    out_ += fmt::format(
        "<rect x='{:.1f}' y='{:.1f}' width='{:.1f}' height='{:.1f}' rx='4' fill='#fff' "
        "fill-opacity='0.85' stroke='#ddd'/>\n",
        x, y, width, height);
    size_t colour = 0;
    for (const Series& series : chart_.series) {
      if (series.faint) continue;
      const double row = y + 18 + 19 * static_cast<double>(colour);
      out_ += fmt::format("<path d='M{:.1f} {:.1f}h20' stroke='{}' stroke-width='2.5'/>\n", x + 10,
                          row - 4, kColours[colour % kColours.size()]);
      text(x + 38, row, "start", series.label, "#222");
      ++colour;
    }
  }

  size_t covered(double x, double y, double width, double height) const {
    size_t hits = 0;
    for (const Series& series : chart_.series)
      for (const auto& [px, py] : series.points) {
        if (!std::isfinite(py)) continue;
        const double dx = place_x(px) - x, dy = place_y(py) - y;
        hits += dx > 0 && dx < width && dy > 0 && dy < height ? 1 : 0;
      }
    return hits;
  }

  const Chart& chart_;
  double left_, right_ = 0, bottom_ = 0;
  bool whole_x_ = true;
  Range x_, y_;
  std::string out_;
};

}  // namespace

std::vector<double> round_ticks(double low, double high, int count, bool whole) {
  if (!(high > low) || count < 1) return {low};
  const double rough = whole ? std::max(1.0, (high - low) / count) : (high - low) / count;
  const double unit = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * unit;
  for (const double factor : {1.0, 2.0, 2.5, 5.0}) {
    if (whole && factor * unit != std::floor(factor * unit)) continue;
    if (factor * unit >= rough * 0.999) {
      step = factor * unit;
      break;
    }
  }
  std::vector<double> ticks;
  const double slack = 1e-9 * (high - low);
  for (double index = std::ceil((low - slack) / step); index * step <= high + slack; index += 1)
    ticks.push_back(index * step + 0.0);  // no negative zero
  return ticks;
}

std::string draw_svg(std::span<const Chart> charts, ChartOrder order) {
  double width = 0, height = 0;
  std::string body;
  for (const Chart& chart : charts) {
    if (order == ChartOrder::kBelow) {
      body += fmt::format("<g transform='translate(0 {:g})'>\n{}</g>\n", height,
                          Drawing(chart, 0).draw());
      width = std::max(width, chart.width);
      height += chart.height;
    } else {
      body += Drawing(chart, width).draw();
      width += chart.width;
      height = std::max(height, chart.height);
    }
  }
  return fmt::format(
             "<svg xmlns='http://www.w3.org/2000/svg' width='{0:g}' height='{1:g}' "
             "viewBox='0 0 {0:g} {1:g}' font-family='sans-serif' font-size='13'>"
             "<rect width='{0:g}' height='{1:g}' fill='#fff'/>\n",
             width, height) +
         body + "</svg>\n";
}

}  // namespace hadal
