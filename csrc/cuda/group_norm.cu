// GroupNorm, the injection of the time embedding and SiLU: fastdiff/ops/group_norm_silu.py, forward.
//
// One pass: a tile stays in shared memory, spread over the blocks of a cluster where it is large. Two passes: partial
// moments per channel and split, `finish` merges them in a fixed order, `apply` scales. No atomics: results repeat.
#include "residual.cuh"

namespace fastdiff {
namespace cuda {
namespace {

// distances to the first number of each channel that this thread meets, so that no large mean cancels
template <typename V>
struct Distances {
    float pivot[V::WIDE] = {}, first[V::WIDE] = {}, second[V::WIDE] = {}, n;

    template <typename Read, typename Keep>
    FASTDIFF_DEVICE Distances(int count, const Read& read, const Keep& keep) : n((float)count * V::DEEP) {
        float v[V::SIZE];
        if (count) {
            V::widened(read(0), v);
#pragma unroll
            for (int w = 0; w < V::WIDE; ++w) pivot[w] = v[w];
        }
        walk<4, typename V::Raw>(count, read, [&](int j, const typename V::Raw& raw) {
            keep(j, raw);
            V::widened(raw, v);
#pragma unroll
            for (int e = 0; e < V::SIZE; ++e) {
                const int w = V::WIDE > 1 ? e : 0;
                const float d = v[e] - pivot[w];
                first[w] += d, second[w] = fused(d, d, second[w]);
            }
        });
    }

    FASTDIFF_DEVICE void total(float (&sums)[V::WIDE]) const {
#pragma unroll
        for (int w = 0; w < V::WIDE; ++w) sums[w] = fused(pivot[w], n, first[w]);
    }

