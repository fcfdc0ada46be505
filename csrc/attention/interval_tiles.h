// How the CPU kernels of interval attention cut their work up.
//
// A tile is a run of queries of one sentence that see mostly the same keys, and a family is tiles
// that have keys in common. The keys of a family are those that any of its queries sees, in order;
// a key's place in that list is its position. Keys are packed once for a family. Queries of a tile
// are taken in blocks, which leave out what none of theirs sees. No result depends on the cut: each
// is a sum over the query's own keys in order, to which the keys of others add exact zeros.
#pragma once

#include "attention/interval_attention.h"

namespace pynar {

// Keys are packed and scored in groups of this many positions.
constexpr int kKeyGroup = 16;
// Queries of a block. Six times two vectors of sums leave AVX2 the registers for their factors, and
// six times four AVX-512.
constexpr int kBlockRows = 6;

// Queries that a block of `rows` is computed as: few numbers, for which there are inner loops. What
// comes of those that it has not is left.
constexpr int64_t padded_rows(int64_t rows) {
  return rows <= 2 ? rows : rows <= 4 ? 4 : kBlockRows;
}

// Channels in whole vectors of any instruction set.
constexpr int64_t attention_width(int64_t dim) {
  return (dim + 15) / 16 * 16;
}

struct Range {
  int64_t begin, end;
};

template <int kCapacity>
struct Ranges {
  int count = 0;
  Range range[kCapacity];

  const Range* begin() const { return range; }
  const Range* end() const { return range + count; }
};

// Neighbouring groups of a block, of which each query sees all, or not.
struct GroupRun {
  int64_t begin, end;
  // Where not, the element of TilePlan::masks() from where on the groups have kKeyGroup numbers for
  // each of padded_rows() queries, or for all of them if they do not differ: -1 for what it sees
  // and 0 for the rest.
  int64_t mask;

  bool masked() const { return mask >= 0; }
};

struct RowBlock {
  static constexpr int kMaxRuns = kBlockRows * kMaxIntervals;
  // Positions that each query sees: a range for each of its intervals, of which those that touch or
  // overlap are one. Ranges that only came to touch because nobody sees what lay between stay
  // apart.
  Ranges<kMaxIntervals> seen[kBlockRows];
  Ranges<kMaxRuns> runs;    // positions that any of them sees
  Ranges<kMaxRuns> groups;  // the groups that hold those
  bool mixed = false;       // whether the queries differ
  int num_parts = 0;
  GroupRun parts[4 * kMaxRuns + 1];  // of `groups`
};

}  // namespace pynar

#ifndef PYNAR_ISA

#include <algorithm>
#include <span>
#include <vector>

#include "common/tensor.h"

namespace pynar {

// The queries' intervals of one call, as the tensor has them.
struct IntervalView {
  const int32_t* data;
  int64_t stride_b, stride_t, stride_r;
  int64_t batch, queries, keys, num_intervals;
};

// Work is measured in pairs of a query and a key, about. `begin` is that of all items before.
struct TileSpan {
  int64_t b, first, rows;
  bool uniform;  // all queries have the same intervals
  int64_t begin;
  Range hull;  // of the keys
};

// Calls body(item, head) for those pairs whose work begins in [first, last) when items come one
// after the other and the heads of an item too. For parallel_for(heads * total, ...).
template <typename Item, typename Body>
void for_each_share(const std::vector<Item>& items, int64_t total, int64_t heads, int64_t first,
                    int64_t last, const Body& body) {
  const auto after = [](int64_t work, const Item& item) { return work < item.begin; };
  auto item = std::upper_bound(items.begin(), items.end(), first / heads, after);
  if (item != items.begin()) --item;
  for (; item != items.end() && item->begin * heads < last; ++item) {
    const int64_t next = item + 1 != items.end() ? (item + 1)->begin : total;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t at = item->begin * heads + h * (next - item->begin);
      if (at >= first && at < last) body(*item, h);
    }
  }
}

// Cuts the queries of a call into tiles; throws for an interval that leaves [0, keys].
class TileList {
 public:
  static constexpr int64_t kMaxRows = 64;

  TileList(const Check& check, const IntervalView& view);

  int64_t total() const { return total_; }  // work for one head
  const std::vector<TileSpan>& tiles() const { return tiles_; }

 private:
  std::vector<TileSpan> tiles_;
  int64_t total_ = 0;
};

// Tiles with keys in common, directly or through others. Where families are not cut, `keys` are
// theirs alone, and those of a sentence share out all its keys.
struct TileFamily {
  int64_t b;
  Range keys;
  int64_t first, last;  // in tiles()
  int64_t begin;        // see TileSpan
  int64_t rows;         // of all tiles
};

class TileFamilies {
 public:
  // Families of more than `max_rows` queries are cut where they consist of several tiles.
  TileFamilies(const TileList& tiles, const IntervalView& view, int64_t max_rows);

  int64_t total() const { return total_; }
  const std::vector<TileFamily>& families() const { return families_; }
  std::span<const TileSpan* const> tiles(const TileFamily& family) const {
    return {tiles_.data() + family.first, tiles_.data() + family.last};
  }

 private:
  std::vector<TileFamily> families_;
  std::vector<const TileSpan*> tiles_;
  int64_t total_ = 0;
};

// The blocks of a tile.
struct TileBlocks {
  const TileSpan* span;
  int64_t first;  // in TilePlan::blocks()
  int64_t step;   // 0 if all blocks are the same one
  int64_t count;  // of different ones
};

// The keys and blocks of a family. Kept by a thread from one to the next for its memory.
class TilePlan {
 public:
  void build(const IntervalView& view, std::span<const TileSpan* const> tiles);

  int64_t num_keys() const { return num_keys_; }
  int64_t num_groups() const { return static_cast<int64_t>(keys_.size()) / kKeyGroup; }
  // The key at each position; the last one fills its group up.
  const int64_t* keys() const { return keys_.data(); }
  const std::vector<TileBlocks>& tiles() const { return tiles_; }
  const RowBlock* blocks() const { return blocks_.data(); }
  const float* masks() const { return masks_.data(); }

  // For each tile and group of keys, the queries whose blocks hold it.
  void build_group_rows();
  // group_rows()[starts[g]] to group_rows()[starts[g + 1]] for starts = group_starts(tile).
  const Range* group_rows() const { return group_rows_.data(); }
  const int64_t* group_starts(int64_t tile) const {
    return group_starts_.data() + tile * (num_groups() + 1);
  }

 private:
  void set_keys();
  void place(const Ranges<kMaxIntervals>& row, Ranges<kMaxIntervals>& seen) const;
  void finish(RowBlock& block, int64_t rows);
  void add_mask(const RowBlock& block, int64_t rows, int64_t group);

  std::vector<int64_t> keys_;
  int64_t num_keys_ = 0;
  std::vector<TileBlocks> tiles_;
  std::vector<RowBlock> blocks_;  // more than are in use
  std::vector<float> masks_;
  std::vector<Range> segments_;  // of the keys
  std::vector<int64_t> segment_positions_;
  std::vector<Ranges<kMaxIntervals>> rows_;
  std::vector<Range> group_rows_;
  std::vector<int64_t> group_starts_;
};

}  // namespace pynar

#endif
