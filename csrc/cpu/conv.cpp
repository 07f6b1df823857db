// Convolutions behind a norm and in front of a sum: fastdiff/ops/norm_silu_conv.py.
#include "conv_rows.h"
#include "conv_tiles.h"
#include "play.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

inline bool in_tiles(const Conv& call) { return call.kind == WINOGRAD || call.kind == WINOGRAD_UP; }

}  // namespace

int64_t conv_room(const Conv& call, int threads) {
    if (in_tiles(call)) return TileRoom(call, Tiling(call), threads).bytes;
    return LineRoom(call, Lines(call), threads).bytes;
}

void conv(const Conv& call, void* memory, const Team& team) {
    if (!in_tiles(call)) {
        const Lines plan(call);
        return convolve_lines(call, plan, LineRoom(call, plan, team.threads), (char*)memory, team);
    }
    const Tiling plan(call);
    const TileRoom room(call, plan, team.threads);
    const auto body = call.kind == WINOGRAD_UP ? convolve_tiles<true> : convolve_tiles<false>;
    body(call, plan, room, (char*)memory, team);
}

void moments(const float* x, int64_t images, int64_t pixels, int64_t channels, double* out, int threads) {
    constexpr int64_t RUN = 64;
    const int64_t lanes = divided(channels, LANES);
    together(threads, [&](const Team& team) {
        team.share(images * lanes, 1, [&](int64_t i, int64_t, int64_t) {
            const int64_t n = i / lanes, channel = i % lanes * LANES;
            const int count = (int)smaller(LANES, channels - channel);
            double* own = out + (n * channels + channel) * 2;
            for (int64_t first = 0; first < pixels; first += RUN) {
                const int64_t end = smaller(first + RUN, pixels);
                Moments run;
                for (int64_t p = first; p < end; ++p)
                    run.add(read(x + (n * pixels + p) * channels + channel, count));
                double part[2 * LANES];
                run.finish(part, count);
                merge(own, (double)first, part, (double)(end - first), count);
            }
        });
    });
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
