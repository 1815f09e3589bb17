// Pages as vLLM's attention for prompts reads them: the tokens of a page across vectors.
#include "kernels.h"
#include "vectors.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace specontext {
namespace {

// kPage is also the number of elements that are turned round at once.
constexpr int64_t kGrain = 32;  // Head pages that are worth waking a thread for.

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
template <typename E>
struct Row {
  typedef E Vector __attribute__((vector_size(kPage * sizeof(E))));
  Vector v;

  static Row load(const void* from) {
    Row row;
    std::memcpy(&row.v, from, sizeof(Vector));
    return row;
  }
  void store(void* to) const { std::memcpy(to, &v, sizeof(Vector)); }
};

// The first halves of two rows, element by element in turn, and the second halves.
template <typename E>
inline void zip(const Row<E>& a, const Row<E>& b, Row<E>& first, Row<E>& second) {
  first.v = __builtin_shufflevector(a.v, b.v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  second.v = __builtin_shufflevector(a.v, b.v, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                     15, 31);
}
#else
template <typename E>
struct Row {
  E v[kPage];

  static Row load(const void* from) {
    Row row;
    std::memcpy(row.v, from, sizeof row.v);
    return row;
  }
  void store(void* to) const { std::memcpy(to, v, sizeof v); }
};

template <typename E>
inline void zip(const Row<E>& a, const Row<E>& b, Row<E>& first, Row<E>& second) {
  for (int64_t i = 0; i < kPage; ++i) {
    (i < kPage / 2 ? first : second).v[2 * i % kPage] = a.v[i];
    (i < kPage / 2 ? first : second).v[2 * i % kPage + 1] = b.v[i];
  }
}
#endif

// [16, 16] elements of rows `from_row` apart become columns of rows `to_row` apart.
template <typename E>
inline void transpose(const E* from, int64_t from_row, E* to, int64_t to_row) {
  Row<E> rows[kPage], mixed[kPage];
  for (int64_t i = 0; i < kPage; ++i) {
    rows[i] = Row<E>::load(from + i * from_row);
  }
  // After four times element j of row i is element i of row j.
  for (int stage = 0; stage < 4; ++stage) {
    for (int64_t i = 0; i < kPage / 2; ++i) {
      zip(rows[i], rows[i + kPage / 2], mixed[2 * i], mixed[2 * i + 1]);
    }
    std::copy(mixed, mixed + kPage, rows);
  }
  for (int64_t i = 0; i < kPage; ++i) {
    rows[i].store(to + i * to_row);
  }
}

// Keys [width, block], values [block, width].
template <typename E>
void pack_rows(const E* page, int64_t width, E* keys, E* values, int64_t block, int64_t first) {
  for (int64_t at = 0; at < width; at += kPage) {
    transpose(page + at, 2 * width, keys + at * block + first, block);
  }
  for (int64_t token = 0; token < kPage; ++token) {
    std::memcpy(values + (first + token) * width, page + token * 2 * width + width,
                width * sizeof(E));
  }
}

// What matrix units take: pairs of a key's elements across 16 tokens, [block / 16, width / 2, 16, 2],
// and pairs of tokens across 16 elements of a value, [width / 16, block / 2, 16, 2].
void pack_pairs(const uint16_t* page, int64_t width, uint16_t* keys, uint16_t* values,
                int64_t block, int64_t first) {
  for (int64_t at = 0; at < width / 2; at += kPage) {
    transpose(reinterpret_cast<const uint32_t*>(page) + at, width,
              reinterpret_cast<uint32_t*>(keys + first * width) + at * kPage, kPage);
  }
  for (int64_t at = 0; at < width; at += kPage) {
    uint16_t* to = values + at * block + first * kPage;
    for (int64_t token = 0; token < kPage; token += 2) {
      const uint16_t* even = page + token * 2 * width + width + at;
      Row<uint16_t> first_half, second_half;
      zip(Row<uint16_t>::load(even), Row<uint16_t>::load(even + 2 * width), first_half,
          second_half);
      first_half.store(to + token * kPage);
      second_half.store(to + (token + 1) * kPage);
    }
  }
}

// `tokens` tokens of a page in 8-bit floats, as what they stand for.
template <typename T>
void widen_page(const c10::Float8_e4m3fn* page, int64_t tokens, const PackArgs& args, void* to) {
  for (int64_t half = 0; half < 2 * tokens; ++half) {
    const Vec scale(half % 2 == 0 ? args.key_scale : args.value_scale);
    for (int64_t at = 0; at < args.width; at += kLanes) {
      store(static_cast<T*>(to) + half * args.width + at,
            widen(page + half * args.width + at) * scale, std::min(args.width - at, kLanes));
    }
  }
}

void widen_page(const c10::Float8_e4m3fn* page, int64_t tokens, const PackArgs& args, void* to) {
  switch (args.kind) {
    case Kind::kFloat:
      return widen_page<float>(page, tokens, args, to);
    case Kind::kBFloat16:
      return widen_page<c10::BFloat16>(page, tokens, args, to);
    default:
      return widen_page<c10::Half>(page, tokens, args, to);
  }
}

template <typename E>
void pack(const PackArgs& args) {
  const int64_t size = kPage * 2 * args.width, half = args.block * args.width;
  at::parallel_for(0, args.count * args.heads, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<E> cut(size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t which = i / args.heads, head = i % args.heads;
      const int64_t at = (args.pages[which] * args.heads + head) * size;
      const int64_t tokens = args.tokens[which];
      const bool is_wide = args.cache_kind == args.kind;
      const E* page = is_wide ? static_cast<const E*>(args.cache) + at : cut.data();
      if (!is_wide) {
        widen_page(static_cast<const c10::Float8_e4m3fn*>(args.cache) + at, tokens, args,
                   cut.data());
      } else if (tokens < kPage) {
        std::copy(page, page + tokens * 2 * args.width, cut.begin());
        page = cut.data();
      }
      // What lies behind the last token may be anything, and must be finite.
      std::fill(cut.begin() + tokens * 2 * args.width, cut.end(), E(0));
      const int64_t block = args.places[which] * kPage / args.block;
      const int64_t first = args.places[which] * kPage % args.block;
      E* keys = static_cast<E*>(args.copy) + (block * args.heads + head) * 2 * half;
      if constexpr (sizeof(E) == 2) {
        if (args.in_pairs) {
          pack_pairs(page, args.width, keys, keys + half, args.block, first);
          continue;
        }
      }
      pack_rows(page, args.width, keys, keys + half, args.block, first);
    }
  });
}

}  // namespace

void pack_pages(const PackArgs& args) {
  if (args.kind == Kind::kFloat) {
    pack<uint32_t>(args);
  } else {
    pack<uint16_t>(args);
  }
}

}  // namespace specontext
