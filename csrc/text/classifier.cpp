// The linear classifier of cs336.data.filter.classifier.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "cpu/text/classifier.h"
#include "cpu/text/parallel.h"
#include "text/bindings.h"
#include "text/strings.h"

namespace cs336::text {
namespace {

constexpr size_t kGroup = 1 << 16;  // characters of the texts that a thread takes at a time

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
std::span<const T> span_of(const Array<T>& array) {
  return {array.data(), static_cast<size_t>(array.size())};
}

py::array_t<float> array_of(std::span<const float> values) {
  return py::array_t<float>(static_cast<py::ssize_t>(values.size()), values.data());
}

// What the sizes of a model must be: the rest is Python's to check.
void check_sizes(const FeatureSpec& spec, size_t num_classes, size_t num_weights) {
  const size_t wanted = (size_t{1} << spec.bucket_bits) * num_classes;
  if (num_weights != wanted) {
    throw py::value_error("expected " + std::to_string(wanted) + " weights, got " + std::to_string(num_weights));
  }
}

Classifier from_int8(const FeatureSpec& spec, const Array<float>& bias, const Array<int8_t>& weights,
                     const Array<float>& scales) {
  check_sizes(spec, static_cast<size_t>(bias.size()), static_cast<size_t>(weights.size()));
  const size_t blocks = (static_cast<size_t>(weights.size()) + Classifier::kBlock - 1) / Classifier::kBlock;
  if (static_cast<size_t>(scales.size()) != blocks) {
    throw py::value_error("expected " + std::to_string(blocks) + " scales, got " + std::to_string(scales.size()));
  }
  return {spec, span_of(bias), span_of(weights), span_of(scales)};
}

py::array_t<float> predict(const Classifier& model, const py::list& texts, size_t num_threads) {
  const Texts all(texts);
  const size_t K = model.num_classes();
  py::array_t<float> out({all.raws().size(), K});
  float* rows = out.mutable_data();
  const std::vector<size_t> ends = all.groups(kGroup);
  const Unlocked unlocked;
  parallel_for(ends.size(), num_threads, [&](size_t g, size_t) {
    Classifier::Scratch scratch(model);
    const size_t begin = g == 0 ? 0 : ends[g - 1];
    Utf8 utf8;
    for (size_t i = begin; i < ends[g]; ++i) {
      model.predict(utf8.assign(all.raws().subspan(i, 1))[0], scratch, rows + i * K);
    }
  });
  return out;
}

void add(ClassifierTrainer& trainer, const py::list& texts, const Array<uint32_t>& labels, size_t num_threads) {
  const Texts all(texts);
  if (static_cast<size_t>(labels.size()) != all.raws().size()) throw py::value_error("expected one label a text");
  const Unlocked unlocked;
  trainer.add(Utf8(all.raws()).views(), span_of(labels), num_threads);
}

std::vector<uint32_t> features_of(const FeatureSpec& spec, py::handle object) {
  const Text text(object);
  std::vector<uint32_t> out;
  FeatureExtractor(spec).extract(text.view(), out);
  return out;
}

}  // namespace

void bind_classifier(py::module_& m) {
  py::class_<FeatureSpec>(m, "FeatureSpec")
      .def(py::init([](uint32_t word_ngrams, uint32_t char_min, uint32_t char_max, uint32_t bucket_bits) {
             return FeatureSpec{word_ngrams, char_min, char_max, bucket_bits};
           }),
           py::arg("word_ngrams"), py::arg("char_min"), py::arg("char_max"), py::arg("bucket_bits"))
      .def("features", &features_of, py::arg("text"), "The buckets of a text's features.");
  py::class_<Classifier> classifier(m, "Classifier");
  classifier.attr("BLOCK") = Classifier::kBlock;
  classifier
      .def(py::init([](const FeatureSpec& spec, const Array<float>& bias, const Array<float>& weights) {
             check_sizes(spec, static_cast<size_t>(bias.size()), static_cast<size_t>(weights.size()));
             return Classifier(spec, span_of(bias), span_of(weights));
           }),
           py::arg("spec"), py::arg("bias"), py::arg("weights").noconvert())
      .def(py::init(&from_int8), py::arg("spec"), py::arg("bias"), py::arg("weights").noconvert(), py::arg("scales"))
      .def("predict", &predict, py::arg("texts"), py::arg("num_threads"));
  py::class_<ClassifierTrainer>(m, "ClassifierTrainer")
      .def(py::init<const FeatureSpec&>(), py::arg("spec"))
      .def("add", &add, py::arg("texts"), py::arg("labels"), py::arg("num_threads"))
      .def(
          "fit",
          [](ClassifierTrainer& trainer, size_t num_classes, size_t epochs, float learning_rate, uint64_t seed,
             size_t num_threads) {
            const Unlocked unlocked;
            trainer.fit({num_classes, epochs, num_threads, learning_rate, seed});
          },
          py::arg("num_classes"), py::arg("epochs"), py::arg("learning_rate"), py::arg("seed"), py::arg("num_threads"))
      .def("bias", [](const ClassifierTrainer& trainer) { return array_of(trainer.bias()); })
      .def("weights", [](const ClassifierTrainer& trainer) { return array_of(trainer.weights()); });
}

}  // namespace cs336::text
