"""When a challenger takes over: chain by chain, under one protocol, and never on a feeling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from upvla.errors import Mismatch
from upvla.rollout.evaluate import summarise
from upvla.rollout.gate import GateConfig, decide
from upvla.types import ChainRecord, EvalReport

GATE = GateConfig(min_chains=20)


def report(lengths: Sequence[int], suite: str = "chains_d", errors: Sequence[int] = ()) -> EvalReport:
    tasks = ("open_drawer", "turn_on_led", "close_drawer", "turn_off_led", "open_drawer")
    records = [
        ChainRecord(n, "D", tasks, length, (10,) * length, "SimulatorError: died" if n in errors else "")
        for n, length in enumerate(lengths)
    ]
    return summarise("policy", suite, {"world": suite}, {}, records)


WEAK, STRONG = [1, 0, 2, 1] * 10, [2, 1, 2, 2] * 10


def test_a_sure_gain_promotes_and_is_spelt_out() -> None:
    verdict = decide([report(WEAK)], [report(STRONG)], GATE)
    assert verdict.promote and verdict.because.startswith("better on chains_d: +0.75 [")
    assert verdict.gains[0].difference.low > 0 and verdict.gains[0].pairs == 40
    assert verdict.to_json()["gains"][0]["difference"]["value"] == 0.75


@pytest.mark.parametrize(
    ("challenger", "gate", "because"),
    [
        (WEAK, GATE, "not surely better"),
        (list(reversed(STRONG)), GateConfig(min_gain=0.9), "over 0.9 is asked"),
        ([2, *WEAK[1:]], GATE, "not surely better"),  # one lucky chain
        (WEAK[::-1], GATE, "not surely better"),  # the same average on other chains
    ],
)
def test_no_sure_gain_keeps_the_champion(challenger: list[int], gate: GateConfig, because: str) -> None:
    verdict = decide([report(WEAK)], [report(challenger)], gate)
    assert not verdict.promote and because in verdict.because


def test_pairs_see_what_two_averages_cannot() -> None:
    """Each chain a little better: the averages' intervals overlap by far, the differences' does not touch zero."""
    hard_and_easy = [0] * 20 + [4] * 20
    better = [min(5, n + (i % 3 == 0)) for i, n in enumerate(hard_and_easy)]
    before, after = report(hard_and_easy), report(better)
    assert before.average_length.high > after.average_length.value
    assert decide([before], [after], GATE).promote


def test_worse_elsewhere_too_few_or_unjudged_is_no_promotion() -> None:
    both = [report(WEAK), report(STRONG, "chains_abc")], [report(STRONG), report(WEAK, "chains_abc")]
    assert "worse on chains_abc" in decide(*both, GATE).because
    assert "too few" in decide([report(WEAK[:19])], [report(STRONG[:19])], GATE).because
    lost = decide([report(WEAK)], [report(STRONG, errors=range(5))], GATE)
    assert not lost.promote and "could not be judged" in lost.because
    few_lost = decide([report(WEAK)], [report(STRONG, errors=[3])], GATE)
    assert few_lost.promote and (few_lost.gains[0].pairs, few_lost.gains[0].unjudged) == (39, 1)


def test_reports_that_may_not_be_compared_are_refused() -> None:
    ours = report(WEAK)
    for theirs, why in (
        (replace(report(STRONG), fingerprint="2", protocol={"world": "other"}), "world: chains_d and other"),
        (report(STRONG, "chains_abc"), "champion was judged on chains_d, challenger on chains_abc"),
        (report(STRONG[:-1]), "not about the same chains"),
    ):
        with pytest.raises(Mismatch, match=why):
            decide([ours], [theirs], GATE)
    with pytest.raises(Mismatch, match="no suite"):
        decide([], [], GATE)
