// What the kernels include and must not compile themselves: an inline function that is first seen in a target region may
// be kept with that region's instructions and then serve every other caller. For inclusion before a region.
#pragma once

#include <sched.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu.h"
