// softmax(q k' / sqrt(d)) v + residual of all pixels: fastdiff/ops/attention.py. Some queries at a time see all keys.
#include "conv_parts.h"
#include "play.h"
#include "product.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// numbers of the softmax that stay in the second-level cache; queries that are worth a panel of keys
constexpr int64_t SCORES = 65536, FEWEST = 8, QUERIES = 64;
// values that are summed up in one go: roundings of equal ones add up, and those of sums of sums do less
constexpr int64_t RUN = 16;

struct Layout {
    int64_t tokens, line, wide;  // of an image; its keys, and a head's channels, in whole panels
    int64_t copied;              // floats of a head's values, where they are copied
    int64_t queries, parts;      // of a part, of a head
    int64_t heads;               // of all images
    // floats of a head's keys; where values begin, the moments of parts, what is a thread's own; of a thread; in bytes
    int64_t keys_of, values, partial, own, each, bytes;

    Layout(const Attention& call, int threads) {
        tokens = call.tokens, heads = call.images * call.heads;
        line = divided(call.keys, PANEL) * PANEL, wide = divided(call.depth, PANEL) * PANEL;
        queries = larger(FEWEST, smaller(QUERIES, SCORES / larger(line, 1)));
        parts = divided(tokens, queries);
        keys_of = line * call.depth;
        copied = wide == call.depth ? 0 : call.keys * wide;
        values = heads * keys_of, partial = values + heads * copied;
        own = partial + padded(call.out.moments ? call.images * parts * call.out.channels * 4 : 0);
        each = padded(queries * (line + PANEL + LANES));
        bytes = (own + threads * each) * 4;
    }

    // tokens of part i of all
    int64_t pixels(int64_t i) const { return smaller(queries, tokens - i % parts * queries); }
};

// MINUS_LOG2_E 2^((score - top) scale) for scale < 0: a softmax divides by the sum of its like.
FASTDIFF_INLINE inline F32 share_of(F32 score, float top, float scale) {
    F32 t[1] = {(score - top) * scale};
    // below 2^-126 it stays there; a comparison with NaN is false, so NaN stays NaN
    t[0] = t[0] < -126.0f ? splat(-126.0f) : t[0];
    power(t);
    return t[0];
}

// Each of the `count` scores becomes its power of two below the largest; returns 1 over their sum.
inline float softmax(float* scores, int64_t count, float scale) {
    const int64_t whole = count / LANES * LANES;
    F32 most = load(scores, (int)smaller(count, LANES));
    if (count < LANES)
        for (int64_t i = count; i < LANES; ++i) most[i] = scores[0];
    for (int64_t i = LANES; i < whole; i += LANES) {
        const F32 v = load(scores + i);
        most = v > most ? v : most;
    }
    float top = most[0];
    for (int l = 1; l < LANES; ++l) top = most[l] > top ? most[l] : top;
    for (int64_t i = whole; i < count; ++i) top = scores[i] > top ? scores[i] : top;
    F32 sum{};
    for (int64_t i = 0; i < count; i += LANES) {
        const int some = (int)smaller(LANES, count - i);
        const F32 v = share_of(load(scores + i), top, scale);
        store(scores + i, some == LANES ? v : first_of(v, some));
        sum += some == LANES ? v : first_of(v, some);
    }
    float all = 0;
    for (int l = 0; l < LANES; ++l) all += sum[l];
    return 1 / all;
}

struct Head {
    const float *q, *k, *v;
    int64_t image, channel;  // the first of its own in y
};

inline Head head_of(const Attention& call, int64_t i) {
    const int64_t n = i / call.heads, channel = i % call.heads * call.depth, at = n * call.keys * call.keys_apart + channel;
    return {call.q + n * call.tokens * call.apart + channel, call.k + at, call.v + at, n, channel};
}

// The keys of one panel of tokens as columns: (depth, 32), zeros behind the last.
inline void turn_keys(const Attention& call, const float* k, int64_t first, float* out) {
    constexpr int64_t BLOCK = 64;
    for (int64_t low = 0; low < call.depth; low += BLOCK) {
        const int64_t high = smaller(low + BLOCK, call.depth);
        for (int64_t t = 0; t < PANEL; ++t) {
            const float* from = k + (first + t) * call.keys_apart;
            const bool there = first + t < call.keys;
            for (int64_t c = low; c < high; ++c) out[c * PANEL + t] = there ? from[c] : 0;
        }
    }
}

}  // namespace

int64_t attention_room(const Attention& call, int threads) { return Layout(call, threads).bytes; }

void attention(const Attention& call, void* memory, const Team& team) {
    const Layout lay(call, team.threads);
    float *room = (float*)memory, *values = room + lay.values, *own = room + lay.own + team.thread * lay.each;
    double* partial = call.out.moments ? (double*)(room + lay.partial) : nullptr;
    const int64_t panels = lay.line / PANEL, d = call.depth;
    team.share(lay.heads, panels, [&](int64_t head, int64_t first, int64_t end) {
        const Head h = head_of(call, head);
        for (int64_t i = first; i < end; ++i) {
            turn_keys(call, h.k, i * PANEL, room + head * lay.keys_of + i * d * PANEL);
            for (int64_t t = i * PANEL; lay.copied && t < smaller((i + 1) * PANEL, call.keys); ++t)
                for (int64_t c = 0; c < lay.wide; ++c)
                    values[head * lay.copied + t * lay.wide + c] = c < d ? h.v[t * call.keys_apart + c] : 0;
        }
    });
    team.wait();
    const float scale = (float)(-(double)MINUS_LOG2_E / __builtin_sqrt((double)d));
    float *scores = own, *m = scores + lay.queries * lay.line, *shares = m + lay.queries * PANEL;
    team.share(lay.heads * lay.parts, 1, [&](int64_t task, int64_t, int64_t) {
        const Head h = head_of(call, task / lay.parts);
        const int64_t part = task % lay.parts, first = part * lay.queries, count = lay.pixels(part);
        const float* keys = room + task / lay.parts * lay.keys_of;
        const float* v = lay.copied ? values + task / lay.parts * lay.copied : h.v;
        const int64_t next = lay.copied ? lay.wide : call.keys_apart;
        for (int64_t i = 0; i < panels; ++i)
            product(h.q + first * call.apart, call.apart, count, keys + i * d * PANEL, PANEL, d, scores + i * PANEL, false,
                    PANEL, lay.line);
        for (int64_t r = 0; r < count; ++r) shares[r] = softmax(scores + r * lay.line, call.keys, scale);
        for (int64_t c = 0; c < d; c += PANEL) {
            for (int64_t t = 0; t < call.keys; t += RUN)
                product(scores + t, lay.line, count, v + t * next + c, next, smaller(RUN, call.keys - t), m, t > 0,
                        PANEL);
            for (int64_t i = 0; i < PANEL && c + i < d; i += LANES) {
                Writer writer(call.out, h.image, h.channel + c + i, h.channel + d,
                              partial ? partial + (h.image * lay.parts + part) * call.out.channels * 2 : nullptr);
                for (int64_t r = 0; r < count; ++r)
                    writer.put(h.image * call.tokens + first + r, load(m + r * PANEL + i) * shares[r]);
                writer.finish();
            }
        }
    });
    join(call.out, call.images, lay, lay.parts, partial, team);
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
