"""A training step minimises −log p(x | y), and with a `label_weight` −log p(y | x) beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..models.tarflow import TarFlow

Forward = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Objective(NamedTuple):
    """An `Objective` has the loss of a step, and the latents and log-dets of its batch.

    loss: () fp32, to be minimised. z: (B, T, D), the latents of the images with their own labels. log_det: (B,) fp32,
    log|det dz/dx| / (T·D).
    """

    loss: Tensor
    z: Tensor
    log_det: Tensor


def objective(model: TarFlow, forward: Forward, x: Tensor, y: Tensor | None) -> Objective:
    """L = E[½ |z|² − log|det dz/dx|] / (T·D) is the negative log-likelihood a value, but for a constant.

    model: the model in training. forward: gives (z, log_det) of (x, y) by that model. x: (B, …) fp32. y: (B,) int64, −1
    for no class, or None.
    """
    z, log_det = forward(x, y)
    return Objective(model.get_loss(z, log_det), z, log_det)


def objective_with_labels(
    model: TarFlow, forward: Forward, x: Tensor, y: Tensor, others: Tensor, weight: float
) -> Objective:
    """L + λ E[log(1 + (n − 1) p(x | y′) / p(x | y))] / (T·D), where y′ is drawn from the n − 1 labels that are not y.

    The second term estimates −log p(y | x) under a uniform prior of the labels by one wrong label an image: a class is
    then known by its likelihood, as in the hybrid of Lasserre, Bishop and Minka (Principled Hybrids of Generative and
    Discriminative Models, CVPR 2006). A step takes twice the work of one without it.

    others: (B,) int64, y′. weight: λ. The rest is as in `objective`; −1 in y leaves an image out of the second term.
    """
    B, values = len(x), model.var.numel()
    z, log_det = forward(torch.cat([x, x]), torch.cat([y, others]))
    log_p = values * (log_det - (0.5 * z.float().square() / model.var).flatten(1).mean(1))  # (2B,), but for a constant
    wrong = log_p[B:] - log_p[:B] + math.log(model.config.num_classes - 1)
    label_loss = softplus(wrong).masked_fill(y < 0, 0).mean() / values
    z, log_det = z[:B], log_det[:B]
    return Objective(model.get_loss(z, log_det) + weight * label_loss, z, log_det)
