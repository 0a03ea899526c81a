// Index builders of the training data: the loops that are too slow in Python.
//
// Every function releases the interpreter lock while it works, and checks its arguments first: a wrong dtype, shape or
// value is a ValueError, never a crash. The orders produced here are those of Megatron's data helpers, sample for sample.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

// The greedy blend compares rounded products. A fused multiply-add would round once less and pick another dataset on a tie.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace py = pybind11;

namespace {

// Documents looked up ahead of the walk: their lengths lie scattered in memory when the documents are shuffled.
constexpr int64_t kLookAhead = 24;

[[noreturn]] void refuse(const std::string& message) { throw py::value_error(message); }

template <typename T>
const T* checked(const py::array& array, const char* name) {
    if (!py::isinstance<py::array_t<T>>(array)) {
        refuse(std::string(name) + " must be " + std::string(py::str(py::dtype::of<T>())) + ", not " +
               std::string(py::str(array.dtype())));
    }
    if (array.ndim() != 1) {
        refuse(std::string(name) + " must have one dimension, not " + std::to_string(array.ndim()));
    }
    const int wanted = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if ((array.flags() & wanted) != wanted) {
        refuse(std::string(name) + " must be contiguous and aligned: pass a copy");
    }
    return static_cast<const T*>(array.data());
}

// The array takes over the buffer; nothing is copied.
template <typename T>
py::array_t<T> give_away(std::unique_ptr<T[]> buffer, std::vector<py::ssize_t> shape) {
    T* data = buffer.release();
    py::capsule owner(data, [](void* memory) { delete[] static_cast<T*>(memory); });
    return py::array_t<T>(std::move(shape), data, owner);
}

struct Walk {
    const int32_t* lengths;
    int64_t num_lengths;
    const int32_t* documents;
    int64_t num_documents;
    int64_t seq_length;
    int64_t extra;
    int64_t num_samples;
    bool last_is_partial;
};

// Writes num_samples + 1 rows (position in `documents`, token offset in that document). A sample takes seq_length + extra
// tokens and the next one starts seq_length tokens after it.
template <typename T>
const char* walk_documents(const Walk& walk, T* rows) {
    int64_t position = 0;
    int64_t offset = 0;
    rows[0] = 0;
    rows[1] = 0;
    for (int64_t sample = 1; sample <= walk.num_samples; ++sample) {
        int64_t remaining = walk.seq_length + walk.extra;
        while (true) {
            if (position >= walk.num_documents) {
                return "the documents end before the last sample: num_epochs * tokens_per_epoch is not their length";
            }
            if (position + kLookAhead < walk.num_documents) {
                const uint32_t ahead = static_cast<uint32_t>(walk.documents[position + kLookAhead]);
                if (ahead < static_cast<uint64_t>(walk.num_lengths)) {
                    __builtin_prefetch(walk.lengths + ahead);
                }
            }
            const int64_t document = walk.documents[position];
            if (document < 0 || document >= walk.num_lengths) {
                return "document_idx names a document outside of sizes";
            }
            const int64_t length = walk.lengths[document];
            if (length < 0) {
                return "sizes holds a negative length";
            }
            const int64_t available = length - offset;
            if (available >= remaining) {
                offset += remaining - walk.extra;
                break;
            }
            remaining -= available;
            if (position + 1 == walk.num_documents && walk.last_is_partial && sample == walk.num_samples) {
                // The row names the last token there is; empty documents after it have none.
                while (position > 0 && walk.lengths[walk.documents[position]] == 0) --position;
                offset = walk.lengths[walk.documents[position]] - walk.extra;
                break;
            }
            ++position;
            offset = 0;
        }
        rows[2 * sample] = static_cast<T>(position);
        rows[2 * sample + 1] = static_cast<T>(offset);
    }
    return nullptr;
}

template <typename T>
py::array_t<T> build_sample_idx(const py::array& sizes, const py::array& document_idx, int64_t seq_length,
                                int64_t num_epochs, int64_t tokens_per_epoch, bool drop_last, int64_t add_extra) {
    Walk walk{};
    walk.lengths = checked<int32_t>(sizes, "sizes");
    walk.num_lengths = sizes.shape(0);
    walk.documents = checked<int32_t>(document_idx, "document_idx");
    walk.num_documents = document_idx.shape(0);
    if (seq_length < 1) refuse("seq_length must be at least 1, not " + std::to_string(seq_length));
    if (num_epochs < 1) refuse("num_epochs must be at least 1, not " + std::to_string(num_epochs));
    if (tokens_per_epoch < 1) refuse("tokens_per_epoch must be at least 1, not " + std::to_string(tokens_per_epoch));
    if (add_extra != 0 && add_extra != 1) refuse("add_extra must be 0 or 1, not " + std::to_string(add_extra));
    if (num_epochs > std::numeric_limits<int64_t>::max() / tokens_per_epoch) refuse("too many tokens for 64 bits");
    if (walk.num_documents > std::numeric_limits<T>::max()) refuse("document_idx is too long for this index width");
    const int64_t tokens = num_epochs * tokens_per_epoch - add_extra;
    walk.seq_length = seq_length;
    walk.extra = add_extra;
    walk.num_samples = tokens / seq_length;
    walk.last_is_partial = !drop_last && tokens % seq_length != 0;
    if (walk.last_is_partial) ++walk.num_samples;

    std::unique_ptr<T[]> rows(new T[2 * (walk.num_samples + 1)]);
    const char* problem = nullptr;
    {
        py::gil_scoped_release release;
        problem = walk_documents<T>(walk, rows.get());
    }
    if (problem != nullptr) refuse(problem);
    return give_away<T>(std::move(rows), {static_cast<py::ssize_t>(walk.num_samples + 1), 2});
}

// One step of the greedy blend: the dataset that lags most behind its share. The first one wins a tie.
struct Blend {
    std::vector<double> weights;
    std::vector<double> counts;   // integers; as doubles the comparison needs no conversion
    std::vector<int16_t> names;   // dataset number of each entry

