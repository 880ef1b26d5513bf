#include "plan_packs.hpp"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace inverseq {
namespace {

using std::int32_t;
using std::int64_t;
using std::uint32_t;
using std::uint64_t;
using std::to_string;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void require_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    refuse(std::string(name) + "=" + to_string(value) + ": expected " + to_string(low) + " to " + to_string(high));
  }
}

// Open packs by the room they have left. A 64-ary tree of bits finds the smallest sufficient room in
// log64(token_budget) steps; packs of equal room form a stack.
class RoomIndex {
 public:
  RoomIndex(int64_t max_room, int64_t max_packs)
      : head_(static_cast<size_t>(max_room) + 1, -1), next_(static_cast<size_t>(max_packs), -1) {
    for (uint64_t bits = head_.size(); ; bits = levels_.back().size()) {
      levels_.emplace_back((bits + 63) / 64, 0);
      if (levels_.back().size() == 1) break;
    }
  }

  void put(int64_t room, int32_t pack) {
    const size_t r = static_cast<size_t>(room);
    next_[static_cast<size_t>(pack)] = head_[r];
    if (head_[r] < 0) set(r);
    head_[r] = pack;
  }

  // Takes out the pack with the least room that is at least `room`; -1 when there is none.
  int32_t take_best(int64_t room) {
    const int64_t found = find(static_cast<uint64_t>(room));
    if (found < 0) return -1;
    const size_t r = static_cast<size_t>(found);
    const int32_t pack = head_[r];
    head_[r] = next_[static_cast<size_t>(pack)];
    if (head_[r] < 0) clear(r);
    return pack;
  }

  void forget(int64_t room) {
    const size_t r = static_cast<size_t>(room);
    if (head_[r] < 0) return;
    head_[r] = -1;
    clear(r);
  }

 private:
  void set(uint64_t i) {
    for (auto& level : levels_) {
      const bool was_empty = level[i >> 6] == 0;
      level[i >> 6] |= uint64_t{1} << (i & 63);
      if (!was_empty) return;
      i >>= 6;
    }
  }

  void clear(uint64_t i) {
    for (auto& level : levels_) {
      level[i >> 6] &= ~(uint64_t{1} << (i & 63));
      if (level[i >> 6] != 0) return;
      i >>= 6;
    }
  }

  int64_t find(uint64_t i) const {  // the smallest set position >= i, or -1
    for (size_t depth = 0; depth < levels_.size(); ++depth) {
      const auto& level = levels_[depth];
      if ((i >> 6) >= level.size()) return -1;
      const uint64_t word = level[i >> 6] & (~uint64_t{0} << (i & 63));
      if (word != 0) {
        uint64_t position = (i & ~uint64_t{63}) + static_cast<uint64_t>(__builtin_ctzll(word));
        while (depth-- > 0) {
          position = (position << 6) + static_cast<uint64_t>(__builtin_ctzll(levels_[depth][position]));
        }
        return static_cast<int64_t>(position);
      }
      i = (i >> 6) + 1;
    }
    return -1;
  }

  std::vector<std::vector<uint64_t>> levels_;
  std::vector<int32_t> head_;  // [room] pack on top of the stack, -1 when empty
  std::vector<int32_t> next_;  // [pack] pack below it
};

// The samples of one step in packs: pack_at[k] for the k-th longest sample, how many each pack holds, its cost.
struct Grouping {
  std::vector<int32_t> pack_at;
  std::vector<int64_t> sizes;
  std::vector<double> costs;
};

// Samples of equal length within the step's decreasing order, up to position `end`.
struct Run {
  int64_t length;
  size_t end;
};

// No plan lasts less than its cost divided by the ranks; best fit within 2 % of that is left as it is.
constexpr double kCloseEnough = 1.02;

class Planner {
 public:
  explicit Planner(const PlanRequest& request)
      : request_(request), capacity_(request.token_budget - request.shared_tokens), rooms_(capacity_, largest_step()) {}

  PackPlan run() {
    PackPlan plan;
    plan.sample_indices.resize(static_cast<size_t>(request_.num_samples));
    plan.pack_offsets.push_back(0);
    plan.step_offsets.push_back(0);
    for (int64_t step = 0, first = 0; step < request_.num_steps; ++step) {
      plan_step(first, request_.step_sizes[step], plan);
      first += request_.step_sizes[step];
      plan.step_offsets.push_back(static_cast<int64_t>(plan.pack_offsets.size()) - 1);
    }
    return plan;
  }

 private:
  int64_t largest_step() const {
    int64_t largest = 0;
    for (int64_t s = 0; s < request_.num_steps; ++s) largest = std::max(largest, request_.step_sizes[s]);
    return largest;
  }

  double cost_of(int64_t length) const {
    const double all = static_cast<double>(length), own = static_cast<double>(length - request_.shared_tokens);
    return request_.linear_cost * own + request_.attention_cost * all * all;
  }

