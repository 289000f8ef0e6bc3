"""sbi's posteriors, accelerated: the same samples of the same seed, through sbi's own rejection and embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

import tarflow_fast as tff
from tarflow_fast.errors import ArgumentError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
FEATURES = 3


@pytest.fixture(scope="module")
def sbi() -> Any:
    return pytest.importorskip("sbi.inference", reason="sbi is not installed; it is in the extra `flows`")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbi writes logs to where it is."""
    monkeypatch.chdir(tmp_path)


def posterior_of(sbi: Any, estimator: str, **options: Any) -> tuple[Any, Tensor]:
    """Returns a posterior that was trained for a moment, with its default x, and a few x."""
    from sbi.neural_nets import posterior_nn
    from sbi.utils import BoxUniform

    torch.manual_seed(0)
    prior = BoxUniform(-2 * torch.ones(FEATURES), 2 * torch.ones(FEATURES))
    theta = prior.sample((400,))
    x = theta + 0.3 * torch.randn_like(theta)
    if "embedding_net" in options:
        x = torch.cat([x, x], 1)
    inference = sbi.NPE(prior, density_estimator=posterior_nn(estimator, **options), show_progress_bars=False)
    inference.append_simulations(theta, x).train(max_num_epochs=10, show_train_summary=False)
    return inference.build_posterior().set_default_x(x[:1]), x[:4]


def both(ours: Any, theirs: Any, call: Any) -> tuple[Tensor, Tensor]:
    """Returns what a call gives of each, from the same seed."""
    return tuple((torch.manual_seed(3), call(each))[1] for each in (ours, theirs))  # type: ignore[return-value]


@pytest.mark.parametrize("estimator", ["maf", "maf_rqs", "nsf", "zuko_maf", "zuko_nsf"])
def test_posterior(sbi: Any, estimator: str) -> None:
    """Samples for one x and for several, within the prior, log-probabilities with the correction for leakage, MAP."""
    posterior, x = posterior_of(sbi, estimator)
    fast = tff.accelerate(posterior)
    quiet = {"show_progress_bars": False}
    got, wanted = both(fast, posterior, lambda each: each.sample((500,), **quiet))
    assert_close(got, wanted, 1e-4)
    assert got.abs().max() <= 2
    assert_close(*both(fast, posterior, lambda each: each.sample((50,), x=x[1:2], **quiet)), 1e-4)
    assert_close(*both(fast, posterior, lambda each: each.sample_batched((50,), x=x, **quiet)), 1e-4)
    assert_close(*both(fast, posterior, lambda each: each.log_prob(wanted)), 1e-4 * FEATURES**0.5)
    assert_close(*both(fast, posterior, lambda each: each.log_prob_batched(wanted[:4], x, norm_posterior=False)), 2e-4)
    assert_close(*both(fast, posterior, lambda each: each.map(num_iter=10, num_init_samples=50)), 1e-2)
    with torch.no_grad():
        for parameter in posterior.posterior_estimator.net._transform.parameters() if "zuko" not in estimator else []:
            parameter.add_(0.02)
    fast.refresh()
    assert_close(*both(fast, posterior, lambda each: each.sample((50,), **quiet)), 1e-4)


def test_an_embedding_network(sbi: Any) -> None:
    for estimator in ("maf", "zuko_nsf"):
        posterior, _ = posterior_of(sbi, estimator, embedding_net=nn.Sequential(nn.Linear(6, 5), nn.Tanh()))
        fast = tff.accelerate(posterior)
        assert_close(*both(fast, posterior, lambda each: each.sample((200,), show_progress_bars=False)), 1e-4)


def test_what_engines_do_not_know_is_named(sbi: Any) -> None:
    posterior, _ = posterior_of(sbi, "mdn")
    with pytest.raises(ArgumentError, match="posterior_estimator"):
        tff.accelerate(posterior)
    with pytest.raises(ArgumentError, match="Gaussianization"):
        tff.accelerate(posterior_of(sbi, "zuko_gf")[0])
    with pytest.raises(ArgumentError, match="DirectPosterior"):
        tff.accelerate(posterior.posterior_estimator)
