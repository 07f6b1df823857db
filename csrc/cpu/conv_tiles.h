// 3x3 convolutions of stride 1 by Winograd's F(4x4, 3x3), also of an image whose pixels are repeated.
//
// A chunk is some tiles of one image. Of a group of chunks all inputs are transformed, by lanes of channels; then each
// panel of 32 outputs is multiplied: its weights are transformed, some channels at a time, and of a part of the group at a
// time the products are made, summed up and transformed back. Weights are transformed again in every call: 54 additions
// and 36 stores for 36 products of each tile. That keeps them at a quarter of the bytes, which for a few tiles take longer
// to read than to make.
#pragma once

#include "conv_parts.h"
#include "product.h"
#include "winograd.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// Transformed inputs of a group stay in the third-level cache, products of a part of it in the second. Measured on Zen 4
// (1 MB, 32 MB): parts of 32 or 128 tiles, blocks of 128 or 256 channels, and all weights transformed once at the
// beginning of a call were all within the noise of this, or behind it.
constexpr int64_t GROUP_FLOATS = int64_t(1) << 20, PART_TILES = 64, CHUNK_TILES = 16;
// A line behind whole pages more: what is apart by a power of two would fall into one set of a cache.
constexpr int64_t APART = 16;

struct Chunk {  // a rectangle of tiles of one image
    int64_t image, row, column, rows, columns;
};

// How the tiles of a call are numbered, and what is done together.
struct Tiling {
    int64_t height, width;  // of the result
    int64_t tall, wide;     // tiles of an image
    int64_t rows, columns;  // of a chunk, at most
    int64_t down, across;   // chunks of an image
    int64_t chunks;         // of all
    int64_t group, part;    // chunks that are transformed together, multiplied together
    int64_t points;         // products of a tile: those with a zero are left out
    int64_t blocks;         // of DEPTH channels or less, whose products are summed up one after another
    bool up;

    explicit Tiling(const Conv& call) : up(call.kind == UPSAMPLED) {
        height = result_size(call, call.in.height), width = result_size(call, call.in.width);
        tall = divided(height, TILE_OUT), wide = divided(width, TILE_OUT);
        across = divided(wide, CHUNK_TILES), columns = divided(wide, larger(across, 1));
        rows = larger(1, smaller(tall, CHUNK_TILES / larger(columns, 1)));
        down = divided(tall, rows);
        chunks = call.in.images * down * across;
        points = up ? 25 : 36;
        const int64_t each = larger(1, rows * columns), tiles = GROUP_FLOATS / larger(1, points * call.in.channels);
        part = larger(1, PART_TILES / each);
        blocks = divided(call.in.channels, DEPTH);
        group = smaller(chunks, larger(1, tiles / each / part) * part);
    }

    // tiles before chunk i; a chunk that is no whole rows of an image is a part of one
    int64_t tile(int64_t i) const {
        const Chunk c = chunk(i);
        return (c.image * tall + c.row) * wide + c.column;
    }

    Chunk chunk(int64_t i) const {
        const int64_t r = i / across % down * rows, c = i % across * columns;
        return {i / across / down, r, c, smaller(rows, tall - r), smaller(columns, wide - c)};
    }

    int64_t pixels(int64_t i) const {
        const Chunk c = chunk(i);
        return smaller(c.rows * TILE_OUT, height - c.row * TILE_OUT) *
               smaller(c.columns * TILE_OUT, width - c.column * TILE_OUT);
    }
};

// Where everything lies in the call's room.
struct TileRoom {
    Front front;
    int64_t each, bytes;                // bytes from the beginning to what threads have of their own, and of all
    int64_t v_point, u_point, m_point;  // floats from one of the 36 to the next
    int64_t v_tile;                     // and from one tile to the next
    int64_t own, own_u;                 // floats of one thread, of its weights among them

