#pragma once

/// The files of src/monitor/report/ as text; the build makes their source (cmake/embed_text.cmake).
namespace dsv3::report_files {

extern const char* const kPageHtml;
extern const char* const kPageCss;
extern const char* const kChartsJs;
extern const char* const kHeatmapJs;
extern const char* const kPageJs;

}  // namespace dsv3::report_files
