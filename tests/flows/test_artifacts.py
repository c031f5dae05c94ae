"""What Prefect shows of a stage, without a server: `test_prefect.py` publishes it to one."""

from __future__ import annotations

from flows.steps import references


def test_a_stage_shows_its_references_and_an_evaluation_its_intervals() -> None:
    assert references("mix", {"train": "a1", "versions": {"mine": 2}}).splitlines()[2:] == [
        "| what | value |", "|---|---|", '| train | `"a1"` |', '| versions | `{"mine": 2}` |',
    ]  # fmt: skip
    ours = {
        "chains_d/avg_len": {"value": 1.234, "low": 1.0, "high": 1.5},
        "chains_d/sr_1": {"value": 1, "low": 0.5, "high": 1},
    }
    random = {"chains_d/avg_len": {"value": 0.0, "low": 0.0, "high": 0.1}}
    shown = references("evaluate", {"model_id": "m", "scores": {"upvla-tiny": ours, "random": random}})
    assert shown.splitlines()[2:] == [
        "| metric | upvla-tiny | random |",
        "|---|---|---|",
        "| chains_d/avg_len | 1.23 (1.00 to 1.50) | 0.00 (0.00 to 0.10) |",
        "| chains_d/sr_1 | 1.00 (0.50 to 1.00) |  |",
    ]
