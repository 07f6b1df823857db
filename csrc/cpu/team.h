// The threads that run a kernel, or some kernels one after the other.
#pragma once

#include "sizes.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// OpenMP's and POSIX's own, without their headers
extern "C" {
int omp_get_thread_num(void);
int omp_get_num_threads(void);
int sched_yield(void);
}

namespace fastdiff {
namespace FASTDIFF_ISA_NS {

// Where threads wait for each other. OpenMP's own barrier puts a thread to sleep as soon as the process has more threads
// than processors, whoever they belong to, and waking up takes longer than most kernels here have to wait.
struct Gate {
    int arrived = 0, opened = 0;
};

struct Team {
    int thread, threads;
    Gate* gate;

    void wait() const {
        if (threads == 1) return;
        const int now = __atomic_load_n(&gate->opened, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&gate->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
            __atomic_store_n(&gate->arrived, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&gate->opened, now + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int turns = 0; __atomic_load_n(&gate->opened, __ATOMIC_ACQUIRE) == now; ++turns) {
#if defined(__x86_64__)
            _mm_pause();
#endif
            // somebody else may need the processor to get here
            if (turns > PATIENCE) sched_yield();
        }
    }

    // What this thread does of `columns` x `rows` tasks: body(column, first row, last row). A column is cut only where
    // there are too few of them.
    template <typename Body>
    void share(int64_t columns, int64_t rows, const Body& body) const {
        int64_t cuts = 1;
        while (cuts < threads && cuts < rows && columns * cuts % threads && columns * cuts < 4 * threads) ++cuts;
        const int64_t all = columns * cuts, first = all * thread / threads, end = all * (thread + 1) / threads;
        for (int64_t i = first; i < end; ++i) body(i / cuts, rows * (i % cuts) / cuts, rows * (i % cuts + 1) / cuts);
    }

    static constexpr int PATIENCE = 4000;
};

// body(team) on all threads at once
template <typename Body>
inline void together(int threads, const Body& body) {
    Gate gate;
    if (threads == 1) return body(Team{0, 1, &gate});
#pragma omp parallel num_threads(threads)
    body(Team{omp_get_thread_num(), omp_get_num_threads(), &gate});
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
