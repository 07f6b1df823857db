// Linear layers behind a layer norm, in front of a gate and a sum: fastdiff/ops/norm_linear.py.
#include "gelu.h"
#include "maps.h"
#include "play.h"
#include "product.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// tokens that are multiplied together, and the numbers of them that the second-level cache keeps beside weights
constexpr int64_t FEWEST_TOKENS = 64, MOST_TOKENS = 256, NUMBERS = 65536;
// Over DEEP channels it would keep too few tokens: BLOCK channels of them, by so many units of panels, are summed up at a
// time, where that leaves enough tasks.
constexpr int64_t DEEP = 2048, BLOCK = 512, MOST_UNITS = 8, FEWEST_TASKS = 16;
// floats of rows so far apart lie on a line or two of the first-level cache, which has room for eight of them
constexpr int64_t CROWDED = 512;

// Tokens in chunks. Those that are normed, or lie crowded, are written down first: all DEPTH channels of a chunk's tokens
// one behind the other, then the next DEPTH.
struct Tokens {
    int64_t chunks, most;  // of all; tokens of the largest
    int64_t units, width;  // of panels that make outputs: one, or two with a gate; panels of a unit
    int64_t block, group, groups;  // channels that are summed up at a time; units that are, and these groups of units
    int64_t written, own, bytes;  // floats of what is written down, of one thread's; of all, in bytes

    Tokens(const Linear& call, int threads) {
        block = call.channels > DEEP ? BLOCK : call.channels;
        const int64_t some = smaller(MOST_TOKENS, larger(FEWEST_TOKENS, NUMBERS / larger(block, 1)));
        chunks = divided(call.tokens, some), most = chunks ? divided(call.tokens, chunks) : 0;
        units = divided(call.outputs, PANEL), width = call.gate ? 2 : 1;
        const bool deep = block < call.channels;
        group = deep ? larger(1, smaller(MOST_UNITS, units * chunks / FEWEST_TASKS)) : 1;
        groups = divided(units, group);
        const bool writes = call.norm || call.apart % CROWDED == 0;
        written = writes ? call.tokens * divided(call.channels, DEPTH) * DEPTH : 0;
        own = padded(most * PANEL * width * group);
        bytes = (padded(written) + threads * own) * 4;
    }

    int64_t first(const Linear& call, int64_t chunk) const { return call.tokens * chunk / chunks; }
};

// Where channel c of a chunk's token t is: first + c / DEPTH piece + c % DEPTH + t apart.
struct Rows {
    const float* first;
    int64_t apart, piece;
};

// (x - mean) rstd weight + bias of one token, or x, to `out`, whose pieces of DEPTH channels are `piece` apart
inline void write_token(const Linear& call, const float* x, float* out, int64_t piece) {
    const int64_t channels = call.channels;
    float center = 0, rest = 0, rstd = 1;
    if (call.norm) {
        F64 sum{}, squares{};
        for (int64_t c = 0; c < channels; c += LANES) {
            const F32 v = read(x + c, (int)smaller(LANES, channels - c));
            sum += first_half(v) + second_half(v);
        }
        const double mean = added(sum) / (double)channels;
        center = (float)mean;
        for (int64_t c = 0; c < channels; c += LANES) {
            const int count = (int)smaller(LANES, channels - c);
            const F32 v = read(x + c, count), off = count == LANES ? v - center : first_of(v - center, count);
            const F64 low = first_half(off), high = second_half(off);
            squares += low * low + high * high;
        }
        const double off = mean - (double)center;
        rest = (float)off;
        rstd = (float)(1 / __builtin_sqrt(Moments::positive(added(squares) / (double)channels - off * off) + call.eps));
    }
    for (int64_t c = 0; c < channels; c += LANES) {
        const int count = (int)smaller(LANES, channels - c);
        F32 v = read(x + c, count);
        if (call.norm) v = (v - center - rest) * rstd;
        if (call.norm && call.norm_weight) v = v * read(call.norm_weight + c, count);
        if (call.norm && call.norm_bias) v = v + read(call.norm_bias + c, count);
        write(out + c / DEPTH * piece + c % DEPTH, v, count);
    }
}

// what `Rows` says of a chunk of `count` tokens from `first` on
inline Rows rows_of(const Linear& call, const Tokens& plan, const float* room, int64_t first, int64_t count) {
    if (!plan.written) return {call.x + first * call.apart, call.apart, DEPTH};
    return {room + first * divided(call.channels, DEPTH) * DEPTH, DEPTH, count * DEPTH};
}

