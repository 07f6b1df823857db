// softmax(q k' / sqrt(d)) v of all pixels: fastdiff/ops/attention.py. Some queries at a time see all keys.
#include "maps.h"
#include "play.h"
#include "product.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// numbers of the softmax that stay in the second-level cache; queries that are worth a panel of keys
constexpr int64_t SCORES = 65536, FEWEST = 8, QUERIES = 64;

struct Layout {
    int64_t apart;               // floats from one token to the next
    int64_t keys, wide, copied;  // tokens and a head's channels, in whole panels; floats of a head's values, where copied
    int64_t queries, parts;      // of a part, of a head
    int64_t heads;               // of all images
    int64_t keys_of, values, own, each, bytes;  // floats of a head's keys; where values begin; of a thread; in bytes

    Layout(const Attention& call, int threads) {
        apart = 3 * call.heads * call.depth, heads = call.images * call.heads;
        keys = divided(call.tokens, PANEL) * PANEL, wide = divided(call.depth, PANEL) * PANEL;
        queries = larger(FEWEST, smaller(QUERIES, SCORES / larger(keys, 1)));
        parts = divided(call.tokens, queries);
        keys_of = keys * call.depth;
        copied = wide == call.depth ? 0 : call.tokens * wide;
        values = heads * keys_of, own = values + heads * copied;
        each = padded(queries * (keys + PANEL + LANES));
        bytes = (own + threads * each) * 4;
    }
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
    float* y;
};

inline Head head_of(const Attention& call, const Layout& lay, int64_t i) {
    const int64_t n = i / call.heads, head = i % call.heads, width = call.heads * call.depth;
    const float* q = call.qkv + n * call.tokens * lay.apart + head * call.depth;
    return {q, q + width, q + 2 * width, call.y + n * call.tokens * width + head * call.depth};
}

// The keys of one panel of tokens as columns: (depth, 32), zeros behind the last.
inline void turn_keys(const Attention& call, const Layout& lay, const float* k, int64_t first, float* out) {
    constexpr int64_t BLOCK = 64;
    for (int64_t low = 0; low < call.depth; low += BLOCK) {
        const int64_t high = smaller(low + BLOCK, call.depth);
        for (int64_t t = 0; t < PANEL; ++t) {
            const float* from = k + (first + t) * lay.apart;
            const bool there = first + t < call.tokens;
            for (int64_t c = low; c < high; ++c) out[c * PANEL + t] = there ? from[c] : 0;
        }
    }
}

}  // namespace

int64_t attention_room(const Attention& call, int threads) { return Layout(call, threads).bytes; }

void attention(const Attention& call, void* memory, const Team& team) {
    const Layout lay(call, team.threads);
    float *room = (float*)memory, *values = room + lay.values, *own = room + lay.own + team.thread * lay.each;
    const int64_t panels = lay.keys / PANEL, d = call.depth;
    team.share(lay.heads, panels, [&](int64_t head, int64_t first, int64_t end) {
        const Head h = head_of(call, lay, head);
        for (int64_t i = first; i < end; ++i) {
            turn_keys(call, lay, h.k, i * PANEL, room + head * lay.keys_of + i * d * PANEL);
            for (int64_t t = i * PANEL; lay.copied && t < smaller((i + 1) * PANEL, call.tokens); ++t)
                for (int64_t c = 0; c < lay.wide; ++c)
                    values[head * lay.copied + t * lay.wide + c] = c < d ? h.v[t * lay.apart + c] : 0;
        }
    });
    team.wait();
    const float scale = (float)(-(double)MINUS_LOG2_E / __builtin_sqrt((double)d));
    float *scores = own, *m = scores + lay.queries * lay.keys, *shares = m + lay.queries * PANEL;
    team.share(lay.heads * lay.parts, 1, [&](int64_t task, int64_t, int64_t) {
        const Head h = head_of(call, lay, task / lay.parts);
        const int64_t first = task % lay.parts * lay.queries, count = smaller(lay.queries, call.tokens - first);
        const float* keys = room + task / lay.parts * lay.keys_of;
        const float* v = lay.copied ? values + task / lay.parts * lay.copied : h.v;
        const int64_t next = lay.copied ? lay.wide : lay.apart;
        for (int64_t i = 0; i < panels; ++i)
            product(h.q + first * lay.apart, lay.apart, count, keys + i * d * PANEL, PANEL, d, scores + i * PANEL, false,
                    PANEL, lay.keys);
        for (int64_t r = 0; r < count; ++r) shares[r] = softmax(scores + r * lay.keys, call.tokens, scale);
        for (int64_t c = 0; c < d; c += PANEL) {
            product(scores, lay.keys, count, v + c, next, call.tokens, m, false, PANEL);
            for (int64_t r = 0; r < count; ++r)
                for (int64_t i = 0; i < PANEL && c + i < d; i += LANES)
                    write(h.y + (first + r) * call.heads * d + c + i, load(m + r * PANEL + i) * shares[r],
                          (int)smaller(LANES, d - c - i));
        }
    });
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
