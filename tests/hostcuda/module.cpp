// The recurrence of csrc/cuda for Python, on arrays of the host: they are copied to device memory, the pass runs there,
// and the results are copied back.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <optional>

#include "cuda/cuda.h"
#include "cuda/places.h"
#include "device_memory.h"
#include "shim.h"

namespace {

namespace py = pybind11;
using namespace fusedrnn;
using Arrays = std::map<std::string, py::array>;

template <class T>
auto value(T x) {
  return x;
}
struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};
float value(Half x) { return shim::from_float16(x.bits); }
float value(Brain x) { return shim::from_bfloat16(x.bits); }
void set(Half& to, float x) { to.bits = shim::to_float16(x); }
void set(Brain& to, float x) { to.bits = shim::to_bfloat16(x); }
void set(float& to, float x) { to = x; }
void set(double& to, double x) { to = x; }

// Products by plain loops over watched memory.
class Loops : public cuda::Blas {
 public:
  void multiply(const cuda::Product& p) override {
    const int64_t enqueued = shim::enqueued;
    run(p);
    shim::enqueued = enqueued + 1;
  }

 private:
  void run(const cuda::Product& p) {
    using cuda::Element;
    if (p.in == Element::float64) return run<double, double>(p);
    if (p.in == Element::float32) return run<float, float>(p);
    if (p.in == Element::float16) return p.out == p.in ? run<Half, Half>(p) : run<Half, float>(p);
    return p.out == p.in ? run<Brain, Brain>(p) : run<Brain, float>(p);
  }

  template <class In, class Out>
  void run(const cuda::Product& p) {
    using A = decltype(value(Out()));
    for (int i = 0; i < p.count; ++i) {
      const auto a = matrix<In>(p.a, i, p.rows, p.inner), b = matrix<In>(p.b, i, p.inner, p.columns);
      for (int64_t row = 0; row < p.rows; ++row) {
        std::vector<Out> c(p.columns);
        Out* const at = static_cast<Out*>(p.c) + i * p.stride_c + row * p.ldc;
        const size_t bytes = p.columns * sizeof(Out);
        if (p.accumulate) cudaMemcpyAsync(c.data(), at, bytes, cudaMemcpyDeviceToDevice, nullptr);
        for (int64_t column = 0; column < p.columns; ++column) {
          A parts[8] = {};  // several running sums, as the tiles of a real product have
          for (int64_t k = 0; k < p.inner; ++k) parts[k % 8] += A(a[row * p.inner + k]) * A(b[k * p.columns + column]);
          const A sum =
              ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
          set(c[column], p.accumulate ? value(c[column]) + sum : sum);
        }
        cudaMemcpyAsync(at, c.data(), bytes, cudaMemcpyDeviceToDevice, nullptr);
      }
    }
  }

  // As it is multiplied, row by row.
  template <class In>
  static auto matrix(const cuda::Factor& f, int i, int64_t rows, int64_t columns) {
    std::vector<decltype(value(In()))> dense(rows * columns);
    const int64_t lines = f.transposed ? columns : rows, length = f.transposed ? rows : columns;
    std::vector<In> line(length);
    for (int64_t y = 0; y < lines; ++y) {
      const In* const from = static_cast<const In*>(f.data) + i * f.stride + y * f.ld;
      cudaMemcpyAsync(line.data(), from, length * sizeof(In), cudaMemcpyDeviceToDevice, nullptr);
      for (int64_t x = 0; x < length; ++x) dense[f.transposed ? x * columns + y : y * columns + x] = value(line[x]);
    }
    return dense;
  }
};

struct Sizes {
  int cell, scalar;
  int64_t T, B, I, H;
  int directions;
  int64_t chunk_bytes;
  int multiprocessors, largest_cluster, active_blocks;
  unsigned schedules;  // besides the step schedule
  bool shifted;        // whether arrays begin an element after an aligned address
};

// A problem's arrays in device memory, by the names that the params have.
class Device {
 public:
  Device(const Sizes& sizes, uint64_t seed, const Arrays& inputs, Arrays& outputs) : outputs_(outputs) {
    shim::reset(seed);
    const auto allocate = [&](const std::string& name, const py::array& array) {
      const size_t before = sizes.shifted ? array.itemsize() : 0;
      at_[name] = static_cast<char*>(shim::allocate(before + array.nbytes(), name)) + before;
    };
    for (const auto& [name, array] : inputs) {
      allocate(name, array);
      shim::upload(at_[name], array.data(), array.nbytes());
    }
    for (const auto& [name, array] : outputs) allocate(name, array);
  }

