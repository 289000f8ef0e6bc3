"""Statistics are written as the tools of others read them."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ArgumentError
from ..files import PathLike, check_path, replacing
from .fid import FeatureSums, Gaussian

SUFFIXES = (".npz", ".pth")


def save_statistics(
    path: PathLike, sums: FeatureSums, network: nn.Module | None = None, spatial: Gaussian | None = None
) -> None:
    """Writes the statistics of features, replacing the file.

    Args:
        path: A file name in an existing folder. One that ends in `.npz` gets `mu` and `sigma`, as ADM's evaluation
            suite and pytorch-fid read them; one that ends in `.pth` the state of torchmetrics' FID, as ml-tarflow's
            `evaluate_fid.py` loads it.
        sums: The pooled features.
        network: The network, whose weights are a part of that state.
        spatial: The features of sFID, if any, which go into a `.npz` as `mu_s` and `sigma_s`.

    Raises:
        ArgumentError: The path is not a place where such a file can be written; or there are fewer than two features.
        OSError: The system refuses to write.
    """
    out = check_path("path", path, SUFFIXES)
    gaussian = sums.gaussian()
    if out.suffix.lower() == ".npz":
        gaussian.save(out, spatial)
        return
    if network is None:
        raise ArgumentError("network", "the network, of which a .pth has the weights", "None")
    state = {f"inception.{name}": value.cpu() for name, value in network.state_dict().items()}
    for kind, each in (("real", sums), ("fake", FeatureSums(len(sums.sum)))):
        state[f"{kind}_features_sum"] = each.sum
        state[f"{kind}_features_cov_sum"] = each.outer
        state[f"{kind}_features_num_samples"] = torch.tensor(each.n)
    with replacing(out) as partial, partial.open("wb") as file:
        torch.save(state, file)
