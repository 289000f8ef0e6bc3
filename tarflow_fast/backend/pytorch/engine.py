"""The `torch` backend: PyTorch's own kernels on any device, with a preallocated KV cache and no host sync per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dtypes import residual_dtype
from ...engine.base import EngineBase
from ...engine.contract import BlockState, Condition, Guidance, Moved, Progress, embedding_rows
from ...engine.weights import BlockWeights, LayerWeights
from ...engine.windows import Bounds, check_part, check_window, check_windows
from .linear import Linear
from .windows import Windows, attention

# torch.compile wants fixed shapes: a compiled step attends to a whole multiple of this many tokens, masked.
COMPILED_KEYS = 128


@dataclass
class _Cache:
    rows: int  # R: B, or 2B when guided (conditional branch first)
    keys_values: Tensor  # (L, 2, R, H, T, d)
    embedding: Tensor | None  # (R, 1, C), class embedding of each row
    query_scale: Tensor | None  # (R, 1, 1, 1), 1/attn_temp in the unguided half; None when 1 everywhere


@dataclass(frozen=True)
class _Layer:
    """One transformer layer: products in the engine's dtype; norms, which meet the residual stream, in its dtype."""

    norm1: tuple[Tensor, Tensor]
    qkv: Linear
    proj: Linear
    norm2: tuple[Tensor, Tensor]
    fc1: Linear  # with GELU
    fc2: Linear


