"""This file has the differentiable density pass of a TarFlow, data to latents; `tarflow.py` has the whole model."""

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
    check_tensor,
    check_weights,
    kind_of,
    warn_range,
)
from ..errors import ArgumentError, BackendError, first_line
from ..limits import most_threads
from ..sizes import Size
from .attention import ATTENTION_BACKENDS
from .config import TarFlowConfig
from .cpu_density import DENSITY_BACKENDS, cpu_density, cpu_density_missing
from .flow_block import Attention, FlowBlock

if TYPE_CHECKING:
    from ..checkpoints.reading import Origin
    from ..engine import BlockWeights

# No image of −1 to 1 with noise, and no sample, has values beyond this; 8-bit values as they are go to 255.
IMAGE_RANGE = 16.0


class TarFlowDensity(nn.Module):
    """A `TarFlowDensity` is a TarFlow as far as its density goes.

    The constructor takes the fields of `TarFlowConfig`, and raises ArgumentError for sizes that no model can have.
    Where the layout is "tokens", every method that takes or gives images (B, in_channels, H, W) takes and gives
    sequences (B, T, D).

    Attributes:
        config: The `TarFlowConfig` with the sizes of the model.
        metadata: A dict of what is known of the model besides its weights; see `TarFlow`.
        origin: Where `load` found the model, else None.
        blocks: The K flow blocks, an nn.ModuleList in the order in which data go through them.
        var: (T, D), a buffer: the variance of the prior, a normal distribution of the latents.
        VAR_LR: The share of a batch in the moving average of `update_prior`.
    """

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
        # The prior's variance stays one in nvp models, and is learnt by update_prior in volume-preserving ones.
        self.register_buffer("var", torch.ones(config.num_patches, config.token_dim))

    @property
    def raw(self) -> bool:
        """Returns whether the data are no 8-bit pictures, so that their values have no levels and a scale of their own:
        sequences, and what metadata["values"] calls "raw".
        """
        return self.config.layout == "tokens" or self.metadata.get("values") == "raw"

    @classmethod
    def from_config(cls, config: TarFlowConfig) -> Self:
        """Returns a new model of these sizes, with random weights.

        Args:
            config: The sizes of the model.

        Raises:
            ArgumentError: `config` is no `TarFlowConfig`.
        """
        if not isinstance(config, TarFlowConfig):
            raise ArgumentError("config", "a TarFlowConfig", type(config).__name__)
        return cls(**config.to_dict())

    @classmethod
    def for_tokens(cls, tokens: int, token_dim: int, *sizes: Any, **named: Any) -> Self:
        """Returns a new model of sequences, (B, tokens, token_dim), with random weights.

        Every method that takes or gives images of other models takes and gives (B, T, D) here.

        Args:
            tokens: The number T of tokens of a sequence.
            token_dim: The number D of values of a token.
            *sizes: The other sizes by position, from `channels` on as in `TarFlowConfig.for_tokens`.
            **named: The other sizes by name.

        Raises:
            ArgumentError: The sizes are such as no model can have.
        """
        try:
            config = TarFlowConfig.for_tokens(tokens, token_dim, *sizes, **named)
        except TypeError as error:  # sizes are missing, too many, or of another name
            expected = "channels, num_blocks, layers_per_block, and perhaps nvp, num_classes and head_dim"
            raise ArgumentError("sizes", expected, first_line(error).partition(" ")[2]) from error
        return cls.from_config(config)

    # The sizes may be read, as in ml-tarflow, but not changed.

    @property
    def img_size(self) -> Size:
        """Returns the height and width of an image in pixels, as one number where it is a square."""
        return self.config.img_size

    @property
    def patch_size(self) -> Size:
        """Returns the height and width of a patch in pixels, as one number where it is a square."""
        return self.config.patch_size

    @property
    def num_patches(self) -> int:
        """Returns T, the number of tokens of an image or a sequence."""
        return self.config.num_patches

    @property
    def device(self) -> torch.device:
        """Returns the device of the weights."""
        return self.var.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of the weights."""
        return next(self.parameters()).dtype

    def block_weights(self, k: int) -> BlockWeights:
        """Returns the weights of block k as engines take them.

        Args:
            k: The index of the block.

        Returns:
            Detached tensors, which are shared with the model where nothing has to be reordered or averaged.
        """
        block: Any = self.blocks[k]
        found: BlockWeights = block.weights()
        return found

    def set_attention(self, backend: str) -> Self:
        """Chooses what computes the attention of the density pass.

        Args:
            backend: "auto", "sdpa" or "flash"; see `causal_attention`.

        Returns:
            The model itself.

        Raises:
            ArgumentError: The name is none of these.
        """
        check_choice("attention", backend, ATTENTION_BACKENDS)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend
        return self

    def set_density(self, backend: str, threads: int | None = None) -> Self:
        """Chooses what computes the density pass.

        The results of "cpu" and "torch" agree up to rounding.

        Args:
            backend: "torch" is PyTorch. "cpu" is the pass in C++, for models on a CPU where autograd does not record
                (`torch.no_grad()`); where it cannot be had, the density pass raises BackendError. "auto", the default
                of a model, is "cpu" where that can be had, else "torch".
            threads: The number of threads of "cpu", by default as in `Sampler`.

        Returns:
            The model itself.

        Raises:
            ArgumentError: The name is none of these, or the number of threads is none that can be had.
            BackendError: Threads were given for "torch".
        """
        check_choice("density", backend, DENSITY_BACKENDS)
        if threads is not None:
            threads = check_count("threads", threads, high=most_threads())
            if backend == "torch":
                raise BackendError("threads is for density 'cpu'; leave it out, and see torch.set_num_threads")
        self._density, self._density_threads = backend, threads
        return self

    def _on_cpu(self, x: Tensor, dtype: torch.dtype, backend: str) -> bool:
        """Returns whether the C++ pass serves x. Raises BackendError if it was asked for and cannot."""
        if backend == "torch":
            return False
        missing = cpu_density_missing(self.blocks, x, dtype, gradients=torch.is_grad_enabled())
        if missing is not None and backend == "cpu":
            raise BackendError(f"density 'cpu' cannot be had: {missing}")
        return missing is None

    def patchify(self, x: Tensor) -> Tensor:
        """Returns images as tokens: patches row by row, the values of one ordered (channel, row, column).

        Args:
            x: (B, in_channels, H, W) float images.

        Returns:
            (B, T, D) tokens. Sequences, where the layout is "tokens", come back as they are.

        Raises:
            ArgumentError: `x` has another shape or is not of floats.
        """
        x = check_tensor("x", x, self.config.data_shape, finite=False)
        if self.config.layout == "tokens":
            return x
        (rows, columns), (height, width) = self.config.grid, self.config.patch_shape
        split = (len(x), self.config.in_channels, rows, height, columns, width)
        return host_ops.rearranged(x, split, (0, 2, 4, 1, 3, 5), (len(x), *self.var.shape))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Returns tokens as images; this is the inverse of `patchify`.

        Args:
            x: (B, T, D) float tokens.

        Returns:
            (B, in_channels, H, W) images. Where the layout is "tokens", x comes back as it is.

        Raises:
            ArgumentError: `x` has another shape or is not of floats.
        """
        x = check_tensor("x", x, tuple(self.var.shape), finite=False)
        if self.config.layout == "tokens":
            return x
        (rows, columns), (height, width) = self.config.grid, self.config.patch_shape
        split = (len(x), rows, columns, self.config.in_channels, height, width)
        return host_ops.rearranged(x, split, (0, 3, 1, 4, 2, 5), (len(x), *self.config.data_shape))

    def forward(self, x: Tensor, y: Labels = None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Runs the density pass, x to z, under ml-tarflow's conventions.

        Args:
            x: (B, in_channels, H, W) float images.
            y: (B,) labels, or one for all; a label is an integer, negative for no class, or the name of a class. None
                stands for no class.

        Returns:
            z (B, T, D), the output of every block [(B, T, D)] * K, and the log-det (B,) in nats as a *mean* over the
            T·D values.

        Raises:
            ArgumentError: `x` has another shape or is not of floats, or the model does not have one of the labels.
            BackendError: The pass in C++ was chosen by `set_density` and cannot be had.
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
        """½ mean(z²) − mean(log-det): the loss is the negative log-likelihood per value in nats, less ½ log 2π.

        Args:
            z: (B, T, D) latents, as `forward` gives them.
            logdets: (B,) log-dets, means over T·D values as `forward` gives them.

        Returns:
            The loss, a tensor without dimensions.

        Raises:
            ArgumentError: An argument is no tensor.
        """
        for name, value in (("z", z), ("logdets", logdets)):
            if not isinstance(value, Tensor):
                raise ArgumentError(name, "a tensor", kind_of(value))
        return 0.5 * z.pow(2).mean() - logdets.mean()

    def update_prior(self, z: Tensor) -> None:
        """var ← var + VAR_LR (mean_B z² − var): the prior's variance moves towards that of a batch. Mutates `var`.

        Args:
            z: (B, T, D) latents, finite.

        Raises:
            ArgumentError: `z` has another shape, is not of floats, or is not finite.
        """
        z = check_tensor("z", z, tuple(self.var.shape))
        self.var.lerp_(z.detach().pow(2).mean(dim=0).to(self.var.dtype), weight=self.VAR_LR)

    def log_prob(self, x: Tensor, y: Labels = None) -> Tensor:
        """log p(x | y) = log N(z; 0, diag var) + log|det dz/dx|, in nats.

        It is a density over the values of x: for 8-bit images see `bits_per_dim`.

        Args:
            x: (B, in_channels, H, W) float images, finite, on the scale that the model was trained on, [-1, 1] for
                images.
            y: Labels as in `forward`.

        Returns:
            (B,), log p(x | y) of each image.

        Raises:
            ArgumentError: `x` has another shape, is not of floats or not finite, or looks like 8-bit values (0 to 255)
                although the model's data are pictures; or the model does not have one of the labels.
            BackendError: The pass in C++ was chosen by `set_density` and cannot be had.

        Warns:
            TarFlowWarning: The model records that it was trained on 8-bit images, and x has values beyond ±16.
        """
        x = check_tensor("x", x, self.config.data_shape)
        low, high = host_ops.span(x.detach())
        if low > -1 and high > IMAGE_RANGE and not self.raw:
            expected = "values of about -1 to 1 (v/127.5 - 1, or dequantize(v), of 8-bit values v)"
            raise ArgumentError("x", expected, f"{low:g} to {high:g}")
        if not self.raw and {"noise_std", "noise_type"} & self.metadata.keys():  # it learnt 8-bit images
            warn_range("x", x, IMAGE_RANGE, "an image of −1 to 1 (v / 127.5 − 1, for 8-bit values v) and some noise")
        z, _, mean_log_det = self.forward(x, y)
        return self.prior_log_prob(z) + mean_log_det * z[0].numel()

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """log N(z; 0, diag var): the log-density of latents under the prior, in nats.

        Args:
            z: (B, T, D) float latents.

        Returns:
            (B,), the log-density of each sample.

        Raises:
            ArgumentError: `z` has another shape or is not of floats.
        """
        z = check_tensor("z", z, tuple(self.var.shape), finite=False)
        return host_ops.gaussian_log_prob(z, self.var.to(z.dtype))

    def bits_per_dim(self, x: Tensor, y: Labels = None) -> Tensor:
        """−log2 p(x | y) / N + log2(128), N being the values of an image: bits per 8-bit value.

        For sequences, and other data that are no pictures (metadata["values"] is "raw"), it is −log2 p(x | y) / N: such
        values have no levels, and this is their differential entropy, not the length of a code. It may be negative, and
        grows by log2 c where the data's unit is made c times smaller, so that it compares between models of the same
        data in the same unit only.

        An 8-bit image v becomes x = (v + u)/128 − 1 with uniform dequantisation noise u in [0, 1)^N (`dequantize`).
        Then E_u[−log2 p(v + u)] ≥ −log2 P(v) (Jensen), and the change of variables from v + u to x adds log2(128) for
        each value. With Gaussian noise instead of u, the figure is the density of noisy images on the 256-level scale,
        comparable between models of one noise level only.

        Args:
            x: (B, in_channels, H, W) images that are already dequantised, or (B, T, D) sequences, as in `log_prob`.
            y: Labels as in `forward`.

        Returns:
            (B,), the bits per value of each image.

        Raises:
            ArgumentError: As in `log_prob`.
            BackendError: As in `log_prob`.
        """
        values = math.prod(self.config.data_shape)
        bits = -self.log_prob(x, y) / (values * math.log(2))
        return bits if self.raw else bits + math.log2(128)


def check_model(model: object, *, values: bool = True) -> TarFlowDensity:
    """Returns the model. Raises ArgumentError unless it is a TarFlow; values: whether its weights have to have any."""
    if not isinstance(model, TarFlowDensity):
        raise ArgumentError("model", "a TarFlow", kind_of(model))
    if values:
        check_weights(model)
    return model
