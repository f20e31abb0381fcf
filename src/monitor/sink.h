#pragma once

#include "monitor/metrics.h"

namespace dsv3 {

/// A place that takes a run's records. Not for several threads at once: RunMonitor serialises.
class Sink {
 public:
  virtual ~Sink() = default;
  /// Throws IoError when the place cannot take it. What a sink holds back it writes within a few
  /// seconds, at a later write() or at its end.
  virtual void write(const Record& record) = 0;
};

/// Seconds since 1970.
double unix_seconds();

}  // namespace dsv3