class TorchEngine(EngineBase):
    """BlockEngine in plain PyTorch. dtype: of weights and cache; the residual stream is fp32 (fp64 for float64).

    compile: the step under torch.compile, on CUDA as a CUDA graph (mode "reduce-overhead").
    """

    def __init__(self, weights: BlockWeights, *, device: torch.device, dtype: torch.dtype, compile: bool = False):
        self.shape = weights.shape
        self.device, self.dtype, self.residual_dtype = device, dtype, residual_dtype(dtype)
        self.compile, self.graphs = compile, compile and device.type == "cuda"
        self.position = self._in_stream(weights.position)
        self.classes = None if weights.classes is None else self._in_stream(weights.classes)
        self.proj_in = self._linear(weights.proj_in_weight, weights.proj_in_bias)
        self.layers = [self._layer(layer) for layer in weights.layers]
        self.proj_out = self._linear(weights.proj_out_weight, weights.proj_out_bias)
        mode = "reduce-overhead" if self.graphs else None
        self._compiled = torch.compile(self._transformer, dynamic=False, mode=mode) if compile else None

    def _static(self, x: Tensor) -> Tensor:
        """x itself, said to stay where it is: a CUDA graph copies any other input at each replay, and torch makes no
        graph of a step that writes to one, as this one does to the cache."""
        if self.graphs:
            torch._dynamo.mark_static_address(x)
        return x

    def _in_stream(self, x: Tensor) -> Tensor:
        return self._static(x.to(self.device, self.residual_dtype, copy=True).contiguous())

    def _linear(self, weight: Tensor, bias: Tensor, gelu: bool = False) -> Linear:
        to = (self.device, self.dtype)
        linear = Linear(weight.to(*to, copy=True), bias.to(*to, copy=True), gelu=gelu, fused=not self.compile)
        for x in (linear.weight, linear.bias):
            self._static(x)
        return linear

    def _layer(self, w: LayerWeights) -> _Layer:
        return _Layer(
            norm1=(self._in_stream(w.norm1_weight), self._in_stream(w.norm1_bias)),
            qkv=self._linear(w.qkv_weight, w.qkv_bias),
            proj=self._linear(w.proj_weight, w.proj_bias),
            norm2=(self._in_stream(w.norm2_weight), self._in_stream(w.norm2_bias)),
            fc1=self._linear(w.fc1_weight, w.fc1_bias, gelu=True),
            fc2=self._linear(w.fc2_weight, w.fc2_bias),
        )

    ragged = True  # a window for each sample

    def begin(self, z: Tensor, condition: Condition, reuse: BlockState | None = None) -> BlockState:
        shape, guidance = self.shape, condition.guidance
        z = self.latents(z, self.residual_dtype)
        B, T, _ = z.shape
        R = self.branches(condition) * B
        embedding = None
        if self.classes is not None:
            rows = embedding_rows(condition, B, shape.classes, self.device)
            embedding = self.classes[rows].unsqueeze(1)
        query_scale = None
        if guidance.active and guidance.attn_temp != 1.0:
            query_scale = torch.ones(R, 1, 1, 1, device=self.device, dtype=self.dtype)
            query_scale[B:] = 1 / guidance.attn_temp
        sizes = (shape.layers, 2, R, shape.heads, T, shape.head_dim)
        if self._compiled is None and reuse is not None and reuse.cache.keys_values.shape == sizes:
            keys_values = reuse.cache.keys_values
        else:
            # A compiled step has whole lengths of keys before it, of which the last are zeros until they are written.
            keys_values = self._static(torch.zeros(sizes, dtype=self.dtype, device=self.device))
        cache = _Cache(R, keys_values, embedding, query_scale)
        return self.state(z, z.clone(), condition, cache, keys_values.nbytes)

    def bytes_per_sample(self, guided: bool) -> int:
        shape = self.shape
        rows, T, C = 2 if guided else 1, shape.tokens, shape.channels
        cache = 2 * shape.layers * T * C * self.dtype.itemsize
        step = 16 * C * self.residual_dtype.itemsize  # the activations of one token
        return rows * (cache + step) + 4 * T * shape.token_dim * self.residual_dtype.itemsize

    @torch.inference_mode()
    def reverse(
        self, state: BlockState, progress: Progress | None = None, start: int = 1, stop: int | None = None
    ) -> None:
        T = state.x.shape[1]
        stop = T if stop is None else stop
        check_part(start, stop, T)
        schedule = state.condition.guidance.schedule(T)
        if self._compiled is not None and start < stop:
            # A compiled step reads beyond the position, under a mask: those values must be finite (0 · NaN is NaN).
            state.cache.keys_values[..., start - 1 :, :] = 0
        with torch.autocast(self.device.type, enabled=False):
            for i in range(start - 1, stop - 1):
                out = self._evaluate(state, i) if self._compiled is None else self._evaluate_compiled(state, i)
                self._affine(state, out, schedule[i], i + 1, i + 2)
                if progress is not None:
                    progress(1)

    @torch.no_grad()
    def fixed_point(self, state: BlockState, start: Bounds, stop: Bounds) -> Moved:
        B, T, _ = state.x.shape
        with torch.autocast(self.device.type, enabled=False):
            if isinstance(start, int) and isinstance(stop, int):
                check_window(start, stop, T)
                return self._one_window(state, start, stop)
            starts, stops = check_windows(start, stop, B, T)
            if starts == stops:
                return Moved(*(state.x.new_zeros(B, 0) for _ in Moved._fields))
            return self._windows(state, Windows(starts, stops, state.cache.rows // B, self.device))

    def _one_window(self, state: BlockState, start: int, stop: int) -> Moved:
        keys = torch.arange(stop - 1, device=self.device)
        mask = keys <= keys[start - 1 :, None]  # query j of the window sees the prefix and the window up to itself
        window = slice(start - 1, stop - 1)
        out = self._transformer(state.cache, state.x[:, window], self.position[window], window, stop - 1, mask)
        before = state.x[:, start:stop].clone()
        xa = self._affine(state, out, self._schedule(state)[window], start, stop)
        moved = (state.x[:, start:stop] - before).abs()
        return Moved(moved.amax(-1), (moved if xa is None else moved * (-xa).exp()).amax(-1))

    def _windows(self, state: BlockState, windows: Windows) -> Moved:
        """A window for each sample; `fixed_point` of one window, on N tokens instead of (B, W)."""
        B, places = state.x.shape[0], (windows.samples, windows.tokens)
        out = self._evaluate_windows(state, windows)
        xa, xb = self._parameters(out, self._schedule(state)[windows.tokens - 1], state.condition.guidance)
        z, before = state.z[places], state.x[places]
        x = z + xb if xa is None else torch.addcmul(xb, z, xa.exp())
        state.x[places] = x
        state.token_log_det[places] = x.new_zeros(len(x)) if xa is None else xa.sum(-1)
        moved = (x - before).abs()
        found = Moved(*(x.new_zeros(B, windows.width) for _ in Moved._fields))
        found.change[windows.samples, windows.columns] = moved.amax(-1)
        residual = moved if xa is None else moved * (-xa).exp()
        found.residual[windows.samples, windows.columns] = residual.amax(-1)
        return found

    def _schedule(self, state: BlockState) -> Tensor:
        """g_i, (T − 1, 1)."""
        schedule = state.condition.guidance.schedule(state.x.shape[1])
        return torch.tensor(schedule, dtype=self.residual_dtype, device="cpu").to(self.device).unsqueeze(1)

    def _evaluate(self, state: BlockState, i: int) -> Tensor:
        window = slice(i, i + 1)
        return self._transformer(state.cache, state.x[:, window], self.position[window], window, i + 1, None)

    def _evaluate_compiled(self, state: BlockState, i: int) -> Tensor:
        """The same with the position in a tensor, so that one compiled step serves many positions."""
        assert self._compiled is not None
        T = state.x.shape[1]
        index = torch.full((1,), i, device=self.device)  # a kernel; torch.tensor would copy, and wait for the device
        keys = min(T, -(-(i + 1) // COMPILED_KEYS) * COMPILED_KEYS)
        mask = (torch.arange(keys, device=self.device) <= index).unsqueeze(0)
        x, position = state.x[:, i : i + 1].clone(), self.position[i : i + 1].clone()
        if self.graphs:  # the last step's output, which the next replay overwrites, has been used
            torch.compiler.cudagraph_mark_step_begin()
        out: Tensor = self._compiled(state.cache, x, position, index, keys, mask)
        return out

    def _transformer(
        self,
        cache: _Cache,
        x: Tensor,
        position: Tensor,
        window: slice | Tensor,
        keys: int,
        mask: Tensor | None,
    ) -> Tensor:
        """proj_out of W tokens, raw. x: (B, W, D); position: (W, C); mask: (W, keys), True where a key is seen.

        Writes the tokens' keys and values into cache positions `window`, and attends to the first `keys` positions.
        Returns (R, W, 2D), or (R, W, D) for volume-preserving blocks, in the stream's dtype.
        """
        R, (B, W, D) = cache.rows, x.shape
        H, d = self.shape.heads, self.shape.head_dim
        h = self.proj_in(x.to(self.dtype).reshape(B * W, D)).to(self.residual_dtype).view(B, W, -1) + position
        if B != R:  # guided: both branches read the same tokens
            h = h.repeat(2, 1, 1)
        if cache.embedding is not None:
            h = h + cache.embedding

        def attend(qkv: Tensor, keys_values: Tensor) -> Tensor:
            qkv = qkv.view(R, W, 3, H, d).permute(2, 0, 3, 1, 4)
            keys_values[:, :, :, window] = qkv[1:]
            q = qkv[0] if cache.query_scale is None else qkv[0] * cache.query_scale
            k, v = keys_values[:, :, :, :keys]
            return attention(q, k, v, mask).transpose(1, 2)

        return self._layers(cache, h.view(R * W, -1), attend).view(R, W, -1)

    def _evaluate_windows(self, state: BlockState, windows: Windows) -> Tensor:
        """proj_out of the token before each token of the windows, raw: (M, 2D or D), in the stream's dtype."""
        cache, before = state.cache, windows.tokens - 1
        h = (
            self.proj_in(state.x[windows.samples, before].to(self.dtype)).to(self.residual_dtype)
            + self.position[before]
        )
        h = h.repeat(len(windows.rows) // len(h), 1)
        if cache.embedding is not None:
            h = h + cache.embedding[windows.rows, 0]

        def attend(qkv: Tensor, keys_values: Tensor) -> Tensor:
            qkv = qkv.view(len(qkv), 3, self.shape.heads, self.shape.head_dim)
            return windows.attend(qkv, keys_values, cache.query_scale)

        return self._layers(cache, h, attend)

    def _layers(self, cache: _Cache, h: Tensor, attend: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """All layers and proj_out. h: the residual stream, (M, C); attend(qkv (M, 3C), keys_values) has M·C values."""
        dtype, width = self.dtype, (h.shape[1],)
        for layer, keys_values in zip(self.layers, cache.keys_values, strict=True):
            a = torch.layer_norm(h, width, *layer.norm1).to(dtype)
            h = h + layer.proj(attend(layer.qkv(a), keys_values).reshape(h.shape))
            a = torch.layer_norm(h, width, *layer.norm2).to(dtype)
            h = h + layer.fc2(layer.fc1(a))
        return self.proj_out(h.to(dtype)).to(self.residual_dtype)

    def _parameters(self, out: Tensor, scale: float | Tensor, guidance: Guidance) -> tuple[Tensor | None, Tensor]:
        """(xa, xb) of tokens, guided, from their raw (…, 2D or D), both branches of guidance along dimension 0.

        xa is None if volume-preserving. scale: g_i.
        """
        D = self.shape.token_dim
        if guidance.active:
            out, unguided = out.chunk(2)
            guided = out + scale * (out - unguided)
            if self.shape.affine and guidance.what != "ab":
                a, b = (guided, out) if guidance.what == "a" else (out, guided)
                guided = torch.cat([a[..., :D], b[..., D:]], dim=-1)
            elif not self.shape.affine and guidance.what == "a":
                guided = out  # there is no xa to guide
            out = guided
        return (out[..., :D], out[..., D:]) if self.shape.affine else (None, out)

    def _affine(self, state: BlockState, out: Tensor, scale: float | Tensor, start: int, stop: int) -> Tensor | None:
        """Apply x = z · exp(xa) + xb to tokens [start, stop), out: (R, W, 2D or D) from the tokens before.

        Returns xa (B, W, D), or None if volume-preserving.
        """
        xa, xb = self._parameters(out, scale, state.condition.guidance)
        z, x = state.z[:, start:stop], state.x[:, start:stop]
        if xa is None:
            torch.add(z, xb, out=x)
            state.token_log_det[:, start:stop] = 0
            return None
        torch.addcmul(xb, z, xa.exp(), out=x)
        torch.sum(xa, dim=-1, out=state.token_log_det[:, start:stop])
        return xa
