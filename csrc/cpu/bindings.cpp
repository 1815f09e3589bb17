// The kernels as torch operators; what a tensor must be is checked here.
#include "kernels.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>

namespace specontext {
namespace {

using at::Tensor;

Kind kind_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Kind::kFloat;
    case at::kBFloat16:
      return Kind::kBFloat16;
    case at::kHalf:
      return Kind::kHalf;
    case at::kFloat8_e4m3fn:
      return Kind::kFloat8;
    default:
      TORCH_CHECK(false, name, ": found ", tensor.scalar_type(),
                  "; use float32, bfloat16, float16 or, for what is stored, float8_e4m3fn.");
  }
}

void check(const Tensor& tensor, const char* name, int64_t dims, bool last_contiguous = true) {
  TORCH_CHECK(tensor.dim() == dims, name, ": found ", tensor.dim(), " dimensions, needed ", dims);
  TORCH_CHECK(!last_contiguous || tensor.size(-1) <= 1 || tensor.stride(-1) == 1, name,
              ": the last dimension must be contiguous");
}

void check_ints(const Tensor& tensor, const char* name, int64_t dims) {
  check(tensor, name, dims);
  TORCH_CHECK(tensor.scalar_type() == at::kInt, name, ": found ", tensor.scalar_type(),
              ", needed int32");
}

void check_floats(const Tensor& tensor, const char* name, int64_t dims) {
  check(tensor, name, dims);
  TORCH_CHECK(tensor.scalar_type() == at::kFloat, name, ": found ", tensor.scalar_type(),
              ", needed float32");
}

void sparse_decode_op(const Tensor& query, const Tensor& pages, const Tensor& table,
                      const Tensor& lengths, const Tensor& output, double scale, double soft_cap,
                      const std::optional<Tensor>& sinks, const std::optional<Tensor>& starts,
                      double key_scale, double value_scale) {
  check(query, "query", 3);
  check(pages, "pages", 3);
  check_ints(table, "table", 2);
  check_ints(lengths, "lengths", 1);
  check(output, "output", 3);
  const Kind kind = kind_of(query, "query"), page_kind = kind_of(pages, "pages");
  const int64_t heads = query.size(1), width = query.size(2), sequences = lengths.size(0);
  if (starts) {
    check_ints(*starts, "starts", 1);
  }
  const int64_t rows = starts ? starts->size(0) - 1 : query.size(0);
  TORCH_CHECK(kind != Kind::kFloat8 && (page_kind == kind || page_kind == Kind::kFloat8) &&
                  output.scalar_type() == query.scalar_type(),
              "query, pages and output must have one dtype of 16 or 32 bits, or pages 8-bit floats, "
              "found ",
              query.scalar_type(), ", ", pages.scalar_type(), " and ", output.scalar_type());
  TORCH_CHECK(pages.is_contiguous() && pages.size(1) == 16 && pages.size(2) == 2 * width,
              "pages: needed a contiguous [n, 16, ", 2 * width, "], found ", pages.sizes());
  TORCH_CHECK(output.is_contiguous() && output.sizes() == query.sizes(),
              "output: needed a contiguous tensor of query's shape, found ", output.sizes());
  if (rows <= 0) {
    return;
  }
  TORCH_CHECK(sequences % rows == 0 && sequences > 0 && heads % (sequences / rows) == 0 &&
                  table.size(0) == sequences,
              "lengths: found ", sequences, " and ", table.size(0), " rows of the table for ", rows,
              " rows of ", heads, " query heads");
  const int64_t kv_heads = sequences / rows;
  const int32_t* tokens = lengths.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < sequences; ++i) {
    TORCH_CHECK(0 <= tokens[i] && (tokens[i] + 15) / 16 <= table.size(1), "lengths: found ",
                tokens[i], " tokens in a table of ", table.size(1), " pages");
  }
  if (starts) {
    const int32_t* first = starts->const_data_ptr<int32_t>();
    TORCH_CHECK(first[0] == 0 && first[rows] <= query.size(0), "starts: found ", first[0], " to ",
                first[rows], " for ", query.size(0), " tokens");
    for (int64_t i = 0; i < sequences; ++i) {
      const int32_t own = first[i / kv_heads + 1] - first[i / kv_heads];
      TORCH_CHECK(0 <= own && (tokens[i] == 0 || own <= tokens[i]), "starts: found ", own,
                  " query tokens in a row that reads ", tokens[i]);
    }
  }
  if (sinks) {
    check_floats(*sinks, "sinks", 1);
    TORCH_CHECK(sinks->size(0) == heads, "sinks: found ", sinks->size(0), ", needed ", heads);
  }
  const DecodeArgs args{
      kind,
      page_kind,
      query.const_data_ptr(),
      query.stride(0),
      query.stride(1),
      starts ? starts->const_data_ptr<int32_t>() : nullptr,
      pages.const_data_ptr(),
      pages.size(0),
      table.const_data_ptr<int32_t>(),
      table.stride(0),
      tokens,
      sinks ? sinks->const_data_ptr<float>() : nullptr,
      output.mutable_data_ptr(),
      rows,
      kv_heads,
      heads / kv_heads,
      width,
      static_cast<float>(scale),
      static_cast<float>(soft_cap),
      static_cast<float>(key_scale),
      static_cast<float>(value_scale),
  };
  TORCH_CHECK(sparse_decode(args), "table: found a page that is none of the ", pages.size(0));
}

