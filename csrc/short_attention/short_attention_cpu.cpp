// Scores stand the other way round, a row for each key and a column for each query: then a softmax runs down columns,
// all lanes of a vector alike, and no number is ever moved across them. Operands of a product are pairs of bf16 along
// the axis that is summed over, as the processor's instruction takes them; `product` reads the first one as it lies and
// wants the second as rows of pairs.
#include "short_attention.h"

#include <cmath>
#include <memory>

namespace growth_ds::GROWTH_DS_ISA {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int ROWS = W == 16 ? 6 : 3, VECTORS = 4;  // of a block of results, which fills the registers

GROWTH_DS_INLINE Words load_words(const uint32_t* from) {
  Words out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

GROWTH_DS_INLINE void store_words(uint32_t* to, Words x) { std::memcpy(to, &x, sizeof x); }

// sum + the products of the lower and of the upper halves.
GROWTH_DS_INLINE Floats dot(Floats sum, Words a, Words b) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Floats)(a << 16) * (Floats)(b << 16);
  return sum + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

GROWTH_DS_INLINE Halves load_halves(const bf16* from) {
  Halves out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

GROWTH_DS_INLINE void store_halves(bf16* to, Halves x) { std::memcpy(to, &x, sizeof x); }

GROWTH_DS_INLINE Halves rounded(Floats x) {
  Halves out;
  store_fast(reinterpret_cast<bf16*>(&out), x);
  return out;
}

GROWTH_DS_INLINE Words pairs(Halves low, Halves high) { return widen(low) | (widen(high) << 16); }

// Pairs of the first operand: `row` and `pair` are steps in pairs.
struct Pairs {
  const uint32_t* data;
  int64_t row, pair;
};

Pairs rows_of(const bf16* data, int64_t stride) { return {reinterpret_cast<const uint32_t*>(data), stride / 2, 1}; }

template <int M, int V>
void product_block(Pairs a, const uint32_t* b, int64_t width, int64_t count, float* c, int64_t stride, bool add) {
  Floats sums[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[m][v] = add ? load(c + m * stride + v * W) : splat(0.0f);
  for (int64_t p = 0; p < count; ++p, b += width) {
    Words right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load_words(b + v * W);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      uint32_t one;
      std::memcpy(&one, a.data + m * a.row + p * a.pair, sizeof one);
      const Words left = Words{} + one;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] = dot(sums[m][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + m * stride + v * W, sums[m][v]);
}

template <int M>
void product_rows(Pairs a, const uint32_t* b, int64_t width, int64_t count, float* c, bool add) {
  int64_t i = 0;
  for (; i + VECTORS * W <= width; i += VECTORS * W) product_block<M, VECTORS>(a, b + i, width, count, c + i, width, add);
  for (; i < width; i += W) product_block<M, 1>(a, b + i, width, count, c + i, width, add);
}

// c (rows, width) = a (rows, 2 * count) b (2 * count, width), or c + that; width is a multiple of 16, b and c are dense.
void product(int64_t rows, Pairs a, const uint32_t* b, int64_t width, int64_t count, float* c, bool add = false) {
  for (; rows >= ROWS; rows -= ROWS, a.data += ROWS * a.row, c += ROWS * width)
    product_rows<ROWS>(a, b, width, count, c, add);
  if (rows >= 4) {
    product_rows<4>(a, b, width, count, c, add);
    rows -= 4, a.data += 4 * a.row, c += 4 * width;
  }
  for (; rows > 0; --rows, a.data += a.row, c += width) product_rows<1>(a, b, width, count, c, add);
}

// to[p][i] = (from[2p][i], from[2p + 1][i]); a row that is missing is zeros.
void pack_rows(const bf16* from, int64_t stride, int64_t rows, int64_t width, uint32_t* to) {
  for (int64_t r = 0; r < rows; r += 2, from += 2 * stride, to += width)
    for (int64_t i = 0; i < width; i += W) {
      const Halves high = r + 1 < rows ? load_halves(from + stride + i) : Halves{};
      store_words(to + i, pairs(load_halves(from + i), high));
    }
}

// Lanes of the two rows, `step` apart, that change places so that a square of W rows is transposed.
template <int STEP>
GROWTH_DS_INLINE void exchange(Words* rows) {
  Ints first, second;
#pragma GCC unroll 16
  for (int j = 0; j < W; ++j) {
    first[j] = j & STEP ? W + j - STEP : j;
    second[j] = j & STEP ? W + j : j + STEP;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & STEP) continue;
    const Words a = rows[i], b = rows[i + STEP];
    rows[i] = __builtin_shuffle(a, b, (Words)first);
    rows[i + STEP] = __builtin_shuffle(a, b, (Words)second);
  }
}

// to[p][r] = (from[r][2p], from[r][2p + 1]), for `lanes` rows: those from `rows` on are zeros.
void pack_columns(const bf16* from, int64_t stride, int64_t rows, int64_t width, int64_t lanes, uint32_t* to) {
  for (int64_t r = 0; r < lanes; r += W)
    for (int64_t i = 0; i < width / 2; i += W) {
      Words square[W];
      const int64_t count = width / 2 - i < W ? width / 2 - i : W;  // a row has no more, and nothing may lie behind it
      for (int64_t j = 0; j < W; ++j) {
        const auto* row = reinterpret_cast<const uint32_t*>(from + (r + j) * stride) + i;
        square[j] = Words{};
        if (r + j >= rows) continue;
        if (count == W)
          square[j] = load_words(row);
        else
          std::memcpy(&square[j], row, sizeof(uint32_t) * static_cast<size_t>(count));
      }
      if (W >= 16) exchange<8>(square);
      if (W >= 8) exchange<4>(square);
      exchange<2>(square);
      exchange<1>(square);
      for (int64_t j = 0; j < count; ++j) store_words(to + (i + j) * lanes + r, square[j]);
    }
}

// Memory of a thread: every piece is a multiple of 16 numbers of 4 bytes.
class Room {
 public:
  explicit Room(int64_t numbers) : block_(new uint32_t[static_cast<size_t>(numbers) + 16]) {
    next_ = block_.get() + (64 - reinterpret_cast<uintptr_t>(block_.get()) % 64) % 64 / 4;
  }
  template <typename T = uint32_t>
  T* take(int64_t numbers) {
    uint32_t* piece = next_;
    next_ += numbers;
    return reinterpret_cast<T*>(piece);
  }

 private:
  std::unique_ptr<uint32_t[]> block_;
  uint32_t* next_;
};

bf16* at(const HeadsView& view, const AttentionSizes& s, int64_t head) {
  return static_cast<bf16*>(view.data) + head / s.heads * view.batch + head % s.heads * view.head;
}

void write_rows(const float* from, int64_t rows, int64_t width, bf16* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, from += width, to += stride)
    for (int64_t i = 0; i < width; i += W) store_fast(to + i, load(from + i));
}

// scores (keys, lanes), unscaled -> their softmax down the columns: rows of bf16, and the same in pairs of keys.
void softmax(float* scores, const bool* seen, int64_t keys, int64_t lanes, float scale, bf16* weights, uint32_t* in_pairs) {
  for (int64_t i = 0; i < lanes; i += W) {
    float* column = scores + i;
    Floats top = splat(-INFINITY);
    for (int64_t t = 0; t < keys; ++t)
      if (!seen || seen[t]) top = larger(top, load(column + t * lanes));
    const Floats shift = top * (scale * LOG2_E);
    Floats total = splat(0.0f);
    for (int64_t t = 0; t < keys; ++t) {
      const bool counts = !seen || seen[t];
      const Floats e = counts ? power_of_two(load(column + t * lanes) * (scale * LOG2_E) - shift) : splat(0.0f);
      total += e;
      store(column + t * lanes, e);
    }
    const Floats share = 1.0f / total;
    for (int64_t t = 0; t < keys; t += 2) {
      const Halves low = rounded(load(column + t * lanes) * share);
      Halves high = {};
      store_halves(weights + t * lanes + i, low);
      if (t + 1 < keys) {
        high = rounded(load(column + (t + 1) * lanes) * share);
        store_halves(weights + (t + 1) * lanes + i, high);
      }
      store_words(in_pairs + t / 2 * lanes + i, pairs(low, high));
    }
  }
}

// slopes (keys, lanes): of the probabilities -> scale * those of the scores, in both forms.
void softmax_backward(const float* slopes, const bf16* weights, int64_t keys, int64_t lanes, float scale,
                      bf16* of_scores, uint32_t* in_pairs) {
  for (int64_t i = 0; i < lanes; i += W) {
    Floats mean = splat(0.0f);
    for (int64_t t = 0; t < keys; ++t) mean += load(slopes + t * lanes + i) * load(weights + t * lanes + i);
    const auto of_score = [&](int64_t t) {
      return rounded((load(slopes + t * lanes + i) - mean) * (load(weights + t * lanes + i) * scale));
    };
    for (int64_t t = 0; t < keys; t += 2) {
      const Halves low = of_score(t), high = t + 1 < keys ? of_score(t + 1) : Halves{};
      store_halves(of_scores + t * lanes + i, low);
      if (t + 1 < keys) store_halves(of_scores + (t + 1) * lanes + i, high);
      store_words(in_pairs + t / 2 * lanes + i, pairs(low, high));
    }
  }
}

}  // namespace

void short_attention(GROWTH_DS_FORWARD) {
  const auto& s = sizes;
  const int64_t half = (s.keys + 1) / 2;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
  Room room(half * s.width + ATTENTION_BLOCK * (half + s.width / 2 + s.keys + s.width));
  auto* values = room.take(half * s.width);
  auto* asking = room.take(ATTENTION_BLOCK * s.width / 2);
  auto* scores = room.take<float>(ATTENTION_BLOCK * s.keys);
  auto* in_pairs = room.take(ATTENTION_BLOCK * half);
  auto* mixed = room.take<float>(ATTENTION_BLOCK * s.width);
  for (int64_t head = begin; head < end; ++head) {
    pack_rows(at(v, s, head), v.row, s.keys, s.width, values);
    for (int64_t first = 0; first < s.queries; first += ATTENTION_BLOCK) {
      const int64_t rows = s.queries - first < ATTENTION_BLOCK ? s.queries - first : ATTENTION_BLOCK;
      const int64_t lanes = lanes_of(rows);
      auto* shares = static_cast<bf16*>(weights) + head * weights_of(s) + first * s.keys;
      pack_columns(at(q, s, head) + first * q.row, q.row, rows, s.width, lanes, asking);
      product(s.keys, rows_of(at(k, s, head), k.row), asking, lanes, s.width / 2, scores);
      softmax(scores, seen ? seen + head / s.heads * s.keys : nullptr, s.keys, lanes, scale, shares, in_pairs);
      product(rows, {in_pairs, 1, lanes}, values, s.width, half, mixed);
      write_rows(mixed, rows, s.width, at(out, s, head) + first * out.row, out.row);
    }
  }
}

void short_attention_backward(GROWTH_DS_BACKWARD) {
  const auto& s = sizes;
  const int64_t half = (s.keys + 1) / 2, block = ATTENTION_BLOCK;
  const float scale = 1.0f / std::sqrt(static_cast<float>(s.width));
  Room room(s.width * (half + 2 * s.keys + block * 5 / 2) + block * (half + 3 * s.keys / 2) + 64);
  auto* keys = room.take(half * s.width);
  auto* keys_sum = room.take<float>(s.keys * s.width);
  auto* values_sum = room.take<float>(s.keys * s.width);
  auto* queries = room.take(block / 2 * s.width);
  auto* given = room.take(block / 2 * s.width);
  auto* given_columns = room.take(block * s.width / 2);
  auto* queries_sum = room.take<float>(block * s.width);
  auto* slopes = room.take<float>(block * s.keys);
  auto* of_scores = room.take<bf16>((block * s.keys + 1) / 2);
  auto* in_pairs = room.take(block * half);
  for (int64_t head = begin; head < end; ++head) {
    pack_rows(at(k, s, head), k.row, s.keys, s.width, keys);
    for (int64_t first = 0; first < s.queries; first += block) {
      const int64_t rows = s.queries - first < block ? s.queries - first : block, lanes = lanes_of(rows);
      const auto* shares = static_cast<const bf16*>(weights) + head * weights_of(s) + first * s.keys;
      const bf16* of_rows = at(of_out, s, head) + first * of_out.row;
      pack_columns(of_rows, of_out.row, rows, s.width, lanes, given_columns);
      product(s.keys, rows_of(at(v, s, head), v.row), given_columns, lanes, s.width / 2, slopes);
      softmax_backward(slopes, shares, s.keys, lanes, scale, of_scores, in_pairs);
      product(rows, {in_pairs, 1, lanes}, keys, s.width, half, queries_sum);
      write_rows(queries_sum, rows, s.width, at(of_q, s, head) + first * of_q.row, of_q.row);
      pack_rows(at(q, s, head) + first * q.row, q.row, rows, s.width, queries);
      pack_rows(of_rows, of_out.row, rows, s.width, given);
      const int64_t count = (rows + 1) / 2;
      product(s.keys, rows_of(of_scores, lanes), queries, s.width, count, keys_sum, first > 0);
      product(s.keys, rows_of(shares, lanes), given, s.width, count, values_sum, first > 0);
    }
    write_rows(keys_sum, s.keys, s.width, at(of_k, s, head), of_k.row);
    write_rows(values_sum, s.keys, s.width, at(of_v, s, head), of_v.row);
  }
}

}  // namespace growth_ds::GROWTH_DS_ISA
