// How the CPU kernels of interval attention cut their work up.
//
// A tile is a run of queries of one sentence that see mostly the same keys. Its keys are those that
// any of its queries sees, in order; a key's place in that list is its position. Queries of a tile
// are taken in blocks, which leave out what none of theirs sees. No result depends on the cut: each
// is a sum over the query's own keys in order, to which the keys of others add exact zeros.
#pragma once

#include "attention/interval_attention.h"

namespace pynar {

// Keys are packed and scored in groups of this many positions.
constexpr int kKeyGroup = 16;
// Queries of a block.
constexpr int kBlockRows = 4;

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

struct RowBlock {
  static constexpr int kMaxRuns = kBlockRows * kMaxIntervals;
  Ranges<kMaxIntervals> seen[kBlockRows];  // positions that each query sees
  Ranges<kMaxRuns> runs;                   // positions that any of them sees
  Ranges<kMaxRuns> groups;                 // the groups that hold those
  Ranges<kMaxRuns + kMaxIntervals>
      gaps[kBlockRows];  // positions in `groups` that each query does not see
  bool mixed = false;    // whether the queries differ
};

}  // namespace pynar

#ifndef PYNAR_ISA

#include <algorithm>
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

// Tiles with keys in common, directly or through others, and the keys that are theirs alone. Those
// of a sentence share out all its keys.
struct TileFamily {
  int64_t b;
  Range keys;
  std::vector<const TileSpan*> tiles;  // in order of their queries
  int64_t begin;                       // see TileSpan
};

class TileFamilies {
 public:
  TileFamilies(const TileList& tiles, const IntervalView& view);

  int64_t total() const { return total_; }
  const std::vector<TileFamily>& families() const { return families_; }

 private:
  std::vector<TileFamily> families_;
  int64_t total_ = 0;
};

// The keys and blocks of one tile. Kept by a thread from tile to tile for its memory.
class TilePlan {
 public:
  void build(const IntervalView& view, const TileSpan& tile);

  int64_t num_keys() const { return num_keys_; }
  int64_t num_groups() const { return static_cast<int64_t>(keys_.size()) / kKeyGroup; }
  // The key at each position; the last one fills its group up.
  const int64_t* keys() const { return keys_.data(); }
  // Those of a uniform tile are all the same one.
  const RowBlock* blocks() const { return blocks_.data(); }
  int64_t block_step() const { return uniform_ ? 0 : 1; }

  // For each group, the queries whose blocks hold it: ranges[starts[g]] to ranges[starts[g + 1]].
  void build_group_rows(int64_t rows);
  const Range* group_rows() const { return group_rows_.data(); }
  const int64_t* group_starts() const { return group_starts_.data(); }

 private:
  void set_keys(const std::vector<Range>& segments);

  std::vector<int64_t> keys_;
  int64_t num_keys_ = 0;
  bool uniform_ = false;
  std::vector<RowBlock> blocks_;
  std::vector<Range> segments_;
  std::vector<int64_t> segment_positions_;
  std::vector<Range> group_rows_;
  std::vector<int64_t> group_starts_;
  std::vector<Ranges<kMaxIntervals>> rows_;
};

}  // namespace pynar

#endif
