"""Discrete flow matching: an exact network gives the data's law, the bound is a bound, and tokens are in range."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare
from tolerances import STANDARD_ERRORS
from torch import Tensor, nn

from tarflow_fast.errors import ArgumentError
from tarflow_fast.flows import build
from tarflow_fast.flows.discrete import DiscreteFlowMatching

V, T = 3, 2
WORDS = torch.tensor(list(itertools.product(range(V), repeat=T)))  # all sequences
LAW = torch.tensor([0.22, 0.02, 0.06, 0.03, 0.15, 0.10, 0.25, 0.05, 0.12], dtype=torch.float64)  # of dependent tokens
SAMPLES, LEAST_P = 10_000, 1e-3
sources = pytest.mark.parametrize("source", ["masked", pytest.param("uniform", marks=pytest.mark.slow)])


class Exact(nn.Module):
    """log p(x₁ⁱ = a | the tokens of x_t in other places) under LAW, by a sum over all sequences."""

    def __init__(self, source: str):
        super().__init__()
        self.masked = source == "masked"

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        same = (x[:, None, :] == WORDS).double()  # (B, words, T)
        s = t[:, None, None]
        # p(x_t | x₁), from masks up to a factor that is the same for all words that are left
        seen = same + (x[:, None, :] == V) if self.masked else same * s + (1 - s) / V
        out = torch.empty(len(x), T, V, dtype=torch.float64)
        for i, a in itertools.product(range(T), range(V)):
            others = LAW * seen[:, :, [j for j in range(T) if j != i]].prod(2)
            out[:, i, a] = others[:, WORDS[:, i] == a].sum(1)
        return (out / out.sum(2, keepdim=True)).log()


def exact_model(source: str, steps: int = 200, corrections: int = 0) -> DiscreteFlowMatching:
    """Returns a model whose network is exact."""
    sizes = {"width": 4, "heads": 1, "layers": 1, "steps": steps, "corrections": corrections}
    model = build("discrete", data_shape=(T,), vocabulary=V, source=source, **sizes)
    assert isinstance(model, DiscreteFlowMatching)
    model.double()
    model.place_holder = nn.Parameter(torch.zeros((), dtype=torch.float64))  # where the model is
    model.network = Exact(source)
    return model.eval()


def counts(x: Tensor) -> Tensor:
    return torch.bincount(x @ torch.tensor([V, 1]), minlength=V**T)


@sources
def test_an_exact_network_samples_the_law_of_the_data(source: str) -> None:
    model = exact_model(source)
    x = model.sample(SAMPLES, generator=torch.Generator().manual_seed(1))
    assert model.evaluations() == 200
    assert chisquare(counts(x).numpy(), (LAW * SAMPLES).numpy()).pvalue > LEAST_P


def test_too_few_steps_are_seen_by_the_same_test() -> None:
    x = exact_model("masked", steps=2).sample(SAMPLES, generator=torch.Generator().manual_seed(1))
    assert chisquare(counts(x).numpy(), (LAW * SAMPLES).numpy()).pvalue < LEAST_P


@pytest.mark.parametrize(("source", "steps"), [("masked", 2), pytest.param("uniform", 200, marks=pytest.mark.slow)])
def test_corrections_lead_to_the_law_of_an_exact_network(source: str, steps: int) -> None:
    """From masks out of too few steps; from uniform draws they keep what many steps have made."""
    model = exact_model(source, steps, corrections=24)
    x = model.sample(SAMPLES, generator=torch.Generator().manual_seed(1))
    assert model.evaluations() == steps + 24
    assert chisquare(counts(x).numpy(), (LAW * SAMPLES).numpy()).pvalue > LEAST_P


@torch.no_grad()
def bounds(model: DiscreteFlowMatching, rows: int = 400) -> tuple[Tensor, Tensor]:
    """Returns the mean estimate of the bound for each sequence, (words,), and its standard error."""
    found = model.log_prob(WORDS.repeat_interleave(rows, 0), generator=torch.Generator().manual_seed(1)).view(-1, rows)
    return found.mean(1), found.std(1) / math.sqrt(rows)


def test_from_masks_the_bound_of_an_exact_network_is_the_log_likelihood() -> None:
    # with many steps, as those of the last one are drawn independently
    mean, error = bounds(exact_model("masked", steps=4000))
    assert ((mean - LAW.log()).abs() < STANDARD_ERRORS * error + 2e-3).all()


@pytest.mark.parametrize("steps", [2, 5])
def test_the_bound_counts_the_tokens_of_the_last_step(steps: int) -> None:
    model = build("discrete", data_shape=(1,), vocabulary=4, width=4, heads=1, layers=1, steps=steps)
    with torch.no_grad():  # a new network is exact for uniform data, of which one token is drawn exactly in any steps
        found = model.log_prob(torch.zeros(4000, 1, dtype=torch.int64), generator=torch.Generator().manual_seed(1))
    error = float(found.std()) / math.sqrt(len(found))
    assert float(found.mean()) == pytest.approx(-math.log(4), abs=STANDARD_ERRORS * error)


def test_from_uniform_draws_the_bound_is_below_the_log_likelihood_on_average() -> None:
    mean, error = bounds(exact_model("uniform"))
    below = float((LAW * (LAW.log() - mean)).sum())
    assert below > STANDARD_ERRORS * float((LAW * error).sum())
    assert below < T * 1.0


def test_the_bound_of_uniform_tokens_from_uniform_draws_has_a_closed_form() -> None:
    model = build("discrete", data_shape=(1,), vocabulary=4, source="uniform", width=4, heads=1, layers=1)
    with torch.no_grad():  # a new network is exact for uniform data
        found = model.log_prob(torch.zeros(2000, 1, dtype=torch.int64), generator=torch.Generator().manual_seed(1))
    assert float(found.mean()) == pytest.approx(-3 / 4 * (math.log(4) + 1), abs=0.05)


@pytest.mark.slow
@sources
def test_training_learns_the_law(source: str) -> None:
    torch.manual_seed(0)
    model = build("discrete", data_shape=(T,), vocabulary=V, source=source, width=16, heads=2, layers=1, steps=64)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 250)
        x = WORDS[torch.multinomial(LAW, 256, replacement=True, generator=generator)]
        optimizer.zero_grad()
        model.loss(x, generator=generator).backward()
        optimizer.step()
    shares = counts(model.sample(4000, generator=generator)) / 4000
    assert float((shares - LAW).abs().sum()) < 0.15


@sources
def test_the_loss_is_an_unbiased_estimate_of_the_bound_per_token(source: str) -> None:
    model, x = exact_model(source), WORDS[4:5].expand(4000, T)
    with torch.no_grad():
        losses = [-T * float(model.loss(x, generator=torch.Generator().manual_seed(seed))) for seed in range(8)]
        wanted = model.log_prob(x[:1000], generator=torch.Generator().manual_seed(9)).mean()
    assert sum(losses) / 8 == pytest.approx(float(wanted), abs=0.05)


@sources
def test_a_sample_leaves_the_global_generator_alone(source: str) -> None:
    model = exact_model(source, steps=4)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first = model.sample(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(first, model.sample(50, generator=torch.Generator().manual_seed(1)))
    assert first.dtype == torch.int64
    assert first.max() < V


def test_log_prob_reports_its_evaluations() -> None:
    model = exact_model("masked")
    model.log_prob(WORDS, generator=torch.Generator().manual_seed(1))
    assert model.evaluations() == model.options.times


@sources
@pytest.mark.parametrize("call", ["loss", "log_prob"])
def test_tokens_out_of_range_are_refused(source: str, call: str) -> None:
    model = exact_model(source)
    for wrong, got in ((V, f"{V}"), (-1, "-1")):
        with pytest.raises(ArgumentError, match=rf"^x: expected tokens from 0 to vocabulary - 1 = 2, got {got}$"):
            getattr(model, call)(torch.tensor([[0, wrong]]))
    with pytest.raises(ArgumentError, match=r"^x: expected a tensor of \(B, 2\) integers, got a float32 tensor$"):
        getattr(model, call)(torch.zeros(1, 2))
    with pytest.raises(ArgumentError, match=r"^x: expected \(B, 2\) integers with B >= 1, got \(1, 3\)$"):
        getattr(model, call)(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("option", "value"),
    [("vocabulary", 1), ("source", "noise"), ("heads", 3), ("steps", 1), ("corrections", -1), ("times", 0)],
)
def test_options_out_of_range_are_refused(option: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^{option}: expected"):
        build("discrete", data_shape=(4,), **{"width": 16, option: value})
