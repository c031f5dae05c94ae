"""The champion's alias under a race, a crash and a rollback, on a real MLflow."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from upvla.errors import Mismatch, NotFound, UpvlaError
from upvla.launch.promote import history, promote
from upvla.store import Store, open_store
from upvla.tracking import CHAMPION, Registry, Tracker
from upvla.types import Checkpoint

pytestmark = pytest.mark.seam
NAME = "upvla-race"


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """Versions 1 to 4 of one model; the last was never evaluated."""
    folder = tmp_path_factory.mktemp("mlflow")
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "tests")
    tracker.client.create_experiment("tests", artifact_location=f"{folder}/artifacts")
    made, run_id = Registry(tracker), tracker.run_id("k", "train")
    for number in range(1, 5):
        tags = {"protocol.chains_d": "p"} if number < 4 else {}
        checkpoint = Checkpoint(f"s3://nowhere/{number}", f"model-{number}", number, "run")
        made.register(NAME, checkpoint, run_id, cameras=("static",), metrics={}, tags=tags)
    return tracker


@pytest.fixture
def registry(registered: Tracker) -> Registry:
    """Without a champion."""
    registered.client.delete_registered_model_alias(NAME, CHAMPION)
    return Registry(registered)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def champion(registry: Registry) -> str:
    found = registry.by_alias(NAME, CHAMPION)
    assert found is not None
    return found.version


def test_of_two_who_promote_at_once_one_wins_and_the_other_is_told(registry: Registry, store: Store) -> None:
    promote(store, registry, NAME, "1", expected=None, because="the first")
    start, outcomes = threading.Barrier(2), {}

    def challenge(to: str) -> None:
        start.wait()
        try:
            outcomes[to] = promote(store, registry, NAME, to, expected="1", because=f"better: {to}")["to"]
        except UpvlaError as error:
            outcomes[to] = error

    threads = [threading.Thread(target=challenge, args=(to,)) for to in ("2", "3")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [to for to, outcome in outcomes.items() if outcome == to]
    losers = [outcome for outcome in outcomes.values() if isinstance(outcome, Mismatch)]
    assert len(winners) == len(losers) == 1, outcomes
    assert champion(registry) == winners[0]
    assert [entry["to"] for entry in history(store, NAME)] == ["1", winners[0]]


def test_an_alias_never_points_to_what_was_not_evaluated(registry: Registry, store: Store) -> None:
    promote(store, registry, NAME, "1", expected=None, because="the first")
    with pytest.raises(Mismatch, match=r"version 4 was never evaluated: `upvla evaluate upvla-race@4`"):
        promote(store, registry, NAME, "4", expected="1", because="hope")
    with pytest.raises(NotFound, match="no version 9; versions: 4, 3, 2, 1"):
        promote(store, registry, NAME, "9", expected="1", because="hope")
    with pytest.raises(Mismatch, match="the champion is version 1 by now, 3 was compared with 2"):
        promote(store, registry, NAME, "3", expected="2", because="late")
    assert champion(registry) == "1" and len(history(store, NAME)) == 1


def test_back_and_forth_and_again_is_recorded(registry: Registry, store: Store) -> None:
    for to, was in (("1", None), ("2", "1"), ("1", "2")):
        promote(store, registry, NAME, to, expected=was, because="by hand")
        assert champion(registry) == to
    again = promote(store, registry, NAME, "1", expected="2", because="the flow ran twice")
    assert again["from"] == again["to"] == "1"
    assert [(entry["from"], entry["to"]) for entry in history(store, NAME)] == [(None, "1"), ("1", "2"), ("2", "1")]


def test_a_promotion_whose_writer_died_is_carried_out_by_the_next(registry: Registry, store: Store) -> None:
    promote(store, registry, NAME, "1", expected=None, because="the first")
    entry = {"from": "1", "to": "2", "because": "its writer died before the alias", "at": ""}
    store.create_json(f"registry/{NAME}/promotions/000002.json", entry)
    with pytest.raises(Mismatch, match="the champion is version 2 by now"):
        promote(store, registry, NAME, "3", expected="1", because="compared with 1")
    assert champion(registry) == "2"
    promote(store, registry, NAME, "3", expected="2", because="compared with 2")
    assert [entry["to"] for entry in history(store, NAME)] == ["1", "2", "3"]
