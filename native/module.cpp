// The only file that knows Python: addresses and sizes in, calls out. Who calls keeps the memory.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>

#include "model.h"
#include "training.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace aprium {
namespace {

using Release = nb::call_guard<nb::gil_scoped_release>;

// Adds the time that it lives to a machine's counter.
class Clock {
   public:
    explicit Clock(Machine& machine) : machine_(machine), begin_(std::chrono::steady_clock::now()) {}
    ~Clock() {
        std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin_;
        machine_.counters.seconds += took.count();
    }

   private:
    Machine& machine_;
    std::chrono::steady_clock::time_point begin_;
};
using View = std::pair<uintptr_t, int64_t>;  // address and number of floats; {0, 0} is none

template <class T>
T* at(uintptr_t address) {
    return (T*)address;
}
Floats copy(View view) { return Floats(at<float>(view.first), at<float>(view.first) + view.second); }

const Kernels* find(const std::string& name) {
#ifdef __x86_64__
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (name == "avx2") return avx2 ? &avx2::kernels : nullptr;
    if (name == "avx512") {
        bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
                    __builtin_cpu_supports("avx512bf16");
        return avx2 && wide ? &avx512::kernels : nullptr;
    }
#endif
    return name == "scalar" ? &scalar::kernels : nullptr;
}

std::vector<std::string> supported() {  // the fastest first
    std::vector<std::string> found;
    for (const char* name : {"avx512", "avx2", "scalar"})
        if (find(name)) found.push_back(name);
    return found;
}

Machine* make_machine(const std::string& isa, int num_threads) {
    const Kernels* kernels = find(isa);
    if (!kernels) throw std::invalid_argument("this processor or build has no " + isa + " kernels");
    if (num_threads < 1) throw std::invalid_argument("a machine needs at least one thread");
    return new Machine(*kernels, num_threads);
}

Format format_of(const std::string& name) {
    const std::pair<const char*, Format> known[] = {
        {"float32", Format::f32}, {"bfloat16", Format::bf16}, {"float16", Format::f16},
        {"fp8", Format::fp8},     {"nvfp4", Format::nvfp4},   {"nvfp4_transposed", Format::nvfp4_transposed}};
    for (auto& [key, format] : known)
        if (name == key) return format;
    throw std::invalid_argument("unknown weight format " + name);
}

Precision precision_of(const std::string& name) {
    if (name == "float32") return Precision::f32;
    if (name == "bfloat16") return Precision::bf16;
    if (name == "int8") return Precision::int8;
    throw std::invalid_argument("unknown activation dtype " + name);
}

// Formats that a precision does not serve take the nearest that does: int8 is for NVFP4 only, and
// weights wider than bfloat16 are never rounded.
Precision effective(Format format, Precision precision) {
    if (format == Format::f32 || format == Format::f16) return Precision::f32;
    bool nvfp4 = format == Format::nvfp4 || format == Format::nvfp4_transposed;
    if (precision == Precision::int8 && !nvfp4) return Precision::bf16;
    return precision;
}

Weight make_weight(const std::string& format, const std::string& precision, uintptr_t data, uintptr_t scales,
                   float scale, int64_t rows, int64_t cols, View bias) {
    Format f = format_of(format);
    Precision p = effective(f, precision_of(precision));
    if (f == Format::nvfp4_transposed && (p != Precision::int8 || rows % kGroup))
        throw std::invalid_argument("transposed weights need int8 activations and a multiple of 128 rows");
    if ((f == Format::nvfp4 || f == Format::nvfp4_transposed) && cols % kBlock)
        throw std::invalid_argument("NVFP4 weights need a multiple of 16 columns");
    // Codes are doubled for int8, and scales arrive divided by 256.
    if (p == Precision::int8) scale *= 128;
    return {{f, at<uint8_t>(data), at<uint8_t>(scales), scale, rows, cols}, p, copy(bias)};
}

double timed(Machine& m, int64_t repeats, const std::function<void(int64_t, int)>& task) {
    double best = 1e30;
    for (int64_t r = 0; r < repeats; r++) {
        auto begin = std::chrono::steady_clock::now();
        m.pool.run(m.pool.num_threads(), task);
        std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        best = std::min(best, took.count());
    }
    return best;
}

// Bytes a second that all threads together read from `size` bytes; the best of `repeats`.
double bandwidth(Machine& m, uintptr_t data, int64_t size, int64_t repeats) {
    constexpr int64_t kPiece = 1 << 20;
    std::atomic<uint64_t> sink{0};
    double best = 1e30;
    for (int64_t r = 0; r < repeats; r++) {
        auto begin = std::chrono::steady_clock::now();
        m.pool.run(size / kPiece, [&](int64_t i, int) { sink += m.kernels.read(at<uint8_t>(data) + i * kPiece, kPiece); });
        std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        best = std::min(best, took.count());
    }
    return (double)(size / kPiece * kPiece) / best;
}

// Operations a second (multiply and add counted) of the dot product of a precision, on all threads.
double peak(Machine& m, const std::string& precision) {
    constexpr int64_t kRounds = 4000000;
    Precision p = precision_of(precision);
    double done = 0;
    double took = timed(m, 3, [&](int64_t i, int) {
        double count = m.kernels.peak(p, kRounds);
        if (i == 0) done = count;
    });
    return done * m.pool.num_threads() / took;
}

// Encode a stack of matrices; `scale_2` and `amax` hold a float a matrix, `importance` [matrices, cols].
void encode_nvfp4(Machine& m, int rule, bool half, uintptr_t x, uintptr_t importance, std::array<int64_t, 3> sizes,
                  uintptr_t scale_2, uintptr_t amax, uintptr_t packed, uintptr_t scales) {
    auto [matrices, rows, cols] = sizes;
    constexpr int64_t kRows = 16;  // a task
    int64_t tasks = (rows + kRows - 1) / kRows;
    std::lock_guard turn(m.turn);
    m.pool.run(matrices * tasks, [&, rows = rows, cols = cols](int64_t i, int) {
        int64_t matrix = i / tasks, begin = i % tasks * kRows, from = matrix * rows * cols;
        const float* weights = importance ? at<float>(importance) + matrix * cols : nullptr;
        EncodeTask task{(EncodeRule)rule, half, at<uint8_t>(x) + from * (half ? 2 : 4), weights, cols,
                        at<float>(scale_2)[matrix], at<float>(amax)[matrix], at<uint8_t>(packed) + from / 2,
                        at<uint8_t>(scales) + from / kBlock};
        m.kernels.encode_nvfp4(task, begin, std::min(begin + kRows, rows));
    });
}

// Rows of x, b and c, which are parts of one tensor, lie `row` floats apart.
using SsdInputs = std::array<uintptr_t, 6>;   // x, dt, a, b, c, d
using SsdSizes = std::array<int64_t, 5>;      // heads, groups, head_dim, state_size, chunk_size
SsdTask ssd_task(const SsdInputs& in, std::array<int64_t, 3> rows, const SsdSizes& sizes, uintptr_t states) {
    return {at<float>(in[0]), at<float>(in[3]), at<float>(in[4]), rows[0],  rows[1],  rows[2],
            at<float>(in[1]), at<float>(in[2]), at<float>(in[5]), sizes[0], sizes[1], sizes[2],
            sizes[3],         sizes[4],         at<float>(states), nullptr};
}
void ssd_forward(Machine& m, const Chunks& chunks, const SsdInputs& in, std::array<int64_t, 3> rows,
                 const SsdSizes& sizes, uintptr_t states, uintptr_t y) {
    SsdTask task = ssd_task(in, rows, sizes, states);
    task.y = at<float>(y);
    run_ssd(m, chunks, task);
}
// `out`: gradients of x, dt, a, b, c, d.
void ssd_backward(Machine& m, const Chunks& chunks, const SsdInputs& in, std::array<int64_t, 3> rows,
                  const SsdSizes& sizes, uintptr_t states, uintptr_t grad_y, const SsdInputs& out) {
    SsdTask task = ssd_task(in, rows, sizes, states);
    SsdGradients to{at<float>(grad_y), nullptr,           at<float>(out[0]), at<float>(out[3]),
                    at<float>(out[4]), at<float>(out[1]), at<float>(out[2]), at<float>(out[5])};
    run_ssd_back(m, chunks, task, to);
}

// sizes: heads, kv_heads, head_dim.
FlashTask flash_task(std::array<uintptr_t, 3> qkv, bool half, std::array<int64_t, 3> sizes, uintptr_t out,
                     uintptr_t log_mass) {
    return {at<void>(qkv[0]), at<void>(qkv[1]), at<void>(qkv[2]), half, sizes[0], sizes[1], sizes[2],
            at<void>(out),    at<float>(log_mass)};
}
void flash_forward(Machine& m, const std::vector<int64_t>& lengths, std::array<uintptr_t, 3> qkv, bool half,
                   std::array<int64_t, 3> sizes, uintptr_t out, uintptr_t log_mass) {
    run_flash(m, lengths, flash_task(qkv, half, sizes, out, log_mass));
}
void flash_backward(Machine& m, const std::vector<int64_t>& lengths, std::array<uintptr_t, 3> qkv, bool half,
                    std::array<int64_t, 3> sizes, uintptr_t out, uintptr_t log_mass, uintptr_t grad_out,
                    std::array<uintptr_t, 3> grads) {
    FlashTask task = flash_task(qkv, half, sizes, out, log_mass);
    run_flash_back(m, lengths, task, {at<void>(grad_out), at<void>(grads[0]), nullptr, nullptr}, at<void>(grads[1]),
                   at<void>(grads[2]));
}

// sizes: tokens, channels, kernel, floats between rows of x. `halves` as in the tasks.
ConvTask conv_task(uintptr_t x, bool half, std::array<int64_t, 4> sizes, uintptr_t weight, uintptr_t bias,
                   uintptr_t positions) {
    return {at<void>(x),       sizes[3],        half,        sizes[0], sizes[1], sizes[2], at<float>(weight),
            at<float>(bias), at<int64_t>(positions), nullptr};
}
void conv_forward(Machine& m, uintptr_t x, bool half, std::array<int64_t, 4> sizes, uintptr_t weight, uintptr_t bias,
                  uintptr_t positions, uintptr_t out) {
    ConvTask task = conv_task(x, half, sizes, weight, bias, positions);
    task.out = at<float>(out);
    run_conv(m, task);
}
void conv_backward(Machine& m, uintptr_t x, bool half, std::array<int64_t, 4> sizes, uintptr_t weight, uintptr_t bias,
                   uintptr_t positions, uintptr_t grad_out, std::array<uintptr_t, 3> out) {
    ConvTask task = conv_task(x, half, sizes, weight, bias, positions);
    run_conv_back(m, task, {at<float>(grad_out), at<void>(out[0]), at<float>(out[1]), at<float>(out[2])});
}

// sizes: tokens, size, groups, values between rows of the gate. halves: x, and gate and out.
NormTask norm_task(uintptr_t x, uintptr_t gate, std::array<bool, 2> halves, std::array<int64_t, 4> sizes,
                   uintptr_t weight, float eps, uintptr_t scales) {
    return {at<void>(x), at<void>(gate), sizes[3], halves[0], halves[1], sizes[0], sizes[1], sizes[2],
            at<float>(weight), eps, at<float>(scales), nullptr};
}
void norm_forward(Machine& m, uintptr_t x, uintptr_t gate, std::array<bool, 2> halves, std::array<int64_t, 4> sizes,
                  uintptr_t weight, float eps, uintptr_t scales, uintptr_t out) {
    NormTask task = norm_task(x, gate, halves, sizes, weight, eps, scales);
    task.out = at<void>(out);
    run_norm(m, task);
}
void norm_backward(Machine& m, uintptr_t x, uintptr_t gate, std::array<bool, 2> halves, std::array<int64_t, 4> sizes,
                   uintptr_t weight, float eps, uintptr_t scales, uintptr_t grad_out, std::array<uintptr_t, 3> out) {
    NormTask task = norm_task(x, gate, halves, sizes, weight, eps, scales);
    run_norm_back(m, task, {at<void>(grad_out), at<void>(out[0]), at<void>(out[1])}, at<float>(out[2]));
}

}  // namespace
}  // namespace aprium

