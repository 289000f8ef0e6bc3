"""Inception score, kernel distance, precision and recall: against direct computations and torch-fidelity's."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tarflow_fast.errors import ArgumentError
from tarflow_fast.evaluation import (
    Features,
    FeatureSet,
    Gaussian,
    compute_measures,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def values(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + shift


def test_the_inception_score_of_few_logits() -> None:
    """With probabilities by hand: Σ p log(p / mean p) of each part."""
    logits = values(7, 3, 0)
    order = np.random.RandomState(5).permutation(7)
    scores = []
    for rows in (order[:3], order[3:]):
        p = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in logits[rows].tolist()]
        mean = [sum(column) / len(p) for column in zip(*p, strict=True)]
        scores.append(math.exp(sum(v * math.log(v / m) for row in p for v, m in zip(row, mean, strict=True)) / len(p)))
    found = inception_score(logits, splits=2, seed=5)
    assert found == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_the_inception_score_has_its_limits() -> None:
    assert inception_score(torch.zeros(20, 4), splits=2) == pytest.approx((1, 0))
    sure = 1e4 * torch.eye(4).repeat(5, 1)  # where p is 0 to the last bit
    assert inception_score(sure, splits=1)[0] == pytest.approx(4)
    assert torch.isfinite(torch.tensor(inception_score(1e4 * torch.eye(4)[:1].repeat(20, 1), splits=2))).all()


def test_the_kernel_distance_of_few_features() -> None:
    a, b = values(5, 3, 0), values(5, 3, 1, 0.4)

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y).item() / 3 + 1) ** 3

    pairs = list(itertools.permutations(range(5), 2))
    within = sum(k(s[i], s[j]) for s in (a, b) for i, j in pairs) / 20
    wanted = within - 2 * sum(k(x, y) for x in a for y in b) / 25
    assert kernel_distance(a, b, subsets=3) == pytest.approx((wanted, 0), rel=1e-12, abs=1e-12)


def test_the_kernel_distance_has_no_bias() -> None:
    a, b, c = values(400, 6, 0), values(300, 6, 1), values(300, 6, 2, 0.5)
    (same, spread), (other, _) = (kernel_distance(a, each, subset_size=100) for each in (b, c))
    assert abs(same) < 3 * spread
    assert other > 10 * abs(same)


def test_precision_and_recall_of_few_features() -> None:
    images, reference = values(40, 3, 0), values(30, 3, 1, 0.8)

    def share(x: Tensor, centres: Tensor) -> float:
        radius = [sorted(math.dist(c, e) for e in centres.tolist())[2] for c in centres.tolist()]
        inside = [any(math.dist(p, c) <= r for c, r in zip(centres.tolist(), radius, strict=True)) for p in x.tolist()]
        return sum(inside) / len(inside)

    found = precision_recall(images, reference, neighbours=2)
    assert found == (share(images, reference), share(reference, images))
    assert 0 < found[0] < 1
    assert found[0] != found[1]
    assert precision_recall(images, images) == (1, 1)
    assert precision_recall(images, reference + 100) == (0, 0)


def test_they_do_not_depend_on_how_many_distances_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    images, reference = values(40, 3, 0), values(30, 3, 1, 0.8)
    whole = precision_recall(images, reference)
    monkeypatch.setattr("tarflow_fast.evaluation.manifold.BYTES", 8 * 100)
    assert precision_recall(images, reference) == whole


@pytest.mark.parametrize("n", [1200, 1003])
def test_torch_fidelity_agrees(n: int) -> None:
    try:
        from torch_fidelity import metric_isc, metric_kid, metric_prc
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        pytest.skip(str(error))
    a, b = values(n, 16, 0), values(1100, 16, 1, 0.2)
    theirs = metric_isc.isc_features_to_metric(3 * a)
    assert inception_score(3 * a) == pytest.approx(tuple(theirs.values()), rel=1e-6)
    theirs = metric_kid.kid_features_to_metric(a, b, kid_subsets=7, verbose=False)
    assert kernel_distance(a, b, subsets=7) == pytest.approx(tuple(theirs.values()), rel=1e-6)
    theirs = metric_prc.prc_features_to_metric(a, b, verbose=False)
    assert precision_recall(a, b) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_torchmetrics_agrees() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.kid import poly_mmd

    a, b = values(50, 16, 0), values(50, 16, 1, 0.2)
    theirs: Any = poly_mmd(a, b)
    assert kernel_distance(a, b, subsets=1)[0] == pytest.approx(theirs.item(), rel=1e-6)


def features(n: int, seed: int) -> Features:
    return Features(values(n, 4, seed).float(), values(n, 6, seed + 10).float(), values(n, 3, seed + 20).float())


def test_measures_are_of_what_there_is() -> None:
    kept, sums, other = FeatureSet(keep=True), FeatureSet(), FeatureSet(keep=True)
    for each, n, seed in ((kept, 30, 0), (sums, 30, 0), (other, 25, 1)):
        whole = features(n, seed)
        for rows in torch.arange(n).split(8):
            each.add(Features(whole.pooled[rows], whole.spatial[rows], whole.logits[rows]))
    assert (kept.n, sums.n) == (30, 30)
    everything = compute_measures(kept, other)
    assert everything["fid"] == frechet_distance(kept.gaussian(), other.gaussian())
    spatial = other.spatial_gaussian()
    assert spatial is not None
    assert compute_measures(sums, other) == {"fid": everything["fid"]}
    assert set(compute_measures(kept)) == {"inception_score", "inception_score_std"}
    alone = compute_measures(kept, statistics=other.gaussian(), spatial=spatial)
    assert {name: everything[name] for name in alone} == alone
    assert set(alone) == {"fid", "sfid", "inception_score", "inception_score_std"}
    assert set(everything) - set(alone) == {"kid", "kid_std", "precision", "recall"}
    given = Gaussian(torch.ones(4), torch.eye(4).double())
    assert compute_measures(kept, other, statistics=given)["fid"] == frechet_distance(kept.gaussian(), given)


def test_wrong_features_are_refused() -> None:
    with pytest.raises(ArgumentError, match="images: expected at least two"):
        compute_measures(FeatureSet())
    with pytest.raises(ArgumentError, match=r"logits: expected shape \(n, d\), n >= 10"):
        inception_score(torch.zeros(9, 3))
    with pytest.raises(ArgumentError, match="logits: expected finite values"):
        inception_score(torch.full((20, 3), torch.nan))
    with pytest.raises(ArgumentError, match="b: expected features of 4 values"):
        kernel_distance(torch.zeros(9, 4), torch.zeros(9, 3))
    with pytest.raises(ArgumentError, match="subset_size"):
        kernel_distance(torch.zeros(9, 4), torch.zeros(9, 4), subset_size=1)
    with pytest.raises(ArgumentError, match="reference: expected features of 4 values"):
        precision_recall(torch.zeros(9, 4), torch.zeros(9, 3))
    with pytest.raises(ArgumentError, match=r"images: expected shape \(n, d\), n >= 4"):
        precision_recall(torch.zeros(3, 4), torch.zeros(9, 4))
