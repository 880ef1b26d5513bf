#include "pack_views.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace inverseq {
namespace {

using std::int32_t;
using std::int64_t;
using std::to_string;

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string sample_name(const PackRequest& request, int64_t i) {
  return "sample " + to_string(request.sample_numbers[i]);
}

Span slice(const PackRequest& request, int64_t i, const Ragged& ragged, const std::string& part) {
  const int64_t row = request.rows[i];
  if (row < 0 || row >= ragged.num_rows) {
    refuse(sample_name(request, i) + ": row " + to_string(row) + " of " + to_string(ragged.num_rows) + " " + part +
           " rows");
  }
  const int64_t begin = ragged.offsets[row], end = ragged.offsets[row + 1];
  if (begin < 0 || end < begin || end > ragged.num_ids) {
    refuse(sample_name(request, i) + ": " + part + " offsets " + to_string(begin) + " to " + to_string(end) + " of " +
           to_string(ragged.num_ids) + " ids");
  }
  const Span span{ragged.ids + begin, end - begin};
  uint32_t largest = 0;  // negative ids become the largest
  for (int64_t k = 0; k < span.length; ++k) largest = std::max(largest, static_cast<uint32_t>(span.ids[k]));
  if (static_cast<int64_t>(largest) >= request.num_valid_vocab && span.length > 0) {
    int64_t k = 0;
    while (span.ids[k] >= 0 && span.ids[k] < request.num_valid_vocab) ++k;
    refuse(sample_name(request, i) + ": " + part + " token " + to_string(k) + " has id " + to_string(span.ids[k]) +
           ", expected 0 to " + to_string(request.num_valid_vocab - 1));
  }
  return span;
}

// What a sequence feeds: its prefix, its prompt, and its response without the last token.
struct Sequence {
  Span prefix, prompt, response;

  int64_t num_context() const { return prefix.length + prompt.length; }
  int64_t length() const { return num_context() + response.length - 1; }
  int32_t context_at(int64_t k) const { return k < prefix.length ? prefix.ids[k] : prompt.ids[k - prefix.length]; }
};

Sequence sequence_of(const PackLayout& layout, size_t view, size_t i) {
  return {layout.prefixes[view][i], layout.prompts[i], layout.responses[i]};
}

// How many tokens all sequences of the view begin with, leaving each at least the last token of its prompt: that row
// predicts the first response token. One sequence shares nothing.
int64_t common_prefix(const PackLayout& layout, size_t view) {
  const size_t num_samples = layout.prompts.size();
  if (num_samples < 2) return 0;
  const Sequence first = sequence_of(layout, view, 0);
  int64_t common = first.num_context() - 1;
  for (size_t i = 1; i < num_samples; ++i) {
    const Sequence other = sequence_of(layout, view, i);
    common = std::min(common, other.num_context() - 1);
    int64_t equal = 0;
    while (equal < common && first.context_at(equal) == other.context_at(equal)) ++equal;
    common = equal;
  }
  return common;
}

void take_samples(const PackRequest& request, PackLayout& layout) {
  const size_t num_views = request.prefixes.size();
  layout.prefixes.resize(num_views);
  for (int64_t i = 0; i < request.num_samples; ++i) {
    layout.prompts.push_back(slice(request, i, request.prompts, "prompt"));
    layout.responses.push_back(slice(request, i, request.responses, "response"));
    if (layout.responses.back().length == 0) refuse(sample_name(request, i) + ": its response is empty");
    layout.num_actions += layout.responses.back().length;
    for (size_t v = 0; v < num_views; ++v) {
      layout.prefixes[v].push_back(slice(request, i, request.prefixes[v], "prefix of view " + to_string(v)));
      if (layout.prefixes[v].back().length + layout.prompts.back().length == 0) {
        refuse(sample_name(request, i) + ": prefix and prompt of view " + to_string(v) + " are empty");
      }
    }
  }
}

}  // namespace