    // sums of d and d^2 for distances to `mean` instead, `add` having been added to every number
    FASTDIFF_DEVICE void about(int w, float mean, float add, float* sums) const {
        const Exact s = exact_sum(pivot[w], add);
        const float by = (s.sum - mean) + s.rest;
        sums[0] = fused(n, by, first[w]);
        sums[1] = fused(by, fused(n, by, 2 * first[w]), second[w]);
    }
};

FASTDIFF_DEVICE void write_stats(const GroupNorm& call, int64_t n, int group, const Moments& m, float rstd) {
    float* stats = call.stats + (n * call.groups + group) * 3;
    stats[0] = m.hi, stats[1] = m.lo, stats[2] = rstd;
}

FASTDIFF_DEVICE float rstd_of(const Moments& m, float eps) { return 1.0f / sqrtf(m.m2 / m.n + eps); }

FASTDIFF_DEVICE Scales forward_scales(const Channel& c) { return {c.A, c.M, c.B, 0, 0, {}}; }

template <typename V>
FASTDIFF_KERNEL_N(NORM_THREADS, 2) one_pass(const Norm norm) {
    const GroupNorm& call = norm.call;
    const Plan& plan = norm.plan;
    FASTDIFF_SHARED(shared);
    const Rooms rooms = rooms_of(plan, 1);
    float *room = reinterpret_cast<float*>(shared), *exchange = reinterpret_cast<float*>(shared + rooms.exchange);
    Scales* scales = reinterpret_cast<Scales*>(shared + rooms.scales);
    typename V::Raw* tile = reinterpret_cast<typename V::Raw*>(shared + rooms.tile);

    const Place place(call, plan, blockIdx.x);
    const Half2 half(call, plan, place);
    const void* x = half.of(call.x, call.x2);
    const int count = place.count(plan), size = (int)(call.channels / call.groups), groups = place.channels / size;
    const int slots = plan.columns * plan.lanes, thread = (int)threadIdx.x;
    const Distances<V> own(
        count, [&](int j) { return V::read(x, call.dtype, half.cursor(j)); },
        [&](int j, const typename V::Raw& raw) { tile[j * slots + thread] = raw; });

    // the mean of this block's part of each group, then sums about it: exchange = {sum d, sum d^2} (groups), means
    const float pixels = (float)length_of(norm, place.split) * V::DEEP;
    float *means = exchange + 2 * groups, *merges = exchange + 3 * groups;
    float totals[V::WIDE], sums[V::WIDE * 2] = {};
    own.total(totals);
    sum_lanes<V::WIDE, 1>(plan, place, totals, room);
    const float share = pixels > 0 ? 1 / (pixels * size) : 0;
    sum_groups<1>(norm, place, means, [&](int c, int) {
        return (room[c] + pixels * at(call.add, place.n, place.tile + c, 0)) * share;
    });
#pragma unroll
    for (int w = 0; w < V::WIDE; ++w)
        if (place.active) {
            const int c = place.channel - place.tile + w;
            own.about(w, means[c / size], at(call.add, place.n, place.channel + w, 0), sums + 2 * w);
        }
    sum_lanes<V::WIDE, 2>(plan, place, sums, room);
    sum_groups<2>(norm, place, exchange, [&](int c, int k) { return room[2 * c + k]; });

    // every block of the cluster merges all parts, in the same order
    cluster_sync();
    if (thread < groups) {
        Moments m = {};
        for (int r = 0; r < plan.splits; ++r) {
            const float n = (float)length_of(norm, r) * V::DEEP * size, mean = cluster_read(means + thread, r);
            const float a = cluster_read(exchange + 2 * thread, r), b = cluster_read(exchange + 2 * thread + 1, r);
            m = merged(m, moments(mean, a, b, n));
        }
        const float rstd = rstd_of(m, call.eps);
        merges[3 * thread] = m.hi, merges[3 * thread + 1] = m.lo, merges[3 * thread + 2] = rstd;
        if (place.split == 0) write_stats(call, place.n, place.tile / size + thread, m, rstd);
    }
    cluster_arrive();
    __syncthreads();
    for (int c = thread; c < place.channels; c += NORM_THREADS) {
        const float* g = merges + c / size * 3;
        scales[c] = forward_scales(channel_of(call, place.n, place.tile + c, g[0], g[1], g[2]));
    }
    __syncthreads();
    if (count) {
        const Owned<V::WIDE> mine(scales + (place.channel - place.tile));
        const Cursor out(call, plan, place, 0, call.channels);
        for (int j = 0; j < count; ++j) {
            float v[V::SIZE];
            V::widened(tile[j * slots + thread], v);
            scaled<V>(call, mine, v);
            V::write(call.y, call.dtype, out(j), v);
        }
    }
    // no block leaves while another may read its shared memory
    cluster_wait();
}

// partials (N, splits, C) of x alone: `add` joins in `finish`
template <typename V>
FASTDIFF_KERNEL_N(NORM_THREADS, 2) split_moments(const Norm norm) {
    const GroupNorm& call = norm.call;
    const Plan& plan = norm.plan;
    FASTDIFF_SHARED(shared);
    float* room = reinterpret_cast<float*>(shared);
    const Place place(call, plan, blockIdx.x);
    const Half2 half(call, plan, place);
    const void* x = half.of(call.x, call.x2);
    const Distances<V> own(
        place.count(plan), [&](int j) { return V::read(x, call.dtype, half.cursor(j)); },
        [](int, const typename V::Raw&) {});

    const float n = (float)(place.last - place.first) * V::DEEP, share = n > 0 ? 1 / n : 0;
    float totals[V::WIDE], means[V::WIDE], sums[V::WIDE * 2] = {};
    own.total(totals);
    sum_lanes<V::WIDE, 1>(plan, place, totals, room);
#pragma unroll
    for (int w = 0; w < V::WIDE; ++w)
        if (place.active) {
            means[w] = room[place.channel - place.tile + w] * share;
            own.about(w, means[w], 0, sums + 2 * w);
        }
    sum_lanes<V::WIDE, 2>(plan, place, sums, room);
    if (!place.active || place.lane) return;
#pragma unroll
    for (int w = 0; w < V::WIDE; ++w) {
        const float* s = room + 2 * (place.channel - place.tile + w);
        const Moments m = moments(means[w], s[0], s[1], n);
        partials_of(norm, place.n, place.split)[place.channel + w] = make_float4(m.hi, m.lo, m.m2, m.n);
    }
}

// merges the partials of one group of one image
FASTDIFF_KERNEL(NORM_THREADS) finish(const Norm norm) {
    const GroupNorm& call = norm.call;
    FASTDIFF_SHARED(shared);
    Moments* room = reinterpret_cast<Moments*>(shared);
    const int size = (int)(call.channels / call.groups), thread = (int)threadIdx.x;
    const int64_t n = blockIdx.x / call.groups, c0 = (int64_t)(blockIdx.x % call.groups) * size;
    Moments own = {};
    for (int64_t item = thread; item < (int64_t)size * norm.plan.splits; item += NORM_THREADS) {
        const int64_t c = c0 + item % size;
        const float4 p = partials_of(norm, n, item / size)[c];
        const Exact m = exact_sum(p.x, at(call.add, n, c, 0));
        own = merged(own, {m.sum, m.rest + p.y, p.z, p.w});
    }
    room[thread] = own;
    for (int half = NORM_THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (thread < half) room[thread] = merged(room[thread], room[thread + half]);
    }
    __syncthreads();
    const Moments m = room[0];
    const float rstd = rstd_of(m, call.eps);
    if (thread == 0) write_stats(call, n, (int)(c0 / size), m, rstd);
    for (int c = thread; c < size; c += NORM_THREADS)
        scales_of(call, n)[c0 + c] = forward_scales(channel_of(call, n, c0 + c, m.hi, m.lo, rstd));
}

// the injection alone
FASTDIFF_KERNEL(NORM_THREADS) inject_scales(const Norm norm) {
    const GroupNorm& call = norm.call;
    const int64_t item = (int64_t)blockIdx.x * NORM_THREADS + threadIdx.x, n = item / call.channels;
    if (n >= call.images) return;
    const int64_t c = item - n * call.channels;
    scales_of(call, n)[c] = injection_scales(call, n, c);
}

template <typename V, typename R>
FASTDIFF_KERNEL_N(NORM_THREADS, 2) apply(const Norm norm) {
    const GroupNorm& call = norm.call;
    const Plan& plan = norm.plan;
    // backwards: what the pass in front has read last may still be in the cache
    const Place place(call, plan, gridDim.x - 1 - blockIdx.x);
    const Half2 half(call, plan, place);
    const void* x = half.of(call.x, call.x2);
    const int count = place.count(plan);
    if (!count) return;
    const Owned<V::WIDE> mine(scales_of(call, place.n) + place.channel);
    const Cursor out(call, plan, place, 0, call.channels);
    struct Raw {
        typename V::Raw x;
        typename R::Raw residual;
    };
    walk<4, Raw>(
        count,
        [&](int j) -> Raw {
            return {V::read(x, call.dtype, half.cursor(j)), R::read(call.residual, call.residual_dtype, out(j))};
        },
        [&](int j, const Raw& raw) {
            float v[V::SIZE];
            V::widened(raw.x, v);
            scaled<V>(call, mine, v);
            R::add(raw.residual, v);
            V::write(call.y, call.dtype, out(j), v);
        });
}

}  // namespace

Device device(int number) {
    Device d = {};
    const auto ask = [&](int* value, cudaDeviceAttr what) {
        check(cudaDeviceGetAttribute(value, what, number), "cudaDeviceGetAttribute");
    };
    ask(&d.processors, cudaDevAttrMultiProcessorCount);
    ask(&d.shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(&d.shared_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    ask(&d.clusters, cudaDevAttrClusterLaunch);
    // code that was compiled for an older device and translated for this one knows of no clusters
    check(cudaSetDevice(number), "cudaSetDevice");
    cudaFuncAttributes compiled;
    check(cudaFuncGetAttributes(&compiled, finish), "cudaFuncGetAttributes");
    d.clusters = d.clusters && compiled.ptxVersion >= 90 ? 8 : 1;
    return d;
}

void group_norm(const GroupNorm& call, const Plan& plan, const Queue& queue) {
    const Norm norm{call, plan};
    const int64_t blocks = blocks_of(norm), shared = plan.shared;
    if (plan.one_pass)
        return with_vectors(call, plan, [&](auto v) {
            launch(one_pass<decltype(v)>, norm, blocks, NORM_THREADS, queue, (int)shared, plan.splits);
        });
    if (call.groups) {
        with_vectors(call, plan, [&](auto v) {
            launch(split_moments<decltype(v)>, norm, blocks, NORM_THREADS, queue, (int)shared);
        });
        launch(finish, norm, call.images * call.groups, NORM_THREADS, queue, NORM_THREADS * (int)sizeof(Moments));
    } else {
        const int64_t items = call.images * call.channels;
        launch(inject_scales, norm, (items + NORM_THREADS - 1) / NORM_THREADS, NORM_THREADS, queue);
    }
    with_residual(call, plan, [&](auto v, auto residual) {
        launch(apply<decltype(v), decltype(residual)>, norm, blocks, NORM_THREADS, queue);
    });
}

}  // namespace cuda
}  // namespace fastdiff
