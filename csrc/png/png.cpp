#include "png.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace tarflow {

namespace {

constexpr uint8_t SIGNATURE[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
constexpr int64_t MOST_BYTES = 1 << 22;  // a larger file is not held in memory
constexpr int64_t STRIP = 1 << 16;  // bytes of rows that are inflated at once, if a row has no more
constexpr int HEAD = 33;  // bytes of the signature and the first chunk
constexpr std::size_t AROUND = 12;  // bytes of a chunk beside its content: length and name before it, checksum after it

uint32_t number(const uint8_t* at) {
  return uint32_t{at[0]} << 24 | uint32_t{at[1]} << 16 | uint32_t{at[2]} << 8 | uint32_t{at[3]};
}

struct Chunk {
  const uint8_t* content;
  uint32_t length;

  bool is(const char* name) const { return std::memcmp(content - 4, name, 4) == 0; }

  bool is_whole() const { return crc32(0, content - 4, length + 4) == number(content + length); }

  // Whether it changes no level. Other decoders look at these too, and may refuse one of another length.
  bool is_ignored() const {
    return (is("gAMA") && length == 4) || (is("cHRM") && length == 32) || (is("sRGB") && length == 1) ||
           (is("pHYs") && length == 9);
  }
};

// Of what is left, above and above left, the one that is nearest to left + above − corner; of equally near ones the
// first. That is the corner if 3 corner − left − above lies between the two others, the larger of them if it lies below
// both, and the smaller if above. There are no branches, as noise would make a processor guess them wrongly.
int paeth(int left, int above, int corner) {
  const int small = std::min(left, above), large = left + above - small, other = 3 * corner - left - above;
  const int nearest = large <= other ? small : corner;
  return other <= small ? large : nearest;
}

// Adds to each byte of a row what predict(left, above, corner) says. What is left of a row is zero.
template <int Channels, class Predict>
void add_predicted(const uint8_t* in, const uint8_t* above, uint8_t* row, int64_t bytes, Predict predict) {
  int left[Channels] = {}, corner[Channels] = {};
  for (int64_t i = 0; i < bytes; i += Channels)
    for (int c = 0; c < Channels; ++c) {
      const int up = above[i + c];
      left[c] = static_cast<uint8_t>(in[i + c] + predict(left[c], up, corner[c]));
      corner[c] = up;
      row[i + c] = static_cast<uint8_t>(left[c]);
    }
}

// Undoes the filter of a row (section 9 of PNG's standard), and returns whether it is one of the five that there are.
// in: the row, after its filter.
template <int Channels>
bool unfilter(const uint8_t* in, const uint8_t* above, uint8_t* row, int64_t bytes) {
  switch (in[-1]) {
    case 0: std::copy(in, in + bytes, row); return true;
    case 1: add_predicted<Channels>(in, above, row, bytes, [](int left, int, int) { return left; }); return true;
    case 2:
      for (int64_t i = 0; i < bytes; ++i) row[i] = static_cast<uint8_t>(in[i] + above[i]);
      return true;
    case 3:
      add_predicted<Channels>(in, above, row, bytes, [](int left, int up, int) { return (left + up) / 2; });
      return true;
    case 4: add_predicted<Channels>(in, above, row, bytes, paeth); return true;
    default: return false;
  }
}

template <int Channels>
void put_row(const uint8_t* row, int64_t y, const Pixels& wanted, uint8_t* out) {
  for (int64_t c = 0; c < wanted.channels; ++c) {
    const uint8_t* from = row + (Channels == 1 ? 0 : c);
    uint8_t* to = out + (c * wanted.height + y) * wanted.width;
    for (int64_t x = 0; x < wanted.width; ++x) to[x] = from[x * Channels];
  }
}

}  // namespace

PngReader::PngReader(const Pixels& wanted) : wanted_(wanted) {
  if (inflateInit(&stream_) != Z_OK) throw std::bad_alloc();
}

PngReader::~PngReader() { inflateEnd(&stream_); }

bool PngReader::read(const std::string& path, uint8_t* out) {
  return load(path) && find_levels() && (channels_ == 1 ? decode<1>(out) : decode<3>(out));
}

// Reads the file into memory, unless it is too large, of another size or kind, or no file: to open a pipe would be to
// wait.
bool PngReader::load(const std::string& path) {
  struct stat found;
  if (stat(path.c_str(), &found) != 0 || (found.st_mode & S_IFMT) != S_IFREG) return false;
  if (found.st_size < HEAD || found.st_size > MOST_BYTES) return false;
  const auto close = [](std::FILE* file) { std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> file(std::fopen(path.c_str(), "rb"), close);
  if (file == nullptr) return false;
  content_.resize(static_cast<std::size_t>(found.st_size));
  const auto get = [&](std::size_t from, std::size_t to) {
    return std::fread(content_.data() + from, 1, to - from, file.get()) == to - from;
  };
  return get(0, HEAD) && is_wanted() && get(HEAD, content_.size());
}

// Whether the file begins as a plain PNG of the wanted size does.
bool PngReader::is_wanted() {
  const uint8_t* at = content_.data();
  const Chunk head{at + 16, number(at + 8)};
  if (!std::equal(SIGNATURE, SIGNATURE + 8, at) || !head.is("IHDR") || head.length != 13 || !head.is_whole())
    return false;
  const uint8_t kind = head.content[9];
  const uint8_t plain[] = {8, kind, 0, 0, 0};  // bits, colours, and no other compression, filters or interlacing
  channels_ = kind == 0 ? 1 : 3;
  return (kind == 0 || kind == 2) && channels_ <= wanted_.channels && std::equal(plain, plain + 5, head.content + 8) &&
         number(head.content) == wanted_.width && number(head.content + 4) == wanted_.height;
}

// Finds where the levels are. The checksums of other chunks are held to what they should be; the levels have one of their
// own.
bool PngReader::find_levels() {
  pieces_.clear();
  for (std::size_t at = HEAD; content_.size() - at >= AROUND;) {
    const Chunk chunk{content_.data() + at + 8, number(content_.data() + at)};
    if (chunk.length > content_.size() - at - AROUND) return false;
    at += AROUND + chunk.length;
    if (chunk.is("IDAT"))
      pieces_.emplace_back(chunk.content, chunk.length);
    else if (chunk.is("IEND"))
      return chunk.length == 0 && !pieces_.empty();
    else if (!pieces_.empty() || !chunk.is_ignored() || !chunk.is_whole())
      return false;
  }
  return false;
}

// Inflates the next rows, and returns whether they are all there; with the last ones the levels have to end, and their
// checksum to be right.
bool PngReader::inflate_rows(uint8_t* rows, int64_t bytes, bool last) {
  stream_.next_out = rows;
  stream_.avail_out = static_cast<uInt>(bytes);
  while (last || stream_.avail_out > 0) {
    if (stream_.avail_in == 0) {
      if (next_piece_ == pieces_.size()) return false;
      stream_.next_in = const_cast<Bytef*>(pieces_[next_piece_].first);
      stream_.avail_in = pieces_[next_piece_++].second;
      continue;  // a piece may be empty
    }
    const int status = inflate(&stream_, Z_NO_FLUSH);
    if (status == Z_STREAM_END)
      return last && stream_.avail_out == 0 && stream_.avail_in == 0 && next_piece_ == pieces_.size();
    if (status != Z_OK) return false;  // also where there is more than the rows
  }
  return true;
}

template <int Channels>
bool PngReader::decode(uint8_t* out) {
  const int64_t height = wanted_.height, bytes = wanted_.width * Channels, filtered = bytes + 1;
  const int64_t strip = std::min(height, std::max<int64_t>(1, STRIP / filtered));
  rows_.resize(strip * filtered);
  pair_.assign(2 * bytes, 0);
  uint8_t *above = pair_.data(), *row = above + bytes;
  inflateReset(&stream_);
  stream_.avail_in = 0;
  next_piece_ = 0;
  for (int64_t first = 0; first < height; first += strip) {
    const int64_t count = std::min(strip, height - first);
    if (!inflate_rows(rows_.data(), count * filtered, first + count == height)) return false;
    for (int64_t y = 0; y < count; ++y, std::swap(above, row)) {
      if (!unfilter<Channels>(rows_.data() + y * filtered + 1, above, row, bytes)) return false;
      put_row<Channels>(row, first + y, wanted_, out);
    }
  }
  return true;
}

}  // namespace tarflow
