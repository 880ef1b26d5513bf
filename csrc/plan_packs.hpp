// Which samples share a pack: best fit decreasing under a token budget, one optimizer step at a time, the packs dealt
// to ranks so that all ranks take the same number of micro-steps and each micro-step lasts equally long on all.
//
// O(n log n). No Python here; input that cannot be planned throws std::invalid_argument.
#pragma once

#include <cstdint>
#include <vector>

namespace inverseq {

constexpr std::int64_t kMaxTokenBudget = std::int64_t{1} << 24;  // planning takes 4 bytes a token of budget
constexpr std::int64_t kMaxRanks = std::int64_t{1} << 16;

struct PlanRequest {
  const std::int64_t* lengths;  // [num_samples] tokens of a sample, all its views together
  std::int64_t num_samples;
  const std::int64_t* step_sizes;  // [num_steps] consecutive samples of each optimizer step
  std::int64_t num_steps;
  std::int64_t token_budget;
  std::int64_t num_ranks;
  std::int64_t shared_tokens;  // counted in every length, but emitted once a pack
  double linear_cost;          // estimated cost of a sample: linear_cost * length + attention_cost * length^2
  double attention_cost;
};

// Pack p holds sample_indices[pack_offsets[p] .. pack_offsets[p + 1]), the longest first. A step's packs stand rank by
// rank, equally many for each rank; a pack without samples is a dummy. A rank's packs are in decreasing order of cost.
struct PackPlan {
  std::vector<std::int64_t> sample_indices;  // [num_samples]
  std::vector<std::int64_t> pack_offsets;    // [num_packs + 1]
  std::vector<std::int64_t> step_offsets;    // [num_steps + 1], first pack of each step
};

PackPlan plan_packs(const PlanRequest& request);

}  // namespace inverseq
