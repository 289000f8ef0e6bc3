"""Tweedie denoising: what a model trained on noisy images says of the clean one."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor

from .. import host_ops
from ..checks import Count, Labels, Number, batch_labels, check_choice, check_count, check_number, check_tensor
from ..devices import check_dtype
from ..dtypes import residual_dtype
from ..errors import BackendError, TarFlowError
from ..forking import safe_in_forked_child
from ..limits import most_threads
from ..sampling.noise import resolve_noise_std
from .cpu_density import DENSITY_BACKENDS, cpu_density, cpu_density_missing
from .density import TarFlowDensity, check_model


@safe_in_forked_child()
def denoise(
    model: TarFlowDensity,
    images: Tensor,
    y: Labels = None,
    *,
    noise_std: Number | None = None,
    scale: Number = 1.0,
    batch_size: Count | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: Count | None = None,
) -> Tensor:
    """x ← x + scale · σ² ∇_x log p(x | y), the posterior mean of the clean image (Tweedie; arXiv 2412.06329, 3.3).

    images: (B, in_channels, H, W) float, as sampled; y: labels as in `TarFlow.forward`, or one int for all.
    noise_std: σ > 0 of the Gaussian noise in training; default model.metadata["noise_std"]. scale: multiplier of the
    optimal step, >= 0. dtype: bfloat16 or float16 to run the products of the gradient in; default the model's own.
    backend: what computes the gradient, as in `TarFlow.set_density`: "cpu" (C++, for models on a CPU), "torch"
    (autograd), or "auto", the first that can be had. batch_size: images in one pass; default 16 with "torch", and with
    "cpu" all, of which it holds as many at once as fit in 1 GiB. threads: of "cpu", default as in `Sampler`.
    One forward and one backward pass. p is the density of the training loss, whose prior is N(0, 1) also where a
    volume-preserving model has learnt another `var`; so does ml-tarflow. Returns new images, fp32 or wider; nothing
    is mutated. Raises ArgumentError, BackendError for a backend that cannot be had, and TarFlowError for what would
    come out infinite or NaN.
    """
    model = check_model(model)
    images = check_tensor("images", images, model.config.data_shape)
    names = model.metadata.get("class_names")
    labels = batch_labels(y, images.shape[0], model.config.num_classes, model.device, class_names=names)
    sigma = resolve_noise_std(model.metadata, noise_std)
    scale = check_number("scale", scale, 0)
    check_choice("backend", backend, DENSITY_BACKENDS)
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size)
    if threads is not None:
        threads = check_count("threads", threads, high=most_threads())
    products = model.dtype if dtype is None else check_dtype(dtype, model.device)
    missing = cpu_density_missing(model.blocks, images, products, gradients=False)
    if backend == "cpu" and missing is not None:
        raise BackendError(f"backend 'cpu' cannot be had: {missing}")
    if backend == "torch" or missing is not None:
        if threads is not None:
            raise BackendError("threads is for backend 'cpu'; leave it out, and see torch.set_num_threads")
        gradient, size = functools.partial(_gradient_by_autograd, model, dtype), batch_size or 16
    else:
        gradient, size = functools.partial(_gradient_in_cpp, model, products, threads), batch_size or images.shape[0]
    stream = residual_dtype(model.dtype)
    out = []
    with torch.inference_mode(False):  # in which autograd would record nothing
        for start in range(0, images.shape[0], size):
            x = _ordinary(images[start : start + size].detach()).to(model.device, stream)
            slope = gradient(x, None if labels is None else _ordinary(labels[start : start + size]))
            out.append(host_ops.add_scaled(x.detach(), slope, scale * sigma**2))
        denoised = torch.cat(out).to(images.device)
    broken = (~host_ops.all_finite(denoised, 1)).nonzero().flatten().tolist()
    if broken:
        which = ", ".join(map(str, broken[:5])) + (", …" if len(broken) > 5 else "")
        raise TarFlowError(
            f"denoising gave infinities or NaNs for image {which}: the gradient of the log-density overflows there; "
            "look at the images' range, use a wider dtype, or leave these images out"
        )
    return denoised


def _ordinary(x: Tensor) -> Tensor:
    """x, as a copy if it was made in inference mode: autograd keeps no such tensor for its backward pass."""
    return x.clone() if x.is_inference() else x


def _gradient_in_cpp(
    model: TarFlowDensity, dtype: torch.dtype, threads: int | None, x: Tensor, y: Tensor | None
) -> Tensor:
    """∇_x log p(x | y) for images x, by the C++ pass."""
    found = cpu_density(model.blocks, model.patchify(x), y, dtype=dtype, gradient=True, threads=threads)
    assert found.gradient is not None
    return model.unpatchify(found.gradient)


def _gradient_by_autograd(model: TarFlowDensity, dtype: torch.dtype | None, x: Tensor, y: Tensor | None) -> Tensor:
    """∇_x log p(x | y) for images x, by PyTorch; dtype: of autocast, where it is half precision."""
    # Modules of our own, as others may be using the model's, around its weights. These without gradients: only
    # activations that lead back to x are kept.
    weights = {id(value): _ordinary(value.detach()) for value in (*model.parameters(), *model.buffers())}
    ours = copy.deepcopy(model, weights).set_density("torch")
    half = dtype in (torch.bfloat16, torch.float16)
    x = x.requires_grad_()
    with torch.enable_grad(), torch.autocast(model.device.type, dtype=dtype if half else None, enabled=half):
        z, _, mean_log_det = ours(x, y)
        log_prob = (mean_log_det * x[0].numel() - 0.5 * z.to(x.dtype).square().sum(dim=(1, 2))).sum()
    with torch.autocast(model.device.type, enabled=False):  # the caller's
        (gradient,) = torch.autograd.grad(log_prob, x)
    return gradient
