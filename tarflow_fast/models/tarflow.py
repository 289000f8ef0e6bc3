"""A TarFlow (Zhai et al., arXiv 2412.06329) is a stack of autoregressive affine flows made of causal transformers.

Constructor, methods and state-dict keys are those of the published `ml-tarflow`, so that either code loads the other's
checkpoints. The density pass is in `density.py`; the inverse is a `Sampler`'s, which takes the model as a `Flow`.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import host_ops
from ..checks import Flag, Labels, Number, batch_labels, check_choice, check_tensor, check_weights
from ..devices import check_device
from ..engine import Guidance
from ..errors import ArgumentError
from ..flow import Flow, Stage
from ..sampling import Sampler
from ..scalars import check_flag, plain
from .agreement import ALTERNATIVE, check_agreement
from .denoising import denoise
from .density import TarFlowDensity
from .differentiable import differentiable_reverse
from .flow_block import Attention, FlowBlock, unknown_arithmetic
from .gs_jacobi import check_iterations
from .snapshot import Snapshot
from .weight_laws import check_finite, check_masks, check_names, check_prior, is_mask


class TarFlow(TarFlowDensity):
    """A `TarFlow` is a model that is interchangeable with ml-tarflow's `Model`.

    The constructor takes the fields of `TarFlowConfig`, and raises ArgumentError for sizes that no model can have.
    Where the layout is "tokens", every method that takes or gives images (B, in_channels, H, W) takes and gives
    sequences (B, T, D).

    Attributes:
        config: The `TarFlowConfig` with the sizes of the model.
        metadata: A dict of what a checkpoint knows besides weights: "noise_std" (float, σ of the noise in training),
            "noise_type" ("gaussian" or "uniform"), "class_names" (a list of names in the order of the classes),
            "values" ("raw" if the model learnt data that are no pictures), "sampling" (how `tarflow-fast sample` draws
            from the model unless told otherwise, a dict of arguments of `Sampler.sample`: "guidance", "guide_what",
            "attn_temp", "annealed_guidance", "denoise", "denoise_scale").
        origin: Where `load` found the model, else None.
        blocks: The K flow blocks, an nn.ModuleList in the order in which data go through them.
        var: (T, D), a buffer: the variance of the prior, a normal distribution of the latents.
        VAR_LR: The share of a batch in the moving average of `update_prior`.
    """

    def flow(self, device: str | torch.device | None = None, *, check: bool = True, own_reverse: bool = False) -> Flow:
        """Returns the model as sampling takes it.

        Args:
            device: The device of the flow, by default the model's own, where the flow shares the model's weights.
            check: Whether hooks, overridden methods and the like raise ArgumentError where they make the model compute
                another thing than its weights say.
            own_reverse: Whether the model's own `reverse` asks. A subclass may then have one, which calls this, and as
                its sampler ends with the call, no checksums of the weights are taken.

        Returns:
            A `Flow`: the blocks in order, the prior, and how tokens become data.

        Raises:
            ArgumentError: The weights are not plain floats with values, an argument has the wrong type or range, or
                `check` found the model to compute another thing.
            BackendError: The device cannot be had.
            CheckpointError: The weights are not those of a TarFlow of these sizes, or not finite.
        """
        check_weights(self)
        check, own_reverse = check_flag("check", check), check_flag("own_reverse", own_reverse)
        device = self.device if device is None else check_device(device)
        if check:
            _check_methods(self, reverse=not own_reverse)
        model = _plain(self, device)
        if check and _changed(self):
            check_agreement(self, model)
        blocks: list[Any] = list(model.blocks)
        return Flow(
            stages=tuple(Stage(block.shape, block.weights, block.permutation) for block in blocks),
            prior_var=model.var,
            data_shape=self.config.data_shape,
            to_tokens=model.patchify,
            to_data=model.unpatchify,
            dtype=model.dtype,
            device=device,
            model=model,
            num_classes=self.config.num_classes,
            metadata=model.metadata,
            denoise=functools.partial(denoise, model),
            check_unchanged=(lambda thorough: None) if own_reverse else Snapshot(model).check,
        )

    def reverse(
        self,
        x: Tensor,
        y: Labels = None,
        guidance: Number = 0,
        guide_what: str = "ab",
        attn_temp: Number = 1.0,
        annealed_guidance: Flag = False,
        return_sequence: Flag = False,
        *,
        return_log_det: Flag = False,
        on_nonfinite: str = "return",
        differentiable: Flag = False,
        **iterations: Any,
    ) -> Any:
        """Runs the sampling pass, latents to images, with ml-tarflow's signature.

        Images that overflow come back as they are, infinite or NaN, as from ml-tarflow; on_nonfinite="raise" tells
        which. Under autocast the pass runs in autocast's dtype. The weights are packed anew at each call: to sample
        more than once, make a `Sampler`.

        Args:
            x: (B, T, D) float latents, finite, not mutated.
            y: (B,) labels, or one for all; a label is an integer, negative for no class, or the name of a class. None
                stands for no class.
            guidance: The weight w >= 0 of guidance; 0 is none. See `Guidance`, as for the next three.
            guide_what: Which of the log-scale ("a") and the shift ("b") guidance changes: "a", "b" or "ab".
            attn_temp: A number > 0, which divides the attention logits of the unguided branch.
            annealed_guidance: Whether the weight grows along the tokens, up to w.
            return_sequence: Whether to return the K + 1 images that `Sampler.reverse` describes.
            return_log_det: Whether to return log|det dx/dz| too; see `Sampler.reverse`.
            on_nonfinite: "return" images that overflow, or "raise" NonFiniteError.
            differentiable: Whether autograd records the pass, for gradients of x and the weights. It takes the memory
                of 2 K tensors (B, T, D), and while it goes backward that of one block's density pass at a time, which
                then takes up to T − 1 backward passes (see `differentiable.py`). It runs in the model's own dtype.
            **iterations: The lists of GS-Jacobi's scripts, see `gs_jacobi.py`.

        Returns:
            Images (B, in_channels, H, W) on x's device, or the list of them with `return_sequence`. With
            `return_log_det`, a pair of these and the log-det (B,) in nats.

        Raises:
            ArgumentError: An argument has the wrong type, shape or range, or the model computes another thing than its
                weights say.
            BackendError: No engine can be had for the model's device and dtype.
            CheckpointError: The weights are not those of a TarFlow of these sizes, or not finite.
            NonFiniteError: An image overflows and on_nonfinite is "raise".
            OutOfMemoryError: Not even one image fits in memory.
            TypeError: An argument has a name that GS-Jacobi's scripts do not know either.

        Warns:
            TarFlowWarning: x has values beyond ±20, which no noise of a standard normal distribution has.
            UserWarning: `num_GS_list` asks for iterations; the result is the inverse itself all the same.
        """
        check_iterations({name: value for name, value in iterations.items() if value is not None}, len(self.blocks))
        if isinstance(x, Tensor) and any(map(torch._C._functorch.is_functorch_wrapped_tensor, (x, *self.parameters()))):
            expected = "latents and weights outside of torch.func's transforms; differentiable=True serves autograd"
            raise ArgumentError("x", expected, "some that a transform follows")
        if check_flag("differentiable", differentiable) and torch.is_grad_enabled():
            return self._differentiable_reverse(
                x, y, guidance, guide_what, attn_temp, annealed_guidance, return_sequence, return_log_det, on_nonfinite
            )
        flow = self.flow(own_reverse=True)
        kind = flow.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return Sampler(flow, dtype=dtype, solver="sequential", probe="never").reverse(
            x,
            y,
            guidance,
            guide_what,
            attn_temp,
            annealed_guidance,
            return_sequence,
            return_log_det=return_log_det,
            on_nonfinite=on_nonfinite,
        )

    def _differentiable_reverse(
        self,
        x: Tensor,
        y: Labels,
        guidance: Number,
        guide_what: str,
        attn_temp: Number,
        annealed_guidance: Flag,
        return_sequence: Flag,
        return_log_det: Flag,
        on_nonfinite: str,
    ) -> Any:
        """Returns what `reverse` does, recorded by autograd."""
        x = check_tensor("x", x, tuple(self.var.shape))
        check_choice("on_nonfinite", on_nonfinite, ("raise", "return"))
        names = self.metadata.get("class_names")
        labels = batch_labels(y, x.shape[0], self.config.num_classes, self.device, class_names=names)
        classifier_free = Guidance(plain(guidance), guide_what, plain(attn_temp), plain(annealed_guidance))
        sampler = Sampler(self.flow(own_reverse=True), solver="sequential", probe="never")
        tokens, log_det = differentiable_reverse(self, x.to(self.device), labels, classifier_free, sampler)
        if on_nonfinite == "raise" and not host_ops.all_finite(tokens[-1].detach()):
            sampler.reverse(x.detach(), labels, plain(guidance), guide_what, plain(attn_temp), annealed_guidance)
        sequence = [self.unpatchify(each).to(x.device) for each in tokens]
        images: Any = sequence if check_flag("return_sequence", return_sequence) else sequence[-1]
        return (images, log_det.to(x.device)) if check_flag("return_log_det", return_log_det) else images


METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    TarFlow: ("reverse", "unpatchify"),
    FlowBlock: ("reverse", "reverse_step"),
    Attention: ("step",),
}
"""These methods are sampling in our modules. A sampler has its engines for that, and calls none of them."""


def _check_methods(model: nn.Module, *, reverse: bool) -> None:
    """Raises ArgumentError if a part of ours in the model samples by a method of its own, which no sampler would call.

    reverse: whether the model's own `reverse` counts, which may be what asks for a sampler.
    """
    for module in model.modules():
        for kind, names in METHODS.items():
            for name in names if isinstance(module, kind) else ():
                own = name in module.__dict__ or getattr(type(module), name) is not getattr(kind, name)
                if own and (reverse or name != "reverse" or module is not model):
                    what = f"one that samples as {kind.__name__}.{name} does, as a sampler calls no other"
                    raise ArgumentError("model", f"{what}; {ALTERNATIVE}", f"{type(module).__name__}.{name}")


def _changed(model: TarFlow) -> bool:
    """Returns whether something about the model may make it compute another thing than its weights say."""
    overridden = type(model) is not TarFlow or model.__dict__.keys() & {"forward", "patchify"}
    hooks = model._forward_hooks or model._forward_pre_hooks
    return bool(overridden or hooks or unknown_arithmetic(model.blocks))


def _plain(model: TarFlow, device: torch.device) -> TarFlow:
    """Returns a TarFlow of the same blocks that shares the weights, without hooks, overridden methods and gradients."""
    blocks: Any = model.blocks
    with torch.device("meta"):
        plain_model = TarFlow.from_config(model.config)
        plain_model.blocks = nn.ModuleList([FlowBlock(block.shape, block.permutation) for block in blocks])
    with torch.inference_mode(False), torch.no_grad():  # it outlives the mode that it is made in
        weights = {key: _lasting(value.detach().to(device)) for key, value in model.state_dict().items()}
        weights["var"] = weights["var"].clone()  # no engine packs it, and training changes it
    check_names(weights, {key: blank.shape for key, blank in plain_model.state_dict().items()})
    check_masks(weights, model.config.num_patches, weights.__getitem__)
    for key in filter(lambda key: not is_mask(key), weights):
        check_finite(key, weights[key])
    check_prior(weights["var"])
    plain_model.requires_grad_(False).load_state_dict(weights, assign=True)
    plain_model.metadata = copy.deepcopy(model.metadata)
    return plain_model


def _lasting(x: Tensor) -> Tensor:
    """Returns x, as a copy if it was made in inference mode: autograd takes no such tensor."""
    return x.clone() if x.is_inference() else x