// Cut off at the largest 8-bit float; NaN stays.
template <typename T>
void to_float8(const T* from, int64_t count, float scale, c10::Float8_e4m3fn* to) {
  constexpr float kLargest = 448.f;
  for (int64_t i = 0; i < count; ++i) {
    to[i] = c10::Float8_e4m3fn(
        std::clamp(static_cast<float>(from[i]) / scale, -kLargest, kLargest));
  }
}

// `count` elements of `kind`, kept as they are, or as 8-bit floats.
void store_row(Kind kind, bool as_float8, const void* from, int64_t count, float scale, void* to) {
  if (!as_float8) {
    std::memcpy(to, from, count * (kind == Kind::kFloat ? 4 : 2));
    return;
  }
  auto* into = static_cast<c10::Float8_e4m3fn*>(to);
  switch (kind) {
    case Kind::kFloat:
      return to_float8(static_cast<const float*>(from), count, scale, into);
    case Kind::kBFloat16:
      return to_float8(static_cast<const c10::BFloat16*>(from), count, scale, into);
    default:
      return to_float8(static_cast<const c10::Half*>(from), count, scale, into);
  }
}

void write_kv_op(const Tensor& key, const Tensor& value, const Tensor& kv_cache,
                 const Tensor& slots, double key_scale, double value_scale) {
  check(key, "key", 3);
  check(value, "value", 3);
  check(kv_cache, "kv_cache", 4);
  check(slots, "slots", 1);
  const int64_t heads = kv_cache.size(1), width = kv_cache.size(3) / 2, count = slots.size(0);
  const int64_t page_size = kv_cache.size(2), places = kv_cache.size(0) * page_size;
  TORCH_CHECK(slots.scalar_type() == at::kLong, "slots: found ", slots.scalar_type(),
              ", needed int64");
  TORCH_CHECK(kv_cache.is_contiguous(), "kv_cache must be contiguous");
  const Kind kind = kind_of(key, "key");
  const bool as_float8 = kv_cache.scalar_type() == at::kFloat8_e4m3fn;
  TORCH_CHECK(kind != Kind::kFloat8 && value.scalar_type() == key.scalar_type() &&
                  (as_float8 || kv_cache.scalar_type() == key.scalar_type()),
              "key, value and kv_cache must have one dtype of 16 or 32 bits, or kv_cache 8-bit "
              "floats, found ",
              key.scalar_type(), ", ", value.scalar_type(), " and ", kv_cache.scalar_type());
  for (const Tensor* each : {&key, &value}) {
    TORCH_CHECK(each->size(0) >= count && each->size(1) == heads && each->size(2) == width,
                "key, value: needed [>= ", count, ", ", heads, ", ", width, "], found ",
                each->sizes());
  }
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  TORCH_CHECK(std::all_of(slot, slot + count, [&](int64_t at) { return at < places; }),
              "slots: found one beyond the ", places, " of the cache");
  const int64_t bytes = width * kv_cache.element_size(), element = key.element_size();
  const float by_key = static_cast<float>(key_scale), by_value = static_cast<float>(value_scale);
  const char* keys = static_cast<const char*>(key.const_data_ptr());
  const char* values = static_cast<const char*>(value.const_data_ptr());
  char* cache = static_cast<char*>(kv_cache.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 16384 / (heads * bytes));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (slot[i] < 0) {
        continue;
      }
      const int64_t block = slot[i] / page_size, offset = slot[i] % page_size;
      for (int64_t head = 0; head < heads; ++head) {
        char* to = cache + ((block * heads + head) * page_size + offset) * 2 * bytes;
        store_row(kind, as_float8, keys + (i * key.stride(0) + head * key.stride(1)) * element,
                  width, by_key, to);
        store_row(kind, as_float8,
                  values + (i * value.stride(0) + head * value.stride(1)) * element, width,
                  by_value, to + bytes);
      }
    }
  });
}

