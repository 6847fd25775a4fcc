"""Every rule against a slow one in plain Python, and the identities that follow from the definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lmpatch.errors import BadInput
from lmpatch.inference.interventions import Rule
from lmpatch.patches.decode.rules import CONTEXT, PRIOR, UNDECIDED, AdaCAD, Arr, Coiecd, Grd, Power, divergence

Floats = list[float]
LN2 = math.log(2)
SIZE = 9
SEEDS = range(40)


def draw(seed: int, n: int = 1, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits [n, SIZE] of two streams."""
    g = torch.Generator().manual_seed(seed)
    full, bare = (spread * torch.randn(n, SIZE, generator=g) for _ in range(2))
    return full, bare


def combined(rule: Rule, full: Tensor, bare: Tensor, memory: Tensor | None = None) -> Tensor:
    memory = torch.zeros(len(full), dtype=torch.int64) if memory is None else memory
    return rule.combine(full.clone(), bare.clone(), memory)


def logp(z: Sequence[float]) -> Floats:
    total = math.log(sum(math.exp(x) for x in z))
    return [x - total for x in z]


def entropy(z: Sequence[float]) -> float:
    return -sum(math.exp(x) * x for x in logp(z))


def jsd(full: Sequence[float], bare: Sequence[float]) -> float:
    total = 0.0
    for x, y in zip(logp(full), logp(bare), strict=True):
        p, q = math.exp(x), math.exp(y)
        total += (p * math.log(2 * p / (p + q)) + q * math.log(2 * q / (p + q))) / 2
    return total


def power(full: Sequence[float], bare: Sequence[float], tau: float) -> Floats:
    return [tau * x + (1 - tau) * y for x, y in zip(logp(full), logp(bare), strict=True)]


