"""What errors may say: never a password, whatever URL they are about."""

from __future__ import annotations

import pickle
import re
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from requests import ConnectionError

from upvla import tracking
from upvla.config import RunConfig, load
from upvla.errors import BadEpisode, NotFound, StackError, UpvlaError, shown
from upvla.launch.journal import Journal
from upvla.launch.train import TrainSpec
from upvla.store import open_store
from upvla.tracking.runs import translated

ROOT = Path(__file__).parents[1]
SECRET = "canary-51d2e84b67"
URL = f"https://robot:{SECRET}@weights.example.org"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{URL}/a@b.json", "https://weights.example.org/a@b.json"),
        (f"{URL}: no", "https://weights.example.org: no"),
        (f"postgresql://u:{SECRET}@h:1/d and {URL}", "postgresql://h:1/d and https://weights.example.org"),
        (f"http://u:{SECRET}@x@h/", "http://h/"),
        ("s3://upvla/models and mail me@example.org", "s3://upvla/models and mail me@example.org"),
        ("models:/upvla-tiny@champion", "models:/upvla-tiny@champion"),
        ('["file://a", "b@c"]', '["file://a", "b@c"]'),
    ],
)
def test_a_login_is_all_that_a_shown_url_lacks(text: str, expected: str) -> None:
    assert shown(text) == expected


def test_no_error_keeps_a_password() -> None:
    for error in (UpvlaError(f"{URL} is away"), BadEpisode("schema", f"{URL}: x"), NotFound(URL)):
        again = pickle.loads(pickle.dumps(error))
        assert SECRET not in f"{error} {error!r} {again} {again.__dict__}"
    assert BadEpisode("schema", f"{URL}: x").detail == "https://weights.example.org: x"


def test_an_mlflow_that_is_away_is_named_without_its_password() -> None:
    with (
        pytest.raises(StackError, match=r"MLflow at https://weights\.example\.org: .*is it up") as told,
        translated(URL),
    ):
        raise MlflowException(f"API request to {URL}/api failed")
    assert SECRET not in "".join(traceback.format_exception(told.value))
    with pytest.raises(StackError, match="object store up") as told, translated(URL):
        raise ConnectionError(f"{URL}/artifacts")
    assert SECRET not in "".join(traceback.format_exception(told.value))
    with pytest.raises(StackError) as told, translated("http://mlflow:5000"):
        raise MlflowException("no route")
    assert isinstance(told.value.__cause__, MlflowException)


def test_a_store_is_named_without_its_password() -> None:
    store = open_store(f"memory://robot:{SECRET}@x/folder")
    with pytest.raises(NotFound) as told:
        store.read("nothing")
    assert SECRET not in "".join(traceback.format_exception(told.value)) + repr(store)


def test_runs_have_params_without_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[dict[str, Any]] = []
    fake = SimpleNamespace(start=lambda key, name, **about: started.append(about))
    monkeypatch.setattr(tracking, "Tracker", lambda uri, experiment: fake)
    config = load("pretrain/ci", RunConfig)
    about = {"train_plan": "a", "validation_plan": "b", "weights_urls": (f"{URL}/w",), "parent_url": f"{URL}/p"}
    spec = TrainSpec(
        kind="policy", store_url=str(tmp_path), stage=config.stage2, engine=config.engine, weights_ids=("0123",),
        tracking={"uri": URL, "experiment": "t", "tags": {}}, **about,
    )  # fmt: skip
    mixture: Any = None
    Journal(spec, 0, 0.0, mixture)
    (params,) = (each["params"] for each in started)
    assert SECRET not in str(params) and params["weights_ids"] == ["0123"]


def kinds_of(kind: type[UpvlaError]) -> set[type[UpvlaError]]:
    return {kind, *(found for each in kind.__subclasses__() for found in kinds_of(each))}


def test_the_runbook_has_a_paragraph_for_every_code() -> None:
    runbook = (ROOT / "docs/operations.md").read_text().partition("## Runbook")[2]
    titles = " ".join(re.findall(r"^\*\*.*?\*\*", runbook, re.MULTILINE | re.DOTALL))
    codes = {kind.code for kind in kinds_of(UpvlaError) if kind.__module__ == "upvla.errors"} - {UpvlaError.code}
    assert len(codes) > 12 and {code for code in codes if f"`{code}`" not in titles} == set()
