"""These functions measure how good a model is on data."""

from .bayes import BayesAccuracy, bayes_accuracy
from .density import BitsPerDim, bits_per_dim
from .family import FlowScore, flow_score, reconstruction_error
from .feature_shards import Extractor, compute_features, feature_format, holds_features, read_features, write_features
from .features import Features
from .fid import FeatureSums, Gaussian, feature_sums, frechet_distance, read_spatial_statistics, read_statistics
from .inception import Inception
from .manifold import precision_recall
from .measures import FeatureSet, compute_measures
from .mmd import kernel_distance
from .noise import Noise
from .saving import SUFFIXES, save_statistics
from .score import inception_score
from .sources import ImageSource, open_images, training_images
from .tuning import TuningPoint, require_matplotlib, save_curve, tune

__all__ = [
    "SUFFIXES",
    "BayesAccuracy",
    "BitsPerDim",
    "Extractor",
    "FeatureSet",
    "FeatureSums",
    "Features",
    "FlowScore",
    "Gaussian",
    "ImageSource",
    "Inception",
    "Noise",
    "TuningPoint",
    "bayes_accuracy",
    "bits_per_dim",
    "compute_features",
    "compute_measures",
    "feature_format",
    "feature_sums",
    "flow_score",
    "frechet_distance",
    "holds_features",
    "inception_score",
    "kernel_distance",
    "open_images",
    "precision_recall",
    "read_features",
    "read_spatial_statistics",
    "read_statistics",
    "reconstruction_error",
    "require_matplotlib",
    "save_curve",
    "save_statistics",
    "training_images",
    "tune",
    "write_features",
]
