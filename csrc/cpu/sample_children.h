// sample_children and top_children on one instruction set: from logits to K tokens without sorting the vocabulary.
//
// Probabilities are integers: weight(i) = round(2^40 exp((logit_i - max) / temperature)), in double precision and in
// the order of operations that lbr_kernels/ops/sample_children.py writes down. Integer sums do not depend on their
// order, so every backend, vector width and number of threads draws the same tokens for the same logits.
//
// Without filters a row is read twice (largest logit; weights, summed per chunk) and a draw then re-reads one chunk.
// With filters the tokens that can be left are gathered first, and everything else happens on that short list.
#pragma once

#include <math.h>

#include "../params.h"
#include "simd.h"
#include "support.h"

namespace lbr::LBR_ISA {

constexpr int kDoubleLanes = kLanes / 2;
typedef double vdouble __attribute__((vector_size(8 * kDoubleLanes)));
typedef int64_t vlong __attribute__((vector_size(8 * kDoubleLanes)));
typedef float vfloat_half __attribute__((vector_size(4 * kDoubleLanes)));

constexpr int kWeightBits = 40;
constexpr int64_t kChunk = 1024;  // tokens whose weights are summed together

static inline vdouble splat(double x) { return x - vdouble{}; }

// round(2^40 e^x) for x <= 0.
static inline vlong weight_of(vdouble x) {
  const vdouble magic = splat(0x1.8p52), floor = splat(-64.0);
  const vlong below = x < floor;
  x = (vdouble)((below & (vlong)floor) | (~below & (vlong)x));
  const vdouble shifted = x * 0x1.71547652b82fep0 + magic;
  const vdouble n = shifted - magic;
  const vdouble r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  constexpr double kInverseFactorials[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                           1.0 / 5040,     1.0 / 720,     1.0 / 120,    1.0 / 24,
                                           1.0 / 6,        1.0 / 2,       1.0,          1.0};
  vdouble p = splat(kInverseFactorials[0]);
  for (int i = 1; i < 12; ++i) p = p * r + kInverseFactorials[i];
  const vlong exponent = ((vlong)shifted << 52) + (int64_t(kWeightBits) << 52);
  const vdouble scaled = (vdouble)((vlong)p + exponent);
  return (vlong)(scaled + 0x1p52) - (vlong)splat(0x1p52);
}

// (logit - max) / temperature, and the weights of one vector of it.
struct Softmax {
  double max, temperature;

  double exponent(float logit) const { return (double(logit) - max) / temperature; }
  vlong weights(vfloat_half logits) const {
    const vdouble below = __builtin_convertvector(logits, vdouble) - max;
    // x / 1 is x; a division costs as much as half of the rest.
    return weight_of(temperature == 1 ? below : below / temperature);
  }
  int64_t weight(float logit) const { return weights(logit - vfloat_half{})[0]; }
};

struct Token {
  float logit;
  int32_t id;
  int64_t weight;
};

// The order in which a nucleus is filled: larger logits first, and of equal ones the larger id.
static inline bool nucleus_before(const Token& a, const Token& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id > b.id);
}

static inline void swap(Token& a, Token& b) {
  const Token t = a;
  a = b;
  b = t;
}

// Moves the tokens that come before `pivot` to the front; returns how many they are.
static inline int64_t partition(Token* tokens, int64_t count, Token pivot) {
  int64_t front = 0;
  for (int64_t i = 0; i < count; ++i)
    if (nucleus_before(tokens[i], pivot)) swap(tokens[front++], tokens[i]);
  return front;
}

static inline Token median_of_three(const Token* tokens, int64_t count) {
  Token a = tokens[0], b = tokens[count / 2], c = tokens[count - 1];
  if (nucleus_before(b, a)) swap(a, b);
  if (nucleus_before(c, b)) b = nucleus_before(c, a) ? a : c;
  return b;
}

// The rank-th token (from 0) in nucleus order; reorders.
static Token select_rank(Token* tokens, int64_t count, int64_t rank) {
  while (true) {
    const Token pivot = median_of_three(tokens, count);
    const int64_t front = partition(tokens, count, pivot);
    if (rank < front) {
      count = front;
    } else {
      // The pivot is the first of what remains: bring it there and go on behind it.
      for (int64_t i = front; i < count; ++i)
        if (tokens[i].id == pivot.id) swap(tokens[front], tokens[i]);
      if (rank == front) return tokens[front];
      tokens += front + 1;
      count -= front + 1;
      rank -= front + 1;
    }
  }
}

