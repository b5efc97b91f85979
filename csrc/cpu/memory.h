// Memory that a pass works in.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace fusedrnn::cpu {
namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class S>
using Scratch = std::unique_ptr<S[], Free>;

// Room for `count` numbers, at the start of a cache line; nothing for none.
template <class S>
Scratch<S> scratch(int64_t count) {
  constexpr size_t line = 64;
  if (count == 0) return nullptr;
  void* p = std::aligned_alloc(line, (count * sizeof(S) + line - 1) / line * line);
  if (!p) throw std::bad_alloc();
  return Scratch<S>(static_cast<S*>(p));
}

}  // namespace
}  // namespace fusedrnn::cpu
