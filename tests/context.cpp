// SPDX-License-Identifier: MIT
#include <zamba/context.hpp>

#include <atomic>
#include <cstdint>
#include <set>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>

using namespace zamba;

TEST_SUITE("context") {
  TEST_CASE("scratch is aligned, apart from each other, and given back by marks") {
    Arena<cpu> arena;
    const auto begin = arena.mark();
    const auto a = arena.tensor<float>(3, 5);
    const auto b = arena.tensor<double>(7);
    CHECK(reinterpret_cast<std::uintptr_t>(a.data) % alignment == 0);
    CHECK(reinterpret_cast<std::uintptr_t>(b.data) % alignment == 0);
    CHECK(reinterpret_cast<char*>(b.data) - reinterpret_cast<char*>(a.data) >= 60);
    {
      ArenaScope scope(arena);
      arena.tensor<char>(1000);
    }
    const auto c = arena.tensor<char>(1);
    CHECK(reinterpret_cast<char*>(c.data) - reinterpret_cast<char*>(b.data) == 64);
    arena.rewind(begin);
    CHECK(arena.tensor<float>(1).data == a.data);
    CHECK(arena.tensor<float>(0, 4).size() == 0);
  }

  TEST_CASE("it grows once for a new shape and never for a known one") {
    Arena<cpu> arena;
    const auto work = [&] {
      ArenaScope scope(arena);
      std::vector<std::pair<char*, Index>> taken;
      for (const Index bytes : {Index{1} << 20, Index{3} << 20, Index{100}, Index{5} << 20}) {
        const auto t = arena.tensor<char>(bytes);
        t[0] = t[bytes - 1] = 1;
        for (const auto& [data, size] : taken) CHECK((t.data + bytes <= data || data + size <= t.data));
        taken.emplace_back(t.data, bytes);
      }
    };
    work();
    const std::size_t capacity = arena.capacity();
    CHECK(capacity >= std::size_t{9} << 20);
    for (int i = 0; i < 5; ++i) work();
    CHECK(arena.capacity() == capacity);
  }

  TEST_CASE("parallel_for calls every index once, on a worker of its own") {
    for (const int threads : {1, 2, 3}) {
      Context<cpu> ctx(threads);
      for (const Index count : {0, 1, 2, 1000}) {
        std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
        std::vector<std::atomic<int>> inside(static_cast<std::size_t>(ctx.threads()));
        std::atomic<bool> shared{false};
        ctx.parallel_for(count, [&](Index i, int worker) {
          if (inside.at(static_cast<std::size_t>(worker))++ != 0) shared = true;
          ++calls[static_cast<std::size_t>(i)];
          --inside[static_cast<std::size_t>(worker)];
        });
        for (const auto& times : calls) CHECK(times == 1);
        CHECK_FALSE(shared);
      }
    }
  }

  TEST_CASE("the number of threads") {
    CHECK(Context<cpu>().threads() >= 1);
#ifdef _OPENMP
    CHECK(Context<cpu>(3).threads() == 3);
    // What the caller set for itself stays.
    const int before = omp_get_max_threads();
    Context<cpu>(1).parallel_for(3, [](Index, int) {});
    Context<cpu>(2).parallel_for(3, [](Index, int) {});
    CHECK(omp_get_max_threads() == before);
#endif
    CHECK_THROWS_WITH_AS(Context<cpu>(-1), "zamba: Context: threads must be 0 (all) or more, got -1", Error);
    CHECK(&this_thread_context<cpu>() == &this_thread_context<cpu>());
  }

#ifdef _OPENMP
  TEST_CASE("after fork, parent and child compute with all their threads") {
    Context<cpu> ctx(3);
    const auto workers = [&] {  // that were seen, each for as long as it takes the others to come
      std::set<int> seen;
      std::atomic<int> inside{0};
      std::array<int, 3> of_task{};
      ctx.parallel_for(3, [&](Index i, int worker) {
        ++inside;
        for (int wait = 0; inside < 3 && wait < 2000; ++wait) ::usleep(1000);
        of_task[static_cast<std::size_t>(i)] = worker;
      });
      seen.insert(of_task.begin(), of_task.end());
      return seen.size();
    };
    CHECK(workers() == 3);
    for (int generation = 0; generation < 3; ++generation) {
      const pid_t child = ::fork();
      REQUIRE(child >= 0);
      if (child == 0) {
        ::alarm(60);  // ends a child that waits for ever
        bool right = workers() == 3;
        const pid_t grandchild = ::fork();
        if (grandchild == 0) ::_exit(workers() == 3 ? 0 : 1);
        int status = 1;
        right = right && ::waitpid(grandchild, &status, 0) == grandchild && status == 0;
        ::_exit(right ? 0 : 1);
      }
      CHECK(workers() == 3);
      int status = 1;
      REQUIRE(::waitpid(child, &status, 0) == child);
      CHECK(status == 0);
    }
  }
#endif
}
