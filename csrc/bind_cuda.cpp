// fastdiff._cuda: the CUDA kernels for Python. Tensors come as addresses, the stream as a number; their owner has
// checked shapes and dtypes. Importing it needs no driver: the CUDA runtime is linked in and called on use only.
#include <pybind11/pybind11.h>

#include "cuda/kernels.h"

namespace py = pybind11;
using namespace fastdiff;

namespace {

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

cuda::Queue queue(int device, uintptr_t stream) { return {device, at<void>(stream)}; }

void check_size(int64_t size) {
    // a counter holds 32 bits of i / 4
    if (size > (int64_t(1) << 34)) throw py::value_error("one image holds at most 2**34 numbers");
}

void normal(uintptr_t out, uintptr_t seed, uintptr_t index, int64_t step, uint32_t stream_of_noise, int64_t images,
            int64_t size, int device, uintptr_t stream) {
    check_size(size);
    cuda::normal(at<float>(out), {at<int64_t>(seed), at<int64_t>(index), step, stream_of_noise}, images, size,
                 queue(device, stream));
}

void q_sample(uintptr_t x0, int x0_dtype, uintptr_t noise, int noise_dtype, uintptr_t t, uintptr_t table,
              uintptr_t seed, uintptr_t index, int64_t step, uint32_t stream_of_noise, uintptr_t where,
              int64_t where_image, int64_t where_channel, int64_t where_pixel, uintptr_t x_t, uintptr_t eps,
              uintptr_t v, int dtype, int64_t images, int64_t channels, int64_t pixels, int device,
              uintptr_t stream) {
    check_size(channels * pixels);
    const cuda::QSample call{at<void>(x0),
                             at<void>(noise),
                             Dtype(x0_dtype),
                             Dtype(noise_dtype),
                             at<int64_t>(t),
                             at<float>(table),
                             {at<int64_t>(seed), at<int64_t>(index), step, stream_of_noise},
                             {at<void>(where), UINT8, where_image, where_channel, where_pixel},
                             at<void>(x_t),
                             at<void>(eps),
                             at<void>(v),
                             Dtype(dtype),
                             images,
                             channels,
                             pixels};
    cuda::q_sample(call, queue(device, stream));
}

void step(uintptr_t x, uintptr_t h, uintptr_t x_in, int x_in_dtype, int64_t x_in_image, int64_t x_in_channel,
          int64_t x_in_pixel, bool doubled, uintptr_t F, int F_dtype, int64_t F_image, int64_t F_channel,
          int64_t F_pixel, bool guided, uintptr_t rows, uintptr_t k, uintptr_t index, uintptr_t seed, int variance,
          uintptr_t noise, uintptr_t bad, int64_t images, int64_t channels, int64_t pixels, int device,
          uintptr_t stream) {
    check_size(channels * pixels);
    const cuda::Step call{at<float>(x),
                          at<float>(h),
                          {at<void>(x_in), Dtype(x_in_dtype), x_in_image, x_in_channel, x_in_pixel},
                          {at<void>(F), Dtype(F_dtype), F_image, F_channel, F_pixel},
                          doubled,
                          guided,
                          at<float>(rows),
                          at<int64_t>(k),
                          at<int64_t>(index),
                          at<int64_t>(seed),
                          Variance(variance),
                          at<float>(noise),
                          at<int64_t>(bad),
                          images,
                          channels,
                          pixels};
    cuda::step(call, queue(device, stream));
}

cuda::PerChannel per_channel(const py::tuple& v) { return {at<float>(v[0].cast<uintptr_t>()), v[1].cast<int64_t>()}; }

// addresses of (x, x2, dy, residual, y, dx, dx2, stats, sums); (weight, bias, add, scale, shift) as (address, step an
// image)
cuda::GroupNorm norm(const py::tuple& tensors, const py::tuple& numbers, int dtype, int residual_dtype,
                     bool channels_last, bool act, int64_t images, int64_t first, int64_t channels, int64_t pixels,
                     int groups, float eps) {
    const auto tensor = [&](int i) { return at<void>(tensors[i].cast<uintptr_t>()); };
    const auto number = [&](int i) { return per_channel(numbers[i].cast<py::tuple>()); };
    return {tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5), tensor(6),
            number(0), number(1), number(2), number(3), number(4),
            static_cast<float*>(tensor(7)), static_cast<float*>(tensor(8)), nullptr,
            Dtype(dtype), Dtype(residual_dtype), channels_last, act, images, first, channels, pixels, groups, eps};
}

// the plan of a call, with its workspace in floats
struct Planned {
    cuda::GroupNorm call;
    cuda::Plan plan;
    int64_t workspace;
    bool backward;
};

Planned planned(const cuda::GroupNorm& call, const cuda::Device& device, bool backward) {
    const cuda::Plan plan = cuda::plan(call, device, backward);
    return {call, plan, cuda::workspace_size(call, plan), backward};
}

void run(Planned& self, uintptr_t workspace, int device, uintptr_t stream) {
    self.call.workspace = at<float>(workspace);
    (self.backward ? cuda::group_norm_backward : cuda::group_norm)(self.call, self.plan, queue(device, stream));
}

#define FASTDIFF_TEXT(...) #__VA_ARGS__
#define FASTDIFF_NAMES(...) FASTDIFF_TEXT(__VA_ARGS__)

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastdiff's CUDA kernels on raw addresses; fastdiff.ops holds the functions for users";
    m.attr("columns") = FASTDIFF_NAMES(FASTDIFF_COLUMNS);
    m.def("normal", &normal);
    m.def("q_sample", &q_sample);
    m.def("step", &step);
    m.def("device", &cuda::device);
    py::class_<cuda::Device>(m, "Device", py::module_local())
        .def(py::init([](int processors, int shared_block, int shared_processor, int clusters) {
            return cuda::Device{processors, shared_block, shared_processor, clusters};
        }));
    py::class_<cuda::GroupNorm>(m, "GroupNorm", py::module_local()).def(py::init(&norm));
    py::class_<Planned>(m, "Planned", py::module_local())
        .def(py::init(&planned))
        .def_readonly("workspace", &Planned::workspace)
        .def_property_readonly("plan", [](const Planned& p) {
            return py::dict(py::arg("one_pass") = p.plan.one_pass, py::arg("vectors") = p.plan.vectors,
                            py::arg("wide") = p.plan.wide, py::arg("deep") = p.plan.deep,
                            py::arg("columns") = p.plan.columns, py::arg("lanes") = p.plan.lanes,
                            py::arg("tiles") = p.plan.tiles, py::arg("splits") = p.plan.splits,
                            py::arg("range") = p.plan.range, py::arg("shared") = p.plan.shared);
        })
        .def("run", &run);
}
