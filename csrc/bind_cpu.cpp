// fastdiff._cpu: the CPU kernels for Python. Tensors come as addresses; their owner has checked shapes and dtypes.
#include <pybind11/pybind11.h>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "cpu/group_norm.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace fastdiff;

namespace {

struct Kernels {
    const char* name;
    bool runs;
    void (*normal)(const Normal&);
    void (*q_sample)(const QSample&);
    void (*step)(const Step&);
    void (*time_embed)(const TimeEmbed&);
    bool (*group_norm)(const GroupNorm&);
    bool (*group_norm_backward)(const GroupNormBackward&);
    bool (*inject)(const Inject&);
    bool (*inject_backward)(const InjectBackward&);
    int64_t (*kernel_room)(const Kernel&, int);
    void (*play)(const Kernel*, int64_t, void*, int);
    void (*moments)(const float*, int64_t, int64_t, int64_t, double*, int);
};

#define FASTDIFF_KERNELS(isa, runs)                                                                             \
    {                                                                                                           \
        #isa, static_cast<bool>(runs), isa::normal, isa::q_sample, isa::step, isa::time_embed, isa::group_norm, \
            isa::group_norm_backward, isa::inject, isa::inject_backward, isa::kernel_room, isa::play,           \
            isa::moments                                                                                        \
    }

#if defined(__clang__)
#define FASTDIFF_RUNS_V3                                                                       \
    (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && \
     __builtin_cpu_supports("bmi2"))
#define FASTDIFF_RUNS_V4                                                                       \
    (FASTDIFF_RUNS_V3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
     __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
#else
#define FASTDIFF_RUNS_V3 __builtin_cpu_supports("x86-64-v3")
#define FASTDIFF_RUNS_V4 __builtin_cpu_supports("x86-64-v4")
#endif

// what this build holds, best first
std::vector<Kernels> compiled() {
    return {
#ifdef FASTDIFF_HAVE_V4
        FASTDIFF_KERNELS(v4, FASTDIFF_RUNS_V4),
#endif
#ifdef FASTDIFF_HAVE_V3
        FASTDIFF_KERNELS(v3, FASTDIFF_RUNS_V3),
#endif
        FASTDIFF_KERNELS(base, true),
    };
}

Kernels choose() {
    const char* forced = std::getenv("FASTDIFF_ISA");
    const std::string asked = forced ? forced : "";
    std::string accepted;
    for (const Kernels& kernels : compiled()) {
        if (!kernels.runs) {
            if (asked == kernels.name)
                throw py::import_error("FASTDIFF_ISA=" + asked + ": this CPU lacks x86-64-" + asked +
                                       "; unset FASTDIFF_ISA to have the best that it runs");
            continue;
        }
        if (asked.empty() || asked == kernels.name) return kernels;
        accepted += std::string(accepted.empty() ? "" : ", ") + kernels.name;
    }
    throw py::import_error("FASTDIFF_ISA=" + asked + " is unknown to this build; accepted here: " + accepted +
                           ", or unset it");
}

Kernels chosen;

template <typename T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check_size(int64_t size) {
    // a counter holds 32 bits of i / 4
    if (size > (int64_t(1) << 34)) throw py::value_error("one image holds at most 2**34 numbers");
}

void normal(uintptr_t out, uintptr_t seed, uintptr_t index, int64_t step, uint32_t stream, int64_t images,
            int64_t size, int threads) {
    check_size(size);
    const Normal call{at<float>(out), at<int64_t>(seed), at<int64_t>(index), step, stream, images, size, threads};
    const py::gil_scoped_release released;
    chosen.normal(call);
}

void q_sample(uintptr_t x0, int x0_dtype, uintptr_t noise, int noise_dtype, uintptr_t where, int64_t where_image,
              int64_t where_channel, int64_t where_pixel, uintptr_t t, uintptr_t table, int64_t lines, uintptr_t seed,
              uintptr_t index, int64_t step, uint32_t stream, uintptr_t x_t, uintptr_t eps, uintptr_t v, int dtype,
              int64_t images, int64_t channels, int64_t pixels, int threads) {
    check_size(channels * pixels);
    for (int64_t n = 0; n < images; ++n)
        if (const int64_t time = at<int64_t>(t)[n]; time < 0 || time >= lines)
            throw py::index_error("q_sample: t[" + std::to_string(n) + "] = " + std::to_string(time) +
                                  " is out of range; the table has the lines 0 to " + std::to_string(lines - 1));
    const QSample call{at<void>(x0),
                       at<void>(noise),
                       {at<void>(where), UINT8, where_image, where_channel, where_pixel},
                       Dtype(x0_dtype),
                       Dtype(noise_dtype),
                       at<int64_t>(t),
                       at<float>(table),
                       at<int64_t>(seed),
                       at<int64_t>(index),
                       step,
                       stream,
                       at<void>(x_t),
                       at<void>(eps),
                       at<void>(v),
                       Dtype(dtype),
                       images,
                       channels,
                       pixels,
                       threads};
    const py::gil_scoped_release released;
    chosen.q_sample(call);
}

void check_row(const Step& call, int64_t lines) {
    const int64_t k = *call.k, last = call.x_in.data ? k + 1 : k;
    if (k < 0 || last >= lines)
        throw py::value_error("step_: k=" + std::to_string(k) + " is outside the " + std::to_string(lines) +
                              " lines of rows (the last one only says what the result is)");
    const float* r = call.rows + k * COLUMNS;
    if ((r[P] != 0 || r[Q] != 0) && !(r[SLOT] >= 0 && r[SLOT] < 3))
        throw py::value_error("step_: row " + std::to_string(k) + " has SLOT " + std::to_string(r[SLOT]) +
                              "; accepted: 0, 1, 2");
}

void step(uintptr_t x, uintptr_t h, uintptr_t x_in, int x_in_dtype, int64_t x_in_image, int64_t x_in_channel,
          int64_t x_in_pixel, bool doubled, uintptr_t F, int F_dtype, int64_t F_image, int64_t F_channel,
          int64_t F_pixel, bool guided, uintptr_t rows, int64_t lines, uintptr_t k, uintptr_t index, uintptr_t seed,
          int variance, uintptr_t noise, uintptr_t bad, int64_t images, int64_t channels, int64_t pixels,
          int threads) {
    const Step call{at<float>(x),
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
                    pixels,
                    threads};
    check_size(channels * pixels);
    check_row(call, lines);
    const py::gil_scoped_release released;
    chosen.step(call);
}

void time_embed(uintptr_t t, bool whole, double max_period, double shift, double scale, bool flip, uintptr_t out,
                int dtype, int64_t images, int64_t dim, int threads) {
    // here, so that every ISA gets the same bits; with room for the widest vector behind them
    std::vector<double> frequencies(dim / 2 + 8);
    for (int64_t j = 0; j < dim / 2; ++j)
        frequencies[j] = std::exp(-std::log(max_period) * double(j) / (double(dim / 2) - shift));
    const TimeEmbed call{at<void>(t),   whole,        frequencies.data(), scale, flip, at<void>(out),
                         Dtype(dtype), images, dim,    threads};
    const py::gil_scoped_release released;
    chosen.time_embed(call);
}

// Asks for huge pages under memory that malloc has just mapped: a first touch of each 2 MB instead of each 4 KB.
// Only advice: what does not know it ignores it.
void advise_huge(uintptr_t address, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = sysconf(_SC_PAGESIZE), first = (address + page - 1) / page * page;
    const uintptr_t last = (address + bytes) / page * page;
    if (first < last) madvise(at<void>(first), last - first, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
}

// fastdiff/ops/group_norm_silu_cpp.py builds the tuple
Normed normed(const py::tuple& in) {
    const auto whole = [&](int i) { return in[i].cast<int64_t>(); };
    const auto per_channel = [&](int i) { return PerChannel{at<float>(in[i].cast<uintptr_t>()), whole(i + 1)}; };
    return {at<void>(in[0].cast<uintptr_t>()),
            at<void>(in[1].cast<uintptr_t>()),
            whole(2),
            Dtype(whole(3)),
            in[4].cast<bool>(),
            whole(5),
            whole(6),
            whole(7),
            whole(8),
            per_channel(9),
            per_channel(11),
            per_channel(13),
            per_channel(15),
            per_channel(17),
            in[19].cast<bool>(),
            in[20].cast<int>()};
}

template <typename Call>
void finish(bool (*kernel)(const Call&), const Call& call) {
    bool done;
    {
        const py::gil_scoped_release released;
        done = kernel(call);
    }
    if (!done) throw std::bad_alloc();
}

void group_norm(const py::tuple& in, double eps, uintptr_t y, uintptr_t stats) {
    finish(chosen.group_norm, GroupNorm{normed(in), eps, at<void>(y), at<float>(stats)});
}

void group_norm_backward(const py::tuple& in, uintptr_t stats, uintptr_t dy, uintptr_t dx, uintptr_t dx2,
                         uintptr_t sums) {
    finish(chosen.group_norm_backward, GroupNormBackward{normed(in), at<float>(stats), at<void>(dy), at<void>(dx),
                                                         at<void>(dx2), at<float>(sums)});
}

void inject(const py::tuple& in, uintptr_t residual, int residual_dtype, uintptr_t y) {
    finish(chosen.inject, Inject{normed(in), at<void>(residual), Dtype(residual_dtype), at<void>(y)});
}

void inject_backward(const py::tuple& in, uintptr_t dy, uintptr_t dx, uintptr_t sums) {
    finish(chosen.inject_backward, InjectBackward{normed(in), at<void>(dy), at<void>(dx), at<float>(sums)});
}

// What a calling thread's convolutions work in: kept from call to call, since a fresh page costs more than it is used for.
class Scratch {
public:
    void* of(size_t bytes) {
        if (bytes > bytes_) {
            std::free(memory_);
            bytes_ = 0;
            const size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
            memory_ = std::aligned_alloc(PAGE, whole);
            if (!memory_) throw std::bad_alloc();
            bytes_ = whole;
            advise_huge(reinterpret_cast<uintptr_t>(memory_), whole);
        }
        return memory_;
    }
    ~Scratch() { std::free(memory_); }

private:
    static constexpr size_t PAGE = size_t(1) << 21;
    void* memory_ = nullptr;
    size_t bytes_ = 0;
};

thread_local Scratch scratch;

// fastdiff/ops/norm_silu_conv_cpp.py builds the tuple
Kernel conv_of(const py::tuple& in) {
    int i = 0;
    const auto whole = [&] { return in[i++].cast<int64_t>(); };
    const auto floats = [&] { return at<float>(in[i++].cast<uintptr_t>()); };
    const auto doubles = [&] { return at<double>(in[i++].cast<uintptr_t>()); };
    const auto per_channel = [&] {
        const float* data = floats();
        return PerChannel{data, whole()};
    };
    Kernel kernel{Kernel::CONV, {}};
    Conv& call = kernel.conv;
    Maps& maps = call.in;
    call.kind = Kind(whole()), call.append = in[i++].cast<bool>();
    maps.x = floats(), maps.x2 = floats(), maps.x_channels = whole(), maps.channels = whole();
    maps.images = whole(), maps.height = whole(), maps.width = whole(), maps.groups = whole();
    maps.eps = in[i++].cast<double>();
    maps.weight = per_channel(), maps.bias = per_channel(), maps.scale = per_channel(), maps.shift = per_channel();
    maps.moments = doubles(), maps.moments2 = doubles(), maps.act = in[i++].cast<bool>();
    call.weight = floats();
    call.out.y = floats(), call.out.channels = whole(), call.out.bias = floats(), call.out.add = per_channel();
    call.out.apart = call.out.channels + (call.append ? maps.channels : 0);
    call.out.residual = floats(), call.out.moments = doubles();
    call.stride = whole(), call.before = whole();
    return kernel;
}

// fastdiff/ops/attention_cpp.py does
Kernel attention_of(const py::tuple& in) {
    Kernel kernel{Kernel::ATTENTION, {}};
    const auto whole = [&](int i) { return in[i].cast<int64_t>(); };
    const auto floats = [&](int i) { return at<float>(in[i].cast<uintptr_t>()); };
    const int64_t channels = whole(8) * whole(9);
    kernel.attention = {floats(0), floats(1), floats(2), whole(3), whole(4), whole(5), whole(6), whole(7), whole(8), whole(9),
                        Sum{floats(10), channels, channels, nullptr, {}, floats(11), at<double>(in[12].cast<uintptr_t>())}};
    return kernel;
}

// fastdiff/ops/norm_linear_cpp.py does
Kernel linear_of(const py::tuple& in) {
    int i = 0;
    const auto whole = [&] { return in[i++].cast<int64_t>(); };
    const auto floats = [&] { return at<float>(in[i++].cast<uintptr_t>()); };
    Kernel kernel{Kernel::LINEAR, {}};
    Linear& call = kernel.linear = {};
    call.x = floats(), call.apart = whole(), call.tokens = whole(), call.channels = whole();
    call.norm = in[i++].cast<bool>(), call.eps = in[i++].cast<double>();
    call.norm_weight = floats(), call.norm_bias = floats();
    call.weight = floats(), call.bias = floats();
    call.outputs = whole(), call.gate = in[i++].cast<bool>(), call.residual = floats(), call.y = floats();
    return kernel;
}

void play(const Kernel* kernels, size_t count, int threads) {
    const py::gil_scoped_release released;
    int64_t room = 0;
    for (size_t i = 0; i < count; ++i) room = std::max(room, chosen.kernel_room(kernels[i], threads));
    chosen.play(kernels, int64_t(count), scratch.of(size_t(room)), threads);
}

template <Kernel (*of)(const py::tuple&)>
void alone(const py::tuple& in, int threads) {
    const Kernel kernel = of(in);
    play(&kernel, 1, threads);
}

// Kernels that are run again and again on the same memory.
class Tape {
public:
    template <Kernel (*of)(const py::tuple&)>
    size_t add(const py::tuple& in) {
        kernels_.push_back(of(in));
        return kernels_.size();
    }

    void play(size_t first, size_t end, int threads) const {
        if (first > end || end > kernels_.size()) throw py::index_error("the tape has no such kernels");
        ::play(kernels_.data() + first, end - first, threads);
    }

private:
    std::vector<Kernel> kernels_;
};

// Whether tensors are at the addresses and of the versions that they had: torch's own `_version` and `data_ptr`, asked
// without a step of Python for each.
class Watch {
public:
    Watch(py::list tensors, py::object base) : tensors_(std::move(tensors)) {
        version_ = reinterpret_cast<PyGetSetDescrObject*>(py::object(base.attr("_version")).ptr())->d_getset;
        address_ = reinterpret_cast<PyMethodDescrObject*>(py::object(base.attr("data_ptr")).ptr())->d_method;
        for (const py::handle tensor : tensors_) seen_.push_back({version_of(tensor.ptr()), address_of(tensor.ptr())});
    }

    bool same() const {
        size_t i = 0;
        for (const py::handle tensor : tensors_) {
            const Seen& seen = seen_[i++];
            if (version_of(tensor.ptr()) != seen.version || address_of(tensor.ptr()) != seen.address) return false;
        }
        return true;
    }

private:
    struct Seen {
        long long version;
        unsigned long long address;
    };

    long long version_of(PyObject* tensor) const {
        const auto number = py::reinterpret_steal<py::object>(version_->get(tensor, version_->closure));
        if (!number) throw py::error_already_set();
        return PyLong_AsLongLong(number.ptr());
    }

    unsigned long long address_of(PyObject* tensor) const {
        const auto number = py::reinterpret_steal<py::object>(address_->ml_meth(tensor, nullptr));
        if (!number) throw py::error_already_set();
        return PyLong_AsUnsignedLongLong(number.ptr());
    }

    py::list tensors_;
    PyGetSetDef* version_;
    PyMethodDef* address_;
    std::vector<Seen> seen_;
};

void moments(uintptr_t x, int64_t images, int64_t pixels, int64_t channels, uintptr_t out, int threads) {
    const py::gil_scoped_release released;
    chosen.moments(at<float>(x), images, pixels, channels, at<double>(out), threads);
}

#define FASTDIFF_TEXT(...) #__VA_ARGS__
#define FASTDIFF_NAMES(...) FASTDIFF_TEXT(__VA_ARGS__)

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fastdiff's CPU kernels on raw addresses; fastdiff.ops holds the functions for users";
    chosen = choose();
    m.attr("isa") = chosen.name;
    py::list isas;
    for (const Kernels& kernels : compiled())
        if (kernels.runs) isas.append(kernels.name);
    m.attr("isas") = py::tuple(isas);
    m.attr("columns") = FASTDIFF_NAMES(FASTDIFF_COLUMNS);
    m.def("normal", &normal);
    m.def("q_sample", &q_sample);
    m.def("step", &step);
    m.def("time_embed", &time_embed);
    m.def("advise_huge", &advise_huge);
    m.def("group_norm", &group_norm);
    m.def("group_norm_backward", &group_norm_backward);
    m.def("inject", &inject);
    m.def("inject_backward", &inject_backward);
    py::class_<Watch>(m, "Watch").def(py::init<py::list, py::object>()).def("same", &Watch::same);
    m.def("conv", &alone<conv_of>);
    m.def("attention", &alone<attention_of>);
    m.def("linear", &alone<linear_of>);
    py::class_<Tape>(m, "Tape")
        .def(py::init<>())
        .def("conv", &Tape::add<conv_of>)
        .def("attention", &Tape::add<attention_of>)
        .def("linear", &Tape::add<linear_of>)
        .def("play", &Tape::play);
    m.def("moments", &moments);
}
