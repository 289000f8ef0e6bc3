"""`flow_score` measures a model of a family on held-out data."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, kind_of
from ..data import FlowData
from ..errors import ArgumentError, TarFlowError, TarFlowWarning
from ..flows import FamilyFlow, Preprocessed

EXACT, WRONG = 1e-5, 1e-3  # a reconstruction error of an exact inverse in fp32, and one that is worth a warning
RECONSTRUCTED = 256  # samples


@dataclass(frozen=True)
class FlowScore:
    """A `FlowScore` is what `flow_score` found.

    Attributes:
        log_prob: The mean of log p(x | y) in nats: a lower bound on log P of 8-bit images, an estimate for families
            whose density is one.
        standard_error: The standard error of that mean, or None for a single sample.
        bits_per_dim: −log_prob / (dims · log 2) for images and tokens, else None.
        reconstruction: max |inverse(forward(x)) − x| in the space of the flow, or None where there is no inverse.
        evaluations: How often one density pass evaluated the network, or None where that is always once.
        samples: The number of samples.
        seconds: The time that it took.
        figures: What the family reports beside its density, by name, such as the straightness of rectified flow.
    """

    log_prob: float
    standard_error: float | None
    bits_per_dim: float | None
    reconstruction: float | None
    evaluations: int | None
    samples: int
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields by their names."""
        return asdict(self)

    def row(self) -> dict[str, float]:
        """Returns the figures that this kind of model has."""
        names = ("log_prob", "bits_per_dim", "reconstruction", "evaluations")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None} | self.figures


@torch.no_grad()
def flow_score(
    model: FamilyFlow, data: FlowData, *, conditional: bool | None = None, batch_size: int = 500, seed: int = 0
) -> FlowScore:
    """Returns the mean log-likelihood of data, and how exact the inverse is.

    Args:
        model: A model of a family, on whose device the passes run.
        data: The data, of the model's kind and shape.
        conditional: Whether log p(x | y) is taken, by default where the model has classes and the data have labels.
        batch_size: The number of samples in one pass.
        seed: The seed of dequantisation and of estimates.

    Raises:
        ArgumentError: The data are not such as the model takes.
        TarFlowError: A density is not finite.

    Warns:
        TarFlowWarning: The reconstruction error is above 1e-3.
    """
    if not isinstance(model, FamilyFlow):
        raise ArgumentError("model", "a model of a family", kind_of(model))
    if data.shape != model.data_shape:
        raise ArgumentError("data", f"{data.kind} of shape {model.data_shape}", data.shape)
    size, start = check_count("batch_size", batch_size), time.perf_counter()
    labels = data.labels if (model.num_classes > 0 if conditional is None else conditional) else None
    if labels is not None:
        data.check_classes(model.num_classes, model.metadata.get("class_names"))
    random = torch.Generator(model.place.device).manual_seed(seed)
    parts, evaluations = [], None
    for first in range(0, len(data), size):
        x = _placed(model, data.values[first : first + size])
        y = None if labels is None else labels[first : first + size]
        parts.append(model.log_prob(x, y, generator=random).double().cpu())
        evaluations = model.evaluations() if evaluations is None else evaluations
    found = torch.cat(parts)
    bad = (~torch.isfinite(found)).nonzero()
    if len(bad):
        raise TarFlowError(f"the density of sample {int(bad[0, 0])} is not finite")
    error = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else None
    mean, coded = float(found.mean()), data.levels or data.kind == "tokens"
    figures = model.figures(random)
    bits = -mean / (model.dims * math.log(2)) if coded else None
    return FlowScore(
        mean,
        error,
        bits,
        reconstruction_error(model, data.values[:RECONSTRUCTED], labels, random),
        evaluations,
        len(data),
        time.perf_counter() - start,
        figures,
    )


@torch.no_grad()
def reconstruction_error(model: FamilyFlow, x: Tensor, labels: Tensor | None, random: torch.Generator) -> float | None:
    """Returns max |inverse(forward(x)) − x|, or None where a family has no inverse. Warns where it is above 1e-3."""
    flow = model.flow if isinstance(model, Preprocessed) else model
    if not flow.has_inverse:
        return None
    x, y = _placed(model, x), None if labels is None else labels[: len(x)]
    if isinstance(model, Preprocessed):
        x = model.transformed(x, random)
    back, _ = flow.inverse(flow(x, y)[0], y)
    error = float((back - x).abs().max())
    if not error <= WRONG:
        said = (
            f"reconstruction: max |inverse(forward(x)) − x| is {error:.3g}, above {WRONG:g}; an exact one is {EXACT:g}"
        )
        warnings.warn(said, TarFlowWarning, stacklevel=3)
    return error


def _placed(model: FamilyFlow, x: Tensor) -> Tensor:
    """Returns data on the model's device, in its dtype unless they are tokens."""
    if x.dtype == torch.int64:
        return x.to(model.place.device)
    return x.to(model.place.device, model.place.dtype)
