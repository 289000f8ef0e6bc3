"""Measurements of tarflow_fast, run from a checkout: `python -m bench --help`."""
