// Python module inverseq._packing: numpy arrays in, numpy arrays out, the GIL released while C++ works.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pack_views.hpp"
#include "plan_packs.hpp"

namespace py = pybind11;

namespace {

using std::int32_t;
using std::int64_t;

// The data of a one-dimensional contiguous array of T; ValueError names the argument otherwise.
template <typename T>
const T* data_of(const py::array& array, const std::string& name) {
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(array) || array.ndim() != 1) {
    throw py::value_error(name + ": expected a contiguous " + std::string(py::str(py::dtype::of<T>())) +
                          " array of one dimension, got " + std::string(py::str(array.dtype())) + " of " +
                          std::to_string(array.ndim()));
  }
  return static_cast<const T*>(array.data());
}

// A vector as an array that owns it, without a copy.
py::array_t<int64_t> to_array(std::vector<int64_t>&& values) {
  auto owned = std::make_unique<std::vector<int64_t>>(std::move(values));
  const int64_t* data = owned->data();
  const auto size = static_cast<py::ssize_t>(owned->size());
  py::capsule owner(owned.get(), [](void* vector) { delete static_cast<std::vector<int64_t>*>(vector); });
  owned.release();
  return py::array_t<int64_t>(size, data, owner);
}

py::tuple plan_arrays(const py::array& lengths, const py::array& step_sizes, int64_t token_budget, int64_t num_ranks,
                      int64_t shared_tokens, double linear_cost, double attention_cost) {
  inverseq::PlanRequest request{};
  request.lengths = data_of<int64_t>(lengths, "lengths");
  request.num_samples = lengths.size();
  request.step_sizes = data_of<int64_t>(step_sizes, "step_sizes");
  request.num_steps = step_sizes.size();
  request.token_budget = token_budget;
  request.num_ranks = num_ranks;
  request.shared_tokens = shared_tokens;
  request.linear_cost = linear_cost;
  request.attention_cost = attention_cost;
  inverseq::PackPlan result;
  {
    py::gil_scoped_release release;
    result = inverseq::plan_packs(request);
  }
  return py::make_tuple(to_array(std::move(result.sample_indices)), to_array(std::move(result.pack_offsets)),
                        to_array(std::move(result.step_offsets)));
}

using RaggedArrays = std::pair<py::array, py::array>;  // ids int32, offsets int64

inverseq::Ragged ragged_of(const RaggedArrays& arrays, const std::string& name) {
  if (arrays.second.size() < 1) throw py::value_error(name + " offsets: expected at least one");
  return {data_of<int32_t>(arrays.first, name + " ids"), arrays.first.size(),
          data_of<int64_t>(arrays.second, name + " offsets"), arrays.second.size() - 1};
}

inverseq::PackRequest request_of(const std::vector<RaggedArrays>& prefixes, const RaggedArrays& prompts,
                                 const RaggedArrays& responses, const py::array& rows, const py::array& sample_numbers,
                                 bool share_prefix, int64_t num_valid_vocab) {
  inverseq::PackRequest request{};
  for (const RaggedArrays& prefix : prefixes) {
    request.prefixes.push_back(ragged_of(prefix, "prefix " + std::to_string(request.prefixes.size())));
  }
  request.prompts = ragged_of(prompts, "prompt");
  request.responses = ragged_of(responses, "response");
  request.rows = data_of<int64_t>(rows, "rows");
  request.sample_numbers = data_of<int64_t>(sample_numbers, "sample_numbers");
  request.num_samples = rows.size();
  if (sample_numbers.size() != rows.size()) throw py::value_error("sample_numbers: expected as many as rows");
  request.share_prefix = share_prefix;
  request.num_valid_vocab = num_valid_vocab;
  return request;
}

py::tuple pack_arrays(const std::vector<RaggedArrays>& prefixes, const RaggedArrays& prompts,
                      const RaggedArrays& responses, const py::array& rows, const py::array& sample_numbers,
                      bool share_prefix, int64_t num_valid_vocab) {
  const inverseq::PackRequest request =
      request_of(prefixes, prompts, responses, rows, sample_numbers, share_prefix, num_valid_vocab);
  inverseq::PackLayout layout;
  {
    py::gil_scoped_release release;
    layout = inverseq::lay_out(request);
  }
  const auto num_views = static_cast<py::ssize_t>(request.prefixes.size());
  py::array_t<int64_t> input_ids(layout.num_tokens), position_ids(layout.num_tokens);
  py::array_t<int32_t> cu_seqlens(layout.num_seqs + 1), parent_seq(layout.num_seqs);
  py::array_t<int64_t> action_index({num_views, static_cast<py::ssize_t>(layout.num_actions)});
  py::array_t<int64_t> token_ids(layout.num_actions), sample_index(layout.num_actions);
  const inverseq::PackArrays out{input_ids.mutable_data(),    position_ids.mutable_data(), cu_seqlens.mutable_data(),
                                 parent_seq.mutable_data(),   action_index.mutable_data(), token_ids.mutable_data(),
                                 sample_index.mutable_data()};
  {
    py::gil_scoped_release release;
    inverseq::write_pack(layout, request.sample_numbers, out);
  }
  return py::make_tuple(input_ids, position_ids, cu_seqlens, layout.max_seqlen, parent_seq, action_index, token_ids,
                        sample_index);
}

std::vector<int64_t> shared_lengths(const std::vector<RaggedArrays>& prefixes, const RaggedArrays& prompts,
                                    const RaggedArrays& responses, const py::array& rows, int64_t num_valid_vocab) {
  const inverseq::PackRequest request =
      request_of(prefixes, prompts, responses, rows, rows, /*share_prefix=*/true, num_valid_vocab);
  py::gil_scoped_release release;
  return inverseq::lay_out(request).shared_lengths;
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
  module.doc() = "The batched prefix packer; see inverseq.packing.";
  module.def("plan", &plan_arrays, py::arg("lengths"), py::kw_only(), py::arg("step_sizes"), py::arg("token_budget"),
             py::arg("num_ranks"), py::arg("shared_tokens"), py::arg("linear_cost"), py::arg("attention_cost"),
             "(sample_indices, pack_offsets, step_offsets), all int64");
  module.def("write", &pack_arrays, py::arg("prefixes"), py::arg("prompts"), py::arg("responses"), py::kw_only(),
             py::arg("rows"), py::arg("sample_numbers"), py::arg("share_prefix"), py::arg("num_valid_vocab"),
             "(input_ids, position_ids, cu_seqlens, max_seqlen, parent_seq, action_index, token_ids, sample_index)");
  module.def("shared_lengths", &shared_lengths, py::arg("prefixes"), py::arg("prompts"), py::arg("responses"),
             py::kw_only(), py::arg("rows"), py::arg("num_valid_vocab"),
             "tokens that all sequences of each view begin with");
}
