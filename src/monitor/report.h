#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "monitor/run_history.h"

namespace dsv3 {

/// A run that a page shows.
struct ReportRun {
  RunHistory history;
  std::string resume_command;  // "" where there is none to give
};

/// Curves are thinned out to this many points, so that a page of a long run stays small.
inline constexpr size_t kMostPoints = 2000;
inline constexpr size_t kMostLayerPoints = 300;  // of curves that come by layer
inline constexpr size_t kMostBars = 300;         // of the stacked step time
inline constexpr size_t kMostMarks = 400;        // events of one kind on the time axis

/// The whole page, which needs no other file and no network: of one run, or of two to eight with
/// their curves over each other. All text that comes from the runs is escaped. Throws
/// std::invalid_argument when there are none or more than eight.
std::string report_page(const std::vector<ReportRun>& runs);

/// What the page shows as numbers at the top: label and value, "–" where the run has none.
std::vector<std::pair<std::string, std::string>> headline(const RunHistory& history);

/// `text` as an HTML text node or attribute.
std::string escape_html(std::string_view text);

/// `json` so that it can stand in a <script> element: the same value, without <, > and &.
std::string escape_json_for_html(std::string_view json);

}  // namespace dsv3
