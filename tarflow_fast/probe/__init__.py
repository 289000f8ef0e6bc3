"""The probe: backends prove themselves on the device at hand before `backend="auto"` takes them.

A job (`job.py`) is done in a process of its own (`child.py`), which another one follows and ends when its time is up
(`parent.py`). The engines are held to laws (`laws.py`) over what `subject.py` gives them. Verdicts are kept
(`store.py`), and a `Prober` is what a sampler asks for them.
"""

from .density_gate import density_proven
from .faults import naming_faults
from .job import Limits
from .prober import MODES, Prober

__all__ = ["MODES", "Limits", "Prober", "density_proven", "naming_faults"]
