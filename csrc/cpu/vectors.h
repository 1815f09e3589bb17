// Rows of floats of any kind, read as vectors of float32 and summed there.
//
// Written with torch's Vectorized, whose width follows CPU_CAPABILITY: 16 lanes with AVX-512, 8 with
// AVX2, 4 with NEON. Nothing is read or written beyond the lengths that are named.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>
#include <c10/util/Half.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace specontext {

using Vec = at::vec::Vectorized<float>;

constexpr int64_t kLanes = Vec::size();
constexpr int64_t kPage = 16;  // Tokens of a page.
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Query heads that are multiplied with a token at once: as many as registers hold sums of.
constexpr int kHeadsAtOnce = kLanes == 8 ? 2 : 4;
constexpr int kTokensAtOnce = 4;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The length of a row of float32 that is read in whole vectors.
inline int64_t padded(int64_t width) {
  return ceil_div(width, kLanes) * kLanes;
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// Eight 8-bit floats as float16 of 1/256 their value: the exponent's bias is larger by 8 there, and
// converting small numbers of these costs nothing. All ones stand for NaN.
inline __m128i to_half(__m128i bytes) {
  const __m128i wide = _mm_cvtepu8_epi16(bytes), magnitude = _mm_set1_epi16(0x7f);
  const __m128i unsigned_bits = _mm_and_si128(wide, magnitude);
  const __m128i sign = _mm_slli_epi16(_mm_andnot_si128(magnitude, wide), 8);
  const __m128i nan =
      _mm_and_si128(_mm_cmpeq_epi16(unsigned_bits, magnitude), _mm_set1_epi16(0x7fff));
  return _mm_or_si128(_mm_or_si128(_mm_slli_epi16(unsigned_bits, 7), sign), nan);
}
#endif

inline Vec widen_float8(const c10::Float8_e4m3fn* from) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i halves = _mm256_set_m128i(to_half(_mm_srli_si128(bytes, 8)), to_half(bytes));
  return Vec(_mm512_cvtph_ps(halves)) * Vec(256.f);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return Vec(_mm256_cvtph_ps(to_half(bytes))) * Vec(256.f);
#else
  alignas(64) float values[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    values[i] = static_cast<float>(from[i]);
  }
  return Vec::loadu(values);
#endif
}

template <typename T>
inline Vec widen(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return Vec::loadu(from);
  } else if constexpr (std::is_same_v<T, c10::Float8_e4m3fn>) {
    return widen_float8(from);
  } else {
    Vec out;
    at::vec::load_to_float<T>(from, out);
    return out;
  }
}

// The first `count` lanes, zeros in the others.
template <typename T>
inline Vec widen(const T* from, int64_t count) {
  std::array<T, kLanes> whole{};
  std::memcpy(whole.data(), from, count * sizeof(T));
  return widen(whole.data());
}

template <typename T>
inline void store(T* to, const Vec& values, int64_t count) {
  if constexpr (std::is_same_v<T, float>) {
    values.store(to, count);
  } else {
    at::vec::convert_from_float<T>(values, Vec(0.f)).store(to, count);
  }
}

inline float sum_of(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, v);
}

// NaN if there is one.
inline float max_of(const Vec& v) {
  return at::vec::vec_reduce_all<float>(
      [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, v);
}

// The four sums to `out`. Together they need fewer shuffles than alone.
inline void four_sums(const Vec* v, float* out) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 lanes = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
#else
  for (int i = 0; i < 4; ++i) {
    out[i] = sum_of(v[i]);
  }
#endif
}

// Dot products of G queries with `Tokens` (1 or 4) keys: out[g * out_stride + t].
template <typename T, int G, int Tokens>
inline void dot_block(const float* query, int64_t query_stride, const T* keys, int64_t key_stride,
                      int64_t width, float* out, int64_t out_stride) {
  Vec sums[G][Tokens];
  for (int g = 0; g < G; ++g) {
    for (int t = 0; t < Tokens; ++t) {
      sums[g][t] = Vec(0.f);
    }
  }
  const auto add = [&](int64_t at, const auto& key_at) {
    Vec key[Tokens];
    for (int t = 0; t < Tokens; ++t) {
      key[t] = key_at(keys + t * key_stride + at);
    }
    for (int g = 0; g < G; ++g) {
      const Vec q = Vec::loadu(query + g * query_stride + at);
      for (int t = 0; t < Tokens; ++t) {
        sums[g][t] = at::vec::fmadd(q, key[t], sums[g][t]);
      }
    }
  };
  int64_t at = 0;
  for (; at + kLanes <= width; at += kLanes) {
    add(at, [](const T* from) { return widen(from); });
  }
  if (at < width) {
    add(at, [&](const T* from) { return widen(from, width - at); });
  }
  for (int g = 0; g < G; ++g) {
    if constexpr (Tokens == 4) {
      four_sums(sums[g], out + g * out_stride);
    } else {
      out[g * out_stride] = sum_of(sums[g][0]);
    }
  }
}

// Ask for memory that is read soon. Pages lie anywhere, so the processor does not foresee the next. It
// is to come no nearer than the second cache: with what is at work, what is asked for would fill the
// first and push some of itself out.
template <typename T>
inline void ask_for(const T* from, int64_t elements) {
  constexpr int64_t kLine = 64;
  for (int64_t byte = 0; byte < elements * static_cast<int64_t>(sizeof(T)); byte += kLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + byte, 0, 2);
  }
}

// Dot products of G queries (rows of `padded(width)` float32, zeros at the end) with `tokens` keys.
// `ahead`, if it is not null, is asked for meanwhile: `ahead_width` elements a token.
template <typename T, int G>
inline void dots(const float* query, int64_t query_stride, const T* keys, int64_t key_stride,
                 int64_t tokens, int64_t width, float* out, int64_t out_stride,
                 const T* ahead = nullptr, int64_t ahead_width = 0) {
  int64_t t = 0;
  for (; t + kTokensAtOnce <= tokens; t += kTokensAtOnce) {
    if (ahead != nullptr) {
      ask_for(ahead + t * ahead_width, kTokensAtOnce * ahead_width);
    }
    dot_block<T, G, kTokensAtOnce>(query, query_stride, keys + t * key_stride, key_stride, width,
                                   out + t, out_stride);
  }
  for (; t < tokens; ++t) {
    dot_block<T, G, 1>(query, query_stride, keys + t * key_stride, key_stride, width, out + t,
                       out_stride);
  }
}

// Call `body` with the number of query heads, at most kHeadsAtOnce, as a constant.
template <typename F>
inline void with_heads(int64_t heads, const F& body) {
  switch (heads) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      if constexpr (kHeadsAtOnce >= 3) {
        return body(std::integral_constant<int, 3>());
      }
      break;
    case 4:
      if constexpr (kHeadsAtOnce >= 4) {
        return body(std::integral_constant<int, 4>());
      }
      break;
  }
}

// `heads` query rows as float32, times `scale`, in rows of `padded(width)`.
template <typename T>
inline void read_queries(const T* query, int64_t query_stride, int64_t heads, int64_t width,
                         float scale, float* out) {
  const int64_t row = padded(width);
  for (int64_t head = 0; head < heads; ++head) {
    const T* from = query + head * query_stride;
    float* to = out + head * row;
    int64_t at = 0;
    for (; at + kLanes <= width; at += kLanes) {
      (widen(from + at) * Vec(scale)).store(to + at);
    }
    if (at < width) {
      (widen(from + at, width - at) * Vec(scale)).store(to + at);
    }
  }
}

}  // namespace specontext
