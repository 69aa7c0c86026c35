// SPDX-License-Identifier: MIT
// ended_in_child(f): whether f comes back. A view of nothing that a block reads ends the process, and with it every
// line that a check has written so far; so what might do that is tried in a child first.
#pragma once

#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cerrno>
#include <csignal>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif
#endif

namespace zamba::testing::detail {

#if defined(__unix__) || defined(__APPLE__)

/// In the child: it says nothing, leaves no core, ends within a minute, and starts no team of threads, since those of
/// the parent are not there.
inline void become_quiet() {
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) std::signal(signal, SIG_DFL);
  const rlimit none{0, 0};
  ::setrlimit(RLIMIT_CORE, &none);
  const int nowhere = ::open("/dev/null", O_WRONLY);
  if (nowhere >= 0) {
    ::dup2(nowhere, STDOUT_FILENO);
    ::dup2(nowhere, STDERR_FILENO);
  }
  ::alarm(60);
#ifdef _OPENMP
  omp_set_num_threads(1);
#endif
}

inline constexpr int of_exception = 70;

/// Calls f in a child process. Empty where it returned, else how it ended, as "ended by signal 11 (Segmentation
/// fault)". Where no child can be had, f is not called.
template <class F>
std::string ended_in_child(F&& f) {
  const pid_t child = ::fork();
  if (child == 0) {
    become_quiet();
    try {
      f();
    } catch (...) {
      ::_exit(of_exception);
    }
    ::_exit(0);
  }
  int status = 0;
  pid_t waited = child;
  while (child > 0 && (waited = ::waitpid(child, &status, 0)) < 0 && errno == EINTR) continue;
  if (waited <= 0 || (WIFEXITED(status) && WEXITSTATUS(status) == 0)) return {};
  if (WIFEXITED(status) && WEXITSTATUS(status) == of_exception) return "ended by an exception";
  if (WIFEXITED(status)) return "ended by exit status " + std::to_string(WEXITSTATUS(status));
  return "ended by signal " + std::to_string(WTERMSIG(status)) + " (" + ::strsignal(WTERMSIG(status)) + ")";
}

#else

template <class F>
std::string ended_in_child(F&&) {
  return {};
}

#endif

}  // namespace zamba::testing::detail
