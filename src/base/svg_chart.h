// Line charts as SVG text: axes with round ticks, legend, vertical marks.
#pragma once

#include <span>
#include <string>
#include <utility>
#include <vector>

namespace hadal {

struct Series {
  std::string label;
  std::vector<std::pair<double, double>> points;  ///< by ascending x; not finite y: a gap
  bool faint = false;  ///< background of the next series, no legend entry
};

struct ChartMark {
  double x;
  std::string label;
};

enum class XScale {
  kLinear,
  kLog2,  ///< ticks at powers of 4, as K and M of 1024
};

struct Chart {
  std::string title, x_label, y_label;
  XScale x_scale = XScale::kLinear;
  bool from_zero = false;  ///< the y axis begins at 0
  std::vector<Series> series;
  std::vector<ChartMark> marks;
  double width = 880, height = 420;  ///< of this chart, in pixels
};

enum class ChartOrder { kBeside, kBelow };

/// One document with the charts beside or below each other. An axis of whole numbers (tokens,
/// steps) has ticks at whole numbers.
std::string draw_svg(std::span<const Chart> charts, ChartOrder order = ChartOrder::kBeside);

/// About `count` round values that lie in [low, high]; `whole`: whole numbers, fewer if need be.
std::vector<double> round_ticks(double low, double high, int count, bool whole = false);

}  // namespace hadal
