"""The backends that engines run on, each in a folder of its own; `registry.py` has the table of them."""

from .registry import BackendStatus, backends, check_compile, check_threads, choose_backend, make_engines

__all__ = ["BackendStatus", "backends", "check_compile", "check_threads", "choose_backend", "make_engines"]
