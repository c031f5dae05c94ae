"""The nightly: fine-tune the champion on what has landed since, judge both on the same chains, keep the better."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

from upvla.checkpoint import load_bundle, read_meta
from upvla.config import FinetuneConfig, SiteConfig, fingerprint, load
from upvla.data.table import Dataset, load_manifest
from upvla.errors import NotFound
from upvla.launch import drift as drifting
from upvla.launch import scores as scoring
from upvla.launch.line import Line, Progress, Result
from upvla.launch.promote import promote
from upvla.launch.tokenizers import save_tower, save_vq
from upvla.rollout.gate import Verdict, decide
from upvla.tracking import CHAMPION, Registry
from upvla.types import ModelVersion


def open_finetuning(
    config: str, site: str, overrides: Sequence[str] = (), progress: Progress | None = None
) -> Finetuning:
    """The nightly of `configs/<config>.yaml` on `configs/site/<site>.yaml`."""
    return Finetuning(load(f"site/{site}", SiteConfig), load(config, FinetuneConfig, overrides), progress)


class Finetuning(Line):
    """Stages of one nightly; `Line` has the ones that it shares with pre-training."""

    config: FinetuneConfig

    def __init__(self, site: SiteConfig, config: FinetuneConfig, progress: Progress | None = None) -> None:
        super().__init__(site, config, config.model_name, progress)

    def champion(self) -> Result:
        """The registered champion, and how many of the mixture's recordings are news: neither it nor the newest
        challenger that was judged against it, under this very configuration, was trained with them.

        Raises `NotFound` where there is no champion yet.
        """
        version = Registry(self.logbook.tracker).by_alias(self.model_name, CHAMPION)
        if version is None:
            raise NotFound(f"{self.model_name} has no champion to fine-tune: run `pretrain/full` first")
        bundle = load_bundle(version.checkpoint.url)
        seen, new = {version.version: bundle.meta["datasets"]}, 0
        if judged := self._judged_against(version.version):
            seen[judged.version] = read_meta(judged.checkpoint.url)["datasets"]
        for name, pinned in {source.dataset: source.version for source in self.config.mixture.sources}.items():
            now = self._recordings(name, pinned)
            for trained in seen.values():
                with suppress(NotFound):  # `upvla data gc` let it go: nobody knows any more what was in it
                    now -= self._recordings(name, trained[name]["version"]) if name in trained else set()
            new += len(now)
        return {
            "version": version.version,
            "url": version.checkpoint.url,
            "model_id": version.checkpoint.model_id,
            "vq_id": save_vq(self.store, bundle.vq),
            "tower_id": save_tower(self.store, bundle.model.vision) if bundle.config.vision.cacheable else "",
            "new_recordings": new,
            "since": list(seen),
        }

    def _judged_against(self, champion: str) -> ModelVersion | None:
        """The newest version that the gate of this configuration has judged against `champion`, whatever it said."""
        asked = {"gate.champion": champion, "gate.config": fingerprint(self.config)}
        versions: list[ModelVersion] = Registry(self.logbook.tracker).versions(self.model_name)
        return next((version for version in versions if asked.items() <= version.tags.items()), None)

    def _recordings(self, dataset: str, version: int | str | None) -> set[str]:
        return {row.id for row in Dataset(self.store, load_manifest(self.store, dataset, version)).episodes}

    def is_due(self, champion: Result) -> bool:
        return bool(champion["new_recordings"] >= self.config.min_new_recordings)

    def skip(self, champion: Result) -> Result:
        """Record that there was nothing to do: a night without new recordings is an answer, not a gap.

        `since` are the versions that were trained with all there is: the champion, and who was judged against it.
        """
        key = f"skip/{champion['model_id']}/{time.strftime('%Y-%m-%d')}"
        tags = {"since": ", ".join(champion["since"])}
        with self.logbook.run(key, f"{self.config.name} (skipped)", tags=tags) as run:
            run.log({"nightly/new_recordings": champion["new_recordings"], "nightly/skipped": 1.0}, 0)
        told = {"new_recordings": champion["new_recordings"], "since": champion["since"]}
        return {"skipped": True, **told, "champion": champion["version"]}

    def drift(self, plan: Result, champion: Result) -> Result:
        """How far the data of `plan` lies from the champion's statistics, which the fine-tuned model keeps."""
        began, parent = time.monotonic(), load_bundle(champion["url"])
        found: list[drifting.Drift] = []
        for name, version in plan["versions"].items():
            found += drifting.drift(parent.stats, Dataset(self.store, load_manifest(self.store, name, version)).stats)
        found.sort(key=lambda one: one.size, reverse=True)
        report: Result = {"metrics": drifting.as_metrics(found), "worst": [one._asdict() for one in found[:10]]}
        with self.logbook.pipeline() as run:
            run.log(report["metrics"], sum(plan["versions"].values()))  # grows with every night that has news
            run.record(report, f"drift-from-v{champion['version']}.json")
        return report | {"seconds": round(time.monotonic() - began, 3)}

    def train(self, plan: Result, champion: Result) -> Result:
        """`stage.steps` more steps from the champion's weights, with its statistics and tokenizers."""
        parent = {"parent_url": champion["url"], "parent_id": champion["model_id"]}
        described = self.describe(plan, champion)
        return self._train(
            self._spec(
                "policy", self.config.stage, plan, description_id=described, tower_id=self.tower_id(champion), **parent
            )
        )

    def promote(self, model: Result, champion: Result, scored: Result) -> Result:
        """Register the challenger; it becomes champion if the gate of the configuration says so."""
        verdict = self.compare(champion["url"], model["url"])
        registered = self.register(model, scored)
        registry, to, was = Registry(self.logbook.tracker), registered["version"], champion["version"]
        if verdict.promote:
            promote(self.store, registry, self.model_name, to, expected=was, because=verdict.because)
        # last: who is killed before it judges again, and a version that a person takes back is not promoted twice
        about = {"gate": verdict.because, "gate.champion": was, "gate.config": fingerprint(self.config)}
        registry.tag(self.model_name, to, about)
        with self.logbook.pipeline() as run:
            run.record(verdict.to_json(), f"gate-v{registered['version']}.json")
        return {**registered, "promoted": verdict.promote, "against": champion["version"], **verdict.to_json()}

    def roll_to(self, version: str, because: str) -> Result:
        """Make an evaluated version champion by hand, forward or back; recorded like any promotion."""
        registry = Registry(self.logbook.tracker)
        champion = registry.by_alias(self.model_name)
        was = champion.version if champion else None
        return {"name": self.model_name} | promote(
            self.store, registry, self.model_name, version, expected=was, because=because
        )

    def compare(self, champion_url: str, challenger_url: str) -> Verdict:
        """Both on every suite of the configuration, chain by chain; what was judged before is not judged again."""
        both = (champion_url, challenger_url)
        judged = [scoring.judge(self.store, self.exam(suite), both) for suite in self.config.eval.suites]
        champion, challenger = ([of_suite[url].report for of_suite in judged] for url in both)
        return decide(champion, challenger, self.config.gate)
