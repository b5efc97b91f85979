// The device memory of memory.cpp, for whoever fills and reads it between launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace shim {

// Forgets everything and chooses the order of threads. What comes after belongs to one test.
void reset(uint64_t seed);

// The memory's part of that.
void forget_memory();

// Memory of that size between guard bytes, 256-aligned; `name` is for reports.
void* allocate(size_t bytes, const std::string& name);

// Room of that size for arrays that begin_array makes.
void* allocate_workspace(size_t bytes);

// Copies from and to the host. What nobody has written arrives as all ones (a NaN); returns whether there was any.
void upload(void* to, const void* from, size_t bytes);
bool download(void* to, const void* from, size_t bytes);

// The first thing that went wrong since reset, or nothing.
const std::string& error();

}  // namespace shim
