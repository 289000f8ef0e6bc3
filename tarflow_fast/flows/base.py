"""`FamilyFlow` is what every family of flow offers: a density of data, and samples of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import Labels, batch_labels, check_count, check_tensor


class Bijection(nn.Module):
    """One invertible step z = f(x; c) of a flow, with the log-determinant of its Jacobian.

    Training reports the log-det of each `Bijection` of a model by the step's name.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns z and log|det dz/dx|, (B,).

        x: (B, …), the side of the data. context: (B, num_classes) one-hot classes, or None.
        """
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns x and log|det dx/dz|, (B,), the inverse of `forward`.

        z: (B, …), the side of the latents. context: as in `forward`.
        """
        raise NotImplementedError


class FamilyFlow(nn.Module):
    """A density p(x | y) that can be sampled: log p(x | y) = log N(z; 0, I) + log|det dz/dx|, z = forward(x, y).

    A family with an inverse sets `bijection`, or overrides `forward` and `inverse`. Another one overrides `loss`,
    `log_prob` and `sample`. Every one calls `check_data` and `context` before it computes.

    Attributes:
        data_shape: The shape of one sample: (D,), (channels, height, width), or (T,) for a sequence of tokens.
        num_classes: How many classes there are; 0 for an unconditional model.
        options: The options that the model was built with.
        bijection: The map from data to latents, where the family is made of one.
        name: The name of the family in the registry, which `build` sets.
        metadata: What a file records beside the weights, such as class_names; of text, numbers and lists.
        for_vectors: The names of the options that do nothing for images.
        for_images: The names of those that do nothing for vectors.
        has_inverse: Whether `forward` and `inverse` are there.
        exact: Whether `log_prob` is deterministic and exact to rounding. If not, it is an estimate, which draws from
            `generator`, or the solution of an ODE to a tolerance.
        trained_by_likelihood: Whether `loss` is −log p in nats per value, or an estimate or bound of it.
    """

    @dataclass(frozen=True)
    class Options:
        """The options of a family, with defaults that fit the demonstration data. `__post_init__` checks ranges."""

    name: str = ""
    for_vectors: ClassVar[tuple[str, ...]] = ()
    for_images: ClassVar[tuple[str, ...]] = ()
    has_inverse: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    trained_by_likelihood: ClassVar[bool] = True
    options: Any
    bijection: Bijection

    def __init__(self, data_shape: tuple[int, ...], num_classes: int = 0, options: Any = None):
        super().__init__()
        self.data_shape = tuple(data_shape)
        self.num_classes = num_classes
        self.options = self.Options() if options is None else options
        self.metadata: dict[str, Any] = {}

    @property
    def dims(self) -> int:
        """The number of values in one sample."""
        return math.prod(self.data_shape)

    def loss(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns the scalar that training minimises, by default −mean(log p(x | y)) / dims, in nats per value.

        x: (B, *data_shape), a batch of data. y: labels as in `log_prob`. generator: what random numbers come from.
        """
        x = self.check_data(x, finite=False)
        z, log_det = self.forward(x, y)
        return -(self.prior_log_prob(z) + log_det).mean() / self.dims

    def log_prob(self, x: Tensor, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns log p(x | y), (B,) in nats.

        x: (B, *data_shape), finite. y: (B,) integers in [0, num_classes), or negative for no class; None for no class
        at all. generator: what the random numbers of an estimate come from; an exact density draws none.
        """
        x = self.check_data(x)
        z, log_det = self.forward(x, y)
        return self.prior_log_prob(z) + log_det

    @torch.no_grad()
    def sample(self, n: int, y: Labels = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Returns n samples of p(x | y), (n, *data_shape), on the device of the parameters.

        n: how many. y: one label for all, or n of them. generator: what the random numbers come from.
        """
        z = self.latents(check_count("n", n), generator)
        return self.inverse(z, y)[0]

    def forward(self, x: Tensor, y: Labels = None) -> tuple[Tensor, Tensor]:
        """Returns z, (B, *data_shape), and log|det dz/dx|, (B,), of `self.bijection`.

        x: (B, *data_shape). y: labels as in `log_prob`.
        """
        if not self.has_inverse:
            raise NotImplementedError(f"{type(self).__name__} has no forward with a log-determinant")
        x = self.check_data(x, finite=False)
        return self.bijection(x, self.context(y, len(x)))

    def inverse(self, z: Tensor, y: Labels = None) -> tuple[Tensor, Tensor]:
        """Returns x, (B, *data_shape), and log|det dx/dz|, (B,), of the inverse of `self.bijection`.

        z: (B, *data_shape). y: labels as in `log_prob`.
        """
        if not self.has_inverse:
            raise NotImplementedError(f"{type(self).__name__} has no inverse with a log-determinant")
        z = check_tensor("z", z, self.data_shape, finite=False)
        return self.bijection.inverse(z, self.context(y, len(z)))

    @classmethod
    def idle_options(cls, data_shape: tuple[int, ...], options: Any) -> dict[str, str]:
        """Returns the options that do nothing for data of this shape, each with what it is for.

        By default these are those of `for_vectors` and `for_images`. `build` refuses them where they are given.

        data_shape: that of one sample. options: the options of the model.
        """
        others, kind = (cls.for_vectors, "vectors") if len(data_shape) == 3 else (cls.for_images, "images")
        return dict.fromkeys(others, kind)

    def evaluations(self) -> int | None:
        """Returns how often the last `sample` or `log_prob` evaluated the network; None where it is always once."""
        return None

    def at_step(self, step: int, steps: int) -> None:
        """Is called before each step of training, for families that train in stages. step: of `steps`, from 0."""

    def figures(self, generator: torch.Generator | None = None) -> dict[str, float]:
        """Returns what an evaluation reports of this family beside its density, by name; by default nothing.

        generator: what random numbers come from.
        """
        return {}

    # What families are made of ------------------------------------------------------------------------------------

    def check_data(self, x: Tensor, *, finite: bool = True) -> Tensor:
        """Returns x, (B, *data_shape) floats. Raises ArgumentError for others, and for infinities unless finite=False.

        Families of tokens or of points on a manifold override it.
        """
        return check_tensor("x", x, self.data_shape, finite=finite)

    def context(self, y: Labels, rows: int) -> Tensor | None:
        """Returns the classes of `rows` samples as a one-hot (rows, num_classes), or None for an unconditional model.

        The row of a sample without a class is zero. y: labels as in `log_prob`. Raises ArgumentError for labels that
        the model does not have.
        """
        place = self.place
        labels = batch_labels(y, rows, self.num_classes, place.device)
        if self.num_classes == 0:
            return None
        if labels is None:
            return place.new_zeros(rows, self.num_classes)
        return F.one_hot(labels.clamp(min=0), self.num_classes).to(place.dtype) * (labels >= 0).unsqueeze(1)

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """Returns log N(z; 0, I), (B,) in nats. z: (B, …)."""
        return -0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1)

    def latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Returns n draws of N(0, I), (n, *data_shape), on the model's device and in its dtype."""
        place = self.place
        return torch.randn(n, *self.data_shape, generator=generator, device=place.device, dtype=place.dtype)

    @property
    def place(self) -> Tensor:
        """A parameter of the model, whose device and dtype are the model's."""
        return next(self.parameters())
