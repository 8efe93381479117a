// The kernel of sample_children and top_children: from logits to K tokens in one launch, without sorting the
// vocabulary.
//
// Probabilities are integers: weight(i) = round(2^40 exp((logit_i - max) / temperature)), in double precision and in
// the order of operations that lbr_kernels/ops/sample_children.py writes down. Sums of integers do not depend on their
// order, so the tokens are those of every other backend, whichever thread or block comes first.
//
// A group of blocks shares a row. Each has a contiguous part of the vocabulary, which it reads anew in every pass,
// after the first one out of the caches. The blocks meet after each pass:
// 1. the largest logit;
// 2. where top-k or top-p cut: logits, as integers of the same order, are narrowed down by 11 bits at a time, from
//    histograms of how many they are (top-k; the first one is filled in pass 1) or of their weights (top-p). Where the
//    logits have 16 bits, or had once, two of them settle it, else three;
// 3. the weights' sums, over the block's part and over pieces of it.
// Then each draw is known to fall into one block and one piece of its part, through which a warp goes.
//
// Equal logits at the edge of the nucleus, "ties", are kept from the largest id down. They are counted beside the sums
// of the tokens that are surely kept; all ties together tell how many of the first of them are left out.
#pragma once

#include <type_traits>

#include "block_group.cuh"
#include "sample_children.h"

namespace lbr::gpu {

using Word = SampleChildrenBlockShape::Word;

template <class To, class From>
LBR_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
LBR_DEVICE T minus_infinity();
template <>
LBR_DEVICE float minus_infinity<float>() {
  return -__builtin_huge_valf();
}
template <>
LBR_DEVICE Half minus_infinity<Half>() {
  return {0xfc00};
}
template <>
LBR_DEVICE BFloat16 minus_infinity<BFloat16>() {
  return {0xff80};
}

// Logits as integers of the same order; 0 and -0, which are equal, become the same one.
LBR_DEVICE unsigned image_of(float logit) {
  const unsigned bits = bits_as<unsigned>(logit + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
LBR_DEVICE float logit_of(unsigned image) { return bits_as<float>(image >> 31 ? image & 0x7fffffffu : ~image); }
constexpr unsigned kLowestImage = 0x00800000u, kImageOfInfinity = 0xff800000u;  // the former of a finite logit

// What some tokens have together: the weight of those that are surely kept, and how many ties there are.
struct Mass {
  Word sum = 0;
  unsigned ties = 0;
};
LBR_DEVICE Mass operator+(Mass a, Mass b) { return {a.sum + b.sum, a.ties + b.ties}; }
LBR_DEVICE Mass operator-(Mass a, Mass b) { return {a.sum - b.sum, a.ties - b.ties}; }

// Collective over the warp: of all its lanes; of this lane and those below.
LBR_DEVICE Mass sum_over_warp(Mass mass) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2)
    mass = mass + Mass{shuffle_xor(mass.sum, step), shuffle_xor(mass.ties, step)};
  return mass;
}
LBR_DEVICE Mass running_sum_over_warp(Mass mass, int lane) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const Mass below{shuffle_up(mass.sum, step), shuffle_up(mass.ties, step)};
    if (lane >= step) mass = mass + below;
  }
  return mass;
}

struct Larger {
  LBR_DEVICE Word operator()(Word a, Word b) const { return a > b ? a : b; }
};

// Of the largest image, in the upper half, and notes, whose bits are collected.
struct MergeSummaries {
  LBR_DEVICE Word operator()(Word a, Word b) const {
    return (Larger{}(a, b) & ~Word(0xffffffffu)) | ((a | b) & 0xffffffffu);
  }
};

template <class Merge>
LBR_DEVICE Word merge_over_warp(Word value, const Merge& merge, int lanes = kWarpSize) {
  for (int step = lanes / 2; step > 0; step /= 2) value = merge(value, shuffle_xor(value, step));
  return value;
}

