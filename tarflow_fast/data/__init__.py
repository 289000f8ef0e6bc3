"""Labelled images are read from a folder of pictures, a `.npz` or `.npy` file, or IDX files (MNIST's)."""

from .centre_crops import centre_crops, find_below
from .classes import matched, renamed
from .demonstrations import DEMONSTRATIONS, Demonstration
from .flow_data import FlowData, load_flow_data
from .image_data import ImageData
from .load import SPLITS, load_images
from .picture_folder import PictureFolder, open_pictures
from .values import LAYOUTS, VALUES

__all__ = [
    "DEMONSTRATIONS",
    "LAYOUTS",
    "SPLITS",
    "VALUES",
    "Demonstration",
    "FlowData",
    "ImageData",
    "PictureFolder",
    "centre_crops",
    "find_below",
    "load_flow_data",
    "load_images",
    "matched",
    "open_pictures",
    "renamed",
]
