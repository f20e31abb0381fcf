#pragma once

#include <nlohmann/json.hpp>
#include <vector>

#include "monitor/report.h"

namespace dsv3 {

/// The charts of a page, as its script reads them: [{id, title, unit, kind, log, startsLog, note,
/// series: [{run, name, label, style, window, step, value, total}]}]. Charts without a curve are
/// left out. With several runs the curves by layer are left out too, and the step's time is one
/// curve a run.
nlohmann::ordered_json report_panels(const std::vector<ReportRun>& runs);

/// The loads of experts over time, {layers, experts, scale, total, frames: [{step, cells}]}, cells
/// in base64; null when the run has none.
nlohmann::ordered_json report_loads(const RunHistory& history);

/// `value` with six digits, null when it is not finite.
nlohmann::ordered_json short_number(double value);

}  // namespace dsv3
