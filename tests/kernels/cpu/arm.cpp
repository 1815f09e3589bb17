// The kernels on plain memory, against sums in double: for machines without torch's libraries, of
// which only headers are used. Prints each case that is off, all selections, and a last line.
#include "kernels.h"
#include "vectors.h"

#include <c10/util/ParallelGuard.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

// What the headers of torch expect of its libraries: here, one thread.
namespace c10 {
ParallelGuard::ParallelGuard(bool) {}
ParallelGuard::~ParallelGuard() {}
namespace detail {
void torchCheckFail(const char*, const char*, uint32_t, const char* what) {
  std::puts(what);
  std::abort();
}
void torchCheckFail(const char*, const char*, uint32_t, const std::string& what) {
  std::puts(what.c_str());
  std::abort();
}
void torchInternalAssertFail(const char*, const char*, uint32_t, const char*, const char* what) {
  std::puts(what);
  std::abort();
}
}  // namespace detail
}  // namespace c10
namespace at {
int get_num_threads() { return 1; }
int get_thread_num() { return 0; }
bool in_parallel_region() { return false; }
namespace internal {
void set_thread_num(int) {}
void lazy_init_num_threads() {}
}  // namespace internal
}  // namespace at

namespace {

using namespace specontext;

template <typename T>
constexpr Kind kKind = std::is_same_v<T, float>           ? Kind::kFloat
                       : std::is_same_v<T, c10::BFloat16> ? Kind::kBFloat16
                                                          : Kind::kHalf;
// Of an output, which is rounded to T.
template <typename T>
constexpr double kTolerance = std::is_same_v<T, float>           ? 1e-5
                              : std::is_same_v<T, c10::BFloat16> ? 8e-3
                                                                 : 1e-3;
constexpr int kPages = 64;
std::mt19937 random_bits(7);
int cases = 0, wrong = 0;

float number() {
  return (static_cast<int>(random_bits() % 4001) - 2000) / 1000.f;
}

template <typename T>
std::vector<T> numbers(size_t count) {
  std::vector<T> made(count);
  std::generate(made.begin(), made.end(), [] { return static_cast<T>(number()); });
  return made;
}

template <typename T>
double dot(const T* a, const T* b, int width) {
  double sum = 0;
  for (int d = 0; d < width; ++d) {
    sum += static_cast<double>(static_cast<float>(a[d])) * static_cast<float>(b[d]);
  }
  return sum;
}

// Whether a value is near; NaN is not.
bool near(double value, double expected, double tolerance) {
  return std::abs(value - expected) <= tolerance * (1 + std::abs(expected));
}

void count(const char* kernel, Kind kind, int group, int width, bool right) {
  ++cases;
  if (!right) {
    ++wrong;
    std::printf("%s: kind %d, group %d, width %d\n", kernel, static_cast<int>(kind), group, width);
  }
}

template <typename T>
void decode(int rows, int heads, int group, int width, bool with_sinks, float cap) {
  const int columns = 40, queries = heads * group;
  const auto query = numbers<T>(rows * queries * width);
  auto pages = numbers<T>(static_cast<size_t>(kPages) * kPage * 2 * width);
  // Page 0 is in no table.
  std::fill_n(pages.begin(), kPage * 2 * width, std::numeric_limits<T>::quiet_NaN());
  std::vector<T> out(query.size(), std::numeric_limits<T>::quiet_NaN());
  std::vector<int32_t> table(rows * heads * columns), lengths(rows * heads);
  for (auto& page : table) page = 1 + random_bits() % (kPages - 1);
  for (auto& length : lengths) length = 1 + random_bits() % (columns * kPage);
  const auto sinks = numbers<float>(queries);
  const float scale = 0.125f;
  DecodeArgs args{kKind<T>};
  args.query = query.data();
  args.query_token = queries * width;
  args.query_head = width;
  args.pages = pages.data();
  args.num_pages = kPages;
  args.table = table.data();
  args.table_row = columns;
  args.lengths = lengths.data();
  args.sinks = with_sinks ? sinks.data() : nullptr;
  args.output = out.data();
  args.rows = rows;
  args.kv_heads = heads;
  args.group = group;
  args.width = width;
  args.scale = scale;
  args.soft_cap = cap;
  bool right = sparse_decode(args);
  for (int row = 0; row < rows * queries; ++row) {
    const int sequence = row / group;
    const auto key = [&](int t) {
      const int page = table[sequence * columns + t / kPage];
      return &pages[(static_cast<size_t>(page) * kPage + t % kPage) * 2 * width];
    };
    std::vector<double> weights(lengths[sequence]);
    double sum = with_sinks ? std::exp(sinks[row % queries]) : 0;
    for (size_t t = 0; t < weights.size(); ++t) {
      double logit = scale * dot(&query[row * width], key(t), width);
      logit = cap > 0 ? cap * std::tanh(logit / cap) : logit;
      sum += weights[t] = std::exp(logit);
    }
    for (int d = 0; d < width; ++d) {
      double value = 0;
      for (size_t t = 0; t < weights.size(); ++t) {
        value += weights[t] / sum * static_cast<float>(key(t)[width + d]);
      }
      right &= near(static_cast<float>(out[row * width + d]), value, kTolerance<T>);
    }
  }
  count("decode", kKind<T>, group, width, right);
}

template <typename T>
void score(int rows, int heads, int group, int width) {
  const int columns = 30, queries = heads * group, capacity = rows * columns;
  const auto query = numbers<T>(rows * queries * width);
  const auto keys = numbers<T>(static_cast<size_t>(kPages) * heads * kPage * width);
  std::vector<int32_t> table(rows * columns), lengths(rows), starts(rows);
  for (auto& page : table) page = random_bits() % kPages;
  for (int row = 0; row < rows; ++row) {
    lengths[row] = 2 + random_bits() % (columns * kPage - 2);
    starts[row] = row * columns;
  }
  std::vector<float> largest(queries * capacity), lse(queries * capacity);
  ScoreArgs args{kKind<T>, kKind<T>};
  args.queries = query.data();
  args.query_row = queries * width;
  args.query_head = width;
  args.keys = keys.data();
  args.key_block = heads * kPage * width;
  args.key_head = kPage * width;
  args.key_token = width;
  args.num_blocks = kPages;
  args.block_table = table.data();
  args.table_row = columns;
  args.seq_lens = lengths.data();
  args.starts = starts.data();
  args.page_max = largest.data();
  args.page_lse = lse.data();
  args.capacity = capacity;
  args.num_rows = rows;
  args.heads = heads;
  args.group = group;
  args.width = width;
  const std::vector<int32_t> nothing(rows);
  args.min_pages = nothing.data();
  args.first_token = 1;
  bool right = score_pages(args);
  for (int row = 0; row < rows; ++row) {
    for (int head = 0; head < queries; ++head) {
      for (int page = 0; page * kPage < lengths[row]; ++page) {
        double best = -INFINITY, sum = 0;
        const int end = std::min<int>(lengths[row], (page + 1) * kPage);
        for (int t = std::max<int>(1, page * kPage); t < end; ++t) {
          const size_t block = table[row * columns + page] * heads + head / group;
          const double logit = dot(&query[(row * queries + head) * width],
                                   &keys[(block * kPage + t % kPage) * width], width) /
                               std::sqrt(width);
          best = std::max(best, logit);
          sum += std::exp(logit);
        }
        const int at = head * capacity + starts[row] + page;
        right &= near(largest[at], best, 1e-5) && near(lse[at], std::log(sum), 1e-5);
      }
    }
  }
  count("score", kKind<T>, group, width, right);
}

// Prints what is selected, to be compared with another machine's.
void select() {
  const int rows = 5, heads = 3, group = 3, columns = 120, capacity = rows * columns, budget = 24;
  const auto largest = numbers<float>(heads * group * capacity);
  auto lse = largest;
  for (auto& value : lse) value += std::abs(number());
  std::vector<int32_t> table(capacity), lengths(rows), starts(rows);
  std::vector<int32_t> pages(rows * heads * budget, -1), kept(rows * heads);
  std::vector<float> mass(rows * heads);
  for (int i = 0; i < capacity; ++i) table[i] = i;
  for (int row = 0; row < rows; ++row) {
    lengths[row] = 100 + 400 * row - (row == 4);
    starts[row] = row * columns;
  }
  SelectArgs args{largest.data(), lse.data(), capacity};
  args.seq_lens = lengths.data();
  args.starts = starts.data();
  args.block_table = table.data();
  args.table_row = columns;
  args.pages = pages.data();
  args.pages_row = budget;
  args.lengths = kept.data();
  args.kept_mass = mass.data();
  args.num_rows = rows;
  args.heads = heads;
  args.group = group;
  const std::vector<int32_t> totals(rows, budget);
  args.totals = totals.data();
  args.sink_pages = 1;
  args.recent_pages = 2;
  select_pages(args);
  for (int row = 0; row < rows * heads; ++row) {
    std::printf("selected %d, %.4f:", kept[row], mass[row]);
    for (int i = 0; i * kPage < kept[row]; ++i) std::printf(" %d", pages[row * budget + i]);
    std::puts("");
  }
}

template <typename T>
void all_shapes() {
  for (int group : {1, 3, 4, 8}) {
    for (int width : {64, 72, 128}) {
      decode<T>(3, 2, group, width, false, 0.f);
      decode<T>(2, 2, group, width, true, 3.f);
      score<T>(3, 2, group, width);
    }
  }
}

}  // namespace

int main() {
  all_shapes<float>();
  all_shapes<c10::BFloat16>();
  all_shapes<c10::Half>();
  select();
  std::printf("%d lanes: %d cases, %d wrong\n", static_cast<int>(kLanes), cases, wrong);
  return wrong != 0;
}
