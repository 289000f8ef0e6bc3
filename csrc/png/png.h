// Plain PNGs (8 bits of grey or RGB, without interlacing, transparency, text or EXIF) as pixels. Only those of one size
// are read, and whatever is odd about a file leaves it to another decoder: a file that is done is one that any decoder
// reads, to the same pixels.
#pragma once

#include <zlib.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tarflow {

// The pixels that are wanted: (channels, height, width). channels: 3, or 1 for grey. A grey file has three equal channels
// too.
struct Pixels {
  int64_t height, width, channels;

  int64_t bytes() const { return height * width * channels; }
};

// Reads files one after the other; their buffers stay. One thread at a time may use it.
class PngReader {
 public:
  explicit PngReader(const Pixels& wanted);
  ~PngReader();
  PngReader(const PngReader&) = delete;
  PngReader& operator=(const PngReader&) = delete;

  // Returns whether the file is a plain PNG of the wanted size, whose pixels are now in `out`; if not, `out` holds
  // anything.
  bool read(const std::string& path, uint8_t* out);

 private:
  bool load(const std::string& path);
  bool is_wanted();
  bool find_levels();
  bool inflate_rows(uint8_t* rows, int64_t bytes, bool last);
  template <int Channels>
  bool decode(uint8_t* out);

  const Pixels wanted_;
  z_stream stream_{};
  std::vector<uint8_t> content_;  // the file
  std::vector<std::pair<const uint8_t*, uint32_t>> pieces_;  // where its levels are, and how many bytes
  std::size_t next_piece_ = 0;
  int channels_ = 0;  // that the file has
  std::vector<uint8_t> rows_;  // a strip of filtered rows
  std::vector<uint8_t> pair_;  // a row and the one above
};

}  // namespace tarflow
