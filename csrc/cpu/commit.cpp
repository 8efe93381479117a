// commit_ on a CPU: prune and shift, in place.
//
// A column is one head of one cache for one row of the batch. One worker owns a whole column and walks its moves
// upwards. Sources ascend and never lie below their destination, so whatever a move overwrites has been read by then.
//
// A column is a few hundred bytes in a place of its own, far from the others and seldom in a cache: what takes time is
// waiting for memory. So the columns that come next are fetched while one is moved.
#include <cstring>

#include "kernels.h"

namespace lbr {
namespace {

constexpr int64_t kAhead = 8;  // columns
constexpr int64_t kCacheLine = 64;

class Commit {
 public:
  explicit Commit(const CommitParams& params) : p(params) {}

  void run(const ThreadPool& pool) const {
    int64_t columns = 0;
    for (int64_t c = 0; c < p.num_caches; ++c) columns += p.caches[c].heads * p.batch;
    constexpr int64_t kGrain = 64;  // columns per worker at least
    pool.parallel_for(columns, kGrain, [&](int64_t begin, int64_t end) { move(begin, end); });
    for (int64_t b = 0; b < p.batch; ++b)
      if (moves(b)) p.prefix_lens[b] += int32_t(p.advance ? p.advance[b] : p.advance_all);
  }

 private:
  // Walks the columns from a given one on: cache by cache, row by row, head by head.
  class Column {
   public:
    Column(const CommitParams& params, int64_t index) : p(params) {
      while (cache_ < p.num_caches && index >= p.caches[cache_].heads * p.batch)
        index -= p.caches[cache_++].heads * p.batch;
      if (cache_ == p.num_caches) return;
      row_ = index / cache().heads;
      head_ = index % cache().heads;
    }
    const CommitParams::Cache& cache() const { return p.caches[cache_]; }
    int64_t row() const { return row_; }
    char* tree() const {
      const CommitParams::Cache& c = cache();
      return c.data + row_ * c.batch_stride + head_ * c.head_stride + p.prefix_lens[row_] * c.slot_stride;
    }
    void next() {
      if (++head_ < cache().heads) return;
      head_ = 0;
      if (++row_ < p.batch) return;
      row_ = 0;
      do ++cache_;
      while (cache_ < p.num_caches && cache().heads == 0);
    }

   private:
    const CommitParams& p;
    int64_t cache_ = 0, row_ = 0, head_ = 0;
  };

  int64_t moves(int64_t b) const { return p.num_moves ? p.num_moves[b] : p.max_moves; }

  // Calls f(to, from, bytes) for every slot of a column that changes.
  template <class F>
  void each_move(const Column& column, const F& f) const {
    const int32_t* sources = p.sources + column.row() * p.sources_stride;
    const CommitParams::Cache& cache = column.cache();
    char* tree = column.tree();
    for (int64_t i = 0; i < moves(column.row()); ++i)
      if (sources[i] != i) f(tree + i * cache.slot_stride, tree + sources[i] * cache.slot_stride, cache.row_bytes);
  }

  void move(int64_t begin, int64_t end) const {
    Column ahead(p, begin), column(p, begin);
    int64_t fetched = begin;
    for (int64_t i = begin; i < end; ++i, column.next()) {
      for (; fetched < smallest(end, i + kAhead); ++fetched, ahead.next())
        each_move(ahead, [](const char* to, const char* from, int64_t bytes) {
          for (int64_t at = 0; at < bytes; at += kCacheLine) {
            __builtin_prefetch(from + at);
            __builtin_prefetch(to + at, 1);
          }
        });
      each_move(column, [](char* to, const char* from, int64_t bytes) { std::memcpy(to, from, bytes); });
    }
  }

  static int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

  const CommitParams& p;
};

}  // namespace

void commit(const CommitParams& params, const ThreadPool& pool) { Commit(params).run(pool); }

}  // namespace lbr
