// softmax(q k' / sqrt(d)) v + residual of all pixels: fastdiff/ops/attention.py. Some queries
// at a time see all keys, block after block (Milakov & Gimelshein 2018; Dao 2022).
#include "conv_parts.h"
#include "play.h"
#include "product.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// queries and keys that meet at a time, so that their scores stay in the second-level cache
constexpr int64_t QUERIES = 64, KEYS = 512;
// values that are summed up in one go, those whose sums are, and vectors of shares: roundings of equal ones add up, and
// those of sums of sums do less
constexpr int64_t RUN = 16, RUNS = 256, SHARES = 8;

// MINUS_LOG2_E 2^((score - top) scale) for score <= top: a softmax divides by the sum of its like.
FASTDIFF_INLINE inline F32 share_of(F32 score, float top, float scale) {
    F32 t[1] = {(score - top) * scale};
    // below 2^-126 it stays there; a comparison with NaN is false, so NaN stays NaN
    t[0] = t[0] < -126.0f ? splat(-126.0f) : t[0];
    power(t);
    return t[0];
}

inline float largest(const float* scores, int64_t count) {
    float lane[LANES];
    if (count < LANES) {
        for (int l = 0; l < LANES; ++l) lane[l] = scores[l < count ? l : 0];
    } else {
        F32 most = load(scores + count - LANES);
        for (int64_t i = 0; i + LANES < count; i += LANES) {
            const F32 v = load(scores + i);
            most = v > most ? v : most;
        }
        store(lane, most);
    }
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; ++l) lane[l] = lane[l + half] > lane[l] ? lane[l + half] : lane[l];
    return lane[0];
}

// What is known of a query while its keys come by.
struct Query {
    float top;     // the largest score so far
    float factor;  // for sums from before the last keys
    float sum;     // of all shares

    // Each of the `count` scores becomes its power of two below the largest so far.
    void take(float* scores, int64_t count, float scale, bool first) {
        const float most = largest(scores, count), before = top;
        if (first || most > before) top = most;
        F32 all{}, own{};
        for (int64_t i = 0; i < count; i += LANES) {
            const int some = (int)smaller(LANES, count - i);
            const F32 v = share_of(load(scores + i), top, scale);
            store(scores + i, some == LANES ? v : first_of(v, some));
            own += some == LANES ? v : first_of(v, some);
            if (i / LANES % SHARES == SHARES - 1) all += own, own = F32{};
        }
        float lane[LANES];
        store(lane, all + own);
        for (int half = LANES / 2; half; half /= 2)
            for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
        factor = first ? 0 : share_of(splat(before), top, scale)[0] * (1 / MINUS_LOG2_E);
        sum = first ? lane[0] : sum * factor + lane[0];
    }
};

struct Layout {
    int64_t tokens, line;    // of an image; its keys in whole panels
    int64_t wide, copied;    // where values are copied, floats of one, and of a head's
    int64_t parts, queries;  // of a head; of the largest part
    int64_t keys;            // that meet the queries at a time
    int64_t heads;           // of all images
    // floats of a head's keys; where values begin, the moments of parts, what is a thread's own; in that, where sums of
    // products begin; of a thread; in bytes
    int64_t keys_of, values, partial, own, sums, each, bytes;

    Layout(const Attention& call, int threads) {
        tokens = call.tokens, heads = call.images * call.heads;
        line = divided(call.keys, PANEL) * PANEL, wide = covered(call.depth);
        parts = divided(tokens, QUERIES), queries = parts ? divided(tokens, parts) : 0;
        keys = smaller(KEYS, line);
        keys_of = line * call.depth;
        copied = wide == call.depth ? 0 : call.keys * wide;
        values = heads * keys_of, partial = values + heads * copied;
        own = partial + padded(call.out.moments ? call.images * parts * call.out.channels * 4 : 0);
        sums = queries * (keys + PANEL + (int64_t)sizeof(Query) / 4);
        each = padded(sums + (RUNS < call.keys ? queries * divided(call.depth, PANEL) * PANEL : 0));
        bytes = (own + threads * each) * 4;
    }

    // of all tokens of an image, those before part i; tokens of part i of all
    int64_t first(int64_t i) const { return tokens * i / parts; }
    int64_t pixels(int64_t i) const { return first(i % parts + 1) - first(i % parts); }
};

struct Head {
    const float *q, *k, *v;
    int64_t image, channel;  // the first of its own in y
};

inline Head head_of(const Attention& call, int64_t i) {
    const int64_t n = i / call.heads, channel = i % call.heads * call.depth;
    const int64_t at = n * call.keys * call.keys_apart + channel;
    return {call.q + n * call.tokens * call.apart + channel, call.k + at, call.v + at, n, channel};
}

// four numbers of four tokens, turned
inline void turn_four(const float* from, int64_t apart, float* out) {
    typedef float Four __attribute__((vector_size(16)));
    typedef int32_t Places __attribute__((vector_size(16)));
    Four row[4], pair[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&row[i], from + i * apart, sizeof row[i]);
    for (int i = 0; i < 2; ++i) {
        pair[i] = __builtin_shuffle(row[2 * i], row[2 * i + 1], Places{0, 4, 1, 5});
        pair[i + 2] = __builtin_shuffle(row[2 * i], row[2 * i + 1], Places{2, 6, 3, 7});
    }
    for (int i = 0; i < 2; ++i) {
        const Four even = __builtin_shuffle(pair[2 * i], pair[2 * i + 1], Places{0, 1, 4, 5});
        const Four odd = __builtin_shuffle(pair[2 * i], pair[2 * i + 1], Places{2, 3, 6, 7});
        __builtin_memcpy(out + 2 * i * PANEL, &even, sizeof even);
        __builtin_memcpy(out + (2 * i + 1) * PANEL, &odd, sizeof odd);
    }
}