    TileRoom(const Conv& call, const Tiling& p, int threads) : front(call, p.chunks) {
        v_tile = padded(call.in.channels) + APART;
        v_point = p.group * p.rows * p.columns * v_tile + APART;
        u_point = divided(call.in.channels, larger(1, p.blocks)) * PANEL + APART;
        m_point = p.part * p.rows * p.columns * PANEL + APART;
        own_u = p.points * u_point;
        const int64_t ring = POINTS * 2 * (p.columns * TILE_OUT + 2) * LANES;
        own = padded(larger(own_u + p.points * m_point, ring));
        each = front.end + 4 * padded(p.points * v_point);
        bytes = each + threads * own * 4;
    }
};

// which of the 6 x 6 points are multiplied, in order: an image of repeated pixels has zeros at 2
FASTDIFF_INLINE inline bool taken(bool up, int i) { return !(up && i == 2); }

// Pixels of line y of what is convolved, `width` of them from `left` on, zeros outside of the image
template <bool UP>
void put_line(const Conv& call, const Tiling& plan, const Reader& reader, int64_t n, int64_t y, int64_t left,
              int64_t width, float* out) {
    const int64_t begin = larger(left, 0), end = smaller(left + width, plan.width);
    const bool inside = y >= 0 && y < plan.height && begin < end;
    for (int64_t x = left; x < (inside ? begin : left + width); ++x) store(out + (x - left) * LANES, F32{});
    if (!inside) return;
    for (int64_t x = end; x < left + width; ++x) store(out + (x - left) * LANES, F32{});
    if (!UP) return reader(n, y * call.in.width + begin, end - begin, out + (begin - left) * LANES);
    // whole pairs of repeated pixels, and half a pair at either end
    const int64_t line = y / 2 * call.in.width, low = divided(begin, 2), high = end / 2;
    F32 pair[2];
    if (begin % 2) reader.twice(n, line + begin / 2, 1, (float*)pair), store(out, pair[0]);
    reader.twice(n, line + low, high - low, out + (2 * low - left) * LANES);
    if (end % 2) reader.twice(n, line + high, 1, (float*)pair), store(out + (end - 1 - left) * LANES, pair[0]);
}

// Transforms the input of chunks [first, end), LANES channels of it; v: of the first one's first tile and channel 0
template <bool UP>
void transform_input(const Conv& call, const Tiling& plan, const TileRoom& room, const Numbers& numbers, int64_t lane,
                     int64_t first, int64_t end, float* v, float* own) {
    const int64_t span = plan.columns * TILE_OUT + 2;
    float *ring = own, *turned = own + POINTS * span * LANES;
    Reader reader{call.in, lane_of(call.in, lane), {}, {}, {}};
    v += reader.lane.channel;
    Chunk before{-1, 0, 0, 0, 0};
    for (int64_t i = first; i < end; ++i) {
        const Chunk chunk = plan.chunk(i);
        if (chunk.image != before.image) reader.begin(numbers, chunk.image);
        const bool goes_on = chunk.image == before.image && chunk.column == before.column &&
                             chunk.row == before.row + before.rows;
        const int64_t left = chunk.column * TILE_OUT - 1, width = chunk.columns * TILE_OUT + 2;
        for (int64_t r = 0; r < chunk.rows; ++r) {
            const int64_t top = (chunk.row + r) * TILE_OUT - 1;
            for (int64_t k = r || goes_on ? 2 : 0; k < POINTS; ++k) {
                const int64_t y = top + k;
                put_line<UP>(call, plan, reader, chunk.image, y, left, width, ring + (y + 1) % POINTS * span * LANES);
            }
            // down each column once, though two tiles share it
            const float* rows[POINTS];
            for (int k = 0; k < POINTS; ++k) rows[k] = ring + (top + k + 1) % POINTS * span * LANES;
            for (int64_t x = 0; x < width; ++x) {
                F32 d[POINTS], t[POINTS];
#pragma GCC unroll 6
                for (int k = 0; k < POINTS; ++k) d[k] = load(rows[k] + x * LANES);
                of_input(d, t);
#pragma GCC unroll 6
                for (int k = 0; k < POINTS; ++k) store(turned + (x * POINTS + k) * LANES, t[k]);
            }
            for (int64_t c = 0; c < chunk.columns; ++c, v += room.v_tile) {
                float* out = v;
                for (int k = 0; k < POINTS; ++k) {
                    if (!taken(UP, k)) continue;
                    F32 d[POINTS], t[POINTS];
#pragma GCC unroll 6
                    for (int x = 0; x < POINTS; ++x) d[x] = load(turned + ((c * TILE_OUT + x) * POINTS + k) * LANES);
                    of_input(d, t);
#pragma GCC unroll 6
                    for (int x = 0; x < POINTS; ++x) {
                        if (!taken(UP, x)) continue;
                        write(out, t[x], reader.lane.count);
                        out += room.v_point;
                    }
                }
            }
        }
        before = chunk;
    }
}

