"""How a file becomes a model, and a model a file."""

from .card import model_card
from .checkpoint import load, load_pretrained, save
from .push import push_to_hub

__all__ = ["load", "load_pretrained", "model_card", "push_to_hub", "save"]
