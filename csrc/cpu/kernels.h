// The kernels, on plain memory. bindings.cpp checks the tensors that it comes from.
//
// A head page is one page of one KV head, and its id `page * H + head`. Strides count elements.
#pragma once

#include <cstdint>

namespace specontext {

enum class Kind { kFloat, kBFloat16, kHalf, kFloat8 };

// Attention of a row's newest tokens, nearly always one, over the pages of its page table; each reads
// up to itself.
struct DecodeArgs {
  Kind kind;               // Of query and output.
  Kind page_kind;          // The same, or kFloat8.
  const void* query;       // [N, H * group, width], tokens and heads of any stride
  int64_t query_token, query_head;
  const int32_t* starts;   // [rows + 1], where the tokens of a row begin; null: one token a row
  const void* pages;       // [num_pages, 16, 2 * width]: keys, then values
  int64_t num_pages;
  const int32_t* table;    // [rows * H, table_row]
  int64_t table_row;
  const int32_t* lengths;  // [rows * H], tokens
  const float* sinks;      // [H * group] logits that join the sum of the softmax, or null
  void* output;            // [N, H * group, width]
  int64_t rows, kv_heads, group, width;
  float scale;
  float soft_cap;          // Logits become soft_cap * tanh(logit / soft_cap); 0: they stay.
  float key_scale, value_scale;  // Of what the pages hold.
};

// False if a page id is none of the pages; nothing was read there.
bool sparse_decode(const DecodeArgs& args);

// The largest logit and the log-sum-exp of each page's tokens, for each query head.
struct ScoreArgs {
  Kind query_kind, key_kind;
  const void* queries;     // [B, NQ, width]
  int64_t query_row, query_head;
  const void* keys;        // [blocks, heads, 16, width]
  int64_t key_block, key_head, key_token, num_blocks;
  const int32_t* block_table;  // [B, table_row]
  int64_t table_row;
  const int32_t* seq_lens;  // [B], tokens
  const int32_t* starts;    // [num_rows], where the pages of a row begin in the workspace
  float* page_max;          // [NQ, capacity]
  float* page_lse;          // [NQ, capacity]
  const int32_t* min_pages;  // [B], rows with no more pages get no scores
  int64_t capacity, first_row, num_rows, heads, group, width;
  int64_t first_token;      // Tokens before it take no part,
  int64_t keyless;          // nor do the newest ones.
};

// False if a block id is none of the blocks; nothing was read there.
bool score_pages(const ScoreArgs& args);

// The pages that rows read, chosen by their scores.
struct SelectArgs {
  const float* page_max;  // [heads * group, capacity]
  const float* page_lse;
  int64_t capacity;
  const int32_t* seq_lens;     // [B]
  const int32_t* starts;       // [num_rows]
  const int32_t* block_table;  // [B, table_row], what the selection calls each page
  int64_t table_row;
  int32_t* pages;  // [B * heads, pages_row]
  int64_t pages_row;
  int32_t* lengths;  // [B * heads]
  float* kept_mass;  // [B, heads]
  int64_t first_row, num_rows, heads, group;
  const int32_t* totals;     // [B], pages that each row reads
  const int32_t* fallbacks;  // [B], of rows whose kept mass is below the threshold, or null
  int64_t sink_pages, recent_pages;
  float fallback_threshold;
  const int32_t* lanes;      // [B], rows of slot_of, or null
  const int32_t* slot_of;    // [lanes, heads, slot_row], negative for pages that need a fetch
  int64_t slot_row;
  float margin;              // Added to the score of a page that needs none.
};

void select_pages(const SelectArgs& args);

// Pages that vLLM's attention for prompts is to read, copied into its packing.
struct PackArgs {
  Kind kind;              // Of the copy.
  Kind cache_kind;        // The same, or kFloat8.
  const void* cache;      // [blocks, heads, 16, 2 * width]
  const int32_t* pages;   // [count], blocks of the cache
  const int32_t* tokens;  // [count], of each page; zeros take the place of the others
  const int32_t* places;  // [count], where each goes, in pages from the start of the copy
  void* copy;             // [n, heads, 2 * block, width]: keys, then values
  int64_t count, heads, width, block;
  bool in_pairs;          // As matrix units take them; only with 2 bytes.
  float key_scale, value_scale;  // Of what the cache holds, if that is kFloat8.
};

void pack_pages(const PackArgs& args);

}  // namespace specontext
