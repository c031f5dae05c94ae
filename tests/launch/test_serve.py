"""Serving by name, and evaluating what is served, on the playtable."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.rollout.test_policy import make_bundle
from tests.rollout.test_server import TOKEN, TOKEN_VARIABLE, Counting, always, running
from upvla.checkpoint import export
from upvla.errors import Mismatch, NoAnswer
from upvla.launch.serve import evaluate_served, loader, server_token
from upvla.rollout.benchmarks import line_suite
from upvla.rollout.evaluate import EvalConfig, scores, summarise
from upvla.rollout.judge import SuiteJudge
from upvla.store import open_store
from upvla.types import Checkpoint, ModelVersion

SUITE: dict[str, Any] = {"name": "mine", "kind": "tasks", "scenes": ["D"], "tasks": ["open_drawer", "turn_on_led"]}
EVAL = EvalConfig.model_validate({"suites": [SUITE | {"num": 2}], "max_steps": 20})


def test_a_served_checkpoint_scores_as_it_does_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    url = export(open_store(str(tmp_path)), "one", make_bundle(chunk=10, text_budget=60)).url
    with running(loader(lambda: url)) as found:
        served = evaluate_served(found.url, EVAL)
    suite = line_suite(EVAL, EVAL.suites[0])
    records = SuiteJudge(suite, url, EVAL.control)(list(enumerate(suite.chains(2))))
    assert len(records) == 4 and not any(record.error for record in records)
    here = scores(summarise("", suite.name, {}, {}, records))
    assert served["scores"] == {name: estimate._asdict() for name, estimate in here.items()}
    assert served["protocols"].keys() == {"mine"}


def test_what_was_not_answered_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    slow = Counting(0.5, wait_s=0.5, chunk=10)
    with running(always(slow), deadline_ms=100) as found, pytest.raises(NoAnswer, match="4 of 4 chains of mine"):
        evaluate_served(found.url, EVAL)


def test_a_version_is_served_only_if_its_checkpoint_is_the_registered_one(tmp_path: Path) -> None:
    made = export(open_store(str(tmp_path)), "one", make_bundle())
    version = ModelVersion("upvla-test", "3", "champion", made, {})
    load = loader(lambda: version)
    served = load("")
    assert served is not None and (served.model_id, served.version) == (made.model_id, "3")
    assert load(made.model_id) is None  # nothing new
    other = ModelVersion("upvla-test", "4", "champion", Checkpoint(made.url, "another", 1, ""), {})
    with pytest.raises(Mismatch, match="registered as another"):
        loader(lambda: other)("")


def test_a_version_that_cannot_be_loaded_is_tried_later_and_later_and_another_one_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, now, tried = open_store(str(tmp_path)), [0.0], list[str]()
    good, bad, worse = (
        ModelVersion("m", name, "champion", Checkpoint(f"{store.url}/{name}", name, 1, ""), {})
        for name in ("good", "bad", "worse")
    )

    def opened(url: str, model_id: str, version: str) -> Any:
        tried.append(model_id)
        if model_id != "good":
            raise Mismatch("its golden observation is answered otherwise")
        return model_id

    monkeypatch.setattr("upvla.launch.serve._opened", opened)
    monkeypatch.setattr(
        "upvla.launch.serve.read_marker", lambda place: SimpleNamespace(model_id=place.url.rpartition("/")[2])
    )
    monkeypatch.setattr("upvla.launch.serve.time", SimpleNamespace(monotonic=lambda: now[0]))
    named = [good]
    load = loader(lambda: named[0])
    assert load("") == "good"

    def watched(seconds: int) -> list[str]:
        tried.clear()
        for _ in range(0, seconds, 5):  # as the server asks
            now[0] += 5
            with suppress(Mismatch):
                assert load("good") is None
        return list(tried)

    named[0] = bad
    assert watched(600) == ["bad"] * 6  # after 5, 15, 35, 75, 155 and 315 s
    assert watched(3600) == ["bad"] * 12, "every five minutes"
    named[0] = worse
    assert watched(10) == ["worse"]
    named[0] = good
    assert watched(10) == []
    named[0] = bad
    assert watched(10) == ["bad"], "somebody has put the alias there again"


def test_a_token_is_made_once_and_belongs_to_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    token, source = server_token(tmp_path)
    assert len(token) > 30 and server_token(tmp_path) == (token, source)
    assert [path.name for path in (tmp_path / "secrets").iterdir()] == ["policy_token"]
    assert oct(Path(source).stat().st_mode)[-3:] == "600"
    monkeypatch.setenv(TOKEN_VARIABLE, "given")
    assert server_token(tmp_path) == ("given", f"${TOKEN_VARIABLE}")
