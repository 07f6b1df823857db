// Matrix products of fp32 by registers: a block of rows of A times a panel of 32 columns of B. A's rows are `stride` apart,
// the rows of 32 of a panel of B `next`.
#pragma once

#include "group_norm_vector.h"
#include "sizes.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

constexpr int PANEL = 32;
// What is summed up in registers before it is added to memory: of B as much as stays in the first-level cache. One sum over
// hundreds of numbers would also lose digits that sums of sums keep.
constexpr int64_t DEPTH = 64;

// What fills the registers: MOST rows of WIDE vectors, and room for a vector of B each and a number of A.
#if defined(__AVX512F__)
constexpr int WIDE = 2, MOST = 14;
#elif defined(__aarch64__)
constexpr int WIDE = 4, MOST = 6;
#else
constexpr int WIDE = 2, MOST = 6;
#endif

// c (rows, 32) = a b for the columns of VECTORS vectors, or c += a b
template <int ROWS, int VECTORS>
__attribute__((noinline)) void block_product(const float* a, int64_t stride, const float* b, int64_t next,
                                             int64_t depth, float* c, int64_t line, bool more) {
    F32 sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = F32{};
    // rows in fives: a base, and one, two, three and four strides from it, are what an address can hold
    const float* base[(ROWS + 4) / 5];
#pragma GCC unroll 4
    for (int i = 0; i < (ROWS + 4) / 5; ++i) base[i] = a + 5 * i * stride;
    const int64_t three = 3 * stride;
    for (int64_t k = 0; k < depth; ++k) {
        F32 column[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) column[v] = load(b + v * LANES);
        b += next;
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const int64_t away = r % 5 == 3 ? three : r % 5 * stride;
            const F32 number = splat(base[r / 5][away]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add(number, column[v], sum[r][v]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < (ROWS + 4) / 5; ++i) ++base[i];
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
            float* to = c + r * line + v * LANES;
            store(to, more ? load(to) + sum[r][v] : sum[r][v]);
        }
}

template <int ROWS, int VECTORS>
inline void rows_product(int rows, const float* a, int64_t stride, const float* b, int64_t next, int64_t depth,
                          float* c, int64_t line, bool more) {
    if (rows == ROWS) return block_product<ROWS, VECTORS>(a, stride, b, next, depth, c, line, more);
    if constexpr (ROWS > 1) rows_product<ROWS - 1, VECTORS>(rows, a, stride, b, next, depth, c, line, more);
}

// how many columns product() reads and writes where so many are wanted: a last vector of them goes by itself
inline int64_t covered(int64_t columns) {
    const int64_t rest = columns % (WIDE * LANES);
    return columns - rest + (!rest ? 0 : rest <= LANES ? LANES : WIDE * LANES);
}

// c (rows, columns), whose rows are `line` apart, = a (rows, depth) b (depth, columns), or c += a b; what lies behind the
// columns, as far as they are `covered`, gets anything.
inline void product(const float* a, int64_t stride, int64_t rows, const float* b, int64_t next, int64_t depth, float* c,
                    bool more, int64_t columns, int64_t line = PANEL) {
    const int64_t blocks = divided(rows, MOST);
    for (int64_t low = 0; low < depth; low += DEPTH)
        for (int64_t i = 0; i < blocks; ++i) {
            const int64_t first = rows * i / blocks, count = rows * (i + 1) / blocks - first;
            for (int64_t column = 0; column < columns; column += WIDE * LANES) {
                const auto block = columns - column > LANES ? rows_product<MOST, WIDE> : rows_product<MOST, 1>;
                block((int)count, a + first * stride + low, stride, b + low * next + column, next,
                      smaller(DEPTH, depth - low), c + first * line + column, line, more || low);
            }
        }
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