// u (points, depth, 32) from so many channels of a panel of the weights
template <bool UP>
void transform_weight(const TileRoom& room, const float* from, int64_t depth, int64_t columns, float* u) {
    const int64_t point = room.u_point;
    for (int64_t c = 0; c < depth; ++c, from += 9 * PANEL, u += PANEL)
        for (int64_t column = 0; column < columns; column += LANES) {
            F32 down[3][POINTS];
#pragma GCC unroll 3
            for (int j = 0; j < 3; ++j) {
                const float* w = from + j * PANEL + column;
                of_weight(load(w), load(w + 3 * PANEL), load(w + 6 * PANEL), down[j]);
            }
            float* out = u + column;
#pragma GCC unroll 6
            for (int i = 0; i < POINTS; ++i) {
                if (!taken(UP, i)) continue;
                F32 t[POINTS];
                of_weight(down[0][i], down[1][i], down[2][i], t);
#pragma GCC unroll 6
                for (int j = 0; j < POINTS; ++j) {
                    if (!taken(UP, j)) continue;
                    store(out, t[j]);
                    out += point;
                }
            }
        }
}

// y of one chunk from its products m, LANES channels of it, and their moments
template <bool UP>
void transform_output(const Conv& call, const Tiling& plan, const TileRoom& room, const Chunk& chunk, int64_t channel,
                      const float* m, double* partial) {
    const Sum& out = call.out;
    Writer writer(out, chunk.image, channel, partial);
    for (int64_t i = 0; i < chunk.rows; ++i)
        for (int64_t j = 0; j < chunk.columns; ++j, m += PANEL) {
            const float* from = m;
            F32 half[POINTS][TILE_OUT];
#pragma GCC unroll 6
            for (int k = 0; k < POINTS; ++k) {
                if (!taken(UP, k)) continue;
                F32 d[POINTS];
#pragma GCC unroll 6
                for (int x = 0; x < POINTS; ++x) {
                    d[x] = F32{};
                    if (taken(UP, x)) d[x] = load(from), from += room.m_point;
                }
                of_output(d, half[k]);
            }
            const int64_t y = (chunk.row + i) * TILE_OUT, x = (chunk.column + j) * TILE_OUT;
            const int64_t rows = smaller(TILE_OUT, plan.height - y), columns = smaller(TILE_OUT, plan.width - x);
            const int64_t pixel = (chunk.image * plan.height + y) * plan.width + x;
            for (int r = 0; r < TILE_OUT; ++r)
                for (int c = 0; c < TILE_OUT; ++c) {
                    const int64_t next = (pixel + r * plan.width + c + TILE_OUT) * out.channels + channel;
                    __builtin_prefetch(out.y + next, 1);
                    if (out.residual) __builtin_prefetch(out.residual + next);
                }
            F32 tile[TILE_OUT][TILE_OUT];
#pragma GCC unroll 4
            for (int c = 0; c < TILE_OUT; ++c) {
                F32 d[POINTS], t[TILE_OUT];
#pragma GCC unroll 6
                for (int k = 0; k < POINTS; ++k) d[k] = taken(UP, k) ? half[k][c] : F32{};
                of_output(d, t);
#pragma GCC unroll 4
                for (int r = 0; r < TILE_OUT; ++r) tile[r][c] = t[r] + writer.base;
            }
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < columns; ++c) writer.put(pixel + r * plan.width + c, tile[r][c]);
        }
    writer.finish();
}