  void* operator[](const std::string& name) const {
    const auto found = at_.find(name);
    return found == at_.end() ? nullptr : found->second;
  }

  // Copies the results to the host. Returns what went wrong, and the names of results that are not whole.
  std::pair<std::string, std::vector<std::string>> finish() {
    std::vector<std::string> not_whole;
    for (auto& [name, array] : outputs_)
      if (shim::download(array.mutable_data(), at_[name], array.nbytes())) not_whole.push_back(name);
    return {shim::error(), not_whole};
  }

 private:
  std::map<std::string, void*> at_;
  Arrays& outputs_;
};

// Of an H100, but for what is given.
cuda::Limits limits(const Sizes& s) {
  shim::active_blocks = s.active_blocks;
  return {s.multiprocessors, 227 << 10, s.largest_cluster, s.schedules};
}

void set_problem(Problem& p, const Sizes& s, const std::optional<std::vector<int64_t>>& offsets, const Device& device) {
  p.cell = static_cast<CellKind>(s.cell);
  p.scalar = static_cast<ScalarKind>(s.scalar);
  p.sequence = {s.T, s.B, offsets ? offsets->data() : nullptr, static_cast<int64_t*>(device["lengths"]),
                static_cast<bool*>(device["resets"])};
  p.I = s.I;
  p.H = s.H;
  p.directions = s.directions;
  for (int d = 0; d < s.directions; ++d) {
    const std::string suffix = std::to_string(d);
    p.weights[d] = {device["w_ih" + suffix], device["w_hh" + suffix], device["b_ih" + suffix], device["b_hh" + suffix]};
  }
}

template <class Params>
auto run(void (*pass)(const Params&, const cuda::Context&), const Params& p, bool backward, const Sizes& sizes,
         bool tf32, Device& device) {
  Loops loops;
  cuda::Context context{nullptr, &loops, nullptr, limits(sizes), tf32, sizes.chunk_bytes};
  context.workspace = shim::allocate_workspace(cuda::workspace_bytes(p, backward, context));
  pass(p, context);
  return device.finish();
}

std::string schedule(const Sizes& s, bool tf32, bool backward) {
  Problem p{};
  p.cell = static_cast<CellKind>(s.cell);
  p.scalar = static_cast<ScalarKind>(s.scalar);
  p.sequence.T = s.T;
  p.sequence.B = s.B;
  p.I = s.I;
  p.H = s.H;
  p.directions = s.directions;
  return cuda::schedule(p, limits(s), tf32, backward);
}

// Blocks along x, y and z, and threads of one along x and y.
std::array<int64_t, 5> geometry(int64_t rows, int64_t units, int width, int directions) {
  const cuda::Geometry g = cuda::elementwise_geometry(rows, units, width, directions);
  return {g.grid_x, g.grid_y, g.grid_z, g.block_x, g.block_y};
}

// The steps of a chunk of a padded batch: the end of one that begins at a step, and the begin of one that ends there.
std::array<int64_t, 2> chunks_at(int64_t T, int64_t B, int64_t step, int64_t capacity) {
  const Sequence sequence{T, B, nullptr, nullptr, nullptr};
  return {cuda::chunk_from(sequence, 2, step, capacity).end, cuda::chunk_up_to(sequence, 2, step, capacity).begin};
}

// Rows, threads and bytes of shared memory of the block schedule, with float32 accumulators.
std::array<int, 3> block_plan(int multiprocessors, int64_t B, int64_t H, int directions, int gates, bool has_cell,
                              int scalar_bytes) {
  const cuda::Limits limits{multiprocessors, 227 << 10, 16, cuda::all_schedules};
  const cuda::BlockPlan plan = cuda::block_plan(limits, cuda::fewest_resident_steps, B, H, directions, gates, has_cell,
                                                scalar_bytes, sizeof(float));
  return {plan.rows, plan.threads, plan.shared_bytes};
}