template <class T>
class SampleChildrenBlock : SampleChildrenBlockShape {
 public:
  LBR_DEVICE explicit SampleChildrenBlock(const SampleChildrenLaunch& launch)
      : launch_(launch),
        p_(launch.params),
        shared_(*reinterpret_cast<Shared*>(shared_memory())),
        blocks_(launch.plan.blocks),
        group_index_(int(block_index().x) / launch.plan.blocks),
        rank_(int(block_index().x) % launch.plan.blocks),
        counters_(launch.workspace.counters + int64_t(group_index_) * launch.plan.counters),
        group_(counters_, launch.plan.blocks) {}

  LBR_DEVICE void run() {
    for (int i = thread_index(); i < kBins; i += kThreads) shared_.lows[i] = shared_.highs[i] = 0;
    block_barrier();  // the histogram is empty
    for (int64_t row = group_index_; row < p_.rows; row += launch_.plan.groups) make_children(row);
    if (blocks_ == 1) return;
    go_on(false);  // a histogram that is left belongs to a row that was refused: nobody looks at it any more
    group_.leave();
  }

 private:
  static constexpr int kVector = 16 / int(sizeof(T));
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  static constexpr int kBinsPerThread = kBins / kThreads;
  static constexpr int kPiecesPerLane = kPieces / kWarpSize;
  static constexpr unsigned kHasNaN = 1u << 30, kBadUniform = 1u << 31;  // notes, beside the lowest bits of logits

  // 16 bytes of logits.
  struct alignas(16) Chunk {
    unsigned words[4];

    LBR_DEVICE float logit(int i) const {
      if constexpr (sizeof(T) == 4) {
        return bits_as<float>(words[i]);
      } else {
        return widen(T{uint16_t(words[i / 2] >> (i % 2 * 16))});
      }
    }
  };

  LBR_DEVICE static int lane() { return thread_index() % kWarpSize; }
  LBR_DEVICE static int warp() { return thread_index() / kWarpSize; }

  LBR_DEVICE void make_children(int64_t row) {
    const int64_t index = p_.row_index ? p_.row_index[row] : row;
    if (index == -1) return fill(row, 0.0f);
    if (index < 0 || index >= p_.logit_rows || !read_filters(index)) return refuse(row, kBadDraw);
    locate(index);
    const Word summary = find_top(row);
    const unsigned top = unsigned(summary >> 32), notes = unsigned(summary);
    const bool bad_logits = notes & kHasNaN || top < kLowestImage || top >= kImageOfInfinity;
    if (bad_logits || notes & kBadUniform)
      return refuse(row, (bad_logits ? kBadLogits : 0) | (notes & kBadUniform ? kBadDraw : 0));
    start_softmax(top);
    if (top_k_ > 0) narrow<false>(notes);
    if (top_p_ < 1) narrow<true>(notes);
    sum_pieces();
    block_barrier();  // all pieces are summed
    if (p_.uniforms) {
      if (blocks_ > 1) {
        tell_sum();
        group_.barrier();  // all blocks have told their sums
        go_on(false);
      }
      add_up();
      for (int64_t k = warp(); k < p_.width; k += kWarps) draw(row, k);
    } else {
      take_best(row);
    }
  }

  // --- What the blocks of a group tell each other.

  LBR_DEVICE Word* words(int step, int rank) const {
    const int64_t block = (int64_t(group_index_) * 2 + step % 2) * blocks_ + rank;
    return launch_.workspace.words + block * launch_.plan.words;
  }
  // Before a meeting, and after it.
  LBR_DEVICE void tell(int word, Word value) const { words(step_, rank_)[word] = value; }
  LBR_DEVICE Word told(int rank, int word) const { return load_shared_by_blocks(words(step_ - 1, rank) + word); }

  LBR_DEVICE Word* histogram(int step) const {
    return reinterpret_cast<Word*>(counters_ + kCounterLine) + step % kHistograms * kBins;
  }

  // After each meeting; says whether the blocks have filled a histogram before it.
  LBR_DEVICE void go_on(bool filled) {
    if (filled_ >= 0) {
      const int end = kBins * (rank_ + 1) / blocks_;
      for (int i = kBins * rank_ / blocks_ + thread_index(); i < end; i += kThreads) histogram(filled_)[i] = 0;
    }
    filled_ = filled ? step_ : -1;
    ++step_;
  }