    int64_t laggard(int64_t sample) const {
        const double position = std::max(static_cast<double>(sample), 1.0);
        const int64_t n = static_cast<int64_t>(weights.size());
        int64_t best = 0;
        double best_error = weights[0] * position - counts[0];
        for (int64_t i = 1; i < n; ++i) {
            const double error = weights[i] * position - counts[i];
            if (error > best_error) {
                best_error = error;
                best = i;
            }
        }
        return best;
    }

    void remove(int64_t entry) {
        weights.erase(weights.begin() + entry);
        counts.erase(counts.begin() + entry);
        names.erase(names.begin() + entry);
    }
};

Blend start_blend(std::vector<double> weights) {
    Blend blend;
    blend.weights = std::move(weights);
    blend.counts.assign(blend.weights.size(), 0.0);
    for (size_t i = 0; i < blend.weights.size(); ++i) blend.names.push_back(static_cast<int16_t>(i));
    return blend;
}

void check_number_of_datasets(int64_t number) {
    if (number < 1 || number >= std::numeric_limits<int16_t>::max()) {
        refuse("a blend takes 1 to 32766 datasets, not " + std::to_string(number));
    }
}

py::tuple build_blending_indices(const py::array& weights, int64_t size) {
    const double* values = checked<double>(weights, "weights");
    const int64_t number = weights.shape(0);
    check_number_of_datasets(number);
    if (size < 0) refuse("size must not be negative, not " + std::to_string(size));
    double total = 0;
    for (int64_t i = 0; i < number; ++i) {
        if (!(values[i] > 0) || values[i] > std::numeric_limits<double>::max()) {
            refuse("weight " + std::to_string(i) + " must be positive and finite, not " + std::to_string(values[i]));
        }
        total += values[i];
    }
    if (total < 1 - 1e-6 || total > 1 + 1e-6) refuse("weights must sum to 1, not " + std::to_string(total));

    std::unique_ptr<int16_t[]> datasets(new int16_t[size]);
    std::unique_ptr<int64_t[]> samples(new int64_t[size]);
    {
        py::gil_scoped_release release;
        Blend blend = start_blend({values, values + number});
        for (int64_t sample = 0; sample < size; ++sample) {
            const int64_t chosen = blend.laggard(sample);
            datasets[sample] = static_cast<int16_t>(chosen);
            samples[sample] = static_cast<int64_t>(blend.counts[chosen]);
            blend.counts[chosen] += 1.0;
        }
    }
    return py::make_tuple(give_away<int16_t>(std::move(datasets), {static_cast<py::ssize_t>(size)}),
                          give_away<int64_t>(std::move(samples), {static_cast<py::ssize_t>(size)}));
}

py::tuple build_exhaustive_blending_indices(const py::array& sizes) {
    const int64_t* values = checked<int64_t>(sizes, "sizes");
    const int64_t number = sizes.shape(0);
    check_number_of_datasets(number);
    int64_t total = 0;
    for (int64_t i = 0; i < number; ++i) {
        if (values[i] < 1) refuse("size " + std::to_string(i) + " must be positive, not " + std::to_string(values[i]));
        total += values[i];
        if (total > (int64_t{1} << 52)) refuse("the sizes sum to more than a double can count");
    }

    std::unique_ptr<int16_t[]> datasets(new int16_t[total]);
    std::unique_ptr<int64_t[]> samples(new int64_t[total]);
    {
        py::gil_scoped_release release;
        std::vector<double> weights(number);
        for (int64_t i = 0; i < number; ++i) weights[i] = static_cast<double>(values[i]) / static_cast<double>(total);
        Blend blend = start_blend(std::move(weights));
        for (int64_t sample = 0; sample < total; ++sample) {
            const int64_t chosen = blend.laggard(sample);
            const int16_t name = blend.names[chosen];
            datasets[sample] = name;
            samples[sample] = static_cast<int64_t>(blend.counts[chosen]);
            blend.counts[chosen] += 1.0;
            if (samples[sample] + 1 == values[name]) blend.remove(chosen);
        }
    }
    return py::make_tuple(give_away<int16_t>(std::move(datasets), {static_cast<py::ssize_t>(total)}),
                          give_away<int64_t>(std::move(samples), {static_cast<py::ssize_t>(total)}));
}

// The Mersenne Twister behind numpy's RandomState, continued from its state.
class Twister {
public:
    Twister(uint32_t* key, int64_t position) : key_(key), position_(position) {}

