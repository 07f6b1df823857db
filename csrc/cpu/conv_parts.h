// What the ways to convolve share: what lies first in their room, and how moments are put together again.
#pragma once

#include "maps.h"
#include "team.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// pixels of the result along an axis of n
inline int64_t result_size(const Conv& call, int64_t n) {
    if (call.kind == POINTWISE) return n;
    // as much behind as in front, or one more where the image ends before the last window
    return ((n << (call.kind == UPSAMPLED)) + 1 - 3 + (call.before ? 1 : 0)) / call.stride + 1;
}

// LANES channels of the result of one image: what is added to them, and the moments of what is written.
struct Writer {
    const Sum& out;
    int64_t channel;
    int count;
    double* partial;  // of a chunk (C, 2), or null
    F32 base;         // bias + add
    Moments moments;

    // of the channels before `end`
    Writer(const Sum& out, int64_t image, int64_t channel, int64_t end, double* partial)
        : out(out), channel(channel), count((int)smaller(LANES, end - channel)), partial(partial), base() {
        if (out.bias) base = read(out.bias + channel, count);
        if (out.add.data) base += read(out.add.data + image * out.add.image + channel, count);
    }
    Writer(const Sum& out, int64_t image, int64_t channel, double* partial)
        : Writer(out, image, channel, out.channels, partial) {}

    // pixel of all images; v: with the base in it
    FASTDIFF_INLINE void put(int64_t pixel, F32 v) {
        if (out.residual) v += read(out.residual + pixel * out.channels + channel, count);
        if (partial) moments.add(v);
        write(out.y + pixel * out.apart + channel, v, count);
    }

    void finish() const {
        if (partial) moments.finish(partial + 2 * channel, count);
    }
};

// The first of a call's room: the numbers of its norm, and the moments of each chunk (chunks, C, 2).
struct Front {
    int64_t partial, end;  // bytes from the beginning

    Front(const Conv& call, int64_t chunks) {
        partial = 4 * padded(call.in.groups ? call.in.images * 3 * call.in.channels : 0);
        end = partial + 4 * padded(call.out.moments ? chunks * call.out.channels * 4 : 0);
    }

    // ready for all threads
    Numbers numbers(const Conv& call, char* memory, const Team& team) const {
        const Numbers found{call.in.groups ? (float*)memory : nullptr, call.in.channels};
        if (!found.data) return found;
        for (int64_t n = team.thread; n < call.in.images; n += team.threads) prepare(call.in, found, n);
        team.wait();
        return found;
    }

    // null where nobody asks for them
    double* moments(const Conv& call, char* memory) const {
        return call.out.moments ? (double*)(memory + partial) : nullptr;
    }
};

// The moments of the results from those of the `each` chunks of an image, (chunks, C, 2), where they are asked for
template <typename Plan>
void join(const Sum& out, int64_t images, const Plan& plan, int64_t each, const double* partial, const Team& team) {
    if (!partial) return;
    team.wait();
    for (int64_t n = team.thread; n < images; n += team.threads) {
        double *all = out.moments + n * out.channels * 2, before = 0;
        for (int64_t i = n * each; i < (n + 1) * each; ++i) {
            const double count = (double)plan.pixels(i);
            merge(all, before, partial + i * out.channels * 2, count, out.channels);
            before += count;
        }
    }
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
