// What the ways to convolve share: what lies first in their room, and how moments are put together again.
#pragma once

#include "maps.h"
#include "team.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// so many floats and what is left of a line of the cache
inline int64_t padded(int64_t floats) { return divided(floats, 16) * 16; }

// pixels of the result along an axis of n
inline int64_t result_size(const Conv& call, int64_t n) {
    if (call.kind == POINTWISE) return n;
    // as much behind as in front, or one more where the image ends before the last window
    return ((n << (call.kind == UPSAMPLED)) + 1 - 3 + (call.before ? 1 : 0)) / call.stride + 1;
}

// bias + add of an image, LANES channels of it
inline F32 base_of(const Sum& out, int64_t image, int64_t channel, int count) {
    const F32 base = out.bias ? read(out.bias + channel, count) : F32{};
    return out.add.data ? base + read(out.add.data + image * out.add.image + channel, count) : base;
}

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
void join(const Conv& call, const Plan& plan, int64_t each, const double* partial, const Team& team) {
    if (!partial) return;
    team.wait();
    const int64_t channels = call.out.channels;
    for (int64_t n = team.thread; n < call.in.images; n += team.threads) {
        double *out = call.out.moments + n * channels * 2, before = 0;
        for (int64_t i = n * each; i < (n + 1) * each; ++i) {
            const double count = (double)plan.pixels(i);
            merge(out, before, partial + i * channels * 2, count, channels);
            before += count;
        }
    }
}

}  // namespace
}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