NB_MODULE(_kernels, module) {
    using namespace aprium;
    nb::set_leak_warnings(false);
    module.def("supported", &supported);

    nb::class_<Weight>(module, "Weight")
        .def_prop_ro("precision", [](const Weight& w) {
            return w.precision == Precision::int8 ? "int8" : w.precision == Precision::bf16 ? "bfloat16" : "float32";
        });
    module.def("weight", &make_weight, "format"_a, "precision"_a, "data"_a, "scales"_a, "scale"_a, "rows"_a, "cols"_a,
               "bias"_a);

    nb::class_<Step>(module, "Step")
        .def("__init__",
             [](Step* self, std::vector<int64_t> lengths, std::vector<int64_t> starts, std::vector<int64_t> context,
                std::vector<int64_t> slots, std::vector<int64_t> replay, std::vector<int64_t> hold,
                std::vector<std::vector<int64_t>> pages, int64_t page_size) {
                 int64_t tokens = starts.back() + lengths.back();
                 new (self) Step{std::move(lengths), std::move(starts), std::move(context), std::move(slots),
                                 std::move(replay),  std::move(hold),   std::move(pages),   page_size,
                                 tokens};
             });

    nb::class_<Chunks>(module, "Chunks")
        .def(nb::init<const std::vector<int64_t>&, int64_t>(), "lengths"_a, "chunk_size"_a)
        .def_prop_ro("num_states", [](const Chunks& chunks) { return chunks.num_states; });

    nb::class_<Machine>(module, "Machine")
        .def(nb::new_(&make_machine), "isa"_a, "num_threads"_a)
        .def_prop_ro("isa", [](const Machine& m) { return m.kernels.name; })
        .def_prop_ro("num_threads", [](const Machine& m) { return m.pool.num_threads(); })
        .def("take_counters",
             [](Machine& m) {  // since last asked: seconds in kernels, weight bytes, columns, those skipped
                 auto found = std::tuple(m.counters.seconds, m.counters.bytes, m.counters.columns, m.counters.skipped);
                 m.counters = {};
                 return found;
             })
        .def("linear",
             [](Machine& m, const Weight& w, uintptr_t x, int64_t tokens, uintptr_t out) {
                 Clock clock(m);
                 m.linear(w, at<float>(x), tokens, at<float>(out), m.packed[0]);
             }, Release())
        .def("norm",
             [](Machine& m, View weight, float eps, uintptr_t x, int64_t tokens, uintptr_t out) {
                 Clock clock(m);
                 for (int64_t t = 0; t < tokens; t++)
                     m.kernels.rms_norm(at<float>(x) + t * weight.second, at<float>(weight.first), eps, weight.second,
                                        at<float>(out) + t * weight.second);
             }, Release())
        .def("log_softmax_at",
             [](Machine& m, uintptr_t logits, int64_t rows, int64_t size) {
                 std::vector<std::tuple<int64_t, float, float>> found(rows);
                 {
                     nb::gil_scoped_release release;
                     Clock clock(m);
                     m.each(rows, size, [&](int64_t i, int) {
                         auto& [token, top, mass] = found[i];
                         m.kernels.log_softmax_at(at<float>(logits) + i * size, size, &token, &top, &mass);
                     });
                 }
                 return found;
             })
        .def("encode_nvfp4", &encode_nvfp4, Release())
        .def("flash_forward", &flash_forward, Release())
        .def("flash_backward", &flash_backward, Release())
        .def("conv_forward", &conv_forward, Release())
        .def("conv_backward", &conv_backward, Release())
        .def("norm_forward", &norm_forward, Release())
        .def("norm_backward", &norm_backward, Release())
        .def("ssd_forward", &ssd_forward, Release())
        .def("ssd_backward", &ssd_backward, Release())
        .def("bandwidth", &bandwidth, Release())
        .def("peak", &peak, Release());

    nb::class_<Mamba>(module, "Mamba")
        .def("__init__",
             [](Mamba* self, View norm, float eps, const Weight& in_proj, const Weight& out_proj,
                std::array<int64_t, 5> sizes, View conv_weight, View conv_bias, View a, View d, View dt_bias,
                View mixer_norm, float dt_min, float dt_max) {
                 new (self) Mamba{copy(norm), eps, in_proj, out_proj, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4],
                                  copy(conv_weight), copy(conv_bias), copy(a), copy(d), copy(dt_bias), copy(mixer_norm),
                                  dt_min, dt_max};
             });
    nb::class_<Attention>(module, "Attention")
        .def("__init__",
             [](Attention* self, View norm, float eps, const Weight& q, const Weight& k, const Weight& v,
                const Weight& o, std::array<int64_t, 3> sizes, std::array<float, 2> cache_scales) {
                 new (self) Attention{copy(norm), eps, q, k, v, o, sizes[0], sizes[1], sizes[2], cache_scales[0],
                                      cache_scales[1]};
             });
    nb::class_<MlpBlock>(module, "Mlp")
        .def("__init__",
             [](MlpBlock* self, View norm, float eps, const Weight& up, const Weight& down) {
                 new (self) MlpBlock{copy(norm), eps, {up, down}};
             });
    nb::class_<Moe>(module, "Moe")
        .def("__init__",
             [](Moe* self, View norm, float eps, const Weight& gate, View bias, std::array<int64_t, 3> choice,
                bool normalise, float scale, std::vector<const Weight*> up, std::vector<const Weight*> down,
                const Weight& shared_up, const Weight& shared_down, std::optional<Weight> to_latent,
                std::optional<Weight> from_latent) {
                 auto all = [](const std::vector<const Weight*>& from) {
                     std::vector<Weight> to;
                     for (const Weight* w : from) to.push_back(*w);
                     return to;
                 };
                 Router router{gate, copy(bias), choice[0], choice[1], choice[2], normalise, scale};
                 new (self) Moe{copy(norm), eps, std::move(router), all(up), all(down), {shared_up, shared_down},
                                std::move(to_latent), std::move(from_latent)};
             });

    nb::class_<State>(module, "State")
        .def("__init__",
             [](State* self, std::vector<uintptr_t> conv, std::vector<uintptr_t> ssm, std::vector<uintptr_t> ring,
                std::vector<uintptr_t> keys, std::vector<uintptr_t> values, int64_t ring_size,
                const std::string& cache) {
                 if (ring_size > kMostHeld) throw std::invalid_argument("a ring holds at most 18 tokens");
                 new (self) State{std::move(conv), std::move(ssm),   std::move(ring),  std::move(keys),
                                  std::move(values), ring_size, format_of(cache)};
             });
    nb::class_<Program>(module, "Program")
        .def(nb::init<>())
        .def("add",
             [](Program& self, const Mamba& layer, int64_t index) {
                 auto run = [&layer, index](Machine& m, float* x, const Step& step, const State& state) {
                     layer.run(m, x, step, at<float>(state.conv[index]), at<float>(state.ssm[index]),
                               at<float>(state.ring[index]), state.ring_size);
                 };
                 self.layers.push_back({true, run, nullptr});
             }, nb::keep_alive<1, 2>())
        .def("add",
             [](Program& self, const Attention& layer, int64_t index) {
                 auto run = [&layer, index](Machine& m, float* x, const Step& step, const State& state) {
                     layer.run(m, x, step, at<void>(state.keys[index]), at<void>(state.values[index]), state.cache);
                 };
                 auto ask = [&layer, index](Machine& m, const float* x, float* out, const Step& step,
                                            const Step& asking, const State& state) {
                     layer.run(m, x, out, step, asking, at<void>(state.keys[index]), at<void>(state.values[index]),
                               state.cache);
                 };
                 self.layers.push_back({true, run, ask});
             }, nb::keep_alive<1, 2>())
        .def("add",
             [](Program& self, const MlpBlock& layer, int64_t) {
                 auto run = [&layer](Machine& m, float* x, const Step& step, const State&) {
                     layer.run(m, x, step.num_tokens);
                 };
                 self.layers.push_back({false, run, nullptr});
             }, nb::keep_alive<1, 2>())
        .def("add",
             [](Program& self, const Moe& layer, int64_t) {
                 auto run = [&layer](Machine& m, float* x, const Step& step, const State&) {
                     layer.run(m, x, step.num_tokens);
                 };
                 self.layers.push_back({false, run, nullptr});
             }, nb::keep_alive<1, 2>());

    nb::class_<Head>(module, "Head")
        .def("__init__",
             [](Head* self, View embedding_norm, View hidden_norm, View last_norm, float eps, const Weight& join,
                const Program& layers) {
                 new (self) Head{copy(embedding_norm), copy(hidden_norm), copy(last_norm), eps, join, &layers};
             }, nb::keep_alive<1, 7>());

    nb::class_<Model>(module, "Model")
        .def("__init__",
             [](Model* self, const std::string& format, uintptr_t embedding, int64_t rows, int64_t dim, bool halve,
                const Program& backbone, View last_norm, float eps, const Weight& vocabulary) {
                 new (self) Model{{format_of(format), at<uint8_t>(embedding), rows, dim, halve},
                                  &backbone, copy(last_norm), eps, vocabulary, {}};
             }, nb::keep_alive<1, 7>())
        .def("add_head", [](Model& self, const Head& head) { self.heads.push_back(&head); }, nb::keep_alive<1, 2>())
        .def("forward",
             [](const Model& self, Machine& m, uintptr_t tokens, const Step& step, const State& state, uintptr_t out) {
                 Clock clock(m);
                 self.forward(m, at<int64_t>(tokens), step, state, at<float>(out));
             }, Release())
        .def("predict",
             [](const Model& self, Machine& m, uintptr_t hidden, uintptr_t tokens, const Step& step,
                const State& state, int64_t depth, uintptr_t out) {
                 Clock clock(m);
                 self.predict(m, at<float>(hidden), at<int64_t>(tokens), step, state, depth, at<float>(out));
             }, Release())
        .def("draft",
             [](const Model& self, Machine& m, uintptr_t hidden, std::vector<int64_t> rows, std::vector<int64_t> tokens,
                const Step& step, std::vector<int64_t> counts, double least, const State& state) {
                 nb::gil_scoped_release release;
                 Clock clock(m);
                 return self.draft(m, at<float>(hidden),
                                   {std::move(rows), std::move(tokens), &step, std::move(counts), least}, state);
             });
}
