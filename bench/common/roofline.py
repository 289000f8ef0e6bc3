"""What a pass costs at least: its arithmetic and its memory traffic, against the machine's rates."""

from __future__ import annotations

from typing import NamedTuple

from tarflow_fast import TarFlowConfig


class Work(NamedTuple):
    """The least work of a pass. flops counts a multiply and an add as two; bytes is what is read and written, weights
    and KV cache. weight_bytes is the size of one flow block's weights, and working_set what the steps of a block go
    over again and again, its weights and its whole KV cache."""

    flops: int
    bytes: int
    weight_bytes: int
    working_set: int


def _sizes(config: TarFlowConfig) -> tuple[int, int, int, int, int, int]:
    """Returns K, L, T, C, the elements of a block's matrices, D C + 12 L C² + C O, and of all its weights, W."""
    L, C, D = config.layers_per_block, config.channels, config.token_dim
    out = config.block_shape.parameters
    matrices = D * C + 12 * L * C * C + C * out
    return config.num_blocks, L, config.num_patches, C, matrices, matrices + C + 13 * L * C + out


def inverse_work(config: TarFlowConfig, batch: int, *, guided: bool = False, itemsize: int = 4) -> Work:
    """Returns the least work of the sequential inverse of K blocks of T tokens with a KV cache.

    With R = B rows, or 2B when guided, width C, L layers, D values a token, O = 2D outputs a token (D if volume-
    preserving), s = itemsize bytes a value, and i = 0 … T−2 the token evaluated:

        flops = K Σ_i R [ 2 (D C + 12 L C² + C O) + 4 L C (i+1) ]
        bytes = K Σ_i s [ W + 2 L C R (i+1) + 2 L C R ],  W = D C + C + L (12 C² + 13 C) + C O + O

    Per layer 12 C² is qkv (3), proj (1) and the MLP (8); 4 C (i+1) is q kᵀ and p v over i+1 keys. A step reads the
    weights W once and the cache up to token i, and writes token i's keys and values. Activations are taken to stay in
    the nearest cache; norms, softmax, GELU and exp are not counted.
    """
    K, L, T, C, matrices, weights = _sizes(config)
    rows = 2 * batch if guided else batch
    cache_traffic = L * C * rows * T * (T - 1) + 2 * L * C * rows * (T - 1)
    return Work(
        flops=K * rows * (2 * (T - 1) * matrices + 2 * L * C * T * (T - 1)),
        bytes=K * itemsize * ((T - 1) * weights + cache_traffic),
        weight_bytes=itemsize * weights,
        working_set=itemsize * (weights + 2 * L * C * rows * T),
    )


def product_flops(config: TarFlowConfig, batch: int) -> int:
    """Returns the operations of the products with weights alone in the sequential inverse, in the notation of
    `inverse_work`: K (T−1) B · 2 (D C + 12 L C² + C O)."""
    K, _, T, _, matrices, _ = _sizes(config)
    return 2 * K * (T - 1) * batch * matrices


def density_work(config: TarFlowConfig, batch: int, *, backward: bool = False, itemsize: int = 4) -> Work:
    """Returns the least work of the density pass of K blocks, in the notation of `inverse_work`, all T tokens at once:
    flops = K B [ 2 T (D C + 12 L C² + C O) + 2 L C T (T+1) ] and bytes = s [ K W + 2 B T D ]. backward: each product
    twice more, for the gradients of both its factors; the weights are read again and their gradients written, and the
    images' values read again."""
    K, L, T, C, matrices, weights = _sizes(config)
    flops, values = K * batch * (2 * T * matrices + 2 * L * C * T * (T + 1)), batch * T * config.token_dim
    moved = 3 * (K * weights + values) if backward else K * weights + 2 * values
    working_set = itemsize * (weights + 2 * values)
    return Work(3 * flops if backward else flops, itemsize * moved, itemsize * weights, working_set)


def denoise_work(config: TarFlowConfig, batch: int, *, itemsize: int = 4) -> Work:
    """Returns the least work of the density's gradient by the images, in the notation of `inverse_work`: flops = K B
    [ 4 T (D C + 12 L C² + C O) + 6 L C T (T+1) ] and bytes = s [ 2 K W + 3 B T D ], as a product with weights is done
    once more, for the gradient of what it is applied to, and q kᵀ and p v twice more, for those of both factors."""
    K, L, T, C, _, weights = _sizes(config)
    forward = density_work(config, batch, itemsize=itemsize)
    moved = itemsize * (2 * K * weights + 3 * batch * T * config.token_dim)
    return forward._replace(flops=2 * forward.flops + 2 * K * batch * L * C * T * (T + 1), bytes=moved)


def limit(work: Work, matrix_rate: float, bandwidth: float) -> tuple[float, str]:
    """Returns max(flops / matrix_rate, bytes / bandwidth), and which of the two it is, "arithmetic" or "memory". The
    bandwidth is that of work.working_set bytes: what fits in a cache is held to the cache's speed."""
    return max((work.bytes / bandwidth, "memory"), (work.flops / matrix_rate, "arithmetic"), key=lambda each: each[0])
