"""What the soak calls wrong, on rows as it counts them: a leak of each kind is named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.soak import BUSY, MEMORY_MB_A_NIGHT, WEEK, judge, table

Row = dict[str, Any]
NIGHTS = 4 * WEEK


def nights() -> list[Row]:
    """Four weeks that keep what they should: a week's first night adds as much as the other weeks' do."""
    made = []
    for night in range(NIGHTS):
        week, day = divmod(night, WEEK)
        row = {"night": night, "day": day, "ended": "COMPLETED", "versions": week + 2, "slots": 0, "orphans": 0}
        row |= {"processes": 26, "files": 947 + night % 3, "memory_mb": 1984.5, "scratch": 0, "seconds": 12.5}
        row["memory_by_part"] = dict.fromkeys(MEMORY_MB_A_NIGHT, 400.25 + 0.5 * (night % 5))
        busy = week + 1
        objects = {"datasets": 7 * busy + (day < BUSY), "models": 8 * busy + week // 2, "runs": 20 * busy, "vq": 2}
        made.append({**row, "objects": objects | {"mlflow": 30 * busy}})
    return made


def test_weeks_that_keep_what_they_should_are_right() -> None:
    assert judge(nights()) == []


def grows(name: str, by: float) -> Callable[[Row], Row]:
    return lambda row: row | {name: row[name] + by * row["night"]}


def swells(part: str, by: float) -> Callable[[Row], Row]:
    def change(row: Row) -> Row:
        memory = row["memory_by_part"]
        return row | {"memory_by_part": memory | {part: memory[part] + by * row["night"]}}

    return change


def keeps(prefix: str, number: Callable[[Row], int]) -> Callable[[Row], Row]:
    def change(row: Row) -> Row:
        return row | {"objects": row["objects"] | {prefix: row["objects"].get(prefix, 0) + number(row)}}

    return change


@pytest.mark.parametrize(
    ("leak", "said"),
    [
        (lambda row: row | {"ended": "CRASHED" if row["night"] == 7 else "COMPLETED"}, "night 7: the flow run CRASHED"),
        (lambda row: row | {"slots": int(row["night"] == 9)}, "night 9: 1 slots are still held"),
        (lambda row: row | {"orphans": 3 * (row["night"] == 11)}, "night 11: 3 objects of no version"),
        (lambda row: row | {"versions": 4}, "4 versions are registered, 5 nights had something new"),
        (grows("processes", 0.1), "processes grow by"),
        (grows("files", 1), "files grow by"),
        (grows("scratch", 1), "scratch grow by"),
        (keeps("lost", lambda row: 1), "objects under lost/, which nobody knows"),
        (keeps("runs", lambda row: row["night"] > 14), "night 15: 1 more objects under runs/, 0 may be"),
        (keeps("mlflow", lambda row: 2 * (row["night"] > 23)), "night 24: 2 more objects under mlflow/, 0 may be"),
        (
            keeps("models", lambda row: 5 * (row["night"] >= 3 * WEEK)),
            "night 30: 13 more objects under models/, 10 may be",
        ),
    ],
)
def test_a_leak_of_each_kind_is_named(leak: Callable[[Row], Row], said: str) -> None:
    (wrong,) = judge([leak(row) for row in nights()])
    assert wrong.startswith(said)


@pytest.mark.parametrize("part", MEMORY_MB_A_NIGHT)
def test_a_part_that_grows_by_more_than_its_own_limit_is_named(part: str) -> None:
    """By a tenth of a megabyte more than may be, whatever one night was like. One that is new may not grow at all."""
    limit = MEMORY_MB_A_NIGHT[part]
    rows = [swells(part, limit - 0.1)(row) for row in nights()]
    rows[-5]["memory_by_part"][part] += 4
    assert judge(rows) == []
    rows = [swells(part, limit + 0.1)(row) for row in nights()]
    (wrong,) = judge(rows)
    assert wrong.startswith(f"memory of {part} grows by ") and wrong.endswith(f"{limit} may be")
    assert f"  {part} " in table(rows, [wrong])
    renamed = [row | {"memory_by_part": {"new": 9 + 0.1 * row["night"]}} for row in nights()]
    assert [wrong.partition(" grows")[0] for wrong in judge(renamed)] == ["memory of new"]
