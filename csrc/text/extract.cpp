// Pages to text for cs336.data.extract.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "cpu/text/content.h"
#include "cpu/text/html_render.h"
#include "text/bindings.h"
#include "text/strings.h"

namespace cs336::text {
namespace {

py::str html_to_text(py::handle html, bool main, bool markdown) {
  const Text text(html);
  std::string rendered;
  {
    const py::gil_scoped_release release;
    const Page page = parse_html(text.view());
    rendered = render(page, main ? main_content(page) : visible_blocks(page), markdown);
  }
  return str_of(rendered);
}

py::array_t<float> to_array(const Features& features, size_t rows) {
  return py::array_t<float>({rows, features.width}, features.values.data());
}

// What make_content_weights.py learns from.
class ContentPage {
 public:
  explicit ContentPage(const std::string& html) : html_(html), page_(parse_html(html_)) {}

  std::vector<std::string> texts() const {
    std::vector<std::string> texts;
    for (const Block& block : page_.blocks) texts.push_back(block_text(page_, block));
    return texts;
  }
  // Of each block: the words of the class and id of it and of all above it.
  std::vector<std::vector<std::string>> hints() const {
    std::vector<std::vector<std::string>> all;
    for (const Block& block : page_.blocks) {
      std::vector<std::string>& words = all.emplace_back();
      for (uint32_t e = block.element; e != kNone; e = page_.elements[e].parent) {
        for (std::string& word : hint_words(page_.elements[e])) words.push_back(std::move(word));
      }
    }
    return all;
  }
  py::array_t<float> features(const HintWeights& hints) const {
    return to_array(block_features(page_, hints), page_.blocks.size());
  }
  py::array_t<float> context(const std::vector<float>& scores) const {
    return to_array(context_features(page_, scores), page_.blocks.size());
  }

 private:
  std::string html_;
  Page page_;
};

}  // namespace

void bind_extract(py::module_& m) {
  m.def("html_to_text", &html_to_text, py::arg("html"), py::arg("main"), py::arg("markdown"));
  py::class_<ContentPage>(m, "ContentPage")
      .def(py::init<const std::string&>(), py::arg("html"))
      .def("texts", &ContentPage::texts)
      .def("hints", &ContentPage::hints)
      .def("features", &ContentPage::features, py::arg("hints"))
      .def("context", &ContentPage::context, py::arg("scores"));
}

}  // namespace cs336::text
