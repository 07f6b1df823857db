// Whole numbers: what the standard library's headers, which vector sources leave out, would have.
#pragma once

#include <stdint.h>

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
// rounded up
inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }
// so many floats and what is left of a line of the cache
inline int64_t padded(int64_t floats) { return divided(floats, 16) * 16; }

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
