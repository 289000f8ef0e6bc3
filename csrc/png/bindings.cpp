// What Python sees; see tarflow_fast/data/png.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "png.h"

namespace py = pybind11;
using namespace tarflow;

namespace {

// Reads file i to out + i · height · width · channels, and returns of which files the pixels are there. out: an address.
std::vector<bool> read_pngs(const std::vector<std::string>& paths, int64_t height, int64_t width, int64_t channels,
                            uintptr_t out) {
  const Pixels wanted{height, width, channels};
  PngReader reader(wanted);
  std::vector<bool> done;
  for (const auto& path : paths) {
    done.push_back(reader.read(path, reinterpret_cast<uint8_t*>(out)));
    out += wanted.bytes();
  }
  return done;
}

}  // namespace

PYBIND11_MODULE(_png, m) {
  m.doc() = "Plain PNGs as pixels; see tarflow_fast/data/png.py.";
  using py::arg;
  m.def("read", &read_pngs, py::kw_only(), arg("paths"), arg("height"), arg("width"), arg("channels"), arg("out"),
        py::call_guard<py::gil_scoped_release>());
}