  void plan_step(int64_t first, int64_t size, PackPlan& plan) {
    if (size == 0) return;
    lengths_ = request_.lengths + first;
    sort_decreasing(size);
    Grouping groups = best_fit();
    const int64_t num_ranks = request_.num_ranks;
    const int64_t num_packs = static_cast<int64_t>(groups.costs.size());
    const int64_t num_micro_steps = (num_packs + num_ranks - 1) / num_ranks;
    groups.sizes.resize(static_cast<size_t>(num_micro_steps * num_ranks), 0);
    groups.costs.resize(groups.sizes.size(), 0.0);
    std::vector<int32_t> order = decreasing_cost(groups);
    const double total = std::accumulate(groups.costs.begin(), groups.costs.end(), 0.0);
    if (duration(groups, order) * static_cast<double>(num_ranks) > kCloseEnough * total) {
      Grouping even;
      if (spread(groups.costs.size(), even)) {
        std::vector<int32_t> even_order = decreasing_cost(even);
        if (duration(even, even_order) < duration(groups, order)) {
          groups = std::move(even);
          order = std::move(even_order);
        }
      }
    }
    append(first, groups, deal(groups, order), plan);
  }

  // order_ = samples of the step by decreasing length, equal lengths in their own order; runs_ = its equal lengths.
  void sort_decreasing(int64_t size) {
    order_.resize(static_cast<size_t>(size));
    runs_.clear();
    const int64_t longest = *std::max_element(lengths_, lengths_ + size);
    if (longest > 4 * size) {
      std::iota(order_.begin(), order_.end(), 0);
      std::stable_sort(order_.begin(), order_.end(),
                       [this](int32_t a, int32_t b) { return lengths_[a] > lengths_[b]; });
      for (size_t k = 0; k < order_.size(); ++k) {
        const int64_t length = lengths_[order_[k]];
        if (runs_.empty() || runs_.back().length != length) runs_.push_back({length, k});
        runs_.back().end = k + 1;
      }
      return;
    }
    std::vector<uint32_t> place(static_cast<size_t>(longest) + 1, 0);  // by longest - length
    for (int64_t i = 0; i < size; ++i) ++place[static_cast<size_t>(longest - lengths_[i])];
    std::exclusive_scan(place.begin(), place.end(), place.begin(), uint32_t{0});
    for (int64_t i = 0; i < size; ++i) {
      order_[place[static_cast<size_t>(longest - lengths_[i])]++] = static_cast<int32_t>(i);
    }
    for (size_t shorter = 0, end = 0; shorter < place.size(); ++shorter) {
      if (place[shorter] > end) runs_.push_back({longest - static_cast<int64_t>(shorter), place[shorter]});
      end = place[shorter];
    }
  }

  // Best fit decreasing: each sample goes where it leaves the least room. After a sample, an equally long one fits best
  // into the same pack for as long as it fits, so equal lengths are placed together.
  Grouping best_fit() {
    Grouping groups;
    groups.pack_at.resize(order_.size());
    std::vector<int64_t> room_left;
    size_t k = 0;
    for (const Run& run : runs_) {
      const int64_t room = run.length - request_.shared_tokens;
      const double cost = cost_of(run.length);
      while (k < run.end) {
        int32_t pack = rooms_.take_best(room);
        if (pack < 0) {
          pack = static_cast<int32_t>(room_left.size());
          room_left.push_back(capacity_);
          groups.sizes.push_back(0);
          groups.costs.push_back(0.0);
        }
        const size_t p = static_cast<size_t>(pack);
        const int64_t count = std::min(room_left[p] / room, static_cast<int64_t>(run.end - k));
        std::fill_n(groups.pack_at.begin() + static_cast<std::ptrdiff_t>(k), count, pack);
        k += static_cast<size_t>(count);
        room_left[p] -= count * room;
        groups.sizes[p] += count;
        groups.costs[p] += static_cast<double>(count) * cost;
        if (room_left[p] > 0) rooms_.put(room_left[p], pack);
      }
    }
    for (const int64_t left : room_left) rooms_.forget(left);
    return groups;
  }

  // Longest processing time first over a given number of packs: each sample goes to the cheapest pack so far. False
  // when that pack lacks the room, which happens only when packs are close to full anyway.
  bool spread(size_t num_packs, Grouping& groups) const {
    using Load = std::pair<double, int32_t>;
    std::vector<Load> heap(num_packs);
    for (size_t p = 0; p < num_packs; ++p) heap[p] = {0.0, static_cast<int32_t>(p)};
    std::vector<int64_t> room_left(num_packs, capacity_);
    groups.pack_at.resize(order_.size());
    groups.sizes.assign(num_packs, 0);
    groups.costs.assign(num_packs, 0.0);
    for (size_t k = 0; k < order_.size(); ++k) {
      const int64_t length = lengths_[order_[k]];
      std::pop_heap(heap.begin(), heap.end(), std::greater<>());
      Load& lightest = heap.back();
      const size_t pack = static_cast<size_t>(lightest.second);
      room_left[pack] -= length - request_.shared_tokens;
      if (room_left[pack] < 0) return false;
      lightest.first = groups.costs[pack] += cost_of(length);
      ++groups.sizes[pack];
      groups.pack_at[k] = lightest.second;
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
    return true;
  }

  static std::vector<int32_t> decreasing_cost(const Grouping& groups) {
    std::vector<int32_t> order(groups.costs.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&groups](int32_t a, int32_t b) {
      return groups.costs[static_cast<size_t>(a)] > groups.costs[static_cast<size_t>(b)];
    });
    return order;
  }