// The last token in nucleus order before which less than `limit` weight lies (the first one, if none does); reorders.
static Token select_mass(Token* tokens, int64_t count, double limit) {
  int64_t before = 0;  // weight of the tokens that are known to be kept
  Token last = tokens[0];
  bool found = false;
  while (count > 0) {
    const Token pivot = median_of_three(tokens, count);
    const int64_t front = partition(tokens, count, pivot);
    int64_t mass = before;
    for (int64_t i = 0; i < front; ++i) mass += tokens[i].weight;
    if (double(mass) < limit) {
      // The pivot is kept, and with it everything in front of it.
      last = pivot;
      found = true;
      before = mass + pivot.weight;
      for (int64_t i = front; i < count; ++i)
        if (tokens[i].id == pivot.id) swap(tokens[front], tokens[i]);
      tokens += front + 1;
      count -= front + 1;
    } else {
      if (!found && front == 0) last = pivot;
      count = front;
    }
  }
  return last;
}

// One row of logits under its filters, ready to be drawn from.
template <class T>
class Distribution {
 public:
  using Status = SampleChildrenParams::Status;

  Status prepare(const T* logits, int64_t vocab, const SamplingFilters& filters, int64_t want_best) {
    logits_ = logits;
    vocab_ = vocab;
    float top;
    const Status status = find_max(&top);
    if (status != SampleChildrenParams::kOk) return status;
    softmax_ = {top, filters.temperature};
    const bool use_top_k = filters.top_k > 0 && filters.top_k < vocab;
    listed_ = use_top_k || filters.top_p < 1 || filters.min_p > 0;
    if (!listed_) {
      total_ = sum_chunks();
      if (want_best > 0) gather(want_best < vocab ? rank_threshold(want_best) : -INFINITY);
      return status;
    }
    if (use_top_k) {
      gather(rank_threshold(filters.top_k));
      if (filters.top_p < 1) keep_nucleus(filters.top_p * double(list_weight()));
    } else if (filters.top_p < 1) {
      gather_nucleus(filters.top_p * double(sum_chunks()));
    } else {
      // A little lower than needed, whatever the rounding: keep_weight below decides.
      const double margin = 1e-3 * filters.temperature + 1e-6 * fabs(softmax_.max);
      gather(float(softmax_.max + filters.temperature * log(filters.min_p) - margin));
    }
    if (filters.min_p > 0) keep_weight(filters.min_p * double(int64_t(1) << kWeightBits));
    total_ = list_weight();
    return status;
  }

  float log_prob(float logit) const {
    return float(softmax_.exponent(logit) - (log(double(total_)) - kWeightBits * 0.693147180559945309));
  }

  void draw(double uniform, int64_t* token, float* log_prob_out) {
    int64_t target = int64_t(uniform * double(total_));
    if (target >= total_) target = total_ - 1;
    int64_t id = 0;
    float logit = 0;
    if (listed_) {
      int64_t i = 0;
      while (target >= list_[i].weight) target -= list_[i++].weight;
      id = list_[i].id;
      logit = list_[i].logit;
    } else {
      int64_t chunk = 0;
      while (target >= chunks_[chunk]) target -= chunks_[chunk++];
      for (id = chunk * kChunk;; ++id) {
        logit = widen(logits_[id]);
        const int64_t weight = softmax_.weight(logit);
        if (target < weight) break;
        target -= weight;
      }
    }
    *token = id;
    *log_prob_out = log_prob(logit);
  }

