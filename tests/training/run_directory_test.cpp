#include "training/run_directory.h"

#include <gtest/gtest.h>

#include <csignal>

#include "base/error.h"
#include "base/file.h"
#include "training/stop_signals.h"
#include "training/tiny.h"

namespace dsv3 {
namespace {
namespace fs = std::filesystem;

TEST(RunDirectory, AnExistingRunIsMovedAsideNeverDeleted) {
  const test::TemporaryDirectory temporary;
  const auto run = temporary.path() / "runs" / "first";
  EXPECT_FALSE(prepare_run_directory(run).has_value());
  EXPECT_FALSE(holds_run(run)) << "nothing was trained yet";
  EXPECT_FALSE(prepare_run_directory(run).has_value());
  write_file_atomically(run / "metrics.jsonl", "{}\n");
  EXPECT_TRUE(holds_run(run));
  EXPECT_EQ(prepare_run_directory(run), run.parent_path() / "first.1");
  EXPECT_EQ(read_file(run.parent_path() / "first.1" / "metrics.jsonl"), "{}\n");
  EXPECT_FALSE(fs::exists(run / "metrics.jsonl"));
  fs::create_directory(run / "checkpoints" / "step_1");
  EXPECT_TRUE(holds_run(run.string() + "/"));
  EXPECT_EQ(prepare_run_directory(run.string() + "/"), run.parent_path() / "first.2");
}

TEST(RunDirectory, OtherThingsInTheWayAreNamed) {
  const test::TemporaryDirectory temporary;
  write_file_atomically(temporary.path() / "file", "x");
  EXPECT_THROW(prepare_run_directory(temporary.path() / "file"), std::invalid_argument);
  EXPECT_THROW(prepare_run_directory(temporary.path() / "file" / "run"), IoError);
  EXPECT_EQ(read_file(temporary.path() / "file"), "x");
}

TEST(RunDirectory, LinesBeyondAStepAndHalfLinesAreDropped) {
  const test::TemporaryDirectory temporary;
  const auto path = temporary.path() / "metrics.jsonl";
  EXPECT_EQ(drop_metrics_after(path, 3), 0) << "there is no such file";
  const std::string kept =
      "{\"time\":1.5,\"step\":1,\"train/loss\":2.5}\n{\"step\": 3, \"event\":\"resume\"}\n";
  write_file_atomically(path, kept);
  EXPECT_EQ(drop_metrics_after(path, 3), 0);
  EXPECT_EQ(read_file(path), kept);
  const std::string later = "{\"step\":4}\n", half = "{\"step\":2,\"train/l";
  for (const std::string& more :
       {later, half, later + half, "\n" + later, std::string("null\n"), std::string(3, '\0')}) {
    write_file_atomically(path, kept + more);
    EXPECT_GT(drop_metrics_after(path, 3), 0) << more;
    EXPECT_EQ(read_file(path), kept) << more;
  }
  EXPECT_EQ(drop_metrics_after(path, 0), 2);
  EXPECT_EQ(read_file(path), "");
}

TEST(RunDirectory, ALockIsHeldOnce) {
  const test::TemporaryDirectory temporary;
  {
    const RunLock lock(temporary.path());
    EXPECT_THROW(RunLock(temporary.path()), IoError);
  }
  const RunLock again(temporary.path());
  EXPECT_THROW(RunLock(temporary.path() / "nowhere"), IoError);
}

TEST(RunDirectory, OfTwoProcessesThatBeginOneRunTheSecondTouchesNothing) {
  const test::TemporaryDirectory temporary;
  const auto run = temporary.path() / "run";
  auto first = begin_run_directory(run);
  EXPECT_THROW(begin_run_directory(run), IoError) << "the first is at work";
  write_file_atomically(run / "metrics.jsonl", "{}\n");
  first.reset();
  EXPECT_THROW(begin_run_directory(run), IoError) << "the first has left a run";
  EXPECT_EQ(read_file(run / "metrics.jsonl"), "{}\n");
  EXPECT_FALSE(fs::exists(temporary.path() / "run.1"));
  write_file_atomically(temporary.path() / "file", "x");
  EXPECT_THROW(begin_run_directory(temporary.path() / "file"), std::invalid_argument);
  EXPECT_THROW(begin_run_directory(temporary.path() / "file" / "run"), IoError);
}

TEST(StopSignals, TheFirstIsRememberedAndHandlersReturn) {
  {
    const StopSignals signals;
    EXPECT_FALSE(StopSignals::requested());
    EXPECT_EQ(StopSignals::signal(), 0);
    std::raise(SIGUSR1);
    EXPECT_FALSE(StopSignals::requested()) << "SIGUSR1 stops nothing";
    EXPECT_TRUE(StopSignals::take_save_request());
    EXPECT_FALSE(StopSignals::take_save_request()) << "one signal, one save";
    std::raise(SIGTERM);
    EXPECT_TRUE(StopSignals::requested());
    EXPECT_EQ(StopSignals::signal(), SIGTERM);
  }
  const StopSignals again;
  EXPECT_FALSE(StopSignals::requested());
}

TEST(StopSignals, TheSecondEndsTheProcessWithItsCode) {
  for (const int signal : {SIGINT, SIGTERM})
    EXPECT_EXIT(
        {
          const StopSignals signals;
          std::raise(signal);
          std::raise(signal);
        },
        testing::ExitedWithCode(128 + signal), "stopping after this step");
}

}  // namespace
}  // namespace dsv3