  // Collective over the block.
  template <class Merge>
  LBR_DEVICE Word merge_over_block(Word value, const Merge& merge) {
    value = merge_over_warp(value, merge);
    Word* const of_warps = shared_.of_warps[turn_];
    turn_ ^= 1;  // others may read what was there before
    if (lane() == 0) of_warps[warp()] = value;
    block_barrier();  // all warps have written theirs
    return merge_over_warp(of_warps[lane() % kWarps], merge, kWarps);
  }

  // --- A row: its filters, where it lies, its chunks of 16 aligned bytes, cut at both ends.

  LBR_DEVICE bool read_filters(int64_t index) {
    SamplingFilters filters = p_.filters;
    if (p_.row_filters) {
      const double* const f = p_.row_filters + 4 * index;
      filters = {f[0], 0, f[2], f[3]};
      const bool whole = f[1] >= 0 && f[1] <= 0x1p53 && double(int64_t(f[1])) == f[1];
      if (!(f[0] > 0 && f[0] < __builtin_huge_val() && whole && f[2] >= 0 && f[2] <= 1 && f[3] >= 0 && f[3] <= 1))
        return false;
      filters.top_k = int64_t(f[1]);
    }
    temperature_ = filters.temperature;
    top_k_ = filters.top_k < p_.vocab ? Word(filters.top_k) : 0;
    top_p_ = filters.top_p;
    const double least = multiply(filters.min_p, 0x1p40);
    least_weight_ = Word(least);
    if (double(least_weight_) < least) ++least_weight_;
    return true;
  }

  LBR_DEVICE void locate(int64_t index) {
    logits_ = static_cast<const T*>(p_.logits) + index * p_.logits_stride;
    const uintptr_t address = reinterpret_cast<uintptr_t>(logits_), start = address / 16 * 16;
    chunks_ = reinterpret_cast<const Float4*>(start);
    offset_ = int(address - start) / int(sizeof(T));
    const int64_t count = (offset_ + p_.vocab + kVector - 1) / kVector;
    first_chunk_ = int(count * rank_ / blocks_);
    end_chunk_ = int(count * (rank_ + 1) / blocks_);
    const int steps = (end_chunk_ - first_chunk_ + kWarpSize - 1) / kWarpSize;
    piece_chunks_ = (steps + kPieces - 1) / kPieces * kWarpSize;
  }

  LBR_DEVICE int token_of(int chunk, int i) const { return chunk * kVector + i - offset_; }