PackLayout lay_out(const PackRequest& request) {
  constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();
  if (request.prefixes.empty()) refuse("views: expected at least one");
  if (request.num_samples < 1) refuse("rows: expected at least one sample");
  if (request.num_valid_vocab < 1 || request.num_valid_vocab > kMaxInt32 + 1) {
    refuse("num_valid_vocab=" + to_string(request.num_valid_vocab) + ": expected 1 to " + to_string(kMaxInt32 + 1));
  }
  PackLayout layout;
  take_samples(request, layout);
  const size_t num_views = request.prefixes.size();
  for (size_t v = 0; v < num_views; ++v) {
    const bool is_policys = num_views > 1 && v + 1 == num_views;
    const int64_t shared = request.share_prefix && !is_policys ? common_prefix(layout, v) : 0;
    layout.shared_lengths.push_back(shared);
    layout.num_seqs += request.num_samples + (shared > 0);
    layout.num_tokens += shared;
    layout.max_seqlen = std::max(layout.max_seqlen, shared);
    for (size_t i = 0; i < layout.prompts.size(); ++i) {
      const int64_t length = sequence_of(layout, v, i).length() - shared;
      layout.num_tokens += length;
      layout.max_seqlen = std::max(layout.max_seqlen, length);
    }
  }
  if (layout.num_tokens > kMaxInt32) refuse("pack of " + to_string(layout.num_tokens) + " tokens: cu_seqlens is int32");
  return layout;
}

namespace {

// Appends sequences to the arrays of a pack.
class Writer {
 public:
  explicit Writer(const PackArrays& out) : out_(out) { out_.cu_seqlens[0] = 0; }

  int64_t num_tokens() const { return num_tokens_; }
  int32_t num_seqs() const { return num_seqs_; }

  void copy(const int32_t* ids, int64_t count) {
    std::copy(ids, ids + count, out_.input_ids + num_tokens_);
    num_tokens_ += count;
  }

  void end_sequence(int64_t first_position, int32_t parent) {
    const int64_t start = out_.cu_seqlens[num_seqs_];
    for (int64_t row = start; row < num_tokens_; ++row) out_.position_ids[row] = first_position + row - start;
    out_.parent_seq[num_seqs_++] = parent;
    out_.cu_seqlens[num_seqs_] = static_cast<int32_t>(num_tokens_);
  }

 private:
  const PackArrays& out_;
  int64_t num_tokens_ = 0;
  int32_t num_seqs_ = 0;
};

// The tokens [from, to) of a sequence's prefix and prompt.
void copy_context(Writer& writer, const Sequence& sequence, int64_t from, int64_t to) {
  const int64_t split = sequence.prefix.length;
  if (from < split) writer.copy(sequence.prefix.ids + from, std::min(to, split) - from);
  if (to > split) writer.copy(sequence.prompt.ids + std::max(from - split, int64_t{0}), to - std::max(from, split));
}

void write_view(const PackLayout& layout, size_t view, Writer& writer, int64_t* action_index) {
  const int64_t shared = layout.shared_lengths[view];
  int32_t parent = -1;
  if (shared > 0) {
    parent = writer.num_seqs();
    copy_context(writer, sequence_of(layout, view, 0), 0, shared);
    writer.end_sequence(0, -1);
  }
  for (size_t i = 0; i < layout.prompts.size(); ++i) {
    const Sequence sequence = sequence_of(layout, view, i);
    copy_context(writer, sequence, shared, sequence.num_context());
    const int64_t last_prompt_row = writer.num_tokens() - 1;
    for (int64_t t = 0; t < sequence.response.length; ++t) *action_index++ = last_prompt_row + t;
    writer.copy(sequence.response.ids, sequence.response.length - 1);
    writer.end_sequence(shared, parent);
  }
}

}  // namespace

void write_pack(const PackLayout& layout, const int64_t* sample_numbers, const PackArrays& out) {
  Writer writer(out);
  for (size_t v = 0; v < layout.prefixes.size(); ++v) {
    write_view(layout, v, writer, out.action_index + static_cast<int64_t>(v) * layout.num_actions);
  }
  int64_t action = 0;
  for (size_t i = 0; i < layout.responses.size(); ++i) {
    const Span& response = layout.responses[i];
    std::copy(response.ids, response.ids + response.length, out.token_ids + action);
    std::fill_n(out.sample_index + action, response.length, sample_numbers[i]);
    action += response.length;
  }
}

}  // namespace inverseq
