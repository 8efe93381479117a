// commit_ on a CPU: prune and shift, in place.
//
// A column is one head of one cache for one row of the batch. One worker owns a whole column and walks its moves
// upwards. Sources ascend and never lie below their destination, so whatever a move overwrites has been read by then.
#include <cstring>

#include "kernels.h"

namespace lbr {

static void commit_column(const CommitParams& p, const CommitParams::Cache& cache, int64_t b, int64_t head) {
  const int64_t moves = p.num_moves ? p.num_moves[b] : p.max_moves;
  char* tree = cache.data + b * cache.batch_stride + head * cache.head_stride + p.prefix_lens[b] * cache.slot_stride;
  const int32_t* sources = p.sources + b * p.sources_stride;
  for (int64_t i = 0; i < moves; ++i)
    if (sources[i] != i)
      std::memcpy(tree + i * cache.slot_stride, tree + sources[i] * cache.slot_stride, cache.row_bytes);
}

void commit(const CommitParams& p, const ThreadPool& pool) {
  constexpr int64_t kGrain = 8;  // (cache, row) pairs per worker at least: a pair is a few hundred bytes for each head
  pool.parallel_for(p.num_caches * p.batch, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const CommitParams::Cache& cache = p.caches[i / p.batch];
      for (int64_t head = 0; head < cache.heads; ++head) commit_column(p, cache, i % p.batch, head);
    }
  });
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.num_moves ? p.num_moves[b] : p.max_moves)
      p.prefix_lens[b] += int32_t(p.advance ? p.advance[b] : p.advance_all);
  }
}

}  // namespace lbr
