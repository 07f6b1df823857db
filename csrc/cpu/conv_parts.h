// What the ways to convolve share: how work is cut and shared out, what is put together again.
#pragma once

#include "maps.h"

// OpenMP's own, without its header, which is the compiler's
extern "C" {
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace fastdiff {
namespace FASTDIFF_ISA_NS {
namespace {

// The share of thread `thread` of `columns` x `rows` tasks: body(column, first row, last row). A column is cut only where
// there are too few of them.
template <typename Body>
inline void share(int thread, int threads, int64_t columns, int64_t rows, const Body& body) {
    int64_t cuts = 1;
    while (cuts < threads && cuts < rows && columns * cuts % threads && columns * cuts < 4 * threads) ++cuts;
    const int64_t all = columns * cuts, first = all * thread / threads, end = all * (thread + 1) / threads;
    for (int64_t i = first; i < end; ++i) body(i / cuts, rows * (i % cuts) / cuts, rows * (i % cuts + 1) / cuts);
}

// body(thread, threads) on all threads at once
template <typename Body>
inline void together(int threads, const Body& body) {
    if (threads == 1) return body(0, 1);
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num(), omp_get_num_threads());
}

inline void wait(int threads) {
    // alone, the barrier would be that of whoever called from a thread of his own
    if (threads == 1) return;
#pragma omp barrier
}

// The moments of the results from those of the `each` chunks of an image, (chunks, C, 2)
template <typename Plan>
void join(const Conv& call, const Plan& plan, int64_t each, const double* partial, int thread, int threads) {
    const int64_t channels = call.out.channels;
    for (int64_t n = thread; n < call.in.images; n += threads) {
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
