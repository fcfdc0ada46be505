// A Transformer layer of packed_linear and interval_attention, in two phases: what a row does for
// all, and what it does for itself. See packed_layers.cpp for the formula.
#pragma once

#include <optional>

#include "common/parallel.h"
#include "linear/host.h"

namespace pynar {

// With so many rows a thread, each goes through whole layers with its own. With fewer they share
// the columns of every product, since then reading the weights takes most of the time.
constexpr int64_t kRowsToShare = 4;

// So many rows at most go through the second phase together, so that what is between their maps
// stays in a core's own caches; or as many as are too few to be shared out, where that is more.
constexpr int64_t kTileRows = 96;

// What layers next to each other share.
struct LayerShape {
  int64_t rows;
  int64_t dim;
  int64_t hidden;
  int64_t heads;
  int64_t content;  // the first rows, which have keys and values
  int64_t activation;
  size_t parts;  // sub-layers
  bool bare;     // attention has no map behind it
  double eps;

  size_t maps() const { return bare ? parts + 1 : 2 * parts; }
  // In floats: the first phase's results.
  int64_t projected() const { return 3 * rows * dim; }
};

// Of one layer, each an array of tensors.
struct LayerTensors {
  const Tensor* weights;
  const Tensor* scales;  // null but for int8
  const Tensor* column_sums;
  const Tensor* biases;
  const Tensor* norms;  // null where sub-layers begin with one
};

// What cross-attention reads.
struct LayerMemory {
  const Tensor& keys;
  const Tensor& values;
  const Tensor& intervals;
};

// Keys and values that rows write where they are told, and see among those of earlier calls.
struct LayerCache {
  float* rows;  // [size, 2 dim]
  int64_t size;
  const int64_t* slots;  // of each row with keys and values
};

class Layer {
 public:
  // `chosen`: the rows whose results are wanted; null for all. With a `cache` rows see that.
  Layer(const LayerShape& shape, const LayerTensors& tensors, const Tensor& x,
        const Tensor& intervals, const std::optional<LayerMemory>& memory,
        const std::optional<LayerCache>& cache, const Tensor* chosen, float* projected)
      : shape_(shape),
        tensors_(tensors),
        x_(x),
        intervals_(intervals),
        memory_(memory),
        cache_(cache),
        chosen_(chosen),
        projected_(projected) {}

  // Queries, keys and values of rows [first, last).
  void project(int64_t first, int64_t last) const;
  // Everything else for the wanted rows [first, last), whose results are y. A row needs nothing of
  // the others but what they have projected.
  void finish(int64_t first, int64_t last, const Tensor& y) const;
  // Calls body(begin, end) for tiles of the wanted rows [first, last).
  template <typename Body>
  void in_tiles(int64_t first, int64_t last, const Body& body) const {
    for (int64_t end; first < last; first = end) {
      end = tile_end(first, last);
      body(first, end);
    }
  }

 private:
  // Ends where the first interval's begin changes, if that is in the second half of a full tile;
  // else the same keys would be prepared for the next tile, too. With chosen rows it is full.
  int64_t tile_end(int64_t first, int64_t last) const;
  bool norm_first() const { return tensors_.norms == nullptr; }
  void enter(size_t map, const Tensor& x, const Tensor& y, int64_t activation = 0) const;
  void leave(size_t part, size_t map, const Tensor& x, const Tensor& residual,
             const Tensor& y) const;
  void leave(size_t part, const Tensor& x, const Tensor& residual, const Tensor& y) const;
  void run(size_t map, const Tensor& x, const std::optional<Tensor>& residual,
           const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
           int64_t activation, double input_eps, const Tensor& y) const;

  const LayerShape& shape_;
  LayerTensors tensors_;
  const Tensor& x_;
  const Tensor& intervals_;
  const std::optional<LayerMemory>& memory_;
  const std::optional<LayerCache>& cache_;
  const Tensor* chosen_;
  float* projected_;
};

}  // namespace pynar
