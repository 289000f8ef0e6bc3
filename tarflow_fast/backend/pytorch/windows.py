"""Attention of the `torch` backend, and windows that differ from sample to sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Windows:
    """The windows [start[b], stop[b]) of a batch, their N tokens one after the other, without gaps.

    samples, tokens, columns: (N,), of each token and its place in the window. rows, places: (M,), where the token
    before it is in the cache; M = N, or 2N when guided (conditional branch first). At least one window has a token.
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
        seen = self.rows.new_zeros(branches * len(taken), self.width)  # a column beyond a window sees token 0
        seen[self._queries] = self.places
        self._mask = torch.arange(self.keys, device=device) <= seen[:, None, :, None]  # (A or 2A, 1, W, keys)

    def attend(self, qkv: Tensor, keys_values: Tensor, query_scale: Tensor | None) -> Tensor:
        """qkv: (M, 3, H, d), whose keys and values go into keys_values (2, R, H, T, d). Returns (M, H, d).

        query_scale: (R, 1, 1, 1) or None.
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
    """softmax(q kᵀ / √d, mask) v; q: (R, H, W, d), k, v: (R, H, keys, d).

    mask: (W, keys), or (R, 1, W, keys), True where a key is seen; None: everywhere. A key that some query does not see
    may be infinite or NaN: a later token of a window. Its weight is 0, but 0 · NaN is NaN: such keys and values are
    left out, and the result is NaN for the queries that do see them. What no query of a row sees is memory that nothing
    was written to, where a large number is as bad, as its logit overflows: it is left out too. A mask (1, keys) must
    hide zeros, or keys and values of other tokens.
    """
    if mask is None or mask.shape[:-1] == (1,):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    bad = ~(torch.isfinite(k) & torch.isfinite(v)).all(-1)  # (R, H, keys)
    left_out = (bad | ~mask.any(-2)).unsqueeze(-1)
    k, v = (x.masked_fill(left_out, 0) for x in (k, v))
    seen = (bad.unsqueeze(2) & mask).any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).masked_fill(seen, torch.nan)