    int64_t position() const { return position_; }

    uint32_t next32() {
        if (position_ >= kSize) refill();
        uint32_t y = key_[position_++];
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c5680u;
        y ^= (y << 15) & 0xefc60000u;
        return y ^ (y >> 18);
    }

    // Uniform in [0, highest], drawn as numpy's legacy generator does: masked bits, again while too high.
    uint64_t below_or_equal(uint64_t highest) {
        uint64_t mask = highest;
        for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
        while (true) {
            uint64_t value = next32();
            if (highest > 0xffffffffu) value = (value << 32) | next32();
            value &= mask;
            if (value <= highest) return value;
        }
    }

    static constexpr int64_t kSize = 624;

private:
    static uint32_t twist(uint32_t upper, uint32_t lower) {
        const uint32_t y = (upper & 0x80000000u) | (lower & 0x7fffffffu);
        return (y >> 1) ^ ((y & 1u) ? 0x9908b0dfu : 0u);
    }

    void refill() {
        for (int64_t i = 0; i < kSize; ++i) {
            key_[i] = key_[(i + 397) % kSize] ^ twist(key_[i], key_[(i + 1) % kSize]);
        }
        position_ = 0;
    }

    uint32_t* key_;
    int64_t position_;
};

// Fisher-Yates from the end. The partners are drawn in blocks so that their cache lines can be fetched in advance.
template <typename T>
void shuffle_values(T* values, int64_t size, Twister& twister) {
    constexpr int64_t kBlock = 256;
    uint64_t partners[kBlock];
    for (int64_t last = size - 1; last > 0; last -= kBlock) {
        const int64_t count = std::min(kBlock, last);
        for (int64_t k = 0; k < count; ++k) {
            partners[k] = twister.below_or_equal(static_cast<uint64_t>(last - k));
            __builtin_prefetch(values + partners[k], 1);
        }
        for (int64_t k = 0; k < count; ++k) std::swap(values[last - k], values[partners[k]]);
    }
}

int64_t shuffle(py::array values, py::array_t<uint32_t> key, int64_t position) {
    const bool narrow = py::isinstance<py::array_t<int32_t>>(values) || py::isinstance<py::array_t<uint32_t>>(values);
    if (!narrow && !py::isinstance<py::array_t<int64_t>>(values)) refuse("values must be int32, uint32 or int64");
    const int wanted = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
    if (values.ndim() != 1 || (values.flags() & wanted) != wanted) {
        refuse("values must have one dimension and be contiguous and aligned");
    }
    if (key.ndim() != 1 || key.shape(0) != Twister::kSize || (key.flags() & wanted) != wanted) {
        refuse("key must hold the 624 words of a Mersenne Twister");
    }
    if (position < 0 || position > Twister::kSize) refuse("position must be 0 to 624");
    void* data = values.mutable_data();
    Twister twister(key.mutable_data(), position);
    const int64_t size = values.shape(0);
    {
        py::gil_scoped_release release;
        if (narrow) {
            shuffle_values(static_cast<uint32_t*>(data), size, twister);
        } else {
            shuffle_values(static_cast<uint64_t*>(data), size, twister);
        }
    }
    return twister.position();
}

}  // namespace

