// SPDX-License-Identifier: MIT
// A function for each family of models, each in a unit of its own: the units compile beside each other.
#pragma once

#include <string>

#include <zamba/io/registry.hpp>

namespace zamba_apps {

void add_zamba(zamba::Registry& registry);

/// A network in the two types that its weights may be kept in.
template <class Net>
void add_both(zamba::Registry& registry, const std::string& name) {
  registry.add<Net, zamba::bf16>(name);
  registry.add<Net, float>(name);
}

}  // namespace zamba_apps