// Rows of a workspace whose pages lie behind one another.
struct Rows {
  int64_t first, count;
};

// Checks what scoring and selection share.
void check_rows(const Tensor& page_max, const Tensor& page_lse, const Tensor& seq_lens,
                const Tensor& starts, const Tensor& block_table, Rows rows,
                const Tensor& min_pages) {
  check_floats(page_max, "page_max", 2);
  check_floats(page_lse, "page_lse", 2);
  check_ints(seq_lens, "seq_lens", 1);
  check_ints(starts, "starts", 1);
  check_ints(block_table, "block_table", 2);
  check_ints(min_pages, "pages of a budget", 1);
  TORCH_CHECK(page_max.sizes() == page_lse.sizes() && page_max.stride(0) == page_lse.stride(0),
              "page_max, page_lse: found ", page_max.sizes(), " and ", page_lse.sizes());
  TORCH_CHECK(rows.first >= 0 && rows.count >= 0 && starts.size(0) >= rows.count &&
                  seq_lens.size(0) >= rows.first + rows.count &&
                  min_pages.size(0) >= rows.first + rows.count &&
                  block_table.size(0) >= rows.first + rows.count,
              "rows: found ", rows.first, " to ", rows.first + rows.count, " of ", seq_lens.size(0),
              " lengths, ", min_pages.size(0), " budgets, ", block_table.size(0), " block tables and ",
              starts.size(0), " starts");
  const int32_t* tokens = seq_lens.const_data_ptr<int32_t>() + rows.first;
  const int32_t* start = starts.const_data_ptr<int32_t>();
  const int32_t* enough = min_pages.const_data_ptr<int32_t>() + rows.first;
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t pages = (static_cast<int64_t>(tokens[row]) + 15) / 16;
    TORCH_CHECK(tokens[row] >= 0 && pages <= block_table.size(1), "seq_lens: found ", tokens[row],
                " tokens in a block table of ", block_table.size(1), " pages");
    TORCH_CHECK(pages <= enough[row] ||
                    (start[row] >= 0 && start[row] + pages <= page_max.size(1)),
                "starts: ", pages, " pages from ", start[row], " exceed the workspace of ",
                page_max.size(1));
  }
}

void score_pages_op(const Tensor& queries, const Tensor& keys, const Tensor& block_table,
                    const Tensor& seq_lens, const Tensor& starts, const Tensor& page_max,
                    const Tensor& page_lse, int64_t first_row, int64_t num_rows,
                    const Tensor& min_pages, int64_t first_token, int64_t keyless) {
  check(queries, "queries", 3);
  check(keys, "keys", 4);
  check_rows(page_max, page_lse, seq_lens, starts, block_table, {first_row, num_rows}, min_pages);
  const int64_t heads = keys.size(1), width = keys.size(3);
  const Kind query_kind = kind_of(queries, "queries");
  TORCH_CHECK(query_kind != Kind::kFloat8 && queries.size(2) == width &&
                  queries.size(1) % heads == 0 && queries.size(0) >= first_row + num_rows &&
                  queries.size(1) == page_max.size(0) && keys.size(2) == 16,
              "queries: found ", queries.sizes(), " for keys of ", keys.sizes(), " and ",
              page_max.size(0), " rows of scores");
  TORCH_CHECK(first_token >= 0 && keyless >= 0, "first_token and keyless must not be negative");
  const ScoreArgs args{
      query_kind,
      kind_of(keys, "keys"),
      queries.const_data_ptr(),
      queries.stride(0),
      queries.stride(1),
      keys.const_data_ptr(),
      keys.stride(0),
      keys.stride(1),
      keys.stride(2),
      keys.size(0),
      block_table.const_data_ptr<int32_t>(),
      block_table.stride(0),
      seq_lens.const_data_ptr<int32_t>(),
      starts.const_data_ptr<int32_t>(),
      page_max.mutable_data_ptr<float>(),
      page_lse.mutable_data_ptr<float>(),
      min_pages.const_data_ptr<int32_t>(),
      page_max.stride(0),
      first_row,
      num_rows,
      heads,
      queries.size(1) / heads,
      width,
      first_token,
      keyless,
  };
  TORCH_CHECK(score_pages(args), "block_table: found a block that is none of the ", keys.size(0));
}

