// The arrays of one pack: the views of its samples laid end to end.
//
//     sequence of sample i under view v = prefix_v(i) + prompt(i) + response(i) without its last token
//
// The hidden row of a token predicts the next one: response token 0 is predicted by the last prompt token, and the
// last response token predicts nothing, so it is never fed. Sequences stand view by view, samples in their order.
// With share_prefix the tokens that all sequences of a view begin with are emitted once, as a sequence of their own
// in front of the view's sequences, which continue it. The last of several views is left whole: the policy reads it
// whole when it trains, and rounds alike only when attention runs alike.
//
// No Python here; lay_out checks every offset, length and token id and throws std::invalid_argument before anything
// is written.
#pragma once

#include <cstdint>
#include <vector>

namespace inverseq {

// Row i is ids[offsets[i] .. offsets[i + 1]).
struct Ragged {
  const std::int32_t* ids;
  std::int64_t num_ids;
  const std::int64_t* offsets;
  std::int64_t num_rows;
};

struct PackRequest {
  std::vector<Ragged> prefixes;  // one per view
  Ragged prompts;
  Ragged responses;
  const std::int64_t* rows;            // [num_samples] rows of the ragged arrays that go into this pack
  const std::int64_t* sample_numbers;  // [num_samples] what these samples are called, in sample_index and in errors
  std::int64_t num_samples;
  bool share_prefix;
  std::int64_t num_valid_vocab;  // token ids are below it
};

struct Span {
  const std::int32_t* ids;
  std::int64_t length;
};

// A pack's sizes, and where its ids come from.
struct PackLayout {
  std::vector<std::vector<Span>> prefixes;   // [num_views][num_samples]
  std::vector<Span> prompts;                 // [num_samples]
  std::vector<Span> responses;               // [num_samples]
  std::vector<std::int64_t> shared_lengths;  // [num_views] tokens emitted once for all sequences of a view
  std::int64_t num_tokens = 0;               // T
  std::int64_t num_seqs = 0;                 // S
  std::int64_t num_actions = 0;              // A
  std::int64_t max_seqlen = 0;
};

struct PackArrays {
  std::int64_t* input_ids;     // [T]
  std::int64_t* position_ids;  // [T], a shared prefix counts in front of the sequences that continue it
  std::int32_t* cu_seqlens;    // [S + 1]
  std::int32_t* parent_seq;    // [S] the sequence that this one continues, -1 without one
  std::int64_t* action_index;  // [num_views, A]
  std::int64_t* token_ids;     // [A]
  std::int64_t* sample_index;  // [A]
};

PackLayout lay_out(const PackRequest& request);

void write_pack(const PackLayout& layout, const std::int64_t* sample_numbers, const PackArrays& out);

}  // namespace inverseq
