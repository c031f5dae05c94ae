"""What prefect.yaml promises: names, schedules that survive a change of clocks, a queue instead of cancelling."""

from __future__ import annotations

import asyncio
import importlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect.server.schemas.schedules import CronSchedule

ROOT = Path(__file__).parents[2]
SPECIFICATION = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = {deployment["name"]: deployment for deployment in SPECIFICATION["deployments"]}


def flow_of(deployment: dict[str, Any]) -> Any:
    path, _, name = deployment["entrypoint"].partition(":")
    return getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)


def runs(cron: str, zone: str, first: datetime, days: int) -> list[datetime]:
    """When the schedule fires, by Prefect's own arithmetic, in local time."""
    schedule = CronSchedule(cron=cron, timezone=zone)
    dates = asyncio.run(schedule.get_dates(n=10 * days, start=first, end=first + timedelta(days=days)))
    return [date.astimezone(ZoneInfo(zone)) for date in dates]


def test_every_deployment_is_usable_from_the_ui() -> None:
    names = {f"{flow_of(deployment).name}/{name}" for name, deployment in DEPLOYMENTS.items()}
    assert names == {
        "ingest/playtable", "ingest/watch", "mix/default", "pretrain/full", "evaluate/chains", "finetune/nightly",
    }  # fmt: skip
    for deployment in DEPLOYMENTS.values():
        assert len(deployment["description"]) > 20
        accepted = flow_of(deployment).parameters.properties
        assert set(deployment["parameters"]) <= set(accepted)
        assert {"config", "site", "overrides"} <= set(accepted)


def test_a_second_run_waits_and_cancels_nobody() -> None:
    for name in ("full", "nightly", "watch"):
        limit = DEPLOYMENTS[name]["concurrency_limit"]
        assert limit == {"limit": 1, "collision_strategy": "ENQUEUE"}, name


def test_flows_keep_results_as_json() -> None:
    for deployment in DEPLOYMENTS.values():
        flow = flow_of(deployment)
        assert flow.persist_result is True and flow.result_serializer == "json"


@pytest.mark.parametrize(
    ("zone", "change"),
    [
        ("Europe/Berlin", datetime(2026, 3, 29)),
        ("Europe/Berlin", datetime(2026, 10, 25)),
        ("America/New_York", datetime(2026, 3, 8)),
        ("America/New_York", datetime(2026, 11, 1)),
    ],
)
def test_the_nightly_runs_once_a_local_day_when_clocks_change_too(zone: str, change: datetime) -> None:
    (schedule,) = DEPLOYMENTS["nightly"]["schedules"]
    assert schedule["timezone"] == "Europe/Berlin"
    found = runs(schedule["cron"], zone, change.replace(tzinfo=UTC) - timedelta(days=5), 10)
    assert set(Counter(date.date() for date in found).values()) == {1} and len(found) == 10
    assert {(date.hour, date.minute) for date in found} == {(3, 0)}
    assert len({date.utcoffset() for date in found}) == 2  # the change lies within


def test_a_schedule_within_the_changing_hour_would_not_do() -> None:
    """Why it is not at half past two: on one day of the year there is no such time."""
    found = runs("30 2 * * *", "Europe/Berlin", datetime(2026, 3, 27, 12, tzinfo=UTC), 4)
    assert (2, 30) not in {(d.hour, d.minute) for d in found if d.date() == datetime(2026, 3, 29).date()}