  // -inf stands for what lies outside the row.
  LBR_DEVICE Chunk read(int chunk) const {
    const int token = token_of(chunk, 0), end = int(p_.vocab);
    if (token >= 0 && token + kVector <= end) return bits_as<Chunk>(load_constant(chunks_ + chunk));
    Chunk cut;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      cut.words[word] = 0;
#pragma unroll
      for (int i = 0; i < kVector / 4; ++i) {
        const int at = token + word * (kVector / 4) + i;
        const T logit = at >= 0 && at < end ? logits_[at] : minus_infinity<T>();
        cut.words[word] |= unsigned(bits_as<Bits>(logit)) << (i * 16);
      }
    }
    return cut;
  }

  // Calls f(chunk, its logits) for all of this block's part, which is loaded `kBatch` chunks at a time.
  template <int kBatch, class F>
  LBR_DEVICE void for_each_chunk(const F& f) const {
    for (int first = first_chunk_ + thread_index(); first < end_chunk_; first += kBatch * kThreads) {
      Chunk chunks[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (first + b * kThreads < end_chunk_) chunks[b] = read(first + b * kThreads);
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
        if (first + b * kThreads < end_chunk_) f(first + b * kThreads, chunks[b]);
    }
  }

  // --- Pass 1.

  // The image of the largest logit, and notes: NaN, bad uniforms, and which of the lowest bits are set in some logit.
  LBR_DEVICE Word find_top(int64_t row) {
    constexpr unsigned kLowest = (1u << (32 - kBinBits)) - 1;
    float top = minus_infinity<float>();
    unsigned notes = 0;
    for_each_chunk<4>([&](int, const Chunk& chunk) {  // out of memory, unlike later
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float logit = chunk.logit(i);
        top = gpu::max(top, logit);
        notes |= (bits_as<unsigned>(logit) & kLowest) | (logit != logit ? kHasNaN : 0);
        if (top_k_ > 0) atomic_add(&shared_.lows[place_of(image_of(logit), 32 - kBinBits)], 1u);
      }
    });
    for (int64_t k = thread_index(); p_.uniforms && k < p_.width; k += kThreads) {
      const double uniform = p_.uniforms[row * p_.uniforms_stride + k];
      if (!(uniform >= 0 && uniform < 1)) notes |= kBadUniform;
    }
    Word summary = merge_over_block(Word(image_of(top)) << 32 | notes, MergeSummaries{});
    if (top_k_ > 0) take_bins();
    if (blocks_ == 1) return summary;
    if (top_k_ > 0) add_bins();
    if (thread_index() == 0) tell(0, summary);
    group_.barrier();  // all blocks have told their summaries
    go_on(top_k_ > 0);
    if (top_k_ > 0) read_bins();
    for (int rank = lane(); rank < blocks_; rank += kWarpSize) summary = MergeSummaries{}(summary, told(rank, 0));
    return merge_over_warp(summary, MergeSummaries{});
  }

  // --- Weights.

  LBR_DEVICE void start_softmax(unsigned top) {
    top_ = double(logit_of(top));
    tie_end_ = kept_ties_ = 0;
    first_tie_ = 0;
    // Below e^-29 weights are zero: such tokens need none to be computed.
    floor_ = kLowestImage;
    const double bound = subtract(top_, multiply(30.0, temperature_));
    if (bound > -3e38) {
      const unsigned image = image_of(float(bound)) - 1;  // the rounding may have been upwards
      if (image > floor_) floor_ = image;
    }
  }

  LBR_DEVICE double exponent(float logit) const {
    const double below = subtract(double(logit), top_);
    return temperature_ == 1 ? below : below / temperature_;
  }

  LBR_DEVICE Word weight_of(float logit) const {
    double x = exponent(logit);
    if (x < -64) x = -64;
    const double shifted = add(multiply(x, 0x1.71547652b82fep0), 0x1.8p52);
    const double n = subtract(shifted, 0x1.8p52);
    const double r = subtract(subtract(x, multiply(n, 0x1.62e42feep-1)), multiply(n, 0x1.a39ef35793c76p-33));
    constexpr double kInverseFactorials[] = {1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                                             1.0 / 5040,     1.0 / 720,     1.0 / 120,    1.0 / 24,
                                             1.0 / 6,        1.0 / 2,       1.0,          1.0};
    double p = kInverseFactorials[0];
#pragma unroll
    for (int i = 1; i < 12; ++i) p = add(multiply(p, r), kInverseFactorials[i]);
    const Word scaled = bits_as<Word>(p) + (bits_as<Word>(shifted) << 52) + (Word(40) << 52);
    return bits_as<Word>(add(bits_as<double>(scaled), 0x1p52)) - bits_as<Word>(0x1p52);
  }

  // After min-p.
  LBR_DEVICE Word kept_weight_of(float logit) const {
    const Word weight = weight_of(logit);
    return weight < least_weight_ ? 0 : weight;
  }

  // --- Pass 2: the cut.

  LBR_DEVICE static int place_of(unsigned image, int shift) { return kBins - 1 - int((image >> shift) % kBins); }

  // Atomics of 64 bits on shared memory would be loops.
  LBR_DEVICE void add_to_bin(int place, Word value) {
    const unsigned low = unsigned(value), before = atomic_add(&shared_.lows[place], low);
    const unsigned high = unsigned(value >> 32) + (before + low < low);
    if (high > 0) atomic_add(&shared_.highs[place], high);
  }

  // This thread's bins, the highest logits first: out of the block's histogram, into the group's, and out of it.
  LBR_DEVICE void take_bins() {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      const int place = thread_index() * kBinsPerThread + i;
      bins_[i] = Word(shared_.highs[place]) << 32 | shared_.lows[place];
      shared_.lows[place] = shared_.highs[place] = 0;
    }
  }
  LBR_DEVICE void add_bins() const {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i)
      if (bins_[i] > 0) atomic_add(histogram(step_) + thread_index() * kBinsPerThread + i, bins_[i]);
  }
  LBR_DEVICE void read_bins() {
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i)
      bins_[i] = load_shared_by_blocks(histogram(step_ - 1) + thread_index() * kBinsPerThread + i);
  }

  // Makes a histogram of the tokens with images from `low` to `high`, of their weights or of how many they are.
  template <bool kByWeight>
  LBR_DEVICE void fill_bins(unsigned low, unsigned high, int shift) {
    for_each_chunk<1>([&](int, const Chunk& chunk) {
      bool counts[kVector], any = false;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const unsigned image = image_of(chunk.logit(i));
        any |= counts[i] = image >= low && image <= high;
      }
      if (!any) return;
      Word values[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[i] = kByWeight ? weight_of(chunk.logit(i)) : 1;
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        if (counts[i]) add_to_bin(place_of(image_of(chunk.logit(i)), shift), values[i]);
    });
  }

  // Collective over the block: the bin at which `reached` becomes true of the sum of all bins up to it, which starts
  // from `before`. Of `reached` it is asked after start(the sum of all bins).
  template <class Start, class Reached>
  LBR_DEVICE Bin find_bin(Word before, const Start& start, const Reached& reached) {
    Word own = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) own += bins_[i];
    const Word through = running_sum_over_warp({own, 0}, lane()).sum;
    if (lane() == kWarpSize - 1) shared_.bin_sums[warp()] = through;
    block_barrier();  // the sums of all warps' bins are there
    Word all = 0, until = before + through - own;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Word sum = shared_.bin_sums[w];
      all += sum;
      if (w < warp()) until += sum;
    }
    start(all);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (!reached(until) && reached(until + bins_[i]))
        shared_.bin = {until, bins_[i], thread_index() * kBinsPerThread + i};
      until += bins_[i];
    }
    block_barrier();  // the bin is found
    return shared_.bin;
  }

  // Raises the floor to the k-th largest logit, or finds the last logit of the nucleus and how many of its ties stay.
  template <bool kByWeight>
  LBR_DEVICE void narrow(unsigned bits_in_use) {
    unsigned low = 0, high = 0xffffffffu;
    Word before = 0;
    double limit = 0;
    const auto reached = [&](Word sum) { return kByWeight ? double(sum) >= limit : sum >= top_k_; };
    for (int shift = 32 - kBinBits;; shift -= shift < kBinBits ? shift : kBinBits) {
      if (kByWeight || low > 0) {  // else pass 1 has done it
        fill_bins<kByWeight>(kByWeight && low < floor_ ? floor_ : low, high, shift);
        block_barrier();  // the histogram is filled
        take_bins();
        if (blocks_ > 1) {
          add_bins();
          group_.barrier();  // all blocks have added theirs
          go_on(true);
          read_bins();
        }
      }
      const bool first = high == 0xffffffffu && low == 0;
      const Bin bin = find_bin(
          before,
          [&](Word all) {
            // The first token stays whatever top_p is: before it lies nothing, before the others at least its weight.
            if (kByWeight && first) limit = multiply(top_p_, double(all)) > 0.5 ? multiply(top_p_, double(all)) : 0.5;
          },
          reached);
      before = bin.before;
      low |= unsigned(kBins - 1 - bin.place) << shift;
      high = low | ((1u << shift) - 1);
      const bool all_equal = (bits_in_use & ((1u << shift) - 1)) == 0;
      if (all_equal || (!kByWeight && before + bin.size == top_k_)) break;
    }
    if (low > floor_) floor_ = low;
    if (!kByWeight) return;
    tie_end_ = high;
    const float tie = logit_of(low >> 31 ? low : high);  // the bits of a logit below the bin's are zero
    const Word weight = weight_of(tie);
    // The last that stays is the last before which less than the limit lies.
    unsigned least = 1, most = unsigned(p_.vocab);
    while (least < most) {
      const unsigned middle = least + (most - least + 1) / 2;
      if (reached(before + (middle - 1) * weight)) {
        most = middle - 1;
      } else {
        least = middle;
      }
    }
    kept_ties_ = least;
    tie_weight_ = weight < least_weight_ ? 0 : weight;
  }

  // --- Pass 3: sums.

  LBR_DEVICE Mass mass_of(float logit) const {
    const unsigned image = image_of(logit);
    const Word weight = kept_weight_of(logit);
    const bool stays = image >= floor_, tie = stays && image <= tie_end_;
    return {stays && !tie ? weight : 0, tie ? 1u : 0u};
  }

  LBR_DEVICE Mass mass_of(const Chunk& chunk) const {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kVector; ++i) any |= image_of(chunk.logit(i)) >= floor_;
    Mass mass;
    if (!any) return mass;