// m (tokens, 32) of one panel of weights, or what channels from `low` to `high` add to it
inline void multiply(const Rows& rows, int64_t count, const float* weight, int64_t low, int64_t high, int64_t columns,
                     float* m, int64_t line) {
    for (int64_t c = low; c < high; c += DEPTH)
        product(rows.first + c / DEPTH * rows.piece, rows.apart, count, weight + c * PANEL, PANEL,
                smaller(DEPTH, high - c), m, c > 0, columns, line);
}

// y of LANES outputs of ROWS tokens from token `first` on, from their sums m, whose rows are `line` apart, g's behind a's
template <bool GATE, int ROWS>
FASTDIFF_INLINE inline void put(const Linear& call, int64_t first, int64_t output, const float* m, int64_t line,
                                F32 base, F32 gate, int count) {
    F32 y[ROWS], g[ROWS];
    FASTDIFF_ROWS y[r] = load(m + r * line) + base;
    if (GATE) {
        FASTDIFF_ROWS g[r] = load(m + r * line + PANEL) + gate;
        gelu(g);
        FASTDIFF_ROWS y[r] = y[r] * g[r];
    }
    const int64_t at = first * call.outputs + output;
    if (call.residual) FASTDIFF_ROWS y[r] += read(call.residual + at + r * call.outputs, count);
    FASTDIFF_ROWS write(call.y + at + r * call.outputs, y[r], count);
}

template <bool GATE>
inline void put_all(const Linear& call, int64_t first, int64_t tokens, int64_t output, const float* m, int64_t line) {
    const int count = (int)smaller(LANES, call.outputs - output);
    F32 base{}, gate{};
    if (call.bias) base = read(call.bias + output, count);
    if (call.bias && GATE) gate = read(call.bias + call.outputs + output, count);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) put<GATE, 4>(call, first + t, output, m + t * line, line, base, gate, count);
    for (; t < tokens; ++t) put<GATE, 1>(call, first + t, output, m + t * line, line, base, gate, count);
}

// the outputs of one group of units
inline void one_tile(const Linear& call, const Tokens& plan, const float* room, int64_t chunk, int64_t group,
                     float* m) {
    const int64_t first = plan.first(call, chunk), count = plan.first(call, chunk + 1) - first;
    const int64_t begin = group * plan.group, end = smaller(begin + plan.group, plan.units);
    const int64_t line = plan.width * PANEL, each = plan.most * line;
    const Rows rows = rows_of(call, plan, room, first, count);
    const auto columns = [&](int64_t unit) { return smaller(PANEL, call.outputs - unit * PANEL); };
    for (int64_t low = 0; low < call.channels; low += plan.block)
        for (int64_t panel = begin * plan.width; panel < end * plan.width; ++panel) {
            const int64_t unit = panel / plan.width;
            multiply(rows, count, call.weight + panel * call.channels * PANEL, low,
                     smaller(low + plan.block, call.channels), columns(unit),
                     m + (unit - begin) * each + panel % plan.width * PANEL, line);
        }
    for (int64_t unit = begin; unit < end; ++unit)
        for (int64_t c = 0; c < columns(unit); c += LANES) {
            const auto put = call.gate ? put_all<true> : put_all<false>;
            put(call, first, count, unit * PANEL + c, m + (unit - begin) * each + c, line);
        }
}

}  // namespace

int64_t linear_room(const Linear& call, int threads) { return Tokens(call, threads).bytes; }

void linear(const Linear& call, void* memory, const Team& team) {
    const Tokens plan(call, team.threads);
    float *room = (float*)memory, *m = room + padded(plan.written) + team.thread * plan.own;
    const int64_t whole = divided(call.channels, DEPTH) * DEPTH;
    if (plan.written) {
        team.share(plan.chunks, plan.most, [&](int64_t chunk, int64_t low, int64_t high) {
            const int64_t first = plan.first(call, chunk), count = plan.first(call, chunk + 1) - first;
            for (int64_t t = low; t < smaller(high, count); ++t)
                write_token(call, call.x + (first + t) * call.apart, room + first * whole + t * DEPTH, count * DEPTH);
        });
        team.wait();
    }
    // what is larger is read once: all tokens for each panel of weights, or all weights for each chunk of tokens
    if (plan.units * plan.width * PANEL >= call.tokens)
        team.share(plan.groups, plan.chunks, [&](int64_t group, int64_t chunk, int64_t end) {
            for (; chunk < end; ++chunk) one_tile(call, plan, room, chunk, group, m);
        });
    else
        team.share(plan.chunks, plan.groups, [&](int64_t chunk, int64_t group, int64_t end) {
            for (; group < end; ++group) one_tile(call, plan, room, chunk, group, m);
        });
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
