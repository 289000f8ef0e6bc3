"""The attention of the `torch` backend, and windows that differ from sample to sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Windows:
    """The windows [start[b], stop[b]) of a batch, as N tokens one after the other, without gaps.

    At least one window has a token. samples, tokens, columns: (N,), the sample of each token, its number, and its place
    in the window. rows, places: (M,), the row and the place in the cache of the token before it; M = N, or 2N when
    guided (conditional branch first).
    """

    def __init__(self, start: Sequence[int], stop: Sequence[int], branches: int, device: torch.device):
        B = len(start)
        first, last = torch.tensor([list(start), list(stop)], device="cpu")
        widths = last - first
        taken = widths.nonzero().flatten()  # the A samples that have a window
        pair = torch.arange(len(taken), device="cpu").repeat_interleave(widths[taken])
        samples = taken[pair]
        columns = torch.arange(len(samples), device="cpu") - (widths.cumsum(0) - widths)[samples]
        indices = torch.stack([samples, first[samples] + columns, columns, pair]).to(device)  # in one copy
        self.samples, self.tokens, self.columns, pair = indices
        self.width = int(widths.max())
        self.keys = int(last[taken].max()) - 1

        def branched(x: Tensor, step: int = 0) -> Tensor:
            return torch.cat([x + branch * step for branch in range(branches)])

        self.rows, self.places = branched(self.samples, B), branched(self.tokens - 1)
        self._queries = branched(pair, len(taken)), branched(self.columns)
        self._taken: Tensor | slice = branched(taken.to(device), B) if len(taken) < B else slice(None)
        seen = self.rows.new_zeros(branches * len(taken), self.width)  # columns beyond a window see token 0
        seen[self._queries] = self.places
        self._mask = torch.arange(self.keys, device=device) <= seen[:, None, :, None]  # (A or 2A, 1, W, keys)

    def attend(self, qkv: Tensor, keys_values: Tensor, query_scale: Tensor | None) -> Tensor:
        """Put keys and values into the cache, and return what the queries attend to, (M, H, d).

        qkv: (M, 3, H, d). keys_values: (2, R, H, T, d), the cache of a layer. query_scale: (R, 1, 1, 1) or None.
        """
        keys_values[:, self.rows, :, self.places] = qkv[:, 1:]
        pairs, columns = self._queries
        _, _, H, d = qkv.shape
        q = qkv.new_zeros(self._mask.shape[0], H, self.width, d)
        q[pairs, :, columns] = qkv[:, 0]
        if query_scale is not None:
            q = q * query_scale[self._taken]
        k, v = keys_values[:, self._taken, :, : self.keys]
        return attention(q, k, v, self._mask)[pairs, :, columns]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Returns softmax(q kᵀ / √d, mask) v, (R, H, W, d).

    q: (R, H, W, d). k, v: (R, H, keys, d). mask: (W, keys) or (R, 1, W, keys), True where a key is seen; None means
    everywhere.

    A key that some query does not see may be infinite or NaN, if it is of a later token of the window. Its weight is 0,
    but 0 · NaN is NaN, so such keys and values are left out, and the result is NaN for the queries that do see them.
    What no query of a row sees is memory that nothing was written to. There a large number is as bad, because its logit
    overflows, so it is left out too. A mask (1, keys) must hide only zeros, or keys and values of other tokens.
    """
    if mask is None or mask.shape[:-1] == (1,):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    bad = ~(torch.isfinite(k) & torch.isfinite(v)).all(-1)  # (R, H, keys)
    left_out = (bad | ~mask.any(-2)).unsqueeze(-1)
    k, v = (x.masked_fill(left_out, 0) for x in (k, v))
    seen = (bad.unsqueeze(2) & mask).any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(seen, torch.nan)