#pragma unroll
    for (int i = 0; i < kVector; ++i) mass = mass + mass_of(chunk.logit(i));
    return mass;
  }

  LBR_DEVICE int piece_begin(int piece) const { return first_chunk_ + piece * piece_chunks_; }
  LBR_DEVICE int piece_end(int piece) const {
    const int end = piece_begin(piece) + piece_chunks_;
    return end < end_chunk_ ? end : end_chunk_;
  }

  LBR_DEVICE void sum_pieces() {
    for (int piece = warp(); piece < kPieces; piece += kWarps) {
      Mass mass;
      if (piece_begin(piece) < end_chunk_) {
        for (int chunk = piece_begin(piece) + lane(); chunk < piece_end(piece); chunk += kWarpSize)
          mass = mass + mass_of(read(chunk));
        mass = sum_over_warp(mass);
      }
      if (lane() > 0) continue;
      shared_.piece_sums[piece] = mass.sum;
      shared_.piece_ties[piece] = mass.ties;
    }
  }

  LBR_DEVICE Mass piece_mass(int piece) const { return {shared_.piece_sums[piece], shared_.piece_ties[piece]}; }

  // Of this lane's pieces.
  LBR_DEVICE Mass own_mass() const {
    Mass mass;
#pragma unroll
    for (int i = 0; i < kPiecesPerLane; ++i) mass = mass + piece_mass(lane() * kPiecesPerLane + i);
    return mass;
  }

  // Before the blocks meet.
  LBR_DEVICE void tell_sum() const {
    if (warp() > 0) return;
    const Mass mass = sum_over_warp(own_mass());
    if (lane() > 0) return;
    tell(0, mass.sum);
    tell(1, mass.ties);
  }

  // After they have met: what lies before this lane's pieces, and in all of the row.
  LBR_DEVICE void add_up() {
    const Mass own = own_mass(), through = running_sum_over_warp(own, lane());
    Mass all, before;
    if (blocks_ > 1) {
      for (int rank = lane(); rank < blocks_; rank += kWarpSize) {
        const Mass mass{told(rank, 0), unsigned(told(rank, 1))};
        all = all + mass;
        if (rank < rank_) before = before + mass;
      }
      all = sum_over_warp(all);
      before = sum_over_warp(before);
    } else {
      all = sum_over_warp(own);
    }
    begin_ = before + through - own;
    end_ = before + through;
    skipped_ties_ = all.ties > kept_ties_ ? all.ties - kept_ties_ : 0;
    total_ = weight(all);
  }

  // Of the first tokens of the row, which have this mass.
  LBR_DEVICE Word weight(Mass mass) const {
    return mass.sum + (mass.ties > skipped_ties_ ? (mass.ties - skipped_ties_) * tie_weight_ : 0);
  }

  // --- Draws.

  // Collective over the warp. Calls found(token, logit), in one lane of one block, for the first token with which
  // `measure` of the mass so far exceeds `target`.
  template <class Measure, class Found>
  LBR_DEVICE void search(Word target, const Measure& measure, const Found& found) const {
    const unsigned owners = ballot(measure(begin_) <= target && target < measure(end_));
    if (owners == 0) return;
    const int owner = lowest_bit(owners);
    Mass before = begin_;
    int piece = lane() * kPiecesPerLane;
#pragma unroll
    for (int i = 1; i < kPiecesPerLane; ++i) {
      const Mass through = before + piece_mass(piece);
      if (measure(through) > target) break;
      before = through;
      ++piece;
    }
    piece = broadcast(piece, owner);
    before = {broadcast(before.sum, owner), broadcast(before.ties, owner)};
    const int end = piece_end(piece);
    for (int first = piece_begin(piece); first < end; first += kWarpSize) {
      const int chunk = first + lane();
      const Mass own = chunk < end ? mass_of(read(chunk)) : Mass{};
      const Mass through = before + running_sum_over_warp(own, lane());
      const unsigned hits = ballot(measure(through) > target);
      if (hits > 0) {
        if (lane() == lowest_bit(hits)) search_chunk(chunk, target, through - own, measure, found);
        return;
      }
      before = {broadcast(through.sum, kWarpSize - 1), broadcast(through.ties, kWarpSize - 1)};
    }
  }

  template <class Measure, class Found>
  LBR_DEVICE void search_chunk(int chunk, Word target, Mass mass, const Measure& measure, const Found& found) const {
    for (int token = token_of(chunk, 0) < 0 ? 0 : token_of(chunk, 0);; ++token) {
      const float logit = widen(logits_[token]);
      mass = mass + mass_of(logit);
      if (measure(mass) > target) return found(token, logit);
    }
  }

  LBR_DEVICE void draw(int64_t row, int64_t k) const {
    Word target = Word(multiply(p_.uniforms[row * p_.uniforms_stride + k], double(total_)));
    if (target >= total_) target = total_ - 1;
    search(
        target, [&](Mass mass) { return weight(mass); },
        [&](int token, float logit) { write(row, k, token, log_prob(logit)); });
  }

  LBR_DEVICE float log_prob(float logit) const {
    return float(subtract(exponent(logit), subtract(log(double(total_)), 40 * 0.693147180559945309)));
  }

  LBR_DEVICE void write(int64_t row, int64_t k, int64_t token, float log_prob) const {
    p_.tokens[row * p_.width + k] = token;
    p_.log_probs[row * p_.width + k] = log_prob;
  }

  // --- The most likely. A token's key is its logit's image, and below it its complement: ties go to the lowest id.

  LBR_DEVICE void take_best(int64_t row) {
    const bool several = blocks_ > 1, ties = tie_end_ > 0;
    if (several) {
      tell_sum();
      if (!ties) tell_best();
      group_.barrier();  // all blocks have told their sums, and their best where that can be known
      go_on(false);
    }
    add_up();
    if (skipped_ties_ > 0) find_first_tie();
    if (!several) {
      return find_best([&](int64_t k, Word key) {
        if (thread_index() == 0) write(row, k, key);
      });
    }
    if (ties) {
      tell_best();
      group_.barrier();  // all blocks have told their best
      go_on(false);
    }
    if (rank_ == 0) merge_best(row);
  }

  // Collective over the group.
  LBR_DEVICE void find_first_tie() {
    if (warp() == 0) {
      search(
          skipped_ties_, [](Mass mass) { return Word(mass.ties); },
          [&](int token, float) {
            if (blocks_ > 1) {
              words(step_, 0)[0] = Word(token);
            } else {
              shared_.first_tie = token;
            }
          });
    }
    if (blocks_ > 1) {
      group_.barrier();  // the block that has it has told it
      go_on(false);
      first_tie_ = int(told(0, 0));
    } else {
      block_barrier();  // the first warp has found it
      first_tie_ = shared_.first_tie;
    }
  }

  // Collective over the block. Calls found(k, key) for the K best of its part, the best first; 0 where none is left.
  template <class Found>
  LBR_DEVICE void find_best(const Found& found) {
    Word last = ~Word(0);
    for (int64_t k = 0; k < p_.width; ++k) {
      Word best = 0;
      if (last > 0) {
        for_each_chunk<1>([&](int number, const Chunk& chunk) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) {
            const unsigned image = image_of(chunk.logit(i));
            const int token = token_of(number, i);
            if (image < floor_ || (image <= tie_end_ && token < first_tie_)) continue;
            const Word key = Word(image) << 32 | ~unsigned(token);
            if (key < last) best = Larger{}(best, key);
          }
        });
        best = merge_over_block(best, Larger{});
        if (best > 0 && kept_weight_of(logit_of(unsigned(best >> 32))) == 0) best = 0;
      }
      found(k, best);
      last = best;
    }
  }

  LBR_DEVICE void tell_best() {
    find_best([&](int64_t k, Word key) {
      if (thread_index() == 0) tell(2 + int(k), key);
    });
  }

  LBR_DEVICE void merge_best(int64_t row) const {
    const int width = int(p_.width), count = blocks_ * width;
    for (int i = thread_index(); i < count; i += kThreads) shared_.candidates[i] = told(i / width, 2 + i % width);
    block_barrier();  // the candidates are there
    if (warp() > 0) return;
    Word last = ~Word(0);
    for (int k = 0; k < width; ++k) {
      Word best = 0;
      for (int i = lane(); i < count; i += kWarpSize)
        if (shared_.candidates[i] < last) best = Larger{}(best, shared_.candidates[i]);
      best = merge_over_warp(best, Larger{});
      if (lane() == 0) write(row, k, best);
      last = best;
    }
  }

  LBR_DEVICE void write(int64_t row, int64_t k, Word key) const {
    if (key == 0) return write(row, k, -1, 0.0f);
    write(row, k, int64_t(~unsigned(key)), log_prob(logit_of(unsigned(key >> 32))));
  }

  // --- Rows without children.

  LBR_DEVICE void fill(int64_t row, float log_prob) const {
    if (rank_ > 0) return;
    for (int64_t k = thread_index(); k < p_.width; k += kThreads) write(row, k, -1, log_prob);
  }

  LBR_DEVICE void refuse(int64_t row, int flags) const {
    if (rank_ == 0 && thread_index() == 0) atomic_or(launch_.workspace.flags, flags);
    fill(row, __builtin_nanf(""));
  }

  const SampleChildrenLaunch& launch_;
  const SampleChildrenParams& p_;
  Shared& shared_;
  const int blocks_, group_index_, rank_;
  unsigned* const counters_;
  BlockGroup group_;
  int turn_ = 0;                // of Shared::of_warps
  int step_ = 0, filled_ = -1;  // meetings so far, and the last but one if it was about a histogram
  Word bins_[kBinsPerThread];

  // The row's filters; top_k is 0 where it cuts nothing. They are the same in all threads, like most of what follows.
  double temperature_, top_p_;
  Word top_k_, least_weight_;

  const T* logits_;
  const Float4* chunks_;  // where the 16 bytes begin in which the row begins, `offset_` logits earlier
  int offset_, first_chunk_, end_chunk_, piece_chunks_;

  double top_;
  unsigned floor_;    // images below it have no weight, or are cut
  unsigned tie_end_;  // images from the floor up to it are ties
  unsigned kept_ties_, skipped_ties_;
  Word tie_weight_, total_;
  int first_tie_;     // the lowest id of the ties that stay
  Mass begin_, end_;  // before this lane's pieces, and with them
};

template <class T>
LBR_KERNEL(SampleChildrenBlockShape::kThreads, SampleChildrenBlockShape::kResidentBlocks)
sample_children_kernel(LBR_PARAMETER SampleChildrenLaunch launch) {
  SampleChildrenBlock<T>(launch).run();
}

}  // namespace lbr::gpu
