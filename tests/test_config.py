"""Every file under configs/ loads, overrides reach their key, mistakes are answered with the nearest right thing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from upvla.config import FinetuneConfig, RunConfig, SiteConfig, configs_root, fingerprint, load
from upvla.errors import ConfigError
from upvla.train.config import EngineConfig, world_sizes

KINDS: dict[str, type[BaseModel]] = {
    "pretrain": RunConfig,
    "ablation": RunConfig,
    "finetune": FinetuneConfig,
    "site": SiteConfig,
}
WHOLE = sorted(
    str(p.relative_to(configs_root()).with_suffix("")) for kind in KINDS for p in configs_root().glob(f"{kind}/*.yaml")
)


@pytest.mark.parametrize("name", WHOLE)
def test_every_config_loads_and_is_called_what_its_file_is_called(name: str) -> None:
    config = load(name, KINDS[name.split("/")[0]])
    if not isinstance(config, SiteConfig):
        assert config.name == name  # type: ignore[attr-defined]


def test_every_section_file_is_included_by_a_config() -> None:
    sections = {
        str(p.relative_to(configs_root()).with_suffix(""))
        for p in configs_root().rglob("*.yaml")
        if p.parent.name not in KINDS
    }
    included = set()
    for name in WHOLE:
        included |= set(
            (yaml.safe_load((configs_root() / f"{name}.yaml").read_text()) or {}).get("include", {}).values()
        )
    assert sections == included


def test_an_override_reaches_its_key_and_changes_the_fingerprint() -> None:
    plain = load("pretrain/full", RunConfig)
    changed = load("pretrain/full", RunConfig, ["stage1.steps=77", "model.backbone.blocks=3"])
    assert (changed.stage1.steps, changed.model.backbone.blocks) == (77, 3)
    assert changed.stage2 == plain.stage2
    assert fingerprint(plain) == fingerprint(load("pretrain/full", RunConfig)) != fingerprint(changed)


def test_an_ablation_differs_from_the_full_run_in_its_switch_only() -> None:
    full = load("pretrain/full", RunConfig).model_dump()
    switches = {
        "no_mmu": {"mixture", "stage1", "stage2"},
        "no_prediction": {"stage1", "stage2"},
        "no_stage1": {"stage1"},
        "no_prompt": {"model"},
        "described_prompt": {"model"},
        "other_backbone": {"model"},
    }
    assert {f"ablation/{name}" for name in switches} == {name for name in WHOLE if name.startswith("ablation/")}
    for name, sections in switches.items():
        found = load(f"ablation/{name}", RunConfig).model_dump()
        assert {key for key in full if found[key] != full[key]} == {"name", *sections}
    for name, absent in {"no_mmu": "mmu", "no_prediction": "pre"}.items():
        weights = load(f"ablation/{name}", RunConfig).stage2.weights
        assert weights == full["stage2"]["weights"] | {absent: 0.0}


def test_a_base_is_merged_under_its_heir() -> None:
    full, ci = load("pretrain/full", RunConfig), load("pretrain/ci", RunConfig)
    assert ci.stage2.steps < full.stage2.steps
    assert ci.stage2.optimizer.lr == full.stage2.optimizer.lr


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stage1.stesp=3", r"unknown key 'stage1.stesp' in configs/pretrain/full.yaml; did you mean 'stage1.steps'\?"),
        ("stage1.steps=none", r"'stage1.steps' in configs/pretrain/full.yaml: .*got 'none'"),
        ("stage1.steps", "write it as key.path=value"),
        ("name.x=1", "'name' is a value, not a section"),
        ("engine.zero_stage=4", "engine.zero_stage"),
    ],
)
def test_a_wrong_override_is_answered_with_key_file_and_way_out(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load("pretrain/full", RunConfig, [override])


def test_a_config_that_does_not_exist_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no config 'pretrain/ful'.*did you mean 'pretrain/full'\?"):
        load("pretrain/ful", RunConfig)


def test_broken_yaml_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1")
    monkeypatch.setenv("UPVLA_CONFIGS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"bad.yaml: not valid YAML"):
        load("bad", RunConfig)


def test_addresses_and_workers_take_no_part_in_what_a_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(load("pretrain/full", RunConfig))
    monkeypatch.setenv("UPVLA_STORE_URL", "s3://elsewhere")
    assert load("site/local", SiteConfig).store_url == "s3://elsewhere"
    assert fingerprint(load("pretrain/full", RunConfig)) == before


def test_every_shipped_site_can_train_what_is_trained_there() -> None:
    """A cluster's eight workers have four rows of a global batch of 32 each, whatever `micro_batch` allows."""
    runs = [load("pretrain/full", RunConfig), load("finetune/nightly", FinetuneConfig)]
    for name in sorted(path.stem for path in (configs_root() / "site").glob("*.yaml")):
        engine = EngineConfig(num_workers=load(f"site/{name}", SiteConfig).num_workers)
        for run in runs:
            batch = run.mixture.global_batch
            sizes = world_sizes(batch, run.mixture.lanes or math.gcd(batch, 64), engine)
            assert sizes[-1] == engine.worker_range[1], name
