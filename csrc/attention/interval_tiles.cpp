#include "attention/interval_tiles.h"

#include <algorithm>
#include <string>

namespace pynar {
namespace {

// The intervals of a query that are not empty, as they come.
Ranges<kMaxIntervals> read(const IntervalView& view, int64_t b, int64_t t) {
  Ranges<kMaxIntervals> row;
  const int32_t* p = view.data + b * view.stride_b + t * view.stride_t;
  for (int64_t r = 0; r < view.num_intervals; ++r, p += view.stride_r) {
    if (p[0] < p[1]) row.range[row.count++] = {p[0], p[1]};
  }
  return row;
}

// Sorts ranges and joins those that touch.
template <typename Iterator>
Iterator normalise(Iterator first, Iterator last) {
  if (last - first < 2) return last;
  std::sort(first, last, [](const Range& a, const Range& b) { return a.begin < b.begin; });
  Iterator out = first;
  for (Iterator i = first + 1; i != last; ++i) {
    if (i->begin <= out->end) {
      out->end = std::max(out->end, i->end);
    } else {
      *++out = *i;
    }
  }
  return out + 1;
}

template <int kCapacity>
void normalise(Ranges<kCapacity>& ranges) {
  ranges.count =
      static_cast<int>(normalise(ranges.range, ranges.range + ranges.count) - ranges.range);
}

bool equal(const Ranges<kMaxIntervals>& a, const Ranges<kMaxIntervals>& b) {
  if (a.count != b.count) return false;
  for (int i = 0; i < a.count; ++i) {
    if (a.range[i].begin != b.range[i].begin || a.range[i].end != b.range[i].end) return false;
  }
  return true;
}

int64_t length(const Ranges<kMaxIntervals>& row) {
  int64_t sum = 0;
  for (const Range& range : row) sum += range.end - range.begin;
  return sum;
}

int64_t overlap(const Ranges<kMaxIntervals>& a, const Ranges<kMaxIntervals>& b) {
  int64_t sum = 0;
  for (const Range& x : a) {
    for (const Range& y : b) {
      sum += std::max<int64_t>(0, std::min(x.end, y.end) - std::max(x.begin, y.begin));
    }
  }
  return sum;
}

// What packing a tile's keys, and planning it, cost in queries.
constexpr int64_t kTileCost = 3;

}  // namespace

TileList::TileList(const Check& check, const IntervalView& view) {
  tiles_.reserve(view.batch * view.queries / 8 + view.batch);
  for (int64_t b = 0; b < view.batch; ++b) {
    constexpr Range kNothing{0, 0};
    Ranges<kMaxIntervals> previous;
    int64_t longest = 0;
    int64_t sum = 0;
    TileSpan tile{b, 0, 0, true, total_, kNothing};
    const auto close = [&] {
      if (tile.rows == 0) return;
      tiles_.push_back(tile);
      total_ += sum + kTileCost * longest + 1;
    };
    for (int64_t t = 0; t < view.queries; ++t) {
      const Ranges<kMaxIntervals> row = read(view, b, t);
      for (const Range& range : row) {
        if (range.begin >= 0 && range.end <= view.keys) continue;
        check.fail("intervals", "lie in [0, " + std::to_string(view.keys) + "]",
                   "[" + std::to_string(range.begin) + ", " + std::to_string(range.end) +
                       ") (sentence " + std::to_string(b) + ", query " + std::to_string(t) + ")");
      }
      const int64_t keys = length(row);
      const bool same = tile.rows > 0 && equal(row, previous);
      const bool joins =
          tile.rows > 0 && tile.rows < kMaxRows &&
          (same || (keys > 0 && 2 * overlap(row, previous) >= std::max(keys, length(previous))));
      if (!joins) {
        close();
        tile = {b, t, 0, true, total_, kNothing};
        longest = sum = 0;
      }
      tile.uniform = tile.rows == 0 || (tile.uniform && same);
      ++tile.rows;
      for (const Range& range : row) {
        const bool first = tile.hull.end == 0;
        tile.hull.begin = first ? range.begin : std::min(tile.hull.begin, range.begin);
        tile.hull.end = std::max(tile.hull.end, range.end);
      }
      sum += keys;
      longest = std::max(longest, keys);
      previous = row;
    }
    close();
  }
}

TileFamilies::TileFamilies(const TileList& list, const IntervalView& view, int64_t max_rows) {
  tiles_.reserve(list.tiles().size());
  for (const TileSpan& tile : list.tiles()) tiles_.push_back(&tile);
  // Tiles without keys end up in front, in the family of whatever comes first.
  std::sort(tiles_.begin(), tiles_.end(), [](const TileSpan* x, const TileSpan* y) {
    if (x->b != y->b) return x->b < y->b;
    return x->hull.begin != y->hull.begin ? x->hull.begin < y->hull.begin : x < y;
  });
  const int64_t count = static_cast<int64_t>(tiles_.size());
  int64_t next = 0;
  for (int64_t b = 0; b < view.batch; ++b) {
    families_.push_back({b, {0, view.keys}, next, next, 0, 0});
    int64_t end = 0;
    for (; next < count && tiles_[next]->b == b; ++next) {
      const TileSpan& tile = *tiles_[next];
      const int64_t rows = families_.back().rows;
      const bool apart = end > 0 && tile.hull.begin >= end;
      if (apart || (rows > 0 && rows + tile.rows > max_rows)) {
        families_.back().keys.end = tile.hull.begin;
        families_.push_back({b, {tile.hull.begin, view.keys}, next, next, 0, 0});
      }
      end = std::max(end, tile.hull.end);
      families_.back().last = next + 1;
      families_.back().rows += tile.rows;
    }
  }
  for (TileFamily& family : families_) {
    // In order of their queries.
    std::sort(tiles_.begin() + family.first, tiles_.begin() + family.last);
    family.begin = total_;
    total_ += 1 + family.keys.end - family.keys.begin;
    for (const TileSpan* tile : tiles(family)) {
      const bool last = tile == &list.tiles().back();
      total_ += (last ? list.total() : tile[1].begin) - tile->begin;
    }
  }
}

void TilePlan::set_keys() {
  segments_.erase(normalise(segments_.begin(), segments_.end()), segments_.end());
  segment_positions_.clear();
  num_keys_ = 0;
  for (const Range& segment : segments_) {
    segment_positions_.push_back(num_keys_);
    num_keys_ += segment.end - segment.begin;
  }
  keys_.resize((num_keys_ + kKeyGroup - 1) / kKeyGroup * kKeyGroup);
  int64_t* at = keys_.data();
  for (const Range& segment : segments_) {
    for (int64_t key = segment.begin; key < segment.end; ++key) *at++ = key;
  }
  std::fill(at, keys_.data() + keys_.size(), num_keys_ > 0 ? at[-1] : 0);
}

// The positions of a query's keys.
void TilePlan::place(const Ranges<kMaxIntervals>& row, Ranges<kMaxIntervals>& seen) const {
  seen.count = row.count;
  for (int i = 0; i < row.count; ++i) {
    const Range& range = row.range[i];
    size_t segment = 0;
    if (segments_.size() > 1) {
      segment = std::upper_bound(segments_.begin(), segments_.end(), range.begin,
                                 [](int64_t key, const Range& s) { return key < s.begin; }) -
                segments_.begin() - 1;
    }
    const int64_t shift = segment_positions_[segment] - segments_[segment].begin;
    seen.range[i] = {range.begin + shift, range.end + shift};
  }
}

// What each query of a block sees of a group.
void TilePlan::add_mask(const RowBlock& block, int64_t rows, int64_t group) {
  const int64_t begin = group * kKeyGroup;
  const size_t first = masks_.size();
  masks_.resize(first + (block.mixed ? padded_rows(rows) : 1) * kKeyGroup, 0.f);
  for (int64_t r = 0; r < (block.mixed ? rows : 1); ++r) {
    float* mask = masks_.data() + first + r * kKeyGroup;
    for (const Range& range : block.seen[r]) {
      const int64_t end = std::min<int64_t>(range.end - begin, kKeyGroup);
      for (int64_t i = std::max<int64_t>(range.begin - begin, 0); i < end; ++i) mask[i] = -1.f;
    }
  }
}

void TilePlan::finish(RowBlock& block, int64_t rows) {
  block.runs.count = 0;
  block.mixed = false;
  for (int64_t r = 0; r < rows; ++r) {
    if (r > 0 && equal(block.seen[r], block.seen[r - 1])) continue;
    for (const Range& range : block.seen[r]) block.runs.range[block.runs.count++] = range;
    block.mixed = block.mixed || r > 0;
  }
  normalise(block.runs);
  block.groups.count = 0;
  for (const Range& run : block.runs) {
    const Range groups{run.begin / kKeyGroup, (run.end + kKeyGroup - 1) / kKeyGroup};
    const int n = block.groups.count;
    if (n > 0 && groups.begin <= block.groups.range[n - 1].end) {
      block.groups.range[n - 1].end = groups.end;
    } else {
      block.groups.range[block.groups.count++] = groups;
    }
  }
  // Positions next to each other can lie in ranges of their own.
  Ranges<kMaxIntervals> joined[kBlockRows];
  const int64_t different = block.mixed ? rows : 1;
  for (int64_t r = 0; r < different; ++r) {
    joined[r] = block.seen[r];
    normalise(joined[r]);
  }
  const auto sees_all = [&](int64_t group) {
    const Range positions{group * kKeyGroup, (group + 1) * kKeyGroup};
    return std::all_of(joined, joined + different, [&](const Ranges<kMaxIntervals>& row) {
      return std::any_of(row.begin(), row.end(), [&](const Range& range) {
        return range.begin <= positions.begin && positions.end <= range.end;
      });
    });
  };
  block.num_parts = 0;
  for (const Range& groups : block.groups) {
    for (int64_t g = groups.begin; g < groups.end; ++g) {
      const bool masked = !sees_all(g);
      const int64_t mask = masked ? static_cast<int64_t>(masks_.size()) : -1;
      if (masked) add_mask(block, rows, g);
      GroupRun& last = block.parts[std::max(block.num_parts - 1, 0)];
      if (block.num_parts > 0 && last.end == g && last.masked() == masked) {
        last.end = g + 1;
      } else {
        block.parts[block.num_parts++] = {g, g + 1, mask};
      }
    }
  }
}

void TilePlan::build(const IntervalView& view, std::span<const TileSpan* const> tiles) {
  rows_.clear();
  segments_.clear();
  tiles_.clear();
  masks_.clear();
  int64_t num_blocks = 0;
  for (const TileSpan* tile : tiles) {
    const int64_t blocks = tile->uniform ? 1 : (tile->rows + kBlockRows - 1) / kBlockRows;
    tiles_.push_back({tile, num_blocks, tile->uniform ? 0 : 1, blocks});
    num_blocks += blocks;
    const int64_t rows = tile->uniform ? 1 : tile->rows;
    for (int64_t r = 0; r < rows; ++r) {
      rows_.push_back(read(view, tile->b, tile->first + r));
      normalise(rows_.back());
      for (const Range& range : rows_.back()) {
        // Rows mostly see what the one before saw.
        if (segments_.empty() || range.begin < segments_.back().begin ||
            range.begin > segments_.back().end) {
          segments_.push_back(range);
        } else {
          segments_.back().end = std::max(segments_.back().end, range.end);
        }
      }
    }
  }
  set_keys();
  if (static_cast<int64_t>(blocks_.size()) < num_blocks) blocks_.resize(num_blocks);
  const Ranges<kMaxIntervals>* row = rows_.data();
  for (const TileBlocks& tile : tiles_) {
    for (int64_t i = 0; i < tile.count; ++i) {
      RowBlock& block = blocks_[tile.first + i];
      const int64_t rows = std::min<int64_t>(kBlockRows, tile.span->rows - i * kBlockRows);
      for (int64_t r = 0; r < rows; ++r) {
        if (r > 0 && tile.span->uniform) {
          block.seen[r] = block.seen[0];
        } else {
          place(*row++, block.seen[r]);
        }
      }
      finish(block, rows);
    }
  }
}

void TilePlan::build_group_rows() {
  group_rows_.clear();
  group_starts_.clear();
  for (const TileBlocks& tile : tiles_) {
    group_starts_.push_back(static_cast<int64_t>(group_rows_.size()));
    for (int64_t g = 0; g < num_groups(); ++g) {
      const size_t first = group_rows_.size();
      const RowBlock* block = blocks_.data() + tile.first;
      for (int64_t r = 0; r < tile.span->rows; r += kBlockRows, block += tile.step) {
        const bool holds = std::any_of(block->groups.begin(), block->groups.end(),
                                       [g](const Range& x) { return x.begin <= g && g < x.end; });
        if (!holds) continue;
        const int64_t end = std::min(tile.span->rows, r + kBlockRows);
        if (group_rows_.size() > first && group_rows_.back().end == r) {
          group_rows_.back().end = end;
        } else {
          group_rows_.push_back({r, end});
        }
      }
      group_starts_.push_back(static_cast<int64_t>(group_rows_.size()));
    }
  }
}

}  // namespace pynar
