// Decode attention over page tables.
//
// A sequence (row and KV head) is cut into parts of pages, by its length alone, so that the result
// depends neither on the number of threads nor on the other rows. A part keeps, for each query head of
// each of the row's tokens, its largest logit, the sum of its weights and the weighted sum of its
// values; they are combined in order.
#include "kernels.h"
#include "vectors.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace specontext {
namespace {

constexpr int64_t kPartPages = 16;   // The shortest part that is not a sequence's last,
constexpr int64_t kMostParts = 16;   // and the most of them.
constexpr int64_t kBlockPages = 4;   // Pages whose weights are made together.
constexpr int64_t kBlock = kBlockPages * kPage;
constexpr int64_t kSerialWork = 1 << 14;  // Multiplications that are not worth waking a thread for.

// What is known of a part's softmax, for as many queries (query heads of all of the row's tokens): their
// maxima, sums, and values [queries, padded(width)].
struct PartResult {
  float* largest;
  float* sum;
  float* values;
};

// `result` is its place in the workspace, in floats.
struct Part {
  int64_t sequence, first_page, pages, tokens, result;
};

// The tokens of a row that ask: [first, first + count).
struct Asking {
  int64_t first, count;
};

inline Asking asking(const DecodeArgs& args, int64_t sequence) {
  const int64_t row = sequence / args.kv_heads;
  return args.starts == nullptr
      ? Asking{row, 1}
      : Asking{args.starts[row], args.starts[row + 1] - args.starts[row]};
}

// Adds `Vectors` vectors of the values of `tokens` tokens, from element `at` of each on.
template <typename T, int G, int Vectors, bool Tail>
inline void add_values(const T* const* pages, const T* const* ahead, int64_t tokens, int64_t width,
                       int64_t at, const float* weights, const float* rescale, float* values) {
  const int64_t row = padded(width);
  Vec sums[G][Vectors];
  for (int g = 0; g < G; ++g) {
    for (int v = 0; v < Vectors; ++v) {
      sums[g][v] = Vec::loadu(values + g * row + at + v * kLanes) * Vec(rescale[g]);
    }
  }
  for (int64_t first = 0; first < tokens; first += kPage) {
    const T* from = pages[first / kPage] + width + at;
    const T* next = ahead[first / kPage];
    const int64_t end = std::min(tokens - first, kPage);
    for (int64_t t = 0; t < end; ++t, from += 2 * width) {
      if (next != nullptr && t % 2 == 0) {
        ask_for(next + (kPage + t) * width, 2 * width);
      }
      Vec value[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        value[v] = Tail ? widen(from, width - at) : widen(from + v * kLanes);
      }
      for (int g = 0; g < G; ++g) {
        const Vec weight(weights[g * kBlock + first + t]);
        for (int v = 0; v < Vectors; ++v) {
          sums[g][v] = at::vec::fmadd(weight, value[v], sums[g][v]);
        }
      }
    }
  }
  for (int g = 0; g < G; ++g) {
    for (int v = 0; v < Vectors; ++v) {
      sums[g][v].store(values + g * row + at + v * kLanes);
    }
  }
}

// The softmax of `tokens` more tokens joins what G query heads have so far. `ahead` are the pages of
// the block after it, or null.
template <typename T, int G>
inline void attend_block(const float* query, const T* const* pages, const T* const* ahead,
                         int64_t tokens, int64_t width, float soft_cap, const PartResult& so_far) {
  const int64_t row = padded(width);
  alignas(64) float weights[G * kBlock];
  float rescale[G];
  // The first half of each page ahead is asked for between the products, the second between the sums:
  // so that there is always something on its way.
  for (int64_t first = 0; first < tokens; first += kPage) {
    dots<T, G>(query, row, pages[first / kPage], 2 * width, std::min(tokens - first, kPage), width,
               weights + first, kBlock, ahead[first / kPage], width);
  }
  const int64_t end = ceil_div(tokens, kLanes) * kLanes;
  for (int g = 0; g < G; ++g) {
    float* logits = weights + g * kBlock;
    std::fill(logits + tokens, logits + end, kMinusInfinity);
    Vec largest(kMinusInfinity);
    for (int64_t t = 0; t < end; t += kLanes) {
      Vec logit = Vec::loadu(logits + t);
      if (soft_cap > 0) {
        logit = (logit / Vec(soft_cap)).tanh() * Vec(soft_cap);
        logit.store(logits + t, std::min(tokens - t, kLanes));
        logit = Vec::loadu(logits + t);
      }
      largest = at::vec::maximum(largest, logit);
    }
    const float before = so_far.largest[g];
    const float now = max_of(at::vec::maximum(largest, Vec(before)));
    Vec sum(0.f);
    for (int64_t t = 0; t < end; t += kLanes) {
      const Vec weight = (Vec::loadu(logits + t) - Vec(now)).exp();
      weight.store(logits + t);
      sum = sum + weight;
    }
    rescale[g] = before == kMinusInfinity ? 0.f : std::exp(before - now);
    so_far.largest[g] = now;
    so_far.sum[g] = so_far.sum[g] * rescale[g] + sum_of(sum);
  }
  constexpr int kVectors = kLanes == 8 ? 2 : 4;
  int64_t at = 0;
  const T* const none[kBlockPages] = {};
  for (; at + kVectors * kLanes <= width; at += kVectors * kLanes) {
    add_values<T, G, kVectors, false>(pages, at == 0 ? ahead : none, tokens, width, at, weights,
                                      rescale, so_far.values);
  }
  for (; at + kLanes <= width; at += kLanes) {
    add_values<T, G, 1, false>(pages, at == 0 ? ahead : none, tokens, width, at, weights, rescale, so_far.values);
  }
  if (at < width) {
    add_values<T, G, 1, true>(pages, at == 0 ? ahead : none, tokens, width, at, weights, rescale, so_far.values);
  }
}

// A page of a part; null beyond its end, and for an id that is none of the pages.
template <typename K>
inline const K* page_of(const DecodeArgs& args, const Part& part, int64_t page) {
  if (page >= part.pages) {
    return nullptr;
  }
  const int32_t id = args.table[part.sequence * args.table_row + part.first_page + page];
  return id < 0 || id >= args.num_pages
      ? nullptr
      : static_cast<const K*>(args.pages) + id * (kPage * 2 * args.width);
}

// `next` is the part that this thread goes on with, or null: its first pages are asked for.
template <typename T, typename K>
bool attend_part(const DecodeArgs& args, const Part& part, const Part* next,
                 const PartResult& result, float* queries) {
  const int64_t row = padded(args.width), head = part.sequence % args.kv_heads;
  for (int64_t page = 0; page < part.pages; ++page) {
    if (page_of<K>(args, part, page) == nullptr) {
      return false;
    }
  }
  const Asking own = asking(args, part.sequence);
  for (int64_t i = 0; i < own.count; ++i) {
    const T* query = static_cast<const T*>(args.query) + (own.first + i) * args.query_token +
        head * args.group * args.query_head;
    read_queries(query, args.query_head, args.group, args.width, args.scale * args.key_scale,
                 queries + i * args.group * row);
  }
  const int64_t count = own.count * args.group;
  std::fill_n(result.largest, count, kMinusInfinity);
  std::fill_n(result.sum, count, 0.f);
  std::fill_n(result.values, count * row, 0.f);
  // Tokens of the part that the row's first query reads; each of the others reads one more.
  const int64_t seen =
      args.lengths[part.sequence] - own.count + 1 - part.first_page * kPage;
  const K* const none[kBlockPages] = {};
  const K *pages[kBlockPages], *ahead[kBlockPages];
  for (int64_t first = 0; first < part.pages; first += kBlockPages) {
    const bool is_last = first + kBlockPages >= part.pages;
    for (int64_t i = 0; i < kBlockPages; ++i) {
      pages[i] = page_of<K>(args, part, first + i);
      ahead[i] = !is_last     ? page_of<K>(args, part, first + kBlockPages + i)
          : next != nullptr ? page_of<K>(args, *next, i)
                            : nullptr;
    }
    for (int64_t i = 0; i < own.count; ++i) {
      const int64_t tokens = std::min(std::min(part.tokens, seen + i) - first * kPage, kBlock);
      if (tokens <= 0) {
        continue;
      }
      for (int64_t g = 0; g < args.group; g += kHeadsAtOnce) {
        const int64_t at = i * args.group + g;
        with_heads(std::min<int64_t>(args.group - g, kHeadsAtOnce), [&](auto heads) {
          attend_block<K, heads>(queries + at * row, pages, at == 0 ? ahead : none, tokens,
                                 args.width, args.soft_cap,
                                 {result.largest + at, result.sum + at, result.values + at * row});
        });
      }
    }
  }
  return true;
}

// The output of one query from the parts of its sequence, `stride` floats apart.
template <typename T>
void combine(const PartResult& first, int64_t parts, int64_t stride, const float* sink,
             int64_t width, float scale, T* output) {
  float largest = sink == nullptr ? kMinusInfinity : *sink;
  for (int64_t part = 0; part < parts; ++part) {
    largest = std::max(largest, first.largest[part * stride]);
  }
  float shares[kMostParts];
  float sum = sink == nullptr ? 0.f : std::exp(*sink - largest);
  for (int64_t part = 0; part < parts; ++part) {
    shares[part] = std::exp(first.largest[part * stride] - largest);
    sum += first.sum[part * stride] * shares[part];
  }
  for (int64_t at = 0; at < width; at += kLanes) {
    Vec values(0.f);
    for (int64_t part = 0; part < parts; ++part) {
      values =
          at::vec::fmadd(Vec::loadu(first.values + part * stride + at), Vec(shares[part]), values);
    }
    store(output + at, values * Vec(scale / sum), std::min(width - at, kLanes));
  }
}

template <typename T, typename K>
bool decode(const DecodeArgs& args) {
  const int64_t row = padded(args.width), sequences = args.rows * args.kv_heads;
  std::vector<Part> parts;
  std::vector<int64_t> first_part(sequences + 1, 0);
  int64_t multiplied = 0, floats = 0, most = 1;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) {
    const int64_t tokens = args.lengths[sequence], pages = ceil_div(tokens, kPage);
    const int64_t at_once = std::max(kPartPages, ceil_div(pages, kMostParts));
    const int64_t count = asking(args, sequence).count * args.group;
    for (int64_t page = 0; page < pages && count > 0; page += at_once) {
      parts.push_back({sequence, page, std::min(at_once, pages - page),
                       std::min(tokens - page * kPage, at_once * kPage), floats});
      floats += count * (2 + row);
    }
    first_part[sequence + 1] = static_cast<int64_t>(parts.size());
    multiplied += tokens * count * args.width;
    most = std::max(most, count);
  }
  // A part's maxima, sums and values lie side by side.
  std::vector<float> workspace(floats);
  const auto result = [&](const Part& part) {
    const int64_t count = asking(args, part.sequence).count * args.group;
    float* at = workspace.data() + part.result;
    return PartResult{at, at + count, at + 2 * count};
  };
  std::atomic<bool> in_range{true};
  const int64_t count = static_cast<int64_t>(parts.size());
  const bool small = multiplied < kSerialWork;
  at::parallel_for(0, count, small ? count : 1, [&](int64_t begin, int64_t end) {
    std::vector<float> queries(most * row);
    for (int64_t part = begin; part < end; ++part) {
      const Part* next = part + 1 < end ? &parts[part + 1] : nullptr;
      if (!attend_part<T, K>(args, parts[part], next, result(parts[part]), queries.data())) {
        in_range = false;
      }
    }
  });
  if (!in_range) {
    return false;
  }
  const int64_t grain = std::max<int64_t>(1, kSerialWork / (most * row));
  at::parallel_for(0, sequences, grain, [&](int64_t begin, int64_t end) {
    for (int64_t sequence = begin; sequence < end; ++sequence) {
      const Asking own = asking(args, sequence);
      const int64_t head = sequence % args.kv_heads * args.group;
      const int64_t first = first_part[sequence], number = first_part[sequence + 1] - first;
      const int64_t stride = own.count * args.group * (2 + row);
      for (int64_t i = 0; i < own.count; ++i) {
        T* output = static_cast<T*>(args.output) +
            ((own.first + i) * args.kv_heads * args.group + head) * args.width;
        if (number == 0) {
          std::fill_n(output, args.group * args.width, T(0.f));
          continue;
        }
        const PartResult from = result(parts[first]);
        for (int64_t g = 0; g < args.group; ++g) {
          const int64_t at = i * args.group + g;
          combine<T>({from.largest + at, from.sum + at, from.values + at * row}, number, stride,
                     args.sinks == nullptr ? nullptr : args.sinks + head + g, args.width,
                     args.value_scale, output + g * args.width);
        }
      }
    }
  });
  return true;
}

template <typename T>
bool decode(const DecodeArgs& args) {
  return args.page_kind == Kind::kFloat8 ? decode<T, c10::Float8_e4m3fn>(args) : decode<T, T>(args);
}

}  // namespace

bool sparse_decode(const DecodeArgs& args) {
  switch (args.kind) {
    case Kind::kFloat:
      return decode<float>(args);
    case Kind::kBFloat16:
      return decode<c10::BFloat16>(args);
    default:
      return decode<c10::Half>(args);
  }
}

}  // namespace specontext
