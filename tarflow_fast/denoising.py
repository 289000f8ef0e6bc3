"""Tweedie denoising: what a model trained on noisy images says of the clean one."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import Labels, batch_labels, check_count, check_number, check_tensor
from .errors import ArgumentError
from .model import TarFlow, stream_dtype


def denoise(
    model: TarFlow,
    images: Tensor,
    y: Labels = None,
    *,
    noise_std: float | None = None,
    scale: float = 1.0,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x ← x + scale · σ² ∇_x log p(x | y), the posterior mean of the clean image (Tweedie; arXiv 2412.06329, 3.3).

    images: (B, in_channels, H, W) float, as sampled; y: labels as in `TarFlow.forward`, or one int for all.
    noise_std: σ > 0 of the Gaussian noise in training; default model.metadata["noise_std"]. scale: multiplier of the
    optimal step, >= 0. dtype: bfloat16 or float16 to run the gradient under autocast; default the model's own.
    One forward and one backward pass. p is the density of the training loss, whose prior is N(0, 1) also where a
    volume-preserving model has learnt another `var`; so does ml-tarflow. Returns new images, fp32 or wider; nothing
    is mutated.
    """
    images = check_tensor("images", images, model.config.image_shape)
    labels = batch_labels(y, images.shape[0], model.config.num_classes, model.device)
    sigma = resolve_noise_std(model, noise_std)
    check_number("scale", scale, 0)
    check_count("batch_size", batch_size)
    # Weights without gradients: only activations that lead back to x are kept.
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    values = images[0].numel()
    half = dtype in (torch.bfloat16, torch.float16)
    stream = stream_dtype(model.dtype)
    out = []
    for start in range(0, images.shape[0], batch_size):
        x = images[start : start + batch_size].detach().to(model.device, stream).requires_grad_()
        rows = None if labels is None else labels[start : start + batch_size]
        with torch.enable_grad(), torch.autocast(model.device.type, dtype=dtype if half else None, enabled=half):
            z, _, mean_log_det = torch.func.functional_call(model, weights, (x, rows))
            log_prob = (mean_log_det * values - 0.5 * z.to(stream).square().sum(dim=(1, 2))).sum()
        (gradient,) = torch.autograd.grad(log_prob, x)
        out.append(x.detach() + scale * sigma**2 * gradient)
    return torch.cat(out).to(images.device)


def resolve_noise_std(model: TarFlow, noise_std: float | None) -> float:
    """σ as given, or as the checkpoint records it. Raises ArgumentError when neither is known."""
    if noise_std is None:
        recorded = model.metadata.get("noise_std")
        if not recorded:
            raise ArgumentError("noise_std", "the σ of the training noise, which this checkpoint does not record", None)
        noise_std = float(recorded)
    return check_number("noise_std", noise_std, 0, open_low=True)
