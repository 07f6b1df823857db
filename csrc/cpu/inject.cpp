// y = act((x + add) (1 + scale) + shift) + residual and its gradients, fastdiff/ops/inject.py: A = 1 + scale, M = -add,
// B = shift.
#include "group_norm_gradient.h"

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

template <typename T, bool ACT>
struct Forward {
    static bool run(const Inject& call) {
        return call.residual_dtype == FLOAT32 ? run(call, (const float*)call.residual)
                                              : run(call, (const T*)call.residual);
    }

    template <typename R>
    static bool run(const Inject& call, const R* residual) {
        const Walk w = walk(call.in, 0, APPLIED);
        const auto begin = [&](const Place& place, const Slot& slot) { prepare(w, call.in, place, 0, 1, slot); };
        const auto write = [&](const Place& place, const Slot& slot) {
            apply<T, ACT>(w, call.in, place, slot, (T*)call.y, residual);
        };
        return FASTDIFF_ISA_NS::run(w, groups(begin), cells(write));
    }
};

template <typename T, bool ACT>
struct Backward {
    static bool run(const InjectBackward& call) {
        constexpr int SUMS = X;
        const Walk w = walk(call.in, SUMS, APPLIED);
        const auto begin = [&](const Place& place, const Slot& slot) { prepare(w, call.in, place, 0, 1, slot); };
        const auto reduce = [&](const Place& place, const Slot& slot) {
            summed<SUMS>(w, place, slot, false, [&](const Panel& panel, const Sums& sums) FASTDIFF_INLINE {
                const T *dy = (const T*)call.dy + panel.joined, *x = (const T*)call.in.x + panel.x;
                gradient_sums<SUMS, OUTER, ACT>(panel, dy, x, (T*)call.dx + panel.x, Numbers(w, slot, panel), sums);
            });
        };
        const auto finish = [&](const Place& place, const Slot& slot) {
            const int64_t first = place.group * w.group, column = w.last ? first : 0;
            for (int64_t i = 0; i < w.group; ++i)
                for (int sum = 0; sum < SUMS; ++sum)
                    call.sums[(place.image * w.channels + first + i) * SUMS + sum] =
                        (float)total(w, slot, sum, column + i);
        };
        return FASTDIFF_ISA_NS::run(w, groups(begin), cells(reduce), groups(finish));
    }
};

}  // namespace

bool inject(const Inject& call) { return for_dtype<Forward>(call); }
bool inject_backward(const InjectBackward& call) { return for_dtype<Backward>(call); }

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
