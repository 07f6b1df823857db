// Convolutions behind a norm and in front of a sum: fastdiff/ops/norm_silu_conv.py.
#include "conv_spread.h"
#include "conv_tiles.h"
#include "play.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

template <typename Plan, typename Room>
int64_t room_of(const Conv& call, int threads) {
    return Room(call, Plan(call), threads).bytes;
}

template <typename Plan, typename Room, typename Body>
void convolve(const Conv& call, void* memory, const Team& team, const Body& body) {
    const Plan plan(call);
    body(call, plan, Room(call, plan, team.threads), (char*)memory, team);
}

bool spreads(const Conv& call) { return call.kind != POINTWISE && call.out.channels <= FEW_OUTPUTS; }

bool in_lines(const Conv& call) { return call.kind == POINTWISE || call.kind == STRIDED; }

}  // namespace

int64_t conv_room(const Conv& call, int threads) {
    if (spreads(call)) return room_of<Spread, SpreadRoom>(call, threads);
    return in_lines(call) ? room_of<Lines, LineRoom>(call, threads) : room_of<Tiling, TileRoom>(call, threads);
}

void conv(const Conv& call, void* memory, const Team& team) {
    if (spreads(call)) return convolve<Spread, SpreadRoom>(call, memory, team, convolve_spread);
    if (in_lines(call)) return convolve<Lines, LineRoom>(call, memory, team, convolve_lines);
    const auto tiles = call.kind == UPSAMPLED ? convolve_tiles<true> : convolve_tiles<false>;
    convolve<Tiling, TileRoom>(call, memory, team, tiles);
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
