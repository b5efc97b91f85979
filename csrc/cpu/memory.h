// Memory that a pass works in.
#pragma once

#include <memory>

#include "cpu.h"

namespace fusedrnn::cpu {
namespace {

struct Return {
  size_t bytes;
  void operator()(void* p) const { give_back(p, bytes); }
};
template <class S>
using Scratch = std::unique_ptr<S[], Return>;

// Room for `count` numbers, at the start of a cache line; nothing for none.
template <class S>
Scratch<S> scratch(int64_t count) {
  if (count == 0) return Scratch<S>(nullptr, {0});
  const size_t bytes = count * sizeof(S);
  return Scratch<S>(static_cast<S*>(borrow(bytes)), {bytes});
}

}  // namespace
}  // namespace fusedrnn::cpu