// What tuning.h chooses for a cluster (0), a grid whose products are split (1) or a grid (2), by name.
std::map<std::string, int> resident_plan(int multiprocessors, int team, int64_t B, int64_t H, int directions, int gates,
                                         bool backward, bool has_cell, int scalar_bytes, int largest_cluster) {
  const cuda::Limits limits{multiprocessors, 227 << 10, largest_cluster, cuda::all_schedules};
  const cuda::ResidentPlan plan =
      cuda::resident_plan(limits, static_cast<cuda::Team>(team), cuda::fewest_resident_steps, B, H, directions, gates,
                          backward, has_cell, scalar_bytes);
  if (!plan.blocks) return {};
  const cuda::ResidentLayout layout = cuda::resident_layout(plan, gates, backward, has_cell, scalar_bytes);
  return {{"blocks", plan.blocks},
          {"units", plan.units},
          {"rows", plan.rows},
          {"tiles", plan.tiles},
          {"teams", plan.teams},
          {"shared_bytes", plan.shared_bytes},
          {"parts", layout.parts},
          {"part_groups", layout.part_groups},
          {"split", plan.split},
          {"slot_groups", layout.slot_groups},
          {"cycles", static_cast<int>(plan.cycles)},
          {"halved_tiles", layout.halved_tiles},
          {"half_groups", layout.half_groups},
          {"slot_tiles", layout.slot_tiles},
          {"compact", cuda::is_compact(plan, layout)}};
}

auto forward(uint64_t seed, const Sizes& sizes, bool tf32, const std::optional<std::vector<int64_t>>& offsets,
             const Arrays& inputs, Arrays outputs) {
  Device device(sizes, seed, inputs, outputs);
  ForwardParams p{};
  set_problem(p, sizes, offsets, device);
  p.x = device["x"], p.hx = device["hx"], p.cx = device["cx"];
  p.y = device["y"], p.h_n = device["h_n"], p.c_n = device["c_n"], p.gates = device["gates"], p.cells = device["cells"];
  return run(&cuda::forward, p, false, sizes, tf32, device);
}

auto backward(uint64_t seed, const Sizes& sizes, bool tf32, const std::optional<std::vector<int64_t>>& offsets,
              const Arrays& inputs, Arrays outputs) {
  Device device(sizes, seed, inputs, outputs);
  BackwardParams p{};
  set_problem(p, sizes, offsets, device);
  p.x = device["x"], p.y = device["y"], p.hx = device["hx"], p.cx = device["cx"];
  p.gates = device["gates"], p.cells = device["cells"];
  p.dy = device["dy"], p.dh_n = device["dh_n"], p.dc_n = device["dc_n"], p.dcells = device["dcells"];
  p.dx = device["dx"], p.dhx = device["dhx"], p.dcx = device["dcx"];
  for (int d = 0; d < p.directions; ++d) {
    const std::string suffix = std::to_string(d);
    p.gradients[d] = {device["dw_ih" + suffix], device["dw_hh" + suffix], device["db_ih" + suffix],
                      device["db_hh" + suffix]};
  }
  return run(&cuda::backward, p, true, sizes, tf32, device);
}

}  // namespace

PYBIND11_MODULE(hostcuda, m) {
  py::class_<Sizes>(m, "Sizes", py::module_local())
      .def(py::init<int, int, int64_t, int64_t, int64_t, int64_t, int, int64_t, int, int, int, unsigned, bool>(),
           py::arg("cell"), py::arg("scalar"), py::arg("T"), py::arg("B"), py::arg("I"), py::arg("H"),
           py::arg("directions"), py::arg("chunk_bytes"), py::arg("multiprocessors"), py::arg("largest_cluster"),
           py::arg("active_blocks"), py::arg("schedules"), py::arg("shifted"));
  m.def("enqueued", [] { return shim::enqueued; });
  m.def("schedule", &schedule);
  m.def("vector_width", &cuda::vector_width);
  m.def("geometry", &geometry);
  m.def("chunks_at", &chunks_at);
  m.def("block_plan", &block_plan);
  m.def("resident_plan", &resident_plan, py::arg("multiprocessors"), py::arg("team"), py::arg("B"), py::arg("H"),
        py::arg("directions"), py::arg("gates"), py::arg("backward"), py::arg("has_cell"), py::arg("scalar_bytes"),
        py::arg("largest_cluster") = 16);
  m.def("forward", &forward);
  m.def("backward", &backward);
}
