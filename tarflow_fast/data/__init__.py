"""Labelled images, from a folder of pictures, a `.npz` or `.npy` file, or IDX files (MNIST's)."""

from .image_data import ImageData
from .load import SPLITS, load_images

__all__ = ["SPLITS", "ImageData", "load_images"]