  // The `width` most likely tokens, ties to the lowest id; where fewer are left, -1.
  void best(int64_t width, int64_t* tokens, float* log_probs) {
    int64_t found = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const Token& candidate = list_[i];
      if (candidate.weight == 0) continue;
      int64_t at = found;
      while (at > 0 && best_[at - 1].logit < candidate.logit) --at;
      if (at == width) continue;
      if (found < width) ++found;
      best_.reserve(width);
      for (int64_t j = found - 1; j > at; --j) best_[j] = best_[j - 1];
      best_[at] = candidate;
    }
    for (int64_t k = 0; k < width; ++k) {
      tokens[k] = k < found ? best_[k].id : -1;
      log_probs[k] = k < found ? log_prob(best_[k].logit) : 0;
    }
  }

 private:
  // A growing array of tokens.
  class List {
   public:
    void reserve(int64_t size) {
      if (size <= capacity_) return;
      capacity_ = largest(size, 2 * capacity_);
      tokens_ = (Token*)realloc(tokens_, capacity_ * sizeof(Token));
      if (!tokens_) abort();
    }
    List() = default;
    List(const List&) = delete;
    List& operator=(const List&) = delete;
    ~List() { free(tokens_); }
    Token& operator[](int64_t i) { return tokens_[i]; }
    const Token& operator[](int64_t i) const { return tokens_[i]; }
    Token* data() { return tokens_; }

   private:
    Token* tokens_ = nullptr;
    int64_t capacity_ = 0;
  };

  Status find_max(float* top) const {
    vfloat best = splat(-INFINITY);
    vint unordered = {};
    int64_t i = 0;
    for (; i + kLanes <= vocab_; i += kLanes) {
      const vfloat x = load(logits_ + i);
      unordered |= x != x;
      best = max(x, best);
    }
    *top = horizontal_max(best);
    bool nan = false;
    for (int lane = 0; lane < kLanes; ++lane) nan |= unordered[lane] != 0;
    for (; i < vocab_; ++i) {
      const float x = widen(logits_[i]);
      nan |= x != x;
      if (x > *top) *top = x;
    }
    if (nan) return SampleChildrenParams::kNaN;
    if (*top == INFINITY) return SampleChildrenParams::kInfinite;
    return *top == -INFINITY ? SampleChildrenParams::kAllFiltered : SampleChildrenParams::kOk;
  }

  // Calls visit(id, logit) for every token whose logit is at least *threshold, in order of id.
  template <class Visit>
  void scan(const float* threshold, const Visit& visit) const {
    int64_t i = 0;
    for (; i + kLanes <= vocab_; i += kLanes) {
      const vfloat x = load(logits_ + i);
      for (uint32_t bits = at_least(x, splat(*threshold)); bits; bits &= bits - 1) {
        const int lane = __builtin_ctz(bits);
        visit(i + lane, x[lane]);
      }
    }
    for (; i < vocab_; ++i) {
      const float x = widen(logits_[i]);
      if (x >= *threshold) visit(i, x);
    }
  }

  // The rank-th largest logit. Keeps a pool of candidates and halves it whenever it is full.
  float rank_threshold(int64_t rank) {
    const int64_t capacity = largest(4 * rank, 4096);
    pool_.reserve(capacity);
    int64_t count = 0;
    float threshold = -INFINITY;
    scan(&threshold, [&](int64_t id, float logit) {
      if (logit == threshold && count >= rank) return;  // changes nothing: rank others are at least as large
      pool_[count++] = {logit, int32_t(id), 0};
      if (count == capacity) {
        threshold = select_rank(pool_.data(), count, rank - 1).logit;
        count = rank;
      }
    });
    return count < rank ? -INFINITY : select_rank(pool_.data(), count, rank - 1).logit;
  }

  void gather(float threshold) {
    size_ = 0;
    scan(&threshold, [&](int64_t id, float logit) {
      list_.reserve(size_ + 1);
      list_[size_++] = {logit, int32_t(id), 0};
    });
    int64_t i = 0;
    for (; i + kDoubleLanes <= size_; i += kDoubleLanes) {
      vfloat_half logits;
      for (int lane = 0; lane < kDoubleLanes; ++lane) logits[lane] = list_[i + lane].logit;
      const vlong weights = softmax_.weights(logits);
      for (int lane = 0; lane < kDoubleLanes; ++lane) list_[i + lane].weight = weights[lane];
    }
    for (; i < size_; ++i) list_[i].weight = softmax_.weight(list_[i].logit);
  }

  int64_t list_weight() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < size_; ++i) sum += list_[i].weight;
    return sum;
  }

  // Gathers far enough down that the nucleus is inside, then cuts.
  void gather_nucleus(double limit) {
    for (double depth = 8;; depth *= 2) {
      const double threshold = softmax_.max - depth * softmax_.temperature;
      const bool all = threshold < -3e38 || depth > 64;  // below e^-64 weights are zero
      gather(all ? -INFINITY : float(threshold));
      if (all || double(list_weight()) >= limit) break;
    }
    keep_nucleus(limit);
  }

  void keep_nucleus(double limit) {
    pool_.reserve(size_);
    for (int64_t i = 0; i < size_; ++i) pool_[i] = list_[i];
    const Token last = select_mass(pool_.data(), size_, limit);
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i)
      if (!nucleus_before(last, list_[i])) list_[kept++] = list_[i];
    size_ = kept;
  }

  void keep_weight(double least) {
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i)
      if (!(double(list_[i].weight) < least)) list_[kept++] = list_[i];
    size_ = kept;
  }

  int64_t sum_chunks() {
    const int64_t count = ceil_div(vocab_, kChunk);
    chunks_.resize(count);
    int64_t total = 0;
    for (int64_t chunk = 0; chunk < count; ++chunk) {
      const int64_t end = smallest(vocab_, (chunk + 1) * kChunk);
      vlong sum = {};
      int64_t i = chunk * kChunk;
      for (; i + kLanes <= end; i += kLanes) {
        const vfloat x = load(logits_ + i);
        vfloat_half low, high;
        std::memcpy(&low, &x, sizeof low);
        std::memcpy(&high, (const char*)&x + sizeof low, sizeof high);
        sum += softmax_.weights(low) + softmax_.weights(high);
      }
      int64_t chunk_total = 0;
      for (int lane = 0; lane < kDoubleLanes; ++lane) chunk_total += sum[lane];
      for (; i < end; ++i) chunk_total += softmax_.weight(widen(logits_[i]));
      chunks_[chunk] = chunk_total;
      total += chunk_total;
    }
    return total;
  }

  const T* logits_ = nullptr;
  int64_t vocab_ = 0;
  Softmax softmax_{};
  bool listed_ = false;
  int64_t total_ = 0;
  int64_t size_ = 0;
  List list_;  // the tokens that can be left, in order of id
  List pool_, best_;
  Buffer<int64_t> chunks_;
};

