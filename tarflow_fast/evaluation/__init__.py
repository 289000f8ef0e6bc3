"""These functions measure how good a model is on data."""

from .bayes import BayesAccuracy, bayes_accuracy
from .density import BitsPerDim, bits_per_dim
from .fid import FeatureSums, Gaussian, feature_sums, frechet_distance, read_statistics
from .inception import Inception
from .noise import Noise

__all__ = [
    "BayesAccuracy",
    "BitsPerDim",
    "FeatureSums",
    "Gaussian",
    "Inception",
    "Noise",
    "bayes_accuracy",
    "bits_per_dim",
    "feature_sums",
    "frechet_distance",
    "read_statistics",
]
