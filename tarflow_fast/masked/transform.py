"""One masked autoregressive transform: a masked network, and the univariate transform that its outputs parametrise."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field, replace

from torch import Tensor

from ..errors import ArgumentError
from .layers import Layer
from .order import Order, order_of
from .univariate import Univariate


@dataclass(frozen=True)
class MaskedTransform:
    """A masked autoregressive transform, z_i = f(x_i; φ_i) for the dimensions i that it transforms, else z_i = x_i.

    The parameters φ_i are outputs of the network, which depend on other dimensions of x as its masks say, and on the
    context. Any masks will do, as long as no dimension depends on itself: then some order of the dimensions exists in
    which the inverse can be computed. Coupling transforms are of this kind too: they transform some dimensions, and
    the order has two steps.

    Attributes:
        features: D, the number of dimensions.
        layers: The network. The last layer has P outputs for each transformed dimension: its unit j · P + p is
            parameter p of dimension dims[j].
        univariate: f, with P = univariate.parameters.
        dims: The dimensions that are transformed, by default all, in their order.
        name: What the transform is called in errors, such as "transform.transforms.0".
        inverted: Whether data are x = f(z; φ) and φ depends on z, as in an inverse autoregressive flow, whose slow
            direction is the density.
        known: The order in which the inverse goes, where it is known from a transform with the same masks; by default
            it is read off them.
        order: The order in which the inverse goes.

    Raises:
        ArgumentError: The layers do not fit each other, or a dimension depends on itself.
    """

    features: int
    layers: tuple[Layer, ...]
    univariate: Univariate
    dims: tuple[int, ...] = ()
    name: str = "the transform"
    inverted: bool = False
    known: InitVar[Order | None] = None
    order: Order = field(init=False, repr=False)

    def __post_init__(self, known: Order | None) -> None:
        if not self.dims:
            object.__setattr__(self, "dims", tuple(range(self.features)))
        self._check()
        if known is None:
            masks = [(layer.mask, layer.source, layer.add) for layer in self.layers]
            known = order_of(self.features, masks, self.dims, self.univariate.parameters, self.name)
        object.__setattr__(self, "order", known)

    def _check(self) -> None:
        widths = [self.features]
        for i, layer in enumerate(self.layers):
            for number, what, width in ((layer.source, "reads", layer.inputs), (layer.add, "adds", layer.outputs)):
                if number is not None and not (0 <= number <= i and widths[number] == width):
                    raise ArgumentError(
                        f"layer {i} of {self.name}", f"that it {what} an earlier value of {width} units", number
                    )
            widths.append(layer.outputs)
        wanted = len(self.dims) * self.univariate.parameters
        if not self.layers or widths[-1] != wanted:
            raise ArgumentError(f"the last layer of {self.name}", f"{wanted} outputs", widths[-1])

    def inverted_copy(self) -> MaskedTransform:
        """Returns the inverse of this transform, which shares its network."""
        return replace(self, inverted=not self.inverted, known=self.order)

    def parameters(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Returns the raw parameters of the transformed dimensions, (…, len(dims), P).

        Args:
            x: (…, D), the side on which the parameters depend.
            context: (…, C), or None.

        Returns:
            The network's outputs, which autograd records.
        """
        values = [x]
        for layer in self.layers:
            values.append(layer.evaluate(values, context))
        return values[-1].unflatten(-1, (len(self.dims), self.univariate.parameters))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns f(x), (…, D), and log|det df/dx|, (…), by one pass of the network.

        Args:
            x: (…, D).
            context: (…, C), or None.

        Returns:
            The transformed values and the log-determinant in nats, which autograd records.
        """
        parameters = self.parameters(x, context)
        if len(self.dims) == self.features and self.dims == tuple(range(self.features)):
            z, log_derivative = self.univariate.forward(x, parameters)
            return z, log_derivative.sum(-1)
        dims = list(self.dims)
        moved, log_derivative = self.univariate.forward(x[..., dims], parameters)
        z = x.expand(moved.shape[:-1] + x.shape[-1:]).clone()
        z[..., dims] = moved
        return z, log_derivative.sum(-1)
