// Numbers that no emulated launch reaches: offsets past 2^31, and the quotients that find an image.
#include <pybind11/pybind11.h>

#include "../../../csrc/cuda/elementwise.cuh"
#include "../../../csrc/cuda/group_norm.cuh"

namespace py = pybind11;
using namespace fastdiff;
using namespace fastdiff::cuda;

PYBIND11_MODULE(_checks, m) {
    m.def("divided", [](uint32_t x, uint32_t divisor) { return divided(x, divider(divisor)); });
    m.def("pixel", [](uint32_t u) { return pixel(u); });
    // element (n, c, p) and the next `steps` of it
    m.def("walk", [](int64_t image, int64_t channel, int64_t pixel, int64_t n, int64_t c, int64_t p, int64_t pixels,
                     int steps) {
        Walk walk({nullptr, FLOAT32, image, channel, pixel}, n, c, p, pixels);
        for (int i = 0; i < steps; ++i) walk.step();
        return walk.at;
    });
    // the j-th vector of a thread: its offset in x, and what the place says of it
    m.def("cursor", [](bool channels_last, int64_t images, int64_t channels, int64_t pixels, int wide, int deep,
                       int columns, int lanes, int tiles, int splits, int64_t range, uint32_t block, unsigned thread,
                       int j) {
        GroupNorm call = {};
        call.channels_last = channels_last, call.images = images, call.pixels = pixels;
        call.first = call.channels = channels;
        const Plan plan{false, true, wide, deep, columns, lanes, tiles, splits, range, 0};
        threadIdx = {thread, 0, 0};
        const Place place(call, plan, block);
        const Cursor cursor(call, plan, place, 0, channels);
        return py::make_tuple(cursor(j), place.n, place.channel, place.first + place.lane + (int64_t)j * lanes,
                              place.count(plan));
    });
}
