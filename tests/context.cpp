// SPDX-License-Identifier: MIT
#include <zamba/context.hpp>

#include <atomic>
#include <cstdint>
#include <set>
#include <vector>

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
}
