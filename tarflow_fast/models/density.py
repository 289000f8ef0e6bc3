"""The differentiable density pass of a TarFlow, data to latents; `tarflow.py` has the whole model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .. import host_ops
from ..checks import (
    Labels,
    batch_labels,
    check_choice,
    check_count,
    check_dense,
    check_tensor,
    check_weights,
    short,
    warn_range,
)
from ..errors import ArgumentError, BackendError
from ..limits import most_threads
from ..sizes import Size
from .attention import ATTENTION_BACKENDS
from .config import TarFlowConfig
from .cpu_density import DENSITY_BACKENDS, cpu_density, cpu_density_missing
from .flow_block import Attention, FlowBlock

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Origin
    from ..engine import BlockWeights

IMAGE_RANGE = 16.0  # beyond any image of −1 to 1 with noise, or any sample; 8-bit values as they are go to 255


class TarFlowDensity(nn.Module):
    """A TarFlow as far as its density goes. Arguments: see `TarFlowConfig`."""

    VAR_LR: float = 0.1
    origin: Origin | None = None
    var: Tensor
    _density: str = "auto"
    _density_threads: int | None = None

    def __init__(
        self,
        in_channels: int,
        img_size: Size,
        patch_size: Size,
        channels: int,
        num_blocks: int,
        layers_per_block: int,
        nvp: bool = True,
        num_classes: int = 0,
        head_dim: int = 64,
        layout: str = "image",
    ):
        super().__init__()
        sizes = (channels, num_blocks, layers_per_block, nvp, num_classes, head_dim, layout)
        self.config = config = TarFlowConfig(in_channels, img_size, patch_size, *sizes)
        self.metadata: dict[str, Any] = {}
        self.blocks = nn.ModuleList(
            [FlowBlock(config.block_shape, config.permutation(k)) for k in range(config.num_blocks)]
        )
        # The prior's variance: ones in nvp models, learnt by update_prior in volume-preserving ones.
        self.register_buffer("var", torch.ones(config.num_patches, config.token_dim))

    @classmethod
    def from_config(cls, config: TarFlowConfig) -> Self:
        if not isinstance(config, TarFlowConfig):
            raise ArgumentError("config", "a TarFlowConfig", type(config).__name__)
        return cls(**config.to_dict())

    @classmethod
    def for_tokens(cls, tokens: int, token_dim: int, *sizes: Any, **named: Any) -> Self:
        """A model of sequences, (B, tokens, token_dim); the other sizes are those of the class, from `channels` on.

        All that takes or gives images of other models takes and gives (B, T, D) here.
        """
        return cls.from_config(TarFlowConfig.for_tokens(tokens, token_dim, *sizes, **named))

    # The sizes may be read, as in ml-tarflow, and are those that the model was made with.

    @property
    def img_size(self) -> Size:
        return self.config.img_size

    @property
    def patch_size(self) -> Size:
        return self.config.patch_size

    @property
    def num_patches(self) -> int:
        return self.config.num_patches

    @property
    def device(self) -> torch.device:
        return self.var.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def block_weights(self, k: int) -> BlockWeights:
        """Block k as engines take it; tensors are shared with the model where nothing has to be reordered."""
        block: Any = self.blocks[k]
        found: BlockWeights = block.weights()
        return found

    def set_attention(self, backend: str) -> Self:
        """Attention of the density pass: "auto", "sdpa" or "flash" (see `causal_attention`). Returns self."""
        check_choice("attention", backend, ATTENTION_BACKENDS)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend
        return self

    def set_density(self, backend: str, threads: int | None = None) -> Self:
        """Chooses what computes the density pass: "torch", "cpu" or "auto". Returns self.

        "cpu" is the pass in C++, for models on a CPU where autograd does not record (`torch.no_grad()`); the pass
        raises BackendError where it cannot be had. "auto", the default, is "cpu" where that can be had, else "torch".
        Their results agree up to rounding. threads: of "cpu", default as in `Sampler`.
        """
        check_choice("density", backend, DENSITY_BACKENDS)
        if threads is not None:
            threads = check_count("threads", threads, high=most_threads())
            if backend == "torch":
                raise BackendError("threads is for density 'cpu'; leave it out, and see torch.set_num_threads")
        self._density, self._density_threads = backend, threads
        return self

    def _on_cpu(self, x: Tensor, dtype: torch.dtype, backend: str) -> bool:
        """Whether the C++ pass serves x. Raises BackendError if it was asked for and cannot."""
        if backend == "torch":
            return False
        missing = cpu_density_missing(self.blocks, x, dtype, gradients=torch.is_grad_enabled())
        if missing is not None and backend == "cpu":
            raise BackendError(f"density 'cpu' cannot be had: {missing}")
        return missing is None

    def patchify(self, x: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) to tokens (B, T, D), D ordered (channel, row, column)."""
        x = check_tensor("x", x, self.config.data_shape, finite=False)
        if self.config.layout == "tokens":
            return x
        (rows, columns), (height, width) = self.config.grid, self.config.patch_shape
        split = (len(x), self.config.in_channels, rows, height, columns, width)
        return host_ops.rearranged(x, split, (0, 2, 4, 1, 3, 5), (len(x), *self.var.shape))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (B, T, D) to images (B, in_channels, H, W); the inverse of patchify."""
        x = check_tensor("x", x, tuple(self.var.shape), finite=False)
        if self.config.layout == "tokens":
            return x
        (rows, columns), (height, width) = self.config.grid, self.config.patch_shape
        split = (len(x), rows, columns, self.config.in_channels, height, width)
        return host_ops.rearranged(x, split, (0, 3, 1, 4, 2, 5), (len(x), *self.config.data_shape))

    def forward(self, x: Tensor, y: Labels = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """The density pass, x to z, under ml-tarflow's conventions.

        x: (B, in_channels, H, W) float; y: (B,) labels, or one for all; negative for no class, or None.
        Returns z (B, T, D), the output of every block [(B, T, D)] * K, and the log-det (B,) as a *mean* over T·D.
        """
        x = self.patchify(x)
        if x.is_meta != self.var.is_meta:
            raise ArgumentError("x", f"a tensor on the model's device, {str(self.device)!r}", repr(str(x.device)))
        y = batch_labels(y, x.shape[0], self.config.num_classes, x.device, class_names=self.metadata.get("class_names"))
        autocast = torch.is_autocast_enabled("cpu") and x.device.type == "cpu"
        dtype = torch.get_autocast_dtype("cpu") if autocast else self.dtype
        if self._on_cpu(x, dtype, self._density):
            found = cpu_density(self.blocks, x, y, dtype=dtype, threads=self._density_threads)
            mean = (found.log_det / x[0].numel()).to(torch.float32)
            return found.outputs[-1], list(found.outputs), mean
        outputs: list[Tensor] = []
        log_det = torch.zeros((), dtype=torch.float32, device=x.device)
        for block in self.blocks:
            x, block_log_det = block(x, y)
            log_det = log_det + block_log_det
            outputs.append(x)
        return x, outputs, log_det

    def get_loss(self, z: Tensor, logdets: Tensor) -> Tensor:
        """½ mean(z²) − mean(log-det): the negative log-likelihood per value in nats, less ½ log 2π."""
        return 0.5 * z.pow(2).mean() - logdets.mean()

    def update_prior(self, z: Tensor) -> None:
        """var ← var + VAR_LR (mean_B z² − var), a moving average; z: (B, T, D), finite. Mutates `var`."""
        z = check_tensor("z", z, tuple(self.var.shape))
        self.var.lerp_(z.detach().pow(2).mean(dim=0).to(self.var.dtype), weight=self.VAR_LR)

    def log_prob(self, x: Tensor, y: Labels = None) -> Tensor:
        """log p(x | y) = log N(z; 0, diag var) + log|det dz/dx|, in nats.

        x: (B, in_channels, H, W), finite, on the scale the model was trained on ([-1, 1] for images; 0 to 255 is an
        error unless metadata["values"] is "raw": a model of data that are no pictures); y as in `forward`.
        Returns (B,). It is a density over the values of x: for 8-bit images see `bits_per_dim`.
        """
        x = check_tensor("x", x, self.config.data_shape)
        low, high = host_ops.span(x.detach())
        if low > -1 and high > IMAGE_RANGE and self.metadata.get("values") != "raw":
            expected = "values of about -1 to 1 (v/127.5 - 1, or dequantize(v), of 8-bit values v)"
            raise ArgumentError("x", expected, f"{low:g} to {high:g}")
        if "noise_std" in self.metadata or self.metadata.get("noise_type") == "uniform":  # trained on 8-bit images
            warn_range("x", x, IMAGE_RANGE, "an image of −1 to 1 (v / 127.5 − 1, for 8-bit values v) and some noise")
        z, _, mean_log_det = self.forward(x, y)
        return self.prior_log_prob(z) + mean_log_det * z[0].numel()

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, diag var) in nats; z: (B, T, D). Returns (B,)."""
        z = check_tensor("z", z, tuple(self.var.shape), finite=False)
        return host_ops.gaussian_log_prob(z, self.var.to(z.dtype))

    def bits_per_dim(self, x: Tensor, y: Labels = None) -> Tensor:
        """−log2 p(x | y) / N + log2(128), N = values per image: bits per 8-bit value.

        An 8-bit image v becomes x = (v + u)/128 − 1 with uniform dequantisation noise u in [0, 1)^N
        (`dequantize`). Then E_u[−log2 p(v + u)] ≥ −log2 P(v) (Jensen), and the change of variables from v + u to
        x adds log2(128) for each value. Give x already dequantised. With Gaussian noise instead of u, the figure
        is the density of noisy images on the 256-level scale: comparable between models of one noise level only.
        Returns (B,).
        """
        values = math.prod(self.config.data_shape)
        return -self.log_prob(x, y) / (values * math.log(2)) + math.log2(128)


def check_model(model: object, *, values: bool = True) -> TarFlowDensity:
    """Raises ArgumentError unless this is a TarFlow. values: whether its weights have to have any."""
    if not isinstance(model, TarFlowDensity):
        raise ArgumentError("model", "a TarFlow", model.__name__ if isinstance(model, type) else type(model).__name__)
    if values:
        check_weights(model)
    return model


def dequantize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """x = (v + u)/128 − 1, u uniform in [0, 1): 8-bit images (uint8, any shape) to fp32 in [-1, 1).

    u has 16 bits, so that v + u is exact in fp32 and ⌊128 (x + 1)⌋ gives v back.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = short(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError("images", "a uint8 tensor", got)
    check_dense("images", images)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError("generator", "a torch.Generator", type(generator).__name__)
    u = torch.randint(2**16, images.shape, generator=generator, device=images.device)
    return (images + u.to(torch.float32) / 2**16) / 128 - 1