def same(got: Tensor, want: Sequence[float]) -> None:
    """Equal as distributions: logits count up to a constant."""
    assert got.log_softmax(-1).tolist() == pytest.approx(logp(want), abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("floor", [0.0, 0.3])
def test_adacad_is_cad_with_the_divergence_as_its_strength(seed: int, floor: float) -> None:
    full, bare = draw(seed)
    strength = max(jsd(full[0].tolist(), bare[0].tolist()), floor)
    same(combined(AdaCAD(floor), full, bare)[0], power(full[0].tolist(), bare[0].tolist(), 1 + strength))


@pytest.mark.parametrize("seed", SEEDS)
def test_arr_leans_to_the_surer_side_by_the_divergence(seed: int) -> None:
    full, bare = draw(seed)
    share = jsd(full[0].tolist(), bare[0].tolist()) / LN2
    surer = max(logp(full[0].tolist())) > max(logp(bare[0].tolist()))
    same(combined(Arr(), full, bare)[0], power(full[0].tolist(), bare[0].tolist(), 1 + share if surer else 1 - share))


def test_the_exponent_of_arr_is_in_0_to_2() -> None:
    full, bare = draw(0, n=500, spread=20.0)
    spans = (full - bare).abs().argmax(-1, keepdim=True)  # where the exponent is read off best
    tau = ((combined(Arr(), full, bare) - bare) / (full - bare)).gather(-1, spans)
    assert tau.min() > -1e-4 and tau.max() < 2 + 1e-4
    assert tau.min() < 0.1 and tau.max() > 1.9  # both ends are reached


def slow_grd(fulls: Sequence[Floats], bares: Sequence[Floats], lam: float, gate: str) -> list[tuple[str, Floats]]:
    """One answer, step by step: what is trusted, and scores whose first choice is the token."""
    trusted, told = "", []
    for full, bare in zip(fulls, bares, strict=True):
        ours, theirs = full.index(max(full)), bare.index(max(bare))
        if ours == theirs:
            told.append((trusted, full))
            continue
        if not trusted:
            sure, surer = math.exp(max(logp(bare))) > 0.5, entropy(bare) < entropy(full)
            prior = {"full": sure and surer, "confidence": sure, "entropy": surer}[gate]
            trusted = "prior" if prior else "context"
        if trusted == "context":
            told.append((trusted, full))
            continue
        a, b = logp(full), logp(bare)
        for_context, for_prior = a[ours] - a[theirs], b[theirs] - b[ours]
        told.append((trusted, power(full, bare, (1 - lam) * for_prior / (for_context + for_prior))))
    return told


@pytest.mark.parametrize("gate", ["full", "confidence", "entropy"])
@pytest.mark.parametrize("lam", [0.0, 0.75, 1.0])
def test_grd_decides_once_per_answer(gate: str, lam: float) -> None:
    rule, steps, seen = Grd(lam, gate), [draw(seed, n=12) for seed in range(6)], set()  # type: ignore[arg-type]
    names = {UNDECIDED: "", CONTEXT: "context", PRIOR: "prior"}
    memory = torch.zeros(12, dtype=torch.int64)
    got = []
    for full, bare in steps:
        got.append((combined(rule, full, bare, memory), memory.tolist()))
    for row in range(12):
        told = slow_grd([f[row].tolist() for f, _ in steps], [b[row].tolist() for _, b in steps], lam, gate)
        for (scores, known), (trusted, want) in zip(got, told, strict=True):
            assert names[known[row]] == trusted
            same(scores[row], want)
            seen.add(trusted)
    assert {"context", "prior"} <= seen  # the case was there


def test_grd_gives_the_common_first_choice_where_both_agree() -> None:
    full, bare = draw(1, n=200)
    agree = full.argmax(-1) == bare.argmax(-1)
    assert agree.any()
    for memory in (UNDECIDED, CONTEXT, PRIOR):
        out = combined(Grd(0.75), full, bare, torch.full((200,), memory))
        assert torch.equal(out[agree].argmax(-1), full[agree].argmax(-1))


def test_grd_puts_the_trusted_token_first_in_a_disagreement() -> None:
    full, bare = draw(2, n=200)
    differ = full.argmax(-1) != bare.argmax(-1)
    for memory, wanted in ((CONTEXT, full), (PRIOR, bare)):
        out = combined(Grd(0.75), full, bare, torch.full((200,), memory))
        agrees = out[differ].argmax(-1) == wanted[differ].argmax(-1)
        assert agrees.all() if memory == CONTEXT else agrees.float().mean() > 0.8  # a third token may win a mixture


def official_coiecd(full: Floats, bare: Floats, alpha: float, ratio: float) -> tuple[int, Floats]:
    """As released, with the entropy that cancels; also how many tokens are below the first bound."""
    a, b = logp(full), logp(bare)
    info = logp([-x - entropy(bare) for x in a])
    low, high = min(info) + math.log(ratio), max(info) - math.log(ratio)
    flagged = [x >= low for x in info]
    below = flagged.count(False)
    if below == 1:
        flagged = [True] * len(info)
    flagged = [f and not x > high for f, x in zip(flagged, info, strict=True)]
    return below, [(y if f else x) + alpha * (x - y) for f, x, y in zip(flagged, a, b, strict=True)]


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_coiecd_with_its_tail_is_the_released_rule(alpha: float) -> None:
    alone = several = 0
    for seed in SEEDS:
        full, bare = draw(seed)
        below, want = official_coiecd(full[0].tolist(), bare[0].tolist(), alpha, 4.0)
        same(combined(Coiecd(alpha, 4.0, tail=True), full, bare)[0], want)
        alone, several = alone + (below == 1), several + (below > 1)
    assert alone and several  # both cases were there


def test_coiecd_without_the_tail_starts_from_the_context_near_its_first_choice_only() -> None:
    full, bare = torch.tensor([[3.0, 2.0, 1.0, -3.0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    a, b = full.log_softmax(-1), bare.log_softmax(-1)
    torch.testing.assert_close(combined(Coiecd(0.0, 4.0), full, bare), torch.cat([a[:, :2], b[:, 2:]], 1))
    torch.testing.assert_close(combined(Coiecd(0.0, 4.0, tail=True), full, bare)[0, 3], a[0, 3])
    torch.testing.assert_close(combined(Coiecd(0.0, 2.0), full, bare), b)  # alone: not near either


def test_the_ends_of_the_power_family_give_back_every_bit() -> None:
    full, bare = draw(0, n=5)
    assert torch.equal(combined(Power(1.0), full, bare), full)
    assert torch.equal(combined(Power(0.0), full, bare), bare)
    torch.testing.assert_close(combined(Power(1.5), full, bare), 1.5 * full - 0.5 * bare)


def test_two_powers_one_after_the_other_are_their_product() -> None:
    full, bare = draw(0, n=5)
    twice = combined(Power(0.5), combined(Power(3.0), full, bare), bare)
    torch.testing.assert_close(twice, combined(Power(1.5), full, bare))


@pytest.mark.parametrize("rule", [Power(1.7), AdaCAD(0.0), Arr(), Grd(0.75)])
def test_equal_streams_are_left_as_they_are_to_the_bit(rule: Rule) -> None:
    full, _ = draw(3, n=5)
    assert torch.equal(combined(rule, full, full), full)


def test_the_divergence_is_symmetric_and_at_most_ln_2() -> None:
    full, bare = draw(0, n=500, spread=30.0)
    found = divergence(full, bare)
    torch.testing.assert_close(found, divergence(bare, full))
    assert found.min() >= 0 and found.max() <= LN2 and found.max() > 0.99 * LN2
    assert not divergence(full, full).any()


@pytest.mark.parametrize(
    "rule", [Power(1.7), AdaCAD(0.0), Arr(), Grd(0.75), Grd(0.5, "entropy"), Coiecd(1.0, 4.0), Coiecd(1.0, 4.0, True)]
)
def test_a_rule_leaves_the_stream_without_context_alone_and_rows_do_not_mix(rule: Rule) -> None:
    full, bare = draw(5, n=8)
    kept = bare.clone()
    whole = rule.combine(full.clone(), bare, torch.zeros(8, dtype=torch.int64))
    assert torch.equal(bare, kept)
    for row in range(8):
        torch.testing.assert_close(whole[row], combined(rule, full[row : row + 1], bare[row : row + 1])[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Power(math.inf), "tau is inf"),
        (lambda: AdaCAD(-0.1), "floor is -0.1"),
        (lambda: Grd(1.5), "lam is 1.5"),
        (lambda: Grd(0.5, "conf_only"), "one of full, confidence, entropy"),  # type: ignore[arg-type]
        (lambda: Coiecd(math.nan, 4.0), "alpha is nan"),
        (lambda: Coiecd(1.0, 0.5), "ratio is 0.5"),
    ],
)
def test_a_number_out_of_range_is_refused(make, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()
