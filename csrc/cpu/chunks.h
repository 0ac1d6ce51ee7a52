// How element-wise ops are cut into work for threads: fixed chunks, so that no sum depends on the number of
// threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/parallel.h"

namespace adpdm::cpu {

// Elements added up together: 16 blocks of an L1-sized 1024; a multiple of every packing block.
constexpr int64_t kChunk = 16384;

// Elements per thread below which waking another thread (about 5 us) costs more than it saves at about 0.1 ns
// an element.
constexpr int64_t kMinElementsPerThread = 65536;

constexpr int64_t num_chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }

// Part of one row.
struct Piece {
  int64_t row;
  int64_t column;   // first
  int64_t columns;  // how many, <= kChunk
};

// Consecutive pieces of [rows, columns]; each starts at a column that is a multiple of kChunk.
class PieceRange {
 public:
  // Pieces [begin, end), numbered along rows.
  PieceRange(int64_t begin, int64_t end, int64_t columns)
      : left_(end - begin),
        row_(begin / num_chunks(columns)),
        column_(begin % num_chunks(columns) * kChunk),
        columns_(columns) {}

  bool empty() const { return left_ == 0; }
  Piece piece() const { return {row_, column_, std::min(kChunk, columns_ - column_)}; }

  void next() {
    --left_;
    column_ += kChunk;
    if (column_ >= columns_) {
      column_ = 0;
      ++row_;
    }
  }

 private:
  int64_t left_;
  int64_t row_;
  int64_t column_;
  int64_t columns_;
};

// Calls body(PieceRange) in parallel, for ranges that cover [rows, columns].
template <typename Body>
void for_each_range(int64_t rows, int64_t columns, Body&& body) {
  if (rows == 0 || columns == 0) return;
  const int64_t grain = std::max<int64_t>(1, kMinElementsPerThread / std::min(columns, kChunk));
  parallel_for(0, rows * num_chunks(columns), grain,
               [&](int64_t begin, int64_t end) { body(PieceRange(begin, end, columns)); });
}

// Calls body(Piece) in parallel.
template <typename Body>
void for_each_piece(int64_t rows, int64_t columns, Body&& body) {
  for_each_range(rows, columns, [&](PieceRange range) {
    for (; !range.empty(); range.next()) body(range.piece());
  });
}

}  // namespace adpdm::cpu
