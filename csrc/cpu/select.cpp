// The pages that a row reads: sinks, recents, and the best of the rest.
#include "kernels.h"
#include "vectors.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <functional>
#include <vector>

namespace specontext {
namespace {

// What one thread works with, for rows of any length.
struct Scratch {
  std::vector<float> scores, totals;
  std::vector<uint64_t> ranks, sorted;
};

// The log-sum-exp of what is finite in both; +inf, which makes every weight zero, if nothing is.
float log_sum_exp(const float* page_max, const float* page_lse, int64_t count) {
  float largest = kMinusInfinity;
  for (int64_t page = 0; page < count; ++page) {
    if (std::isfinite(page_max[page]) && std::isfinite(page_lse[page])) {
      largest = std::max(largest, page_lse[page]);
    }
  }
  if (largest == kMinusInfinity) {
    return -kMinusInfinity;
  }
  Vec sum(0.f);
  alignas(64) float part[kLanes];
  for (int64_t first = 0; first < count; first += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t page = first + lane;
      const bool counts =
          page < count && std::isfinite(page_max[page]) && std::isfinite(page_lse[page]);
      part[lane] = counts ? page_lse[page] - largest : kMinusInfinity;
    }
    sum = sum + Vec::loadu(part).exp();
  }
  return largest + std::log(sum_of(sum));
}

// Larger for what is chosen first: by score, then the older page.
uint64_t rank(float score, int64_t page) {
  uint32_t bits;
  score += 0.f;  // -0 is 0.
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(page));
}

// Fills the row and head of the selection; returns the kept mass.
float select_head(const SelectArgs& args, int64_t row, int64_t head, const int32_t* totals,
                  Scratch& scratch) {
  const int64_t at = args.first_row + row, tokens = args.seq_lens[at], budget = totals[at];
  const int64_t count = ceil_div(tokens, kPage), sequence = at * args.heads + head;
  const int32_t* names = args.block_table + at * args.table_row;
  int32_t* pages = args.pages + sequence * args.pages_row;
  const auto keep = [&](int64_t page) {
    *pages++ = names[page] * static_cast<int32_t>(args.heads) + static_cast<int32_t>(head);
  };
  if (count <= budget) {
    for (int64_t page = 0; page < count; ++page) {
      keep(page);
    }
    args.lengths[sequence] = static_cast<int32_t>(tokens);
    return 1.f;
  }
  const int64_t start = head * args.group * args.capacity + args.starts[row];
  scratch.scores.assign(count, kMinusInfinity);
  scratch.totals.resize(args.group);
  for (int64_t g = 0; g < args.group; ++g) {
    const float* page_max = args.page_max + start + g * args.capacity;
    const float* page_lse = args.page_lse + start + g * args.capacity;
    const float total = scratch.totals[g] = log_sum_exp(page_max, page_lse, count);
    for (int64_t page = 0; page < count; ++page) {
      if (std::isfinite(page_max[page]) && std::isfinite(page_lse[page])) {
        scratch.scores[page] = std::max(scratch.scores[page], page_max[page] - total);
      }
    }
  }
  if (args.lanes != nullptr && args.lanes[at] >= 0) {
    const int32_t* slots = args.slot_of + (args.lanes[at] * args.heads + head) * args.slot_row;
    for (int64_t page = 0; page < count; ++page) {
      scratch.scores[page] += slots[page] >= 0 ? args.margin : 0.f;
    }
  }
  scratch.ranks.resize(count);
  for (int64_t page = 0; page < count; ++page) {
    const bool forced = page < args.sink_pages || page >= count - args.recent_pages;
    scratch.ranks[page] = rank(forced ? -kMinusInfinity : scratch.scores[page], page);
  }
  scratch.sorted = scratch.ranks;
  const auto last = scratch.sorted.begin() + budget - 1;
  std::nth_element(scratch.sorted.begin(), last, scratch.sorted.end(), std::greater<uint64_t>());
  const uint64_t least = *last;
  float mass = 0.f;
  for (int64_t page = 0; page < count; ++page) {
    if (scratch.ranks[page] < least) {
      continue;
    }
    keep(page);
    for (int64_t g = 0; g < args.group; ++g) {
      const float page_max = args.page_max[start + g * args.capacity + page];
      const float page_lse = args.page_lse[start + g * args.capacity + page];
      if (std::isfinite(page_max) && std::isfinite(page_lse)) {
        mass += std::exp(page_lse - scratch.totals[g]);
      }
    }
  }
  args.lengths[sequence] = static_cast<int32_t>(tokens - (count - budget) * kPage);
  return mass / args.group;
}

}  // namespace

void select_pages(const SelectArgs& args) {
  const int64_t sequences = args.num_rows * args.heads;
  at::parallel_for(0, sequences, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / args.heads, head = i % args.heads;
      args.kept_mass[(args.first_row + row) * args.heads + head] =
          select_head(args, row, head, args.totals, scratch);
    }
  });
  if (args.fallbacks == nullptr) {
    return;
  }
  // A row falls back as a whole, by the mean over its heads; its kept mass stays what it was.
  at::parallel_for(0, args.num_rows, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t row = begin; row < end; ++row) {
      const float* kept = args.kept_mass + (args.first_row + row) * args.heads;
      float sum = 0.f;
      for (int64_t head = 0; head < args.heads; ++head) {
        sum += kept[head];
      }
      if (sum / args.heads < args.fallback_threshold) {
        for (int64_t head = 0; head < args.heads; ++head) {
          select_head(args, row, head, args.fallbacks, scratch);
        }
      }
    }
  });
}

}  // namespace specontext
