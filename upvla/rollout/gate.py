"""Whether a challenger takes over: paired differences on the same chains under the same protocol, never two averages.

Both policies start every chain from the same state, so the difference a chain is free of how hard the chain is. What
counts is the 95 % bootstrap interval of the mean of these differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from upvla.errors import Mismatch
from upvla.rollout.evaluate import bootstrap_mean, compare
from upvla.types import ChainRecord, Estimate, EvalReport


class GateConfig(BaseModel):
    """When the alias moves. The first suite decides; on every other one the challenger must not be surely worse."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_gain: float = Field(
        default=0.0, ge=0, description="tasks a chain that the interval's lower bound must lie above"
    )
    min_chains: int = Field(default=20, gt=0, description="pairs; with fewer the champion stays")
    max_unjudged: float = Field(
        default=0.1, ge=0, lt=1, description="share of pairs that may lack a record without an error"
    )


class Gain(NamedTuple):
    """Challenger - champion on one suite, in tasks done a chain."""

    suite: str
    difference: Estimate
    pairs: int
    unjudged: int


class Verdict(NamedTuple):
    promote: bool
    gains: tuple[Gain, ...]
    because: str

    def to_json(self) -> dict[str, Any]:
        gains = [{**gain._asdict(), "difference": gain.difference._asdict()} for gain in self.gains]
        return {"promote": self.promote, "because": self.because, "gains": gains}


def decide(champion: Sequence[EvalReport], challenger: Sequence[EvalReport], config: GateConfig) -> Verdict:
    """Compare suite by suite, in the order given. Raises `Mismatch` where two reports may not be compared."""
    gains = tuple(_gain(ours, theirs) for ours, theirs in zip(champion, challenger, strict=True))
    if not gains:
        raise Mismatch("gate: no suite to compare on")
    first = gains[0]
    for gain in gains:
        if gain.unjudged > config.max_unjudged * (gain.pairs + gain.unjudged):
            return Verdict(
                False, gains, f"{gain.unjudged} chains of {gain.suite} could not be judged: look at their errors"
            )
    if first.pairs < config.min_chains:
        return Verdict(
            False, gains, f"{first.pairs} chains of {first.suite} are too few, {config.min_chains} are asked for"
        )
    for gain in gains[1:]:
        if gain.difference.high < 0:
            return Verdict(False, gains, f"worse on {gain.suite}: {_spelt(gain)}")
    if first.difference.low > config.min_gain:
        return Verdict(True, gains, f"better on {first.suite}: {_spelt(first)}")
    return Verdict(
        False, gains, f"not surely better on {first.suite}: {_spelt(first)}, over {config.min_gain:g} is asked"
    )


def _gain(champion: EvalReport, challenger: EvalReport) -> Gain:
    if champion.suite != challenger.suite:
        raise Mismatch(f"gate: champion was judged on {champion.suite}, challenger on {challenger.suite}")
    ours, theirs = (_by_chain(report) for report in (champion, challenger))
    if {n: r.tasks for n, r in ours.items()} != {n: r.tasks for n, r in theirs.items()}:
        raise Mismatch(f"gate: {champion.suite}: the two reports are not about the same chains")
    compare(champion, challenger)  # says what differs where they were not judged by one protocol
    judged = [n for n in sorted(ours) if not ours[n].error and not theirs[n].error]
    difference = bootstrap_mean([float(theirs[n].succeeded - ours[n].succeeded) for n in judged])
    return Gain(champion.suite, difference, len(judged), len(ours) - len(judged))


def _by_chain(report: EvalReport) -> dict[int, ChainRecord]:
    return {record.number: record for record in report.records}


def _spelt(gain: Gain) -> str:
    value, low, high = gain.difference
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}] tasks a chain over {gain.pairs} chains"
