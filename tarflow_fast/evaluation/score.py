"""The Inception score tells how sure a classifier is of each image, and how many classes it sees in all of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..checks import check_count
from .features import check_features

SPLITS, SEED = 10, 2020  # torch-fidelity's


def inception_score(logits: Tensor, *, splits: int = SPLITS, seed: int = SEED) -> tuple[float, float]:
    """exp(mean over images of KL(p(y|x) ‖ p(y))), in fp64, of each of several parts of the images.

    p(y|x) is the softmax of an image's logits, and p(y) its mean over the part. Images are shuffled first, as
    torch-fidelity does it, so that the results are the same.

    Args:
        logits: (n, c), those of Inception-v3 without their bias in published scores.
        splits: The number of parts.
        seed: The seed of the shuffle.

    Returns:
        The mean and the standard deviation over the parts, with as many as there are below.

    Raises:
        ArgumentError: There are fewer images than parts, or logits are not finite.
    """
    splits = check_count("splits", splits)
    n = len(check_features("logits", logits, splits))
    order = torch.from_numpy(np.random.RandomState(seed).permutation(n))
    log_p = logits.detach().to("cpu", torch.float64)[order].log_softmax(1)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits : (i + 1) * n // splits]
        p = part.exp()
        scores.append((p * (part - p.mean(0).log())).nansum(1).mean().exp())  # where p is 0, the term is too
    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))
