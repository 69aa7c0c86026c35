# SPDX-License-Identifier: MIT
# Shared by the scripts beside this file, which source it after `set -euo pipefail`.
# shellcheck shell=bash disable=SC2034  # the variables are theirs to use

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cores=$(nproc)

# What each script needs, by the names Debian and Ubuntu use.
build_packages=(g++ cmake ninja-build ccache libeigen3-dev nlohmann-json3-dev libcli11-dev)
test_packages=(git pkg-config doctest-dev libbenchmark-dev)
clang_packages=(clang libclang-rt-dev libomp-dev)
text_packages=(bible-kjv bible-kjv-text)
# Taken where the release has them: the format check asks for this one release of clang-format, and SentencePiece is one
# of the ways to tokenize.
optional_packages=(clang-format-14 libsentencepiece-dev)

die() {
  echo "error: $*" >&2
  exit 1
}

installed() { dpkg-query -W -f='${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

# missing_packages PACKAGE...: those that are not installed, one a line.
missing_packages() {
  local package
  for package in "$@"; do
    installed "$package" || echo "$package"
  done
}

# need PACKAGE...: installs what is missing, as root or by sudo, and says so.
need() {
  local missing apt=(env DEBIAN_FRONTEND=noninteractive apt-get) who=root
  if ! command -v dpkg-query >/dev/null; then
    echo "This is not Debian or Ubuntu; what these packages hold is expected to be installed: $*"
    return
  fi
  mapfile -t missing < <(missing_packages "$@")
  [ ${#missing[@]} -gt 0 ] || return 0

  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || die "these packages are missing; as root: apt-get install ${missing[*]}"
    apt=(sudo "${apt[@]}")
    who="root, by sudo"
  fi
  echo "Installing Debian packages as $who: ${missing[*]}"
  "${apt[@]}" update -qq
  "${apt[@]}" install -y -qq --no-install-recommends -o Dpkg::Use-Pty=0 "${missing[@]}" >/dev/null
}

# want PACKAGE...: the same, but goes on without a package that this release does not have or that cannot be installed.
want() {
  local package
  command -v dpkg-query >/dev/null || return 0
  for package in "$@"; do
    if ! installed "$package" && apt-cache show "$package" >/dev/null 2>&1; then
      (need "$package") || echo "Continuing without $package."
    fi
  done
}