void select_pages_op(const Tensor& page_max, const Tensor& page_lse, const Tensor& seq_lens,
                     const Tensor& starts, const Tensor& block_table, const Tensor& pages,
                     const Tensor& lengths, const Tensor& kept_mass, int64_t first_row,
                     int64_t num_rows, const Tensor& totals, int64_t sink_pages,
                     int64_t recent_pages, const std::optional<Tensor>& fallbacks,
                     double fallback_threshold,
                     const std::optional<Tensor>& lanes, const std::optional<Tensor>& slot_of,
                     double margin) {
  check_rows(page_max, page_lse, seq_lens, starts, block_table, {first_row, num_rows}, totals);
  check_ints(pages, "pages", 2);
  check_ints(lengths, "lengths", 1);
  check_floats(kept_mass, "kept_mass", 2);
  const int64_t heads = kept_mass.size(1), last_row = first_row + num_rows;
  TORCH_CHECK(kept_mass.is_contiguous() && heads > 0 && page_max.size(0) % heads == 0 &&
                  kept_mass.size(0) >= last_row && lengths.size(0) >= last_row * heads &&
                  pages.size(0) >= last_row * heads,
              "kept_mass: found ", kept_mass.sizes(), " for ", last_row, " rows, ",
              page_max.size(0), " rows of scores and ", lengths.size(0), " lengths");
  TORCH_CHECK(sink_pages >= 0 && recent_pages >= 0, "pages of a budget: found ", sink_pages,
              " and ", recent_pages);
  if (fallbacks) {
    check_ints(*fallbacks, "fallbacks", 1);
    TORCH_CHECK(fallbacks->size(0) >= last_row, "fallbacks: found ", fallbacks->sizes(), " for ",
                last_row, " rows");
  }
  const int32_t* tokens = seq_lens.const_data_ptr<int32_t>();
  const int32_t* budget = totals.const_data_ptr<int32_t>();
  const int32_t* fallback = fallbacks ? fallbacks->const_data_ptr<int32_t>() : nullptr;
  int64_t longest = 0, widest = 0;
  for (int64_t row = first_row; row < last_row; ++row) {
    const int64_t count = (static_cast<int64_t>(tokens[row]) + 15) / 16;
    const int32_t most = fallback ? std::max(budget[row], fallback[row]) : budget[row];
    TORCH_CHECK(budget[row] > 0 && most > 0, "pages of a budget: found ", budget[row],
                " in row ", row);
    longest = std::max(longest, count);
    widest = std::max(widest, std::min<int64_t>(count, most));
  }
  TORCH_CHECK(widest <= pages.size(1), "pages: found ", pages.size(1), " columns for ", widest,
              " pages");
  TORCH_CHECK(lanes.has_value() == slot_of.has_value(), "lanes and slot_of go together");
  if (lanes) {
    check_ints(*lanes, "lanes", 1);
    check_ints(*slot_of, "slot_of", 3);
    TORCH_CHECK(slot_of->is_contiguous() && slot_of->size(1) == heads &&
                    slot_of->size(2) >= longest && lanes->size(0) >= last_row,
                "slot_of: found ", slot_of->sizes(), " for ", heads, " heads and ", longest,
                " pages");
    const int32_t* lane = lanes->const_data_ptr<int32_t>();
    TORCH_CHECK(std::all_of(lane + first_row, lane + last_row,
                            [&](int32_t each) { return each < slot_of->size(0); }),
                "lanes: found one beyond the ", slot_of->size(0));
  }
  select_pages({
      page_max.const_data_ptr<float>(),
      page_lse.const_data_ptr<float>(),
      page_max.stride(0),
      tokens,
      starts.const_data_ptr<int32_t>(),
      block_table.const_data_ptr<int32_t>(),
      block_table.stride(0),
      pages.mutable_data_ptr<int32_t>(),
      pages.stride(0),
      lengths.mutable_data_ptr<int32_t>(),
      kept_mass.mutable_data_ptr<float>(),
      first_row,
      num_rows,
      heads,
      page_max.size(0) / heads,
      budget,
      fallback,
      sink_pages,
      recent_pages,
      static_cast<float>(fallback_threshold),
      lanes ? lanes->const_data_ptr<int32_t>() : nullptr,
      slot_of ? slot_of->const_data_ptr<int32_t>() : nullptr,
      slot_of ? slot_of->size(2) : 0,
      static_cast<float>(margin),
  });
}

