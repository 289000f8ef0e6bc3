"""This package makes a model of a file, and a file of a model."""

from .card import model_card
from .push import push_to_hub
from .reading import load, load_pretrained
from .writing import save

__all__ = ["load", "load_pretrained", "model_card", "push_to_hub", "save"]
