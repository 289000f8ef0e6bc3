"""The backends that engines run on, a folder each; `registry.py` has the table of them."""

from .registry import BackendStatus, backends, check_compile, check_threads, choose_backend, make_engines

__all__ = ["BackendStatus", "backends", "check_compile", "check_threads", "choose_backend", "make_engines"]
