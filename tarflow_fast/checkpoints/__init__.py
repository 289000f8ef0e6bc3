"""This package makes a model of a file, and a file of a model."""

from .card import model_card
from .checkpoint import load, load_pretrained, save
from .push import push_to_hub

__all__ = ["load", "load_pretrained", "model_card", "push_to_hub", "save"]
