"""These functions measure how good a model is on data."""

from .bayes import BayesAccuracy, bayes_accuracy
from .density import BitsPerDim, bits_per_dim
from .noise import Noise

__all__ = ["BayesAccuracy", "BitsPerDim", "Noise", "bayes_accuracy", "bits_per_dim"]
