"""The token that comes next: against the definitions in transformers, and draws against their probabilities."""

import math

import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from matvlm.generation.sampling import COLDEST, Sampling, choose, restrict

WORDS = 50
DRAWS = 20_000


def random_logits(kind: str) -> torch.Tensor:
    """Logits [6, WORDS] of one ``kind``."""
    logits = 3 * torch.randn(6, WORDS, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        return logits.round()
    if kind == "all equal":
        return torch.zeros_like(logits)
    if kind == "extreme":
        return 1e4 * logits
    if kind == "some impossible":
        return logits.masked_fill(logits < 0, -math.inf)
    return logits.to(torch.bfloat16) if kind == "bfloat16" else logits


@pytest.mark.parametrize("kind", ["random", "ties", "all equal", "extreme", "some impossible", "bfloat16"])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 30.0])
@pytest.mark.parametrize("top_k", [None, 1, 7, WORDS, 9999])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.5, 0.93, 1.0])
def test_the_tokens_to_draw_from_are_those_of_transformers(kind, temperature, top_k, top_p):
    logits = random_logits(kind)
    expected = TemperatureLogitsWarper(temperature)(None, logits.float())
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    actual = restrict(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_the_token_that_reaches_top_p_is_kept():
    """Written out, without transformers: 0.5 + 0.3 is below 0.85, so the third one is needed and the last is not."""
    logits = torch.tensor([[0.15, 0.05, 0.5, 0.3]]).log()
    kept = restrict(logits, Sampling(temperature=1.0, top_p=0.85)).isfinite()
    assert kept.tolist() == [[True, False, True, True]]


def test_greedy_takes_the_first_of_the_largest():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [-1.0, -3.0, -1.0, -2.0], [-math.inf, -5.0, -math.inf, -5.0]])
    tokens = choose(logits, Sampling(top_k=2, top_p=0.1))
    assert tokens.tolist() == [1, 0, 1]
    assert tokens.dtype == torch.int64
    assert choose(logits.bfloat16(), Sampling()).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 9},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_come_with_their_probabilities(settings):
    row = 1.5 * torch.randn(WORDS, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(**settings)
    tokens = choose(row.expand(DRAWS, -1), sampling, torch.Generator().manual_seed(3))
    counts = tokens.bincount(minlength=WORDS)
    scores = row[None] / sampling.temperature
    scores = TopKLogitsWarper(sampling.top_k or WORDS)(None, scores)
    scores = TopPLogitsWarper(sampling.top_p or 1.0)(None, scores)
    expected = DRAWS * scores[0].double().softmax(-1)
    assert counts[expected == 0].sum() == 0
    often = expected >= 5  # what chi-square needs; the others as one
    rare = ~often & (expected > 0)
    bins = [torch.cat([values[often].double(), values[rare].sum()[None].double()]) for values in (counts, expected)]
    observed, wanted = (values[: None if rare.any() else -1] for values in bins)
    assert chisquare(observed, wanted).pvalue > 0.01
    wrong = wanted.flip(0) if len(wanted) > 1 else wanted
    assert chisquare(observed, wrong).pvalue < 1e-9, "the check sees a wrong distribution"


def test_rows_are_drawn_independently():
    """Of two rows with the same two equal logits all four outcomes are as frequent."""
    logits = torch.zeros(2 * DRAWS, 2)
    first, second = choose(logits, Sampling(temperature=1.0), torch.Generator().manual_seed(0)).view(2, DRAWS)
    counts = (2 * first + second).bincount(minlength=4)
    assert chisquare(counts).pvalue > 0.01


def test_the_same_seed_gives_the_same_draws():
    logits = torch.randn(4, WORDS, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=1.0, top_p=0.95)

    def draws(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [choose(logits, sampling, generator).tolist() for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    torch.manual_seed(5)
    without = choose(logits, sampling).tolist()
    torch.manual_seed(5)
    assert choose(logits, sampling).tolist() == without


@pytest.mark.parametrize("temperature", [COLDEST, 1.0, 1e6])
def test_a_token_that_is_cut_is_never_drawn(temperature):
    """At the ends of what is allowed there are draws, and only of tokens that may be drawn."""
    logits = torch.full((DRAWS, 4), -math.inf)
    logits[:, 1], logits[:, 3] = 1e4, 1e4 - 1
    tokens = choose(logits, Sampling(temperature=temperature), torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == ({1} if temperature == COLDEST else {1, 3})


def test_logits_are_left_as_they_are():
    logits = random_logits("random")
    before = logits.clone()
    choose(logits, Sampling(temperature=1.0, top_k=5, top_p=0.5))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0: at least 1"),
        ({"temperature": -0.1}, "temperature -0.1: 0 for the most probable token, or 1e-06 and more"),
        ({"temperature": 1e-9}, "temperature 1e-09: 0 for"),
        ({"temperature": math.nan}, "temperature nan: 0 for"),
        ({"temperature": math.inf}, "temperature inf: 0 for"),
        ({"top_k": 0}, "top_k 0: at least 1, or None"),
        ({"top_p": 0.0}, "top_p 0.0: above 0 and at most 1, or None"),
        ({"top_p": 1.01}, "top_p 1.01: above 0"),
        ({"top_p": math.nan}, "top_p nan: above 0"),
        ({"stop": "end"}, "stop 'end': a tuple of texts"),
        ({"stop": ("end", "")}, "remove the empty text"),
    ],
    ids=str,
)
def test_bad_values_are_refused(values, complaint):
    with pytest.raises(ValueError, match=complaint.replace("(", r"\(")):
        Sampling(**values)