void pack_pages_op(const Tensor& kv_cache, const Tensor& pages, const Tensor& tokens,
                   const Tensor& places, const Tensor& copy, bool in_pairs, double key_scale,
                   double value_scale) {
  check(kv_cache, "kv_cache", 4);
  check_ints(pages, "pages", 1);
  check_ints(tokens, "tokens", 1);
  check_ints(places, "places", 1);
  check(copy, "copy", 4);
  const int64_t count = pages.size(0), heads = kv_cache.size(1), width = kv_cache.size(3) / 2;
  const int64_t bytes = copy.element_size(), block = copy.size(2) / 2;
  const Kind kind = kind_of(copy, "copy"), cache_kind = kind_of(kv_cache, "kv_cache");
  TORCH_CHECK(kv_cache.is_contiguous() && kv_cache.size(2) == 16 && kv_cache.size(3) == 2 * width &&
                  width % (in_pairs ? 32 : 16) == 0 && (bytes == 4 || bytes == 2) &&
                  (bytes == 2 || !in_pairs),
              "kv_cache: needed contiguous pages of 16 tokens, a copy of 2 or 4 bytes an element, "
              "heads of ",
              in_pairs ? 32 : 16, " elements or a multiple, found ", kv_cache.sizes(), " and ",
              bytes, " bytes");
  TORCH_CHECK(copy.is_contiguous() && (cache_kind == kind || cache_kind == Kind::kFloat8) &&
                  copy.size(1) == heads && copy.size(3) == width && block % 16 == 0 &&
                  copy.size(2) == 2 * block,
              "copy: found ", copy.sizes(), " for pages of ", kv_cache.sizes());
  TORCH_CHECK(tokens.size(0) == count && places.size(0) == count, "tokens, places: found ",
              tokens.size(0), " and ", places.size(0), " for ", count, " pages");
  const PackArgs args{kind,
                      cache_kind,
                      kv_cache.const_data_ptr(),
                      pages.const_data_ptr<int32_t>(),
                      tokens.const_data_ptr<int32_t>(),
                      places.const_data_ptr<int32_t>(),
                      copy.mutable_data_ptr(),
                      count,
                      heads,
                      width,
                      block,
                      in_pairs,
                      static_cast<float>(key_scale),
                      static_cast<float>(value_scale)};
  const int64_t room = copy.size(0) * block / 16;
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(args.pages[i] >= 0 && args.pages[i] < kv_cache.size(0),
                "pages: found one that is none of the ", kv_cache.size(0));
    TORCH_CHECK(args.tokens[i] >= 0 && args.tokens[i] <= 16 && args.places[i] >= 0 &&
                    args.places[i] < room,
                "tokens, places: found ", args.tokens[i], " tokens at ", args.places[i], " of ",
                room);
  }
  pack_pages(args);
}

}  // namespace
}  // namespace specontext

TORCH_LIBRARY(specontext_cpu, library) {
  library.def(
      "sparse_decode(Tensor query, Tensor pages, Tensor table, Tensor lengths, Tensor(a!) output, "
      "float scale, float soft_cap=0.0, Tensor? sinks=None, Tensor? starts=None, "
      "float key_scale=1.0, float value_scale=1.0) -> ()");
  library.def(
      "write_kv(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slots, float key_scale=1.0, "
      "float value_scale=1.0) -> ()");
  library.def(
      "score_pages(Tensor queries, Tensor keys, Tensor block_table, Tensor seq_lens, Tensor starts, "
      "Tensor(a!) page_max, Tensor(b!) page_lse, int first_row, int num_rows, "
      "Tensor min_pages, int first_token, int keyless) -> ()");
  library.def(
      "select_pages(Tensor page_max, Tensor page_lse, Tensor seq_lens, Tensor starts, "
      "Tensor block_table, Tensor(a!) pages, Tensor(b!) lengths, Tensor(c!) kept_mass, "
      "int first_row, int num_rows, Tensor totals, int sink_pages, int recent_pages, "
      "Tensor? fallbacks=None, float fallback_threshold=0.0, Tensor? lanes=None, "
      "Tensor? slot_of=None, float margin=0.0) -> ()");
  library.def(
      "pack_pages(Tensor kv_cache, Tensor pages, Tensor tokens, Tensor places, Tensor(a!) copy, "
      "bool in_pairs, float key_scale=1.0, float value_scale=1.0) -> ()");
}

TORCH_LIBRARY_IMPL(specontext_cpu, CPU, library) {
  library.impl("sparse_decode", &specontext::sparse_decode_op);
  library.impl("write_kv", &specontext::write_kv_op);
  library.impl("score_pages", &specontext::score_pages_op);
  library.impl("select_pages", &specontext::select_pages_op);
  library.impl("pack_pages", &specontext::pack_pages_op);
}
