// What blocks of launches of many rows send each other without a barrier (see `send` in device.cuh).
//
// Between two barriers of the grid, a turn, every such place is sent to once, and read. What many read has memory for
// two turns: that of the turn before is emptied while that of this one is used, and is empty, for all, after the next
// barrier. What one thread reads it empties itself.
#pragma once

#include "rows.cuh"

namespace tarflow {

// Returns whether a phase sends what it has to. One that is left out, for measurements, does not.
DEVICE bool sends(const Params& p, Phase phase) { return !(p.skip_phases >> phase & 1); }

// Sends a vector, or stores it where its readers wait for a barrier. i: a multiple of N.
template <bool SENDS, int N, class T>
DEVICE void leave(Global<T> to, int64_t i, const Vector<T, N>& value) {
  if constexpr (!SENDS)
    store_vector(to, i, value);
  else if constexpr (N == 1)
    send(to, i, value.at[0]);
  else
    send_vector(to, i, value);
}

// Looks for vectors of `from` that others send, all at once. sent: whether they do. place(u): the index of one of them,
// or −1 where there is none, which becomes 0.
template <int N, int COUNT, class T, class Place>
DEVICE void look_for(bool sent, Global<T> from, Vector<T, N> (&values)[COUNT], Place place) {
#pragma unroll
  for (int u = 0; u < COUNT; u++) {
    values[u] = {};
    if (place(u) >= 0) values[u] = look<N>(from, place(u), sent);
  }
}

// Waits until all of them have come.
template <int N, int COUNT, class T, class Place>
DEVICE void receive(bool sent, Global<T> from, Vector<T, N> (&values)[COUNT], Place place) {
  if (!sent) return;
  unsigned missing = 0;
#pragma unroll
  for (int u = 0; u < COUNT; u++)
    if (place(u) >= 0 && any_empty(values[u])) missing |= 1u << u;
  for (Patience patience; missing; patience.again()) {
    instructions(10);
#pragma unroll
    for (int u = 0; u < COUNT; u++)
      if (missing >> u & 1) values[u] = look<N>(from, place(u), true);
#pragma unroll
    for (int u = 0; u < COUNT; u++)
      if (missing >> u & 1 && !any_empty(values[u])) missing &= ~(1u << u);
  }
}

// Waits until one vector has come, on each lane that has a place for it, which is not −1. Whoever is to receive much
// first waits for a few vectors of each sender, as the L2 cache would be busy with looks for all again and again.
template <int N, class T>
DEVICE void await_sent(bool sent, Global<T> from, int64_t place) {
  Vector<T, N> value[1];
  const auto of = [&](int) { return place; };
  look_for(sent, from, value, of);
  receive(sent, from, value, of);
}

// Empties `count` elements from `first` on, both whole numbers of 16 bytes, of which all blocks take a share.
template <int WARPS, class T>
DEVICE void empty_all(Global<T> to, int64_t first, int count) {
  constexpr int V = 16 / sizeof(T);
#pragma unroll 1
  for (int i = (block() * WARPS * 32 + thread()) * V; i < count; i += blocks() * WARPS * 32 * V)
    empty<V>(to, first + i);
}

}  // namespace tarflow
