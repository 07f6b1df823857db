// How a norm is shared among blocks and threads: numbers only, the same for every run on one model of device.
#include "group_norm.cuh"

namespace fastdiff {
namespace cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t lcm(int64_t a, int64_t b) {
    int64_t x = a, y = b;
    while (y) {
        const int64_t rest = x % y;
        x = y, y = rest;
    }
    return a / x * b;
}

int bytes_of(Dtype dtype) { return dtype == FLOAT32 ? 4 : 2; }

bool on_16_bytes(const GroupNorm& call) {
    const void* tensors[] = {call.x, call.x2, call.dy, call.residual, call.y, call.dx, call.dx2};
    for (const void* data : tensors)
        if (reinterpret_cast<uintptr_t>(data) % 16) return false;
    const int64_t vector = 16 / bytes_of(call.dtype);
    if (call.channels_last) return call.first % vector == 0 && call.channels % vector == 0;
    return call.pixels % vector == 0;
}

// the tile has `channels` channels; splits are even, one of them may be shorter
void share(Plan& plan, const GroupNorm& call, int64_t channels, int64_t splits) {
    const int64_t all = call.pixels / plan.deep;
    plan.columns = (int)(channels / plan.wide);
    plan.tiles = (int)ceil_div(call.channels, channels);
    plan.splits = (int)splits;
    plan.range = ceil_div(all, splits);
    plan.lanes = (int)larger(1, smaller(NORM_THREADS / plan.columns, plan.range));
}

// The smallest cluster that holds a tile of so many channels; then one large enough for every processor to have work.
bool hold(Plan& plan, const GroupNorm& call, const Device& device, int tensors, int64_t channels, int budget) {
    if (channels / plan.wide > NORM_THREADS || channels > NORM_THREADS) return false;
    for (int64_t splits = 1; splits <= device.clusters; splits *= 2) {
        share(plan, call, channels, splits);
        plan.shared = rooms_of(plan, tensors).all;
        const bool busy = call.images * plan.tiles * splits >= device.processors;
        const bool more = splits < device.clusters && plan.range >= 8 * plan.lanes;
        if (plan.shared <= budget && (busy || !more)) return true;
    }
    return false;
}

// Tiles of whole groups, in channels_last as wide as a line of the cache if that leaves no processor idle; two blocks
// a processor where they fit.
bool one_pass(Plan& best, const GroupNorm& call, const Device& device, int tensors) {
    const int64_t size = call.channels / call.groups;
    Plan plan = best;
    plan.one_pass = true;
    int64_t most = 0;
    for (const int budget : {device.shared_processor / 2 - 1024, device.shared_block}) {
        for (const int line : {128, 64, 32, 16}) {
            int64_t channels = size;
            if (call.channels_last) {
                channels = lcm(size, larger(plan.wide, line / bytes_of(call.dtype)));
            } else {
                // several groups where one has fewer vectors than a block has threads
                while (2 * channels * ceil_div(call.pixels, plan.deep) <= NORM_THREADS) channels *= 2;
            }
            if (!hold(plan, call, device, tensors, smaller(channels, call.channels), budget)) continue;
            const int64_t blocks = smaller(call.images * plan.tiles * plan.splits, device.processors);
            if (blocks > most) most = blocks, best = plan;
        }
        if (most) break;
    }
    // with most processors idle, two passes by all of them are faster: the second one reads from the cache
    return most * 4 >= device.processors;
}

void two_passes(Plan& plan, const GroupNorm& call, const Device& device) {
    int64_t channels = plan.wide;
    const int64_t all = call.pixels / plan.deep;
    if (call.channels_last)
        channels *= smaller(call.channels / plan.wide, 32);
    else
        while (2 * channels * all <= NORM_THREADS && 2 * channels <= call.channels) channels *= 2;
    share(plan, call, channels, 1);
    // four blocks a processor, but between 4 and 64 vectors a thread
    const int64_t wanted = ceil_div(4 * device.processors, larger(1, call.images * plan.tiles));
    const int64_t least = ceil_div(all, 64 * plan.lanes), most = ceil_div(all, 4 * plan.lanes);
    share(plan, call, channels, larger(larger(1, least), smaller(wanted, most)));
    plan.splits = (int)ceil_div(all, plan.range);
    plan.shared = rooms_of(plan, 0).scales;
}

}  // namespace

Plan plan(const GroupNorm& call, const Device& device, bool backward) {
    Plan plan = {};
    const int vector = 16 / bytes_of(call.dtype);
    plan.vectors = on_16_bytes(call);
    plan.wide = plan.vectors && call.channels_last ? vector : 1;
    plan.deep = plan.vectors && !call.channels_last ? vector : 1;
    if (call.groups) {
        Plan found = plan;
        if (one_pass(found, call, device, backward ? 2 : 1)) return found;
    }
    two_passes(plan, call, device);
    return plan;
}

int64_t workspace_size(const GroupNorm& call, const Plan& plan) {
    if (plan.one_pass) return 0;
    return call.images * call.channels * ((int64_t)sizeof(Scales) / 4 + 4 * (int64_t)plan.splits);
}

}  // namespace cuda
}  // namespace fastdiff