// Asks for part `i` of `parts` of the floats from here on. A transform writes more streams than the processor can follow,
// so it does not see what is read coming.
inline void fetch(const float* from, int64_t count, int64_t i, int64_t parts) {
    for (int64_t at = count * i / parts / 16 * 16; at < count * (i + 1) / parts; at += 16)
        __builtin_prefetch(from + at, 0, 2);
}

template <bool UP>
void convolve_tiles(const Conv& call, const Tiling& plan, const TileRoom& room, char* memory,
                    const Team& team) {
    const Numbers numbers = room.front.numbers(call, memory, team);
    double* partial = room.front.moments(call, memory);
    float *v = (float*)(memory + room.front.end), *own = (float*)(memory + room.each) + team.thread * room.own;
    float *u = own, *m = own + room.own_u;
    const int64_t panels = divided(call.out.channels, PANEL), depth = call.in.channels;
    for (int64_t begin = 0; begin < plan.chunks; begin += plan.group) {
        const int64_t count = smaller(plan.group, plan.chunks - begin);
        if (begin) team.wait();
        const auto behind = [&](int64_t chunk) { return plan.tile(begin + chunk) - plan.tile(begin); };
        team.share(lanes_of(call.in), count, [&](int64_t lane, int64_t first, int64_t end) {
            transform_input<UP>(call, plan, room, numbers, lane, begin + first, begin + end,
                                v + behind(first) * room.v_tile, own);
        });
        team.wait();
        // of the weights: as much as one block, the next of which lies behind it
        const int64_t ahead = divided(depth, plan.blocks) * 9 * PANEL;
        const int64_t soon = smaller(plan.points, 3 + 180 / (behind(smaller(plan.part, count)) + 1));
        // sums of blocks wait for each other, and have room for one part
        const int64_t parts = divided(count, plan.part), at_once = plan.blocks > 1 ? 1 : parts;
        team.share(panels * parts / at_once, at_once, [&](int64_t task, int64_t first, int64_t end) {
            const int64_t panel = task * at_once / parts, before = task * at_once % parts;
            const int64_t channel = panel * PANEL, columns = smaller(PANEL, call.out.channels - channel);
            for (int64_t block = 0; block < plan.blocks; ++block) {
                const int64_t low = depth * block / plan.blocks, high = depth * (block + 1) / plan.blocks;
                const float* weight = call.weight + (panel * depth + low) * 9 * PANEL;
                transform_weight<UP>(room, weight, high - low, columns, u);
                for (int64_t part = before + first; part < before + end; ++part) {
                    const int64_t at = part * plan.part, chunks = smaller(plan.part, count - at);
                    const int64_t tiles = behind(at + chunks) - behind(at);
                    for (int64_t p = 0; p < plan.points; ++p) {
                        // late, or what passes by meanwhile throws it out; early enough for a few tiles
                        if (part + 1 == before + end && p + soon >= plan.points)
                            fetch(weight + ahead, ahead, p + soon - plan.points, soon);
                        product(v + p * room.v_point + behind(at) * room.v_tile + low, room.v_tile, tiles,
                                u + p * room.u_point, PANEL, high - low, m + p * room.m_point, block > 0, columns);
                    }
                    if (block + 1 < plan.blocks) continue;
                    for (int64_t i = 0; i < chunks; ++i)
                        for (int64_t c = 0; c < columns; c += LANES)
                            transform_output<UP>(call, plan, room, plan.chunk(begin + at + i), channel + c,
                                                 m + (behind(at + i) - behind(at)) * PANEL + c,
                                                 partial ? partial + (begin + at + i) * call.out.channels * 2 : nullptr);
                }
            }
        });
    }
    join(call.out, call.in.images, plan, plan.down * plan.across, partial, team);
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
