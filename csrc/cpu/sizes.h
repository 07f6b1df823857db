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

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
