// The backward of fastdiff/ops/group_norm_silu.py: dn = dy silu'(n), xhat = (z - mean) rstd, w = weight (1 + scale),
//
//     dz = rstd (w dn - mean_g(w dn) - xhat mean_g(w dn xhat)) = A dn - U (x - M) - T
//
// n is computed again from x. One pass: x and dy stay in shared memory. Two passes: partial sums per channel and split.
#include "group_norm_slopes.cuh"

namespace fastdiff {
namespace cuda {
namespace {

template <typename V>
FASTDIFF_KERNEL_N(NORM_THREADS, 2) one_pass(const Norm norm) {
    const GroupNorm& call = norm.call;
    const Plan& plan = norm.plan;
    FASTDIFF_SHARED(shared);
    const Rooms rooms = rooms_of(plan, 2);
    float *room = reinterpret_cast<float*>(shared), *exchange = reinterpret_cast<float*>(shared + rooms.exchange);
    Scales* scales = reinterpret_cast<Scales*>(shared + rooms.scales);
    Pair<V>* tile = reinterpret_cast<Pair<V>*>(shared + rooms.tile);
    const Place place(call, plan, blockIdx.x);
    const Streams<V> streams(call, plan, place);
    const int count = place.count(plan), slots = plan.columns * plan.lanes, thread = (int)threadIdx.x;
    const int size = (int)(call.channels / call.groups);
    const auto channel = [&](int c) { return saved_channel(call, place.n, place.tile + c); };

    for (int c = thread; c < place.channels; c += NORM_THREADS) scales[c] = backward_scales(channel(c), 0, 0);
    __syncthreads();
    float d[V::SIZE], dn[V::SIZE], sums[V::WIDE * 2] = {};
    if (count) {
        const Owned<V::WIDE> mine(scales + (place.channel - place.tile));
        walk<2, Pair<V>>(
            count, [&](int j) { return streams.read(j); },
            [&](int j, const Pair<V>& raw) {
                tile[j * slots + thread] = raw;
                slopes<V>(call, mine, raw, d, dn);
                add_slopes<V>(d, dn, sums);
            });
    }
    sum_lanes<V::WIDE, 2>(plan, place, sums, room);
    for (int i = thread; i < 2 * place.channels; i += NORM_THREADS) exchange[i] = room[i];
    cluster_sync();
    for (int i = thread; i < 2 * place.channels; i += NORM_THREADS) {
        float sum = 0;
        for (int r = 0; r < plan.splits; ++r) sum += cluster_read(exchange + i, r);
        room[i] = sum;
    }
    __syncthreads();
    for (int c = thread; c < place.channels; c += NORM_THREADS) {
        room[2 * c + 1] = about_mean(channel(c), room[2 * c], room[2 * c + 1]);
        float* out = sums_of(call, place.n, place.tile + c);
        if (place.split == 0) out[0] = room[2 * c], out[1] = room[2 * c + 1];
    }
    __syncthreads();
    float *groups = exchange + 2 * place.channels, *dz = exchange + 4 * place.channels;
    sum_groups<2>(norm, place, groups, [&](int c, int k) { return channel(c).w * room[2 * c + k]; });
    const float share = 1 / ((float)call.pixels * size);
    for (int c = thread; c < place.channels; c += NORM_THREADS)
        scales[c] = backward_scales(channel(c), groups[c / size * 2] * share, groups[c / size * 2 + 1] * share);
    __syncthreads();

    float ends[V::WIDE] = {};
    if (count) {
        const Slopes<V::WIDE> mine(scales + (place.channel - place.tile));
        for (int j = 0; j < count; ++j) {
            slopes<V>(call, mine, tile[j * slots + thread], d, dn);
            finished<V>(mine, d, dn);
            streams.write(j, dn);
#pragma unroll
            for (int e = 0; e < V::SIZE; ++e) ends[V::WIDE > 1 ? e : 0] += dn[e];
        }
    }
    sum_lanes<V::WIDE, 1>(plan, place, ends, room);
    for (int c = thread; c < place.channels; c += NORM_THREADS) dz[c] = room[c];
    cluster_sync();
    for (int c = thread; place.split == 0 && c < place.channels; c += NORM_THREADS) {
        float sum = 0;
        for (int r = 0; r < plan.splits; ++r) sum += cluster_read(dz + c, r);
        sums_of(call, place.n, place.tile + c)[2] = sum;
    }
    // no block leaves while another may read its shared memory
    cluster_sync();
}

// A, M, B of every channel: from the saved statistics, or of the injection alone
FASTDIFF_KERNEL(NORM_THREADS) prepare(const Norm norm) {
    const GroupNorm& call = norm.call;
    const int64_t item = (int64_t)blockIdx.x * NORM_THREADS + threadIdx.x, n = item / call.channels;
    if (n >= call.images) return;
    const int64_t c = item - n * call.channels;
    scales_of(call, n)[c] =
        call.groups ? backward_scales(saved_channel(call, n, c), 0, 0) : injection_scales(call, n, c);
}

// partials (N, splits, C): first and second number
template <typename V>
FASTDIFF_DEVICE void write_partials(const Norm& norm, const Place& place, const float (&sums)[V::WIDE * 2]) {
    FASTDIFF_SHARED(shared);
    float* room = reinterpret_cast<float*>(shared);
    sum_lanes<V::WIDE, 2>(norm.plan, place, sums, room);
    if (!place.active || place.lane) return;
#pragma unroll
    for (int w = 0; w < V::WIDE; ++w) {
        const float* s = room + 2 * (place.channel - place.tile + w);
        partials_of(norm, place.n, place.split)[place.channel + w] = make_float4(s[0], s[1], 0, 0);
    }
}

template <typename V>
FASTDIFF_KERNEL_N(NORM_THREADS, 2) split_sums(const Norm norm) {
    const GroupNorm& call = norm.call;
    const Place place(call, norm.plan, blockIdx.x);
    float d[V::SIZE], dn[V::SIZE], sums[V::WIDE * 2] = {};
    if (const int count = place.count(norm.plan)) {
        const Streams<V> streams(call, norm.plan, place);
        const Owned<V::WIDE> mine(scales_of(call, place.n) + place.channel);
        walk<2, Pair<V>>(
            count, [&](int j) { return streams.read(j); },
            [&](int, const Pair<V>& raw) {
                slopes<V>(call, mine, raw, d, dn);
                add_slopes<V>(d, dn, sums);
            });
    }
    write_partials<V>(norm, place, sums);
}

// this warp's sum over the splits of partials of channel c
FASTDIFF_DEVICE float2 sum_splits(const Norm& norm, int64_t n, int64_t c) {
    float2 sum = make_float2(0, 0);
    for (int split = threadIdx.x % 32; split < norm.plan.splits; split += 32) {
        const float4 p = partials_of(norm, n, split)[c];
        sum.x += p.x, sum.y += p.y;
    }
    return make_float2(sum_of_warp(sum.x), sum_of_warp(sum.y));
}

// one block a group: its sums, and what they subtract from every dz
FASTDIFF_KERNEL(NORM_THREADS) finish(const Norm norm) {
    const GroupNorm& call = norm.call;
    FASTDIFF_SHARED(shared);
    float* room = reinterpret_cast<float*>(shared);
    const int size = (int)(call.channels / call.groups), warp = threadIdx.x / 32, warps = NORM_THREADS / 32;
    const int64_t n = blockIdx.x / call.groups, c0 = (int64_t)(blockIdx.x % call.groups) * size;
    float c1 = 0, c2 = 0;
    for (int c = warp; c < size; c += warps) {
        const float2 s = sum_splits(norm, n, c0 + c);
        const Channel channel = saved_channel(call, n, c0 + c);
        const float s2 = about_mean(channel, s.x, s.y);
        float* out = sums_of(call, n, c0 + c);
        if (threadIdx.x % 32 == 0) out[0] = s.x, out[1] = s2;
        c1 += channel.w * s.x, c2 += channel.w * s2;
    }
    if (threadIdx.x % 32 == 0) room[2 * warp] = c1, room[2 * warp + 1] = c2;
    __syncthreads();
    c1 = c2 = 0;
    for (int w = 0; w < warps; ++w) c1 += room[2 * w], c2 += room[2 * w + 1];
    const float share = 1 / ((float)call.pixels * size);
    for (int c = threadIdx.x; c < size; c += NORM_THREADS)
        scales_of(call, n)[c0 + c] = backward_scales(saved_channel(call, n, c0 + c), c1 * share, c2 * share);
}

// dx, and partial sums: of dz for a norm; of dn and dn (x - M) for the injection, whose only pass this is
template <typename V>
FASTDIFF_KERNEL_N(NORM_THREADS, 2) apply(const Norm norm) {
    const GroupNorm& call = norm.call;
    const Place place(call, norm.plan, gridDim.x - 1 - blockIdx.x);
    float d[V::SIZE], dn[V::SIZE], sums[V::WIDE * 2] = {};
    if (const int count = place.count(norm.plan)) {
        const Streams<V> streams(call, norm.plan, place);
        const Slopes<V::WIDE> mine(scales_of(call, place.n) + place.channel);
        walk<2, Pair<V>>(
            count, [&](int j) { return streams.read(j); },
            [&](int j, const Pair<V>& raw) {
                slopes<V>(call, mine, raw, d, dn);
                if (!call.groups) add_slopes<V>(d, dn, sums);
                finished<V>(mine, d, dn);
                streams.write(j, dn);
#pragma unroll
                for (int e = 0; e < V::SIZE; ++e)
                    if (call.groups) sums[V::WIDE > 1 ? 2 * e : 0] += dn[e];
            });
    }
    write_partials<V>(norm, place, sums);
}

// a warp a channel
FASTDIFF_KERNEL(NORM_THREADS) last(const Norm norm) {
    const GroupNorm& call = norm.call;
    const int64_t item = ((int64_t)blockIdx.x * NORM_THREADS + threadIdx.x) / 32, n = item / call.channels;
    if (n >= call.images) return;
    const int64_t c = item - n * call.channels;
    const float2 s = sum_splits(norm, n, c);
    if (threadIdx.x % 32) return;
    float* out = sums_of(call, n, c);
    if (call.groups)
        out[2] = s.x;
    else
        out[0] = s.x, out[1] = s.y;
}

}  // namespace

void group_norm_backward(const GroupNorm& call, const Plan& plan, const Queue& queue) {
    const Norm norm{call, plan};
    const int64_t blocks = blocks_of(norm), items = call.images * call.channels;
    const auto blocks_for = [](int64_t threads) { return (threads + NORM_THREADS - 1) / NORM_THREADS; };
    if (plan.one_pass)
        return with_vectors(call, plan, [&](auto v) {
            launch(one_pass<decltype(v)>, norm, blocks, NORM_THREADS, queue, plan.shared, plan.splits);
        });
    launch(prepare, norm, blocks_for(items), NORM_THREADS, queue);
    if (call.groups) {
        with_vectors(call, plan, [&](auto v) {
            launch(split_sums<decltype(v)>, norm, blocks, NORM_THREADS, queue, plan.shared);
        });
        launch(finish, norm, call.images * call.groups, NORM_THREADS, queue, NORM_THREADS / 32 * 2 * 4);
    }
    with_vectors(call, plan, [&](auto v) {
        launch(apply<decltype(v)>, norm, blocks, NORM_THREADS, queue, plan.shared);
    });
    launch(last, norm, blocks_for(items * 32), NORM_THREADS, queue);
}

}  // namespace cuda
}  // namespace fastdiff
