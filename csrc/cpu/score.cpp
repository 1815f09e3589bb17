// Scores of pages: the maximum and the log-sum-exp of their tokens' logits.
#include "kernels.h"
#include "vectors.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace specontext {
namespace {

constexpr int64_t kPagesAtOnce = 64;  // That one thread scores of one head.
constexpr int64_t kPagesAhead = 4;    // How early a page is asked for.

// Some pages of one row and one KV head.
struct Span {
  int64_t row, head, first_page, pages;
};

const std::array<float, 256>& float8_values() {
  static const std::array<float, 256> values = [] {
    std::array<float, 256> made;
    for (int byte = 0; byte < 256; ++byte) {
      made[byte] = static_cast<float>(
          c10::Float8_e4m3fn(static_cast<uint8_t>(byte), c10::Float8_e4m3fn::from_bits()));
    }
    return made;
  }();
  return values;
}

// Maximum of the tokens' logits, and the sum of their exponentials over that of the maximum.
inline void reduce_page(float* logits, int64_t begin, int64_t end, float* largest, float* sum) {
  std::fill(logits, logits + begin, kMinusInfinity);
  std::fill(logits + end, logits + kPage, kMinusInfinity);
  Vec most = Vec::loadu(logits);
  for (int64_t t = kLanes; t < kPage; t += kLanes) {
    most = at::vec::maximum(most, Vec::loadu(logits + t));
  }
  *largest = max_of(most);
  if (*largest == kMinusInfinity) {
    *sum = 1.f;
    return;
  }
  Vec total(0.f);
  for (int64_t t = 0; t < kPage; t += kLanes) {
    total = total + (Vec::loadu(logits + t) - Vec(*largest)).exp();
  }
  *sum = sum_of(total);
}

template <typename K>
void score_span(const ScoreArgs& args, const Span& span, const float* queries, float* decoded) {
  const int64_t row = padded(args.width), tokens = args.seq_lens[args.first_row + span.row];
  const int32_t* blocks =
      args.block_table + (args.first_row + span.row) * args.table_row + span.first_page;
  const int64_t out =
      span.head * args.group * args.capacity + args.starts[span.row] + span.first_page;
  alignas(64) float logits[kHeadsAtOnce * kPage];
  for (int64_t page = 0; page < span.pages; ++page) {
    const int64_t from = (span.first_page + page) * kPage;
    const int64_t begin = std::clamp<int64_t>(args.first_token - from, 0, kPage);
    const int64_t end = std::clamp<int64_t>(tokens - args.keyless - from, begin, kPage);
    const auto keys_of = [&](int64_t which) {
      return static_cast<const K*>(args.keys) + blocks[which] * args.key_block +
          span.head * args.key_head;
    };
    const K* keys = keys_of(page) + begin * args.key_token;
    const K* ahead = page + kPagesAhead < span.pages ? keys_of(page + kPagesAhead) : nullptr;
    if constexpr (std::is_same_v<K, c10::Float8_e4m3fn>) {
      for (int64_t t = 0; t < end - begin; ++t) {
        for (int64_t i = 0; i < args.width; ++i) {
          decoded[t * row + i] = float8_values()[keys[t * args.key_token + i].x];
        }
      }
    }
    for (int64_t g = 0; g < args.group; g += kHeadsAtOnce) {
      const int64_t heads = std::min<int64_t>(args.group - g, kHeadsAtOnce);
      with_heads(heads, [&](auto constant) {
        if constexpr (std::is_same_v<K, c10::Float8_e4m3fn>) {
          dots<float, constant>(queries + g * row, row, decoded, row, end - begin, args.width,
                                logits + begin, kPage);
        } else {
          dots<K, constant>(queries + g * row, row, keys, args.key_token, end - begin, args.width,
                            logits + begin, kPage, g == 0 ? ahead : nullptr, args.key_token);
        }
      });
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t at = out + (g + head) * args.capacity + page;
        reduce_page(logits + head * kPage, begin, end, args.page_max + at, args.page_lse + at);
      }
    }
  }
  for (int64_t head = 0; head < args.group; ++head) {
    const float* largest = args.page_max + out + head * args.capacity;
    float* sum = args.page_lse + out + head * args.capacity;
    for (int64_t page = 0; page < span.pages; page += kLanes) {
      const int64_t count = std::min(span.pages - page, kLanes);
      (widen(largest + page, count) + widen(sum + page, count).log()).store(sum + page, count);
    }
  }
}

template <typename Q>
void read_span_queries(const ScoreArgs& args, const Span& span, float scale, float* out) {
  const Q* from = static_cast<const Q*>(args.queries) +
      (args.first_row + span.row) * args.query_row + span.head * args.group * args.query_head;
  read_queries(from, args.query_head, args.group, args.width, scale, out);
}

bool in_range(const ScoreArgs& args, const Span& span) {
  const int32_t* blocks =
      args.block_table + (args.first_row + span.row) * args.table_row + span.first_page;
  return std::all_of(blocks, blocks + span.pages, [&](int32_t block) {
    return block >= 0 && block < args.num_blocks;
  });
}

}  // namespace

bool score_pages(const ScoreArgs& args) {
  std::vector<Span> spans;
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const int64_t at = args.first_row + row, pages = ceil_div(args.seq_lens[at], kPage);
    for (int64_t head = 0; pages > args.min_pages[at] && head < args.heads; ++head) {
      for (int64_t page = 0; page < pages; page += kPagesAtOnce) {
        spans.push_back({row, head, page, std::min(kPagesAtOnce, pages - page)});
      }
    }
  }
  const int64_t width = padded(args.width);
  const float scale = 1.f / std::sqrt(static_cast<float>(args.width));
  std::atomic<bool> good{true};
  at::parallel_for(0, static_cast<int64_t>(spans.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> queries(args.group * width), decoded(kPage * width);
    for (int64_t i = begin; i < end; ++i) {
      const Span& span = spans[i];
      if (!in_range(args, span)) {
        good = false;
        continue;
      }
      switch (args.query_kind) {
        case Kind::kFloat:
          read_span_queries<float>(args, span, scale, queries.data());
          break;
        case Kind::kBFloat16:
          read_span_queries<c10::BFloat16>(args, span, scale, queries.data());
          break;
        default:
          read_span_queries<c10::Half>(args, span, scale, queries.data());
      }
      switch (args.key_kind) {
        case Kind::kFloat:
          score_span<float>(args, span, queries.data(), nullptr);
          break;
        case Kind::kBFloat16:
          score_span<c10::BFloat16>(args, span, queries.data(), nullptr);
          break;
        case Kind::kHalf:
          score_span<c10::Half>(args, span, queries.data(), nullptr);
          break;
        default:
          score_span<c10::Float8_e4m3fn>(args, span, queries.data(), decoded.data());
      }
    }
  });
  return good;
}

}  // namespace specontext
