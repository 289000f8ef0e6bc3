"""This package draws any number of images into a folder, shard by shard, by any number of processes."""

from .estimate import estimate
from .formats import FORMATS, Format
from .reading import ShardImages, is_run, read_shards, shard_files
from .run import SHARD_SIZE, Run, draw_shards, processes_of_environment

__all__ = [
    "FORMATS",
    "SHARD_SIZE",
    "Format",
    "Run",
    "ShardImages",
    "draw_shards",
    "estimate",
    "is_run",
    "processes_of_environment",
    "read_shards",
    "shard_files",
]