template <class T>
static void sample_rows(const SampleChildrenParams& p, const ThreadPool& pool) {
  for (int64_t row = 0; p.row_index && row < p.rows; ++row)
    for (int64_t k = 0; p.row_index[row] < 0 && k < p.width; ++k) {
      p.tokens[row * p.width + k] = -1;
      p.log_probs[row * p.width + k] = 0;
    }
  pool.parallel_for(p.logit_rows, 1, [&](int64_t begin, int64_t end) {
    Distribution<T> distribution;
    for (int64_t logit_row = begin; logit_row < end; ++logit_row) {
      bool prepared = false;
      for (int64_t row = p.row_index ? 0 : logit_row; row < (p.row_index ? p.rows : logit_row + 1); ++row) {
        if (p.row_index && p.row_index[row] != logit_row) continue;
        if (!prepared) {
          const double* f = p.row_filters ? p.row_filters + 4 * logit_row : nullptr;
          const SamplingFilters filters = f ? SamplingFilters{f[0], int64_t(f[1]), f[2], f[3]} : p.filters;
          const T* logits = (const T*)p.logits + logit_row * p.logits_stride;
          p.status[logit_row] = distribution.prepare(logits, p.vocab, filters, p.uniforms ? 0 : p.width);
          if (p.status[logit_row] != SampleChildrenParams::kOk) break;
          prepared = true;
        }
        int64_t* tokens = p.tokens + row * p.width;
        float* log_probs = p.log_probs + row * p.width;
        if (!p.uniforms) {
          distribution.best(p.width, tokens, log_probs);
          continue;
        }
        for (int64_t k = 0; k < p.width; ++k)
          distribution.draw(p.uniforms[row * p.uniforms_stride + k], tokens + k, log_probs + k);
      }
    }
  });
}

static void sample_children(const SampleChildrenParams& params, const ThreadPool& pool) {
  switch (params.dtype) {
    case DType::kFloat32: return sample_rows<float>(params, pool);
    case DType::kFloat16: return sample_rows<Float16>(params, pool);
    case DType::kBFloat16: return sample_rows<BFloat16>(params, pool);
  }
}

}  // namespace lbr::LBR_ISA
