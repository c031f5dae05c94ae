"""What errors may say, and what is written down: never a password, whatever URL they are about."""

from __future__ import annotations

import os
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
from upvla.config import RunConfig, SiteConfig, load
from upvla.errors import BadEpisode, ConfigError, JobFailed, NotFound, StackError, UpvlaError, shown
from upvla.launch.journal import Journal
from upvla.launch.train import TrainSpec, run_training
from upvla.store import open_store
from upvla.tracking import Registry
from upvla.tracking.runs import translated
from upvla.types import Checkpoint

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


def spec_of(folder: Path, **more: Any) -> TrainSpec:
    config = load("pretrain/ci", RunConfig)
    about = {"train_plan": "a", "validation_plan": "b", "weights_urls": ("https://c/w",), "weights_ids": ("0123",)}
    given = {"store_url": str(folder), "stage": config.stage2, "engine": config.engine, **about}
    return TrainSpec(kind="policy", tracking={"uri": URL, "experiment": "t"}, **(given | more))


def test_runs_have_params_without_urls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[dict[str, Any]] = []
    fake = SimpleNamespace(start=lambda key, name, **about: started.append(about))
    monkeypatch.setattr(tracking, "Tracker", lambda uri, experiment: fake)
    mixture: Any = None
    Journal(spec_of(tmp_path), 0, 0.0, mixture)
    (params,) = (each["params"] for each in started)
    assert SECRET not in str(params) and "https://c" not in str(params) and params["weights_ids"] == ["0123"]


def test_what_travels_to_a_job_holds_no_login(tmp_path: Path) -> None:
    """Neither its spec, which lies on the store, nor its environment, which Ray's list of jobs shows."""
    told: list[Any] = []
    fake: Any = SimpleNamespace(run=lambda key, entrypoint, **about: told.extend((key, entrypoint, about)))
    spec = spec_of(tmp_path)
    with pytest.raises(JobFailed, match="left no result"):
        run_training(open_store(str(tmp_path)), spec, fake)
    (written,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET not in written.read_text() + str(told)
    assert TrainSpec.model_validate_json(written.read_bytes()) == spec
    assert spec.tracking is not None and spec.tracking.uri == shown(URL)


@pytest.mark.parametrize("given", [{"store_url": URL}, {"parent_url": f"{URL}/p"}, {"weights_urls": (URL,)}])
def test_a_spec_with_a_login_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"stage2: https://weights\.example\.org.* holds a login.*AWS_ACCESS_KEY_ID"):
        spec_of(tmp_path, **given)


def test_addresses_and_weights_with_a_login_are_refused_where_they_are_written_down() -> None:
    for site in ({"store_url": f"s3://key:{SECRET}@upvla"}, {"tracking_url": f"postgresql://u:{SECRET}@h/mlflow"}):
        with pytest.raises(ConfigError, match=r"holds a.* login"):
            SiteConfig.model_validate(site)
    assert SiteConfig(tracking_url=URL).tracking_url == URL
    for name in ("init.vq", "init.text"):
        with pytest.raises(ConfigError, match=r"init: https://weights\.example\.org holds a login"):
            load("pretrain/ci", RunConfig, [f"{name}={URL}"])
    model = Checkpoint(url=f"{URL}/m", model_id="0", step=1, run="r")
    tracker: Any = SimpleNamespace(uri="", client=None)
    with pytest.raises(ConfigError, match=r"checkpoint https://weights\.example\.org/m holds a login"):
        Registry(tracker).log_model("m", model, "r", metrics={}, tags={})


def test_the_login_of_an_mlflow_goes_where_its_client_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    user, password = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
    plain = "https://weights.example.org"
    for uri, environment, expected in (
        (URL, {}, ("robot", SECRET)),
        (plain, {"MLFLOW_TRACKING_URI": f"{URL}/"}, ("robot", SECRET)),  # a driver, whose spec has no login
        (URL, {user: "robot", password: SECRET}, ("robot", SECRET)),
        (plain, {user: "ann", password: "hers"}, ("ann", "hers")),
        (plain, {"MLFLOW_TRACKING_URI": f"http://a:{SECRET}@elsewhere"}, (None, None)),
    ):
        with monkeypatch.context() as patched:
            for name in (user, password, "MLFLOW_TRACKING_URI"):
                patched.setenv(name, "")  # so that what is set below is undone
                patched.delenv(name)
            for name, value in environment.items():
                patched.setenv(name, value)
            assert tracking.Tracker(uri, "t").uri == plain
            assert (os.environ.get(user), os.environ.get(password)) == expected
    monkeypatch.setenv(user, "ann")
    with pytest.raises(ConfigError, match="another login than MLFLOW_TRACKING_USERNAME"):
        tracking.Tracker(URL, "t")
    assert os.environ[user] == "ann"


def kinds_of(kind: type[UpvlaError]) -> set[type[UpvlaError]]:
    return {kind, *(found for each in kind.__subclasses__() for found in kinds_of(each))}


def test_the_runbook_has_a_paragraph_for_every_code() -> None:
    runbook = (ROOT / "docs/operations.md").read_text().partition("## Runbook")[2]
    titles = " ".join(re.findall(r"^\*\*.*?\*\*", runbook, re.MULTILINE | re.DOTALL))
    codes = {kind.code for kind in kinds_of(UpvlaError) if kind.__module__ == "upvla.errors"} - {UpvlaError.code}
    assert len(codes) > 12 and {code for code in codes if f"`{code}`" not in titles} == set()
