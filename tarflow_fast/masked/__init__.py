"""This package describes masked autoregressive flows, whichever library they are of, as engines need them."""

from .fixed import Elementwise, Fixed, Linear, Permute, Reverse, Scale
from .flow import MaskedFlow
from .layers import Activation, Layer, Term
from .order import Order, order_of
from .transform import MaskedTransform
from .univariate import Affine, Shift, Spline, Univariate

__all__ = [
    "Activation",
    "Affine",
    "Elementwise",
    "Fixed",
    "Layer",
    "Linear",
    "MaskedFlow",
    "MaskedTransform",
    "Order",
    "Permute",
    "Reverse",
    "Scale",
    "Shift",
    "Spline",
    "Term",
    "Univariate",
    "order_of",
]