// The keys of one panel of tokens as columns: (depth, 32), zeros behind the last.
inline void turn_keys(const Attention& call, const float* k, int64_t first, float* out) {
    const int64_t there = smaller(PANEL, call.keys - first), fours = there / 4 * 4, whole = call.depth / 4 * 4;
    for (int64_t t = 0; t < fours; t += 4)
        for (int64_t c = 0; c < whole; c += 4)
            turn_four(k + (first + t) * call.keys_apart + c, call.keys_apart, out + c * PANEL + t);
    for (int64_t t = 0; t < PANEL; ++t)
        for (int64_t c = t < fours ? whole : 0; c < call.depth; ++c)
            out[c * PANEL + t] = t < there ? k[(first + t) * call.keys_apart + c] : 0;
}

// A part of a head's queries, and what a thread has for it.
struct Part {
    const Attention& call;
    const Layout& lay;
    Head head;
    int64_t part, first, count;
    const float *keys, *v;
    int64_t next;  // floats from one value to the next
    float *scores, *m, *sums;
    Query* queries;
    float scale;

    // the scores of `some` keys from `low` on, as shares
    void score(int64_t low, int64_t some) const {
        for (int64_t i = 0; i < some; i += PANEL)
            product(head.q + first * call.apart, call.apart, count, keys + (low + i) * call.depth, PANEL, call.depth,
                    scores + i, false, smaller(PANEL, some - i), lay.keys);
        for (int64_t r = 0; r < count; ++r) queries[r].take(scores + r * lay.keys, some, scale, low == 0);
    }

    // m (queries, 32) = the sum so far of channels from c on
    void add(int64_t low, int64_t some, int64_t c) const {
        float* before = sums + c * lay.queries;
        for (int64_t begin = 0; begin < some; begin += RUNS) {
            const int64_t end = smaller(begin + RUNS, some);
            for (int64_t t = begin; t < end; t += RUN)
                product(scores + t, lay.keys, count, v + (low + t) * next + c, next, smaller(RUN, end - t), m,
                        t > begin, smaller(PANEL, call.depth - c));
            for (int64_t r = 0; low + begin && r < count; ++r) {
                const F32 factor = splat(begin ? 1 : queries[r].factor);
                for (int64_t i = r * PANEL; i < (r + 1) * PANEL; i += LANES)
                    store(m + i, multiply_add(load(before + i), factor, load(m + i)));
            }
            if (low + end < call.keys) __builtin_memcpy(before, m, (size_t)(count * PANEL) * 4);
        }
    }

    // y of channels from c on
    void put(int64_t c, double* partial) const {
        float shares[QUERIES];
        for (int64_t r = 0; r < count; ++r) shares[r] = 1 / queries[r].sum;
        for (int64_t i = 0; i < PANEL && c + i < call.depth; i += LANES) {
            Writer writer(call.out, head.image, head.channel + c + i, head.channel + call.depth, partial);
            for (int64_t r = 0; r < count; ++r)
                writer.put(head.image * call.tokens + first + r, load(m + r * PANEL + i) * shares[r]);
            writer.finish();
        }
    }

    void run(double* partial) const {
        for (int64_t low = 0; low < call.keys; low += lay.keys) {
            const int64_t some = smaller(lay.keys, call.keys - low);
            score(low, some);
            for (int64_t c = 0; c < call.depth; c += PANEL) {
                add(low, some, c);
                if (low + some == call.keys) put(c, partial);
            }
        }
    }
};

}  // namespace

int64_t attention_room(const Attention& call, int threads) { return Layout(call, threads).bytes; }

void attention(const Attention& call, void* memory, const Team& team) {
    const Layout lay(call, team.threads);
    float *room = (float*)memory, *values = room + lay.values, *own = room + lay.own + team.thread * lay.each;
    double* partial = call.out.moments ? (double*)(room + lay.partial) : nullptr;
    const int64_t d = call.depth;
    team.share(lay.heads, lay.line / PANEL, [&](int64_t head, int64_t first, int64_t end) {
        const Head h = head_of(call, head);
        for (int64_t i = first; i < end; ++i) {
            turn_keys(call, h.k, i * PANEL, room + head * lay.keys_of + i * d * PANEL);
            for (int64_t t = i * PANEL; lay.copied && t < smaller((i + 1) * PANEL, call.keys); ++t)
                for (int64_t c = 0; c < lay.wide; ++c)
                    values[head * lay.copied + t * lay.wide + c] = c < d ? h.v[t * call.keys_apart + c] : 0;
        }
    });
    team.wait();
    team.share(lay.heads * lay.parts, 1, [&](int64_t task, int64_t, int64_t) {
        const Head h = head_of(call, task / lay.parts);
        const int64_t part = task % lay.parts;
        float *m = own + lay.queries * lay.keys, *queries = m + lay.queries * PANEL;
        const Part of{call,
                      lay,
                      h,
                      part,
                      lay.first(part),
                      lay.pixels(part),
                      room + task / lay.parts * lay.keys_of,
                      lay.copied ? values + task / lay.parts * lay.copied : h.v,
                      lay.copied ? lay.wide : call.keys_apart,
                      own,
                      m,
                      own + lay.sums,
                      (Query*)queries,
                      (float)(-(double)MINUS_LOG2_E / __builtin_sqrt((double)d))};
        of.run(partial ? partial + (h.image * lay.parts + part) * call.out.channels * 2 : nullptr);
    });
    join(call.out, call.images, lay, lay.parts, partial, team);
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
