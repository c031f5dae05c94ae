"""The line: from a robot's recordings to a registered policy, one method a stage.

Every stage is `once(store, stage, key, work)`: its key is made from content, its result is a small JSON of references,
so a finished stage is a no-op and a killed one goes on where it was. The CLI calls these methods directly; the Prefect
flows wrap the same methods in tasks. There is no other implementation of a stage.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from upvla.checkpoint import load_bundle, read_marker
from upvla.config import RunConfig, SiteConfig, fingerprint, load
from upvla.data.mixture import plan_from_json
from upvla.data.table import Dataset, load_manifest
from upvla.errors import ConfigError, NotFound
from upvla.launch import scores as scoring
from upvla.launch.encode import encode_dataset
from upvla.launch.ingest import run_ingest
from upvla.launch.jobs import Jobs
from upvla.launch.steps import once
from upvla.launch.tokenizers import save_text
from upvla.launch.train import TrackingSpec, TrainSpec, run_training, share_done
from upvla.model.text import TextTokenizer
from upvla.rollout.evaluate import as_metrics, scores
from upvla.sim.playtable import tasks
from upvla.sim.playtable.recorder import collect
from upvla.store import Store, content_hash, open_store
from upvla.tracking import CHAMPION, Registry, Tracker
from upvla.train.config import EngineConfig, StageConfig
from upvla.types import Checkpoint, Estimate, ModelVersion

Result = dict[str, Any]
Progress = Callable[[float, str], None]
"""(share done in 0..1, what is being done)"""


def open_line(config: str, site: str, overrides: Sequence[str] = (), progress: Progress | None = None) -> Line:
    """The line of `configs/<config>.yaml` on `configs/site/<site>.yaml`."""
    return Line(load(f"site/{site}", SiteConfig), load(config, RunConfig, overrides), progress)


class Line:
    """One run configuration on one site. Methods return references (JSON); `seconds` is what the stage itself took."""

    def __init__(self, site: SiteConfig, run: RunConfig, progress: Progress | None = None) -> None:
        if not site.store_url:
            raise ConfigError("no object store: run `upvla up`, or set `store_url` in the site file")
        self.site, self.run = site, run
        self.store: Store = open_store(site.store_url)
        self.progress: Progress = progress or (lambda share, text: None)
        self.tracker = Tracker(site.tracking_url, site.experiment)

    # ------------------------------------------------------------------------------------------------------- data

    def collect(self) -> Result:
        """Scripted experts -> recordings in CALVIN's raw layout, in a folder of their own under the site's raw folder."""
        config = self.run.data.collect
        folder = self.site.raw_folder / f"{self.run.data.ingest.dataset}-{config.fingerprint()}"

        def work() -> Result:
            summary = collect(config, folder, progress=self._counting("recordings"))
            return {"source_url": str(folder), "recordings": summary["recordings"], "frames": summary["frames"]}

        if not folder.exists():  # raw recordings lie on this machine, not on the store: the record alone is not enough
            return work()
        return once(self.store, "collect", {"config": config.fingerprint(), "folder": str(folder)}, work)

    def ingest(self, source_url: str) -> Result:
        """Recordings -> a version of the dataset. What is new there becomes its next version; nothing new, no work."""
        config = self.run.data.ingest
        found = run_ingest(self.store, config, source_url, progress=self._counting("recordings"))
        return {"dataset": config.dataset, **found}

    def mix(self) -> Result:
        """Pin the newest dataset versions and fix the order of all training and validation samples."""
        began = time.monotonic()
        plans = {split: self.run.mixture.plan(self.store, split) for split in ("train", "validation")}
        for plan in plans.values():
            self.store.write_json(f"mixtures/{plan.plan_id}.json", asdict(plan))
        return {split: plan.plan_id for split, plan in plans.items()} | {
            "versions": {source.dataset: source.version for source in plans["train"].sources},
            "seconds": round(time.monotonic() - began, 3),
        }

    # --------------------------------------------------------------------------------------------------- training

    def train_text(self, plan: Result) -> Result:
        """Byte-level BPE on the instructions and questions of the training split."""

        def work() -> Result:
            texts = {text for name in plan["versions"] for text in self._texts(self._dataset(name, plan))}
            texts |= {text for row in tasks.TASKS.values() for text in row.train}
            text = TextTokenizer.train(texts, self.run.model.text_vocab_size)
            return {"text_id": save_text(self.store, text), "texts": len(texts)}

        return once(self.store, "text", {"plan": plan["train"], "vocab": self.run.model.text_vocab_size}, work)

    def train_vq(self, plan: Result) -> Result:
        """The image tokenizer, on the frames of the training split."""
        return self._train(self._spec("vq", self.run.vq, plan, model=self.run.model))

    def encode(self, plan: Result, vq: Result) -> Result:
        """Image codes of every frame, once: sidecars of the shards, keyed by the tokenizer."""

        def work() -> Result:
            counts = [
                encode_dataset(self.store, name, version, vq["vq_id"], self.run.model, self._counting("shards"))
                for name, version in plan["versions"].items()
            ]
            return {"shards": sum(count["shards"] for count in counts), "vq_id": vq["vq_id"]}

        return once(self.store, "encode", {"versions": plan["versions"], "vq": vq["vq_id"]}, work)

    def train_stage(self, name: str, plan: Result, text: Result, vq: Result, parent: Result | None = None) -> Result:
        """`stage1` (prediction and understanding) or `stage2` (and action, from the weights of `parent`)."""
        stage: StageConfig = getattr(self.run, name)
        if parent is None:
            spec = self._spec("policy", stage, plan, model=self.run.model, text_id=text["text_id"], vq_id=vq["vq_id"])
        else:
            spec = self._spec("policy", stage, plan, parent_url=parent["url"], parent_id=parent["model_id"])
        return self._train(spec)

    def train_all(self) -> Result:
        """Mixture, tokenizers and both stages; the exported checkpoint of the last."""
        plan = self.mix()
        text, vq = self.train_text(plan), self.train_vq(plan)
        self.encode(plan, vq)
        return self.train_stage("stage2", plan, text, vq, self.train_stage("stage1", plan, text, vq))

    # --------------------------------------------------------------------------------------------------- judging

    def evaluation_key(self, checkpoint_url: str) -> str:
        """Equal for equal weights and an equal protocol: starting the same evaluation twice runs it once."""
        model_id = read_marker(open_store(checkpoint_url)).model_id
        return content_hash({"model": model_id, "protocol": self.run.eval.model_dump(mode="json")})

    def evaluate(self, checkpoint_url: str) -> Result:
        """Closed-loop scores of a checkpoint on every suite beside the reference policies, videos, predicted frames."""
        checkpoint, config = read_marker(open_store(checkpoint_url)), self.run.eval

        def work() -> Result:
            found: dict[str, dict[str, Any]] = {}
            protocols: dict[str, str] = {}
            policies = {self.run.model_name: checkpoint} | {name: name for name in config.references}
            for suite in config.suites:
                for name, policy in policies.items():
                    report = scoring.judge(
                        self.store,
                        config,
                        suite,
                        policy,
                        num_workers=self.site.num_workers,
                        progress=self._counting(f"{suite.name}, {name}: chains"),
                    )
                    found.setdefault(name, {}).update({k: e._asdict() for k, e in scores(report).items()})
                    self._log_scores(checkpoint, name, as_metrics(scores(report)))
                    protocols[suite.name] = report.fingerprint
            self._log_films(checkpoint)
            return {"model_id": checkpoint.model_id, "scores": found, "protocols": protocols}

        return once(self.store, "evaluate", {"key": self.evaluation_key(checkpoint_url)}, work)

    def register(self, model: Result, scored: Result) -> Result:
        """A version in the model registry. The first one becomes champion; a later one is a challenger."""
        began = time.monotonic()
        bundle = load_bundle(model["url"])  # every hash is checked before anything is registered
        checkpoint, registry = read_marker(open_store(model["url"])), Registry(self.tracker)
        metrics = {
            name + suffix: score[bound]
            for name, score in scored["scores"][self.run.model_name].items()
            for suffix, bound in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        version = registry.register(
            self.run.model_name,
            checkpoint,
            self._run_id(checkpoint.run, "stage2"),
            cameras=sorted({*bundle.config.vision_cameras, *bundle.config.code_cameras}),
            metrics=metrics,
            tags={
                "stats_id": content_hash(bundle.stats),
                "mixture": str(bundle.meta.get("train_plan", "")),
                "datasets": ", ".join(f"{n}@{d['version']}" for n, d in bundle.meta.get("datasets", {}).items()),
                "config": fingerprint(self.run),
                "git_commit": git_commit(),
                **{f"protocol.{suite}": mark for suite, mark in scored["protocols"].items()},
            },
        )
        champion = registry.by_alias(self.run.model_name)
        alias = CHAMPION if champion is None or champion.version == version.version else "challenger"
        registry.set_alias(self.run.model_name, alias, version.version)
        seconds = round(time.monotonic() - began, 3)
        return {"seconds": seconds, "name": version.name, "version": version.version, "alias": alias, "model_id": checkpoint.model_id}

    def conclude(self, stages: Mapping[str, Result]) -> Result:
        """One report of a finished line, written to the store and to the pipeline's run: what `upvla demo` prints."""
        vq, first, last = stages["vq"]["losses"], stages["stage1"]["losses"], stages["stage2"]["losses"]
        plan, scored = stages["mix"], stages["evaluate"]["scores"]
        report = {
            "stage_seconds": {name: float(result["seconds"]) for name, result in stages.items()},
            "losses": {"vq": vq["vq"], "pre": first["pre"], "mmu": first["mmu"], "act": last["act"]},
            "scores": scored,
            "versions": {f"dataset {name}": version for name, version in plan["versions"].items()}
            | {"mixture": plan["train"], "text": stages["text"]["text_id"], "vq": stages["vq"]["vq_id"]}
            | {"model": "{name} v{version} ({alias})".format(**stages["register"])},
            "figures": {
                "collect": "{recordings} recordings, {frames} frames".format(**stages["collect"]),
                "ingest": "{recordings} recordings, {segments} segments, {steps} steps".format(**stages["ingest"]),
                **{
                    name: "{samples_per_s:.0f} rows/s, data wait {data_wait_pct:.1f} %".format(**stages[name]["speed"])
                    for name in ("vq", "stage1", "stage2")
                },
            },
        }
        self.store.write_json(self.report_key, report)
        run = self.tracker.start(f"pipeline/{fingerprint(self.run)}", self.run.name, params=self.run.model_dump(mode="json"))
        ours = scored[self.run.model_name]
        run.log(as_metrics({name: Estimate(**score) for name, score in ours.items()}), 0)
        run.record(report, "report.json")
        run.close()
        return report

    @property
    def report_key(self) -> str:
        return f"reports/{fingerprint(self.run)}.json"

    def checkpoint_url(self, model: str) -> str:
        """URL of `name@alias`, `name@version` (as registered) or of a checkpoint URL, which is returned as it is."""
        if "/" in model:
            return model
        name, _, wanted = model.partition("@")
        registry = Registry(self.tracker)
        listed: list[ModelVersion] = registry.versions(name)
        if not listed:
            raise NotFound(f"no registered model {name!r}; train one, or give the URL of a checkpoint")
        aliased = registry.by_alias(name, wanted or CHAMPION)
        for version in [*([aliased] if aliased else []), *listed]:
            if version.version == wanted or version.alias == (wanted or CHAMPION):
                return version.checkpoint.url
        raise NotFound(f"{name} has no version or alias {wanted!r}; versions: {', '.join(v.version for v in listed)}")

    # --------------------------------------------------------------------------------------------------- private

    def _spec(self, kind: str, stage: StageConfig, plan: Result, **inputs: Any) -> TrainSpec:
        engine = self.run.engine.model_copy(
            update={"num_workers": self.site.num_workers, "use_gpu": self.site.use_gpu}
        )
        return TrainSpec(
            kind=kind,  # type: ignore[arg-type]
            store_url=self.site.store_url,
            stage=stage,
            engine=EngineConfig.model_validate(engine.model_dump()),
            train_plan=plan["train"],
            validation_plan=plan["validation"],
            paraphrases={} if kind == "vq" else {name: row.train for name, row in tasks.TASKS.items()},
            tracking=TrackingSpec(
                uri=self.site.tracking_url,
                experiment=self.site.experiment,
                parent=self.pipeline_run(),
                tags={"config": fingerprint(self.run), "mixture": plan["train"], "git_commit": git_commit()},
            ),
            **inputs,
        )

    def _train(self, spec: TrainSpec) -> Result:
        def on_line(line: str) -> None:
            share = share_done(line)
            self.progress(share if share is not None else -1.0, line)

        def work() -> Result:
            return run_training(self.store, spec, Jobs(self.site.ray_jobs_url), on_line=on_line)

        return once(self.store, spec.stage.name, {"spec": spec.key}, work)

    def pipeline_run(self) -> str:
        """Id of the MLflow run that this configuration's stages nest under."""
        key = f"pipeline/{fingerprint(self.run)}"
        return self.tracker.run_id(key, self.run.name)

    def _run_id(self, key: str, stage: str) -> str:
        return self.tracker.run_id(f"{key}/{stage}", stage, self.pipeline_run())

    def _log_scores(self, checkpoint: Checkpoint, policy: str, metrics: dict[str, float]) -> None:
        """The model's scores go to the run that trained it, a reference policy's to a run of its own: comparable."""
        ours = policy == self.run.model_name
        key, name = (f"{checkpoint.run}/{self._stage_of(checkpoint)}", self._stage_of(checkpoint)) if ours else (
            f"reference/{policy}", f"reference {policy}")
        run = self.tracker.start(key, name, parent=self.pipeline_run())
        run.log(metrics, checkpoint.step if ours else 0)
        run.close()

    def _stage_of(self, checkpoint: Checkpoint) -> str:
        return checkpoint.url.rpartition("/")[2]

    def _log_films(self, checkpoint: Checkpoint) -> None:
        if self.run.eval.videos == 0:
            return
        stage = self._stage_of(checkpoint)
        run = self.tracker.start(f"{checkpoint.run}/{stage}", stage, parent=self.pipeline_run())
        with tempfile.TemporaryDirectory(prefix="upvla-films-") as folder:
            for name, data in scoring.film(self.run.eval, self.run.eval.suites[0], checkpoint).items():
                path = Path(folder, name)
                path.write_bytes(data)
                run.artifact(path, "rollouts")
        run.close()

    def _dataset(self, name: str, plan: Result) -> Dataset:
        return Dataset(self.store, load_manifest(self.store, name, plan["versions"][name]))

    def _texts(self, dataset: Dataset) -> set[str]:
        spans = {span.text for episode in dataset.episodes if episode.split == "train" for span in episode.spans}
        asked = [row for row in dataset.qa if row.template_split == "train"]
        return spans | {row.question for row in asked} | {row.answer for row in asked}

    def _counting(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(done / max(1, total), f"{what} {done}/{total}")


def git_commit() -> str:
    """Of the code that runs; `unknown` outside of a checkout."""
    place = Path(__file__).parent
    found = subprocess.run(["git", "-C", str(place), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def list_datasets(store: Store) -> list[Result]:
    """A row a version: dataset, version, recordings, segments, steps."""
    names = sorted({key.split("/")[1] for key in store.list("datasets/") if "/_manifest/" in key})
    rows = []
    for name in names:
        newest = load_manifest(store, name).version
        for version in range(1, newest + 1):
            rows.append(show_dataset(store, f"{name}@{version}"))
    return rows


def show_dataset(store: Store, name: str) -> Result:
    """`name` or `name@version`: counts, statistics id, content id, quarantine."""
    dataset, _, version = name.partition("@")
    manifest = load_manifest(store, dataset, int(version) if version else None)
    return {
        "dataset": dataset,
        "version": manifest.version,
        "recordings": manifest.num_episodes,
        "segments": manifest.num_spans,
        "steps": manifest.num_steps,
        "content_id": manifest.content_id,
        "stats_id": manifest.stats_id,
        "quarantined": dict(manifest.quarantined),
    }


__all__ = ["Line", "Result", "git_commit", "list_datasets", "open_line", "plan_from_json", "show_dataset"]
