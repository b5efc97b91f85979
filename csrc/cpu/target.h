// Compiles the lines between BEGIN and END for an instruction set that the rest of the library does not
// assume, without a compiler flag per file. Everything in such a region must have internal linkage: one weak
// symbol, and the linker may hand AVX-512 code to a processor that lacks it. Standard headers go before the
// region. (tests/test_packaging.py looks for weak symbols.)
#pragma once

#define FUSEDRNN_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define FUSEDRNN_TARGET_BEGIN(features) \
  FUSEDRNN_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FUSEDRNN_TARGET_END FUSEDRNN_PRAGMA(clang attribute pop)
#else
#define FUSEDRNN_TARGET_BEGIN(features) FUSEDRNN_PRAGMA(GCC push_options) FUSEDRNN_PRAGMA(GCC target(features))
#define FUSEDRNN_TARGET_END FUSEDRNN_PRAGMA(GCC pop_options)
#endif
