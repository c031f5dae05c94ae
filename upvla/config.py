"""Configuration: composition of the rooms' own configs, loading with overrides, and fingerprints.

YAML holds values, never behaviour. A file may name one `base:` (merged under it) and `include:` other files as
sections; overrides are `a.b.c=value`. A key that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from upvla.data.ingest import IngestConfig
from upvla.data.mixture import MixtureConfig
from upvla.errors import ConfigError, require_no_login, shown
from upvla.model.config import ModelConfig, merge
from upvla.rollout.evaluate import EvalConfig, Layout
from upvla.rollout.gate import GateConfig
from upvla.sim.playtable.recorder import CollectConfig
from upvla.store import content_hash
from upvla.train.config import EngineConfig, StageConfig

_Config = TypeVar("_Config", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _from_environment(name: str, default: str = "") -> Any:
    return Field(default_factory=lambda: os.environ.get(name) or default, validate_default=True)


class SiteConfig(Section):
    """Where things are and how many workers there are: all that differs between a laptop and a cluster.

    An address that a site file leaves out is read from the environment, which `upvla up` fills for the local stack.
    Nothing here takes part in a fingerprint.
    """

    home: Path = _from_environment("UPVLA_HOME", ".upvla")
    store_url: str = _from_environment("UPVLA_STORE_URL")
    tracking_url: str = _from_environment("MLFLOW_TRACKING_URI")
    pages_url: str = _from_environment("UPVLA_PAGES_URL")  # MLflow's for browsers, where it is not `tracking_url`
    ray_jobs_url: str = _from_environment("UPVLA_RAY_JOBS_URL")
    experiment: str = "upvla"
    num_workers: int | tuple[int, int] = Field(
        2, description="of training, judging and whatever else runs side by side; [least, most] for elastic training"
    )
    use_gpu: bool = False
    rollout: Layout = Layout()
    stack: Mapping[str, Any] | None = Field(
        default=None, description="the local stack's own settings, read by `upvla.stack`"
    )

    @field_validator("store_url")
    @classmethod
    def _store_without_login(cls, url: str) -> str:
        require_no_login("store_url", url)
        return url

    @field_validator("tracking_url")
    @classmethod
    def _tracking_login_that_can_be_split_off(cls, url: str) -> str:
        if shown(url) != url and not url.startswith(("http://", "https://")):
            raise ConfigError(
                f"tracking_url {url} holds a database's login, which Ray's workers would have to be sent: start an "
                "`mlflow server` on that database and give its address"
            )
        return url

    @property
    def most_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def raw_folder(self) -> Path:
        """Raw recordings lie here, on the machine that records."""
        return self.home.expanduser().resolve() / "raw"


class DataConfig(Section):
    """Where episodes come from and how they become a dataset."""

    collect: CollectConfig
    ingest: IngestConfig


class LineConfig(Section):
    """What every line that ends in a registered model has: samples, an engine, a protocol to be judged by."""

    name: str
    mixture: MixtureConfig
    engine: EngineConfig
    eval: EvalConfig


class InitConfig(Section):
    """What a run starts from instead of random weights: URLs written by `upvla weights import`."""

    weights: tuple[str, ...] = Field(
        default=(), description="kinds showo, upvla, phi, clip, in this order into the fresh policy"
    )
    vq: str = Field(default="", description="kind magvit: no image tokenizer is trained")
    text: str = Field(
        default="", description="URL of a tokenizer.json that comes with the weights: no text tokenizer is trained"
    )

    @model_validator(mode="after")
    def _without_login(self) -> Self:
        require_no_login("init:", *self.weights, self.vq, self.text)
        return self


class RunConfig(LineConfig):
    """One pre-training run, from recordings to a registered policy. Without `stage1` the action stage starts afresh."""

    data: DataConfig
    model: ModelConfig
    init: InitConfig = InitConfig()
    vq: StageConfig
    stage1: StageConfig | None
    stage2: StageConfig

    @property
    def model_name(self) -> str:
        """Name in the model registry."""
        return f"upvla-{self.model.preset}"


class FinetuneConfig(LineConfig):
    """One nightly: fine-tune the champion on what has landed since it was trained; keep it only if it is better."""

    model_name: str
    stage: StageConfig
    min_new_recordings: int = Field(default=1, gt=0)
    gate: GateConfig = GateConfig()


def configs_root() -> Path:
    return Path(os.environ.get("UPVLA_CONFIGS", Path(__file__).parent.parent / "configs"))


def load(name: str, kind: type[_Config], overrides: Sequence[str] = ()) -> _Config:
    """`load("pretrain/full", RunConfig, ["stage1.steps=10"])`. Raises `ConfigError` naming file, key and next move."""
    values = assignments(overrides, _read(name))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explained(error, kind, f"configs/{name}.yaml")) from error


def assignments(overrides: Sequence[str], values: dict[str, Any] | None = None) -> dict[str, Any]:
    """`["a.b=1"]` -> `{"a": {"b": 1}}`, on top of `values`. Raises `ConfigError` for what is not `key.path=value`."""
    values = {} if values is None else values
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"override {override!r}: write it as key.path=value")
        try:
            _assign(values, key.strip().split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            said = " ".join(str(error).split())
            raise ConfigError(f"override {override!r}: the value is not valid YAML ({said}); quote it") from error
    return values


def fingerprint(config: BaseModel) -> str:
    """Short hash over the logical values: equal configs give equal keys on every site."""
    return content_hash(config.model_dump(mode="json"))


def _read(name: str, depth: int = 0) -> dict[str, Any]:
    path = configs_root() / f"{name}.yaml"
    if not path.is_file():
        known = [str(p.relative_to(configs_root()).with_suffix("")) for p in configs_root().rglob("*.yaml")]
        raise ConfigError(f"no config {name!r} under {configs_root()}{_nearest(name, known)}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    base, include = values.pop("base", None), values.pop("include", {})
    sections = {key: _read(file, depth + 1) for key, file in include.items()}
    if base is not None:
        if depth > 1:
            raise ConfigError(f"{path}: only one level of `base:` is allowed")
        sections = merge(_read(base, depth + 1), sections)
    return merge(sections, values)


def _assign(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {'.'.join(path)}: {key!r} is a value, not a section")
    values[path[-1]] = value


def explained(error: ValidationError, kind: type[BaseModel], file: str) -> str:
    """What is wrong with the values of a `kind` that were given in `file`, with the nearest key for an unknown one."""
    lines = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        key = ".".join(where)
        if problem["type"] == "extra_forbidden":
            known = _fields_at(kind, where[:-1])
            lines.append(f"unknown key {key!r} in {file}{_nearest(where[-1], known, prefix=where[:-1])}")
        elif problem["type"] == "missing":
            lines.append(f"missing key {key!r} in {file}")
        else:
            lines.append(f"{key!r} in {file}: {problem['msg']} (got {problem['input']!r})")
    return "; ".join(lines)


def _fields_at(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        if part.isdigit():
            continue
        info = kind.model_fields.get(part)
        inner = [a for a in (info.annotation, *getattr(info.annotation, "__args__", ())) if info] if info else []
        nested = [a for a in inner if isinstance(a, type) and issubclass(a, BaseModel)]
        if not nested:
            return []
        kind = nested[0]
    return list(kind.model_fields)


def _nearest(word: str, known: Sequence[str], prefix: Sequence[str] = ()) -> str:
    close = difflib.get_close_matches(word, known, 1, 0.5)
    return f"; did you mean {'.'.join([*prefix, close[0]])!r}?" if close else f"; known: {', '.join(sorted(known))}"
