// Tests of the thread-pool seam: coverage of the range, choice of the backend, exceptions.
#include "cpu/parallel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <stdexcept>
#include <thread>
#include <vector>

namespace adpdm::cpu {
namespace {

constexpr int64_t kThreads = 3;

// A backend on std::thread which cuts the range into kThreads pieces, of `grain` at least.
void run_on_threads(int64_t begin, int64_t end, int64_t grain, void* context, ParallelBody body) {
  const int64_t piece = std::max(grain, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors((end - begin + piece - 1) / piece);
  for (size_t i = 0; i < errors.size(); ++i) {
    threads.emplace_back([=, &errors] {
      const int64_t first = begin + static_cast<int64_t>(i) * piece;
      try {
        body(context, first, std::min(end, first + piece));
      } catch (...) {
        errors[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// Installs a backend for one test.
class Parallel : public ::testing::TestWithParam<ParallelBackend> {
 protected:
  void SetUp() override { previous_ = set_parallel_backend(GetParam()); }
  void TearDown() override { EXPECT_EQ(set_parallel_backend(previous_), GetParam()); }

 private:
  ParallelBackend previous_ = nullptr;
};

TEST_P(Parallel, VisitsEveryIndexOnce) {
  for (int64_t count : {1, 2, 3, 7, 64, 1000}) {
    for (int64_t grain : {1, 5, 64, 5000}) {
      std::vector<int> visits(count, 0);
      parallel_for(10, 10 + count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++visits[i - 10];
      });
      EXPECT_EQ(std::count(visits.begin(), visits.end(), 1), count)
          << "count " << count << ", grain " << grain;
    }
  }
}

TEST_P(Parallel, EmptyRangeCallsNothing) {
  std::atomic<int> calls{0};
  parallel_for(5, 5, 1, [&](int64_t, int64_t) { ++calls; });
  parallel_for(5, 3, 1, [&](int64_t, int64_t) { ++calls; });
  EXPECT_EQ(calls, 0);
}

TEST_P(Parallel, ExceptionReachesTheCaller) {
  EXPECT_THROW(parallel_for(0, 100, 1,
                            [](int64_t begin, int64_t end) {
                              if (begin <= 50 && 50 < end) throw std::out_of_range("50");
                            }),
               std::out_of_range);
}

INSTANTIATE_TEST_SUITE_P(Backends, Parallel, ::testing::Values(ParallelBackend{nullptr}, &run_on_threads));

TEST(ParallelBackendChoice, SerialRunsOneRangeAndThreadsSeveral) {
  std::atomic<int> calls{0};
  const auto count = [&](int64_t, int64_t) { ++calls; };
  const ParallelBackend previous = set_parallel_backend(nullptr);
  parallel_for(0, 300, 1, count);
  EXPECT_EQ(calls.exchange(0), 1);
  set_parallel_backend(&run_on_threads);
  parallel_for(0, 300, 1, count);
  EXPECT_EQ(calls.exchange(0), kThreads);
  parallel_for(0, 300, 300, count);  // not worth a thread
  EXPECT_EQ(calls, 1);
  set_parallel_backend(previous);
}

}  // namespace
}  // namespace adpdm::cpu