  // Ranks wait for each other in every micro-step, so a step lasts the sum of its micro-steps' largest costs.
  double duration(const Grouping& groups, const std::vector<int32_t>& order) const {
    double total = 0.0;
    for (size_t p = 0; p < order.size(); p += static_cast<size_t>(request_.num_ranks)) {
      total += groups.costs[static_cast<size_t>(order[p])];
    }
    return total;
  }

  // Packs of similar cost meet in one micro-step; there the dearest goes to the rank with the least cost so far.
  // Returns the step's packs rank by rank.
  std::vector<int32_t> deal(const Grouping& groups, const std::vector<int32_t>& order) const {
    const size_t num_ranks = static_cast<size_t>(request_.num_ranks), num_micro_steps = order.size() / num_ranks;
    std::vector<int32_t> dealt(order.size());
    std::vector<double> load(num_ranks, 0.0);
    std::vector<size_t> ranks(num_ranks);
    std::iota(ranks.begin(), ranks.end(), size_t{0});
    for (size_t micro_step = 0; micro_step < num_micro_steps; ++micro_step) {
      std::sort(ranks.begin(), ranks.end(),
                [&load](size_t a, size_t b) { return load[a] != load[b] ? load[a] < load[b] : a < b; });
      for (size_t k = 0; k < num_ranks; ++k) {
        const int32_t pack = order[micro_step * num_ranks + k];
        dealt[ranks[k] * num_micro_steps + micro_step] = pack;
        load[ranks[k]] += groups.costs[static_cast<size_t>(pack)];
      }
    }
    return dealt;
  }

  void append(int64_t first, const Grouping& groups, const std::vector<int32_t>& packs, PackPlan& plan) const {
    std::vector<int64_t> cursor(packs.size());  // by pack
    int64_t end = first;
    for (const int32_t pack : packs) {
      cursor[static_cast<size_t>(pack)] = end;
      end += groups.sizes[static_cast<size_t>(pack)];
      plan.pack_offsets.push_back(end);
    }
    for (size_t k = 0; k < order_.size(); ++k) {
      const int64_t place = cursor[static_cast<size_t>(groups.pack_at[k])]++;
      plan.sample_indices[static_cast<size_t>(place)] = first + order_[k];
    }
  }

  const PlanRequest& request_;
  int64_t capacity_;
  RoomIndex rooms_;
  const int64_t* lengths_ = nullptr;  // of the step's samples
  std::vector<int32_t> order_;
  std::vector<Run> runs_;
};

void check(const PlanRequest& request) {
  constexpr int64_t kMaxSamples = int64_t{1} << 30;  // packs and samples of a step are counted in int32
  require_range("num_samples", request.num_samples, 0, kMaxSamples);
  require_range("token_budget", request.token_budget, 1, kMaxTokenBudget);
  require_range("num_ranks", request.num_ranks, 1, kMaxRanks);
  require_range("shared_tokens", request.shared_tokens, 0, request.token_budget - 1);
  const double infinity = std::numeric_limits<double>::infinity();
  const double linear = request.linear_cost, attention = request.attention_cost;
  if (!(linear >= 0 && attention >= 0 && linear + attention > 0 && linear + attention < infinity)) {
    refuse("linear_cost=" + to_string(linear) + ", attention_cost=" + to_string(attention) +
           ": expected finite numbers >= 0, one of them positive");
  }
  int64_t left = request.num_samples;
  for (int64_t s = 0; s < request.num_steps; ++s) {
    const int64_t size = request.step_sizes[s];
    if (size < 0 || size > left) {
      refuse("step_sizes[" + to_string(s) + "]=" + to_string(size) + ": expected 0 to the " + to_string(left) +
             " samples left");
    }
    left -= size;
  }
  if (left != 0) {
    refuse("step_sizes: " + to_string(left) + " of " + to_string(request.num_samples) + " samples are in no step");
  }
  for (int64_t i = 0; i < request.num_samples; ++i) {
    if (request.lengths[i] > request.token_budget) {
      refuse("sample " + to_string(i) + " has " + to_string(request.lengths[i]) + " tokens, token_budget is " +
             to_string(request.token_budget));
    }
    if (request.lengths[i] <= request.shared_tokens) {
      refuse("lengths[" + to_string(i) + "]=" + to_string(request.lengths[i]) + ": expected more than " +
             to_string(request.shared_tokens));
    }
  }
}

}  // namespace

PackPlan plan_packs(const PlanRequest& request) {
  check(request);
  return Planner(request).run();
}

}  // namespace inverseq