PYBIND11_MODULE(_index_builder, module) {
    module.doc() = "Index builders of the training data, in C++.";
    const char* walk_doc =
        "Rows [samples + 1, 2]: where in document_idx each sample starts, and its token offset in that document.\n\n"
        "sizes int32 [documents], document_idx int32 [num_epochs * documents]. A sample is seq_length + add_extra\n"
        "tokens long; the next one starts seq_length tokens later. drop_last leaves out a last sample that is shorter.";
    module.def("build_sample_idx_int32", &build_sample_idx<int32_t>, py::arg("sizes"), py::arg("document_idx"),
               py::arg("seq_length"), py::arg("num_epochs"), py::arg("tokens_per_epoch"), py::arg("drop_last") = true,
               py::arg("add_extra") = 1, walk_doc);
    module.def("build_sample_idx_int64", &build_sample_idx<int64_t>, py::arg("sizes"), py::arg("document_idx"),
               py::arg("seq_length"), py::arg("num_epochs"), py::arg("tokens_per_epoch"), py::arg("drop_last") = true,
               py::arg("add_extra") = 1, walk_doc);
    module.def("build_blending_indices", &build_blending_indices, py::arg("weights"), py::arg("size"),
               "(dataset int16 [size], sample int64 [size]): greedy, every prefix is as near to the weights as it can be.\n\n"
               "weights float64 [datasets], positive, summing to 1.");
    module.def("build_exhaustive_blending_indices", &build_exhaustive_blending_indices, py::arg("sizes"),
               "(dataset int16, sample int64): every sample of every dataset once, mixed in proportion to the sizes.\n\n"
               "sizes int64 [datasets], positive.");
    module.def("shuffle", &shuffle, py::arg("values").noconvert(), py::arg("key").noconvert(), py::arg("position"),
               "Shuffle values in place as numpy.random.RandomState.shuffle does; returns the new position.\n\n"
               "values [n] int32, uint32 or int64; key uint32 [624] and position are the state, key changes in place.");
}
