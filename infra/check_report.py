"""Exit with 1 when a demo's report is incomplete or nothing was learnt, saying what: `check_report.py report.json`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OBJECTIVES = ("pre", "act", "mmu", "vq")
SECTIONS = ("stage_seconds", "losses", "scores", "versions", "addresses")


def problems(report: dict[str, Any]) -> Iterator[str]:
    absent = [section for section in SECTIONS if not report.get(section)]
    if absent:
        yield f"no {', '.join(absent)}"
        return
    for stage, seconds in report["stage_seconds"].items():
        if not (_is_number(seconds) and seconds >= 0):
            yield f"stage_seconds.{stage} is {seconds!r}"
    for objective in OBJECTIVES:
        loss = report["losses"].get(objective, {})
        first, last = loss.get("first"), loss.get("last")
        if not (_is_number(first) and _is_number(last) and last < first):
            yield f"losses.{objective} did not fall: first {first!r}, last {last!r}"
    if len(report["scores"]) < 3:
        yield f"scores has only {', '.join(report['scores'])}: the policy, a random and a do-nothing one are wanted"
    for policy, metrics in report["scores"].items():
        for metric, score in metrics.items():
            low, value, high = (score.get(key) for key in ("low", "value", "high"))
            if not (_is_number(low) and _is_number(value) and _is_number(high) and low <= value <= high):
                yield f"scores.{policy}.{metric}: the interval [{low!r}, {high!r}] does not hold {value!r}"
        if not metrics:
            yield f"scores.{policy} is empty"
    for name, address in report["addresses"].items():
        if not str(address).startswith(("http://", "https://")):
            yield f"addresses.{name} is {address!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def main(path: str) -> int:
    found = list(problems(json.loads(Path(path).read_text())))
    for problem in found:
        print(f"check_report: {path}: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
