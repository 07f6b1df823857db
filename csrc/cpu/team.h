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

// Where threads meet. OpenMP's own barrier puts a thread to sleep as soon as the process has more threads than processors,
// whoever they belong to, and waking up takes longer than most kernels here have to wait.
struct Gate {
    static constexpr int MOST = 128;  // threads

    // what somebody writes has a line of the cache for itself
    struct alignas(64) Count {
        int64_t value = 0;
    };

    Count arrived, opened, begun[MOST];  // begun: tasks of each thread's share
};

struct Team {
    int thread, threads;
    Gate* gate;

    // Between two shares, and wherever one thread reads what another one has written.
    void wait() const {
        const int64_t now = __atomic_load_n(&gate->opened.value, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&gate->arrived.value, 1, __ATOMIC_ACQ_REL) == threads) {
            __atomic_store_n(&gate->arrived.value, 0, __ATOMIC_RELAXED);
            for (int i = 0; i < threads; ++i) __atomic_store_n(&gate->begun[i].value, 0, __ATOMIC_RELAXED);
            __atomic_store_n(&gate->opened.value, now + 1, __ATOMIC_RELEASE);
            return;
        }
        for (int turns = 0; __atomic_load_n(&gate->opened.value, __ATOMIC_ACQUIRE) == now; ++turns) {
#if defined(__x86_64__)
            _mm_pause();
#endif
            // somebody else may need the processor to get here
            if (turns > PATIENCE) sched_yield();
        }
    }

    // `columns` x `rows` tasks: body(column, first row, last row). A column is cut only where there are too few of them.
    // A thread begins with its share, the same in every kernel, so that much of what it reads lies in its own cache; then
    // it takes what others have not begun: processors are not equally fast, nor all of them ours.
    template <typename Body>
    void share(int64_t columns, int64_t rows, const Body& body) const {
        int64_t cuts = 1;
        while (cuts < rows && columns * cuts < ENOUGH * threads) ++cuts;
        const int64_t all = columns * cuts;
        for (int away = 0; away < threads && away <= NEIGHBOURS; ++away) {
            const int owner = (thread + away) % threads;
            const int64_t first = all * owner / threads, count = all * (owner + 1) / threads - first;
            int64_t* begun = &gate->begun[owner].value;
            while (__atomic_load_n(begun, __ATOMIC_RELAXED) < count) {
                const int64_t i = first + __atomic_fetch_add(begun, 1, __ATOMIC_RELAXED);
                if (i >= first + count) break;
                body(i / cuts, rows * (i % cuts) / cuts, rows * (i % cuts + 1) / cuts);
            }
        }
    }

    static constexpr int PATIENCE = 4000, NEIGHBOURS = 8;
    static constexpr int64_t ENOUGH = 4;  // tasks of a thread
};

// body(team) on all threads at once
template <typename Body>
inline void together(int threads, const Body& body) {
    Gate gate;
    if (threads == 1) return body(Team{0, 1, &gate});
    const int some = threads < Gate::MOST ? threads : Gate::MOST;
#pragma omp parallel num_threads(some)
    body(Team{omp_get_thread_num(), omp_get_num_threads(), &gate});
}

}  // namespace FASTDIFF_ISA_NS
}  // namespace fastdiff
