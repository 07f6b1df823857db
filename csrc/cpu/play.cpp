// Kernels one behind the other: those of a tape (fastdiff/ops/tape.py), or one alone.
#include "play.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {

int64_t kernel_room(const Kernel& kernel, int threads) {
    if (kernel.what == Kernel::CONV) return conv_room(kernel.conv, threads);
    if (kernel.what == Kernel::LINEAR) return linear_room(kernel.linear, threads);
    return attention_room(kernel.attention, threads);
}

void play(const Kernel* kernels, int64_t count, void* room, int threads) {
    together(threads, [&](const Team& team) {
        for (const Kernel* kernel = kernels; kernel < kernels + count; ++kernel) {
            if (kernel->what == Kernel::CONV)
                conv(kernel->conv, room, team);
            else if (kernel->what == Kernel::LINEAR)
                linear(kernel->linear, room, team);
            else
                attention(kernel->attention, room, team);
            team.wait();
        }
    });
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
