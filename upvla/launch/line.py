"""The line: from a robot's recordings to a registered policy, one method a stage.

Every stage is `once(store, stage, key, work)`: its key is made from content, its result is a small JSON of references,
so a finished stage is a no-op and a killed one goes on where it was. The CLI calls these methods directly; the Prefect
flows wrap the same methods in tasks. There is no other implementation of a stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any, Literal

from upvla.checkpoint import load_bundle, read_facts, read_marker, registered_name
from upvla.config import LineConfig, SiteConfig
from upvla.errors import ConfigError, Mismatch, NotFound
from upvla.launch import scores as scoring
from upvla.launch.card import model_card
from upvla.launch.cluster import connected
from upvla.launch.describe import describe_dataset, description_id
from upvla.launch.driver import train
from upvla.launch.encode import encode_dataset, encoding_key
from upvla.launch.jobs import Jobs
from upvla.launch.logbook import Logbook
from upvla.launch.promote import promote
from upvla.launch.steps import once
from upvla.launch.train import ALLOCATOR, TrainSpec, run_training, share_done
from upvla.model.config import ModelConfig
from upvla.rollout.benchmarks import line_suite
from upvla.rollout.evaluate import SuiteConfig, as_metrics, scores
from upvla.rollout.golden import proven
from upvla.sim.playtable import tasks
from upvla.sim.playtable.env import world_code
from upvla.store import Store, content_hash, open_store
from upvla.tracking import CHAMPION, Registry, protocol_tags
from upvla.train.config import EngineConfig, StageConfig
from upvla.train.guard import unexplained
from upvla.types import Checkpoint, Estimate, ModelVersion

Result = dict[str, Any]
Progress = Callable[[float, str], None]
"""(share done in 0..1, what is being done)"""


class Line:
    """One configuration on one site. Methods return references (JSON); `seconds` is what the stage itself took."""

    def __init__(self, site: SiteConfig, config: LineConfig, model_name: str, progress: Progress | None = None) -> None:
        if not site.store_url:
            raise ConfigError("no object store: run `upvla up`, or set `store_url` in the site file")
        self.site, self.config, self.model_name = site, config, model_name
        self.store: Store = open_store(site.store_url)
        self.progress: Progress = progress or (lambda share, text: None)
        self.logbook = Logbook(site, config, model_name, note=lambda text: self.progress(-1.0, text))

    # ------------------------------------------------------------------------------------------- shared stages

    def mix(self) -> Result:
        """Pin the newest dataset versions and fix the order of all training and validation samples."""
        began = time.monotonic()
        worlds = {"playtable": {name: row.train for name, row in tasks.TASKS.items()}}
        plans = {split: self.config.mixture.plan(self.store, split, worlds) for split in ("train", "validation")}
        for plan in plans.values():
            self.store.write_json(f"mixtures/{plan.plan_id}.json", asdict(plan))
        return {split: plan.plan_id for split, plan in plans.items()} | {
            "versions": {source.dataset: source.version for source in plans["train"].sources},
            "seconds": round(time.monotonic() - began, 3),
        }

    def encode(self, plan: Result, vq: Result) -> Result:
        """What frozen networks say of every frame, once: sidecars of the shards, keyed by tokenizer and tower."""
        tower_id, model = self.tower_id(vq), self.model_config(vq)

        def work() -> Result:
            counts = [
                encode_dataset(self.store, name, version, vq["vq_id"], model, self._counting("shards"), tower_id)
                for name, version in plan["versions"].items()
            ]
            return {"shards": sum(count["shards"] for count in counts), "vq_id": vq["vq_id"]}

        key = encoding_key(plan["versions"], vq["vq_id"], model, tower_id)
        return once(self.store, "encode", key, work, in_turn=True)

    def model_config(self, source: Result) -> ModelConfig:
        """Of the model that trains on what is encoded: that of the checkpoint `source`."""
        return read_facts(source["url"]).config

    def tower_id(self, source: Result) -> str:
        """Id of the frozen understanding encoder whose features are kept; empty where it learns with the rest."""
        return str(source.get("tower_id", ""))

    def describe(self, plan: Result, describer: Result) -> str:
        """Id of what the checkpoint `describer` says of the datasets; empty where its model asks for nothing."""
        config = load_bundle(describer["url"]).config.description
        if config is None:
            return ""

        def work() -> Result:
            for name, version in plan["versions"].items():
                describe_dataset(self.store, name, version, describer["url"], self._counting("described shards"))
            return {"description_id": description_id(describer["model_id"], config.question, config.every_steps)}

        key = {"versions": plan["versions"], "model": describer["model_id"]}
        return str(once(self.store, "describe", key, work)["description_id"])

    def evaluation_key(self, checkpoint_url: str) -> str:
        """Equal for equal weights and an equal protocol: starting the same evaluation twice runs it once."""
        model_id = read_marker(open_store(checkpoint_url)).model_id
        return content_hash(
            {"model": model_id, "protocol": self.config.eval.model_dump(mode="json"), "world": world_code()}
        )

    def evaluate(self, checkpoint_url: str) -> Result:
        """Closed-loop scores of a checkpoint on every suite beside the reference policies, videos, predicted frames."""
        checkpoint = read_marker(open_store(checkpoint_url))

        def work() -> Result:
            with connected():  # one connection for all suites, so that worker processes are kept between them
                return self._scores(checkpoint)

        return once(self.store, "evaluate", {"key": self.evaluation_key(checkpoint_url)}, work, in_turn=True)

    def register(self, model: Result, scored: Result) -> Result:
        """A version in the model registry. The first one becomes champion; a later one is a challenger."""
        began = time.monotonic()
        bundle = load_bundle(model["url"])  # every hash is checked before anything is registered
        proven(bundle, model["url"])
        checkpoint, registry = read_marker(open_store(model["url"])), Registry(self.logbook.tracker)
        registered = {version.checkpoint.model_id for version in registry.versions(self.model_name)}
        require_explained(self.config, bundle.meta, registered)
        metrics = {
            name + suffix: score[bound]
            for name, score in scored["scores"][self.model_name].items()
            for suffix, bound in (("", "value"), ("_low", "low"), ("_high", "high"))
        }
        run_id = self.logbook.training_id(checkpoint)
        with self.logbook.scored(checkpoint, scored["protocols"]) as run:
            scored_in = run.run_id
        tags = self.logbook.tags(bundle.meta) | protocol_tags(scored["protocols"])
        tags["stats_id"] = content_hash(bundle.stats)
        cameras = sorted({*bundle.config.vision_cameras, *bundle.config.code_cameras})
        version = registry.register(
            self.model_name, checkpoint, run_id, cameras=cameras, metrics=metrics, tags=tags, scored_in=scored_in
        )
        strips = [path for path in self.logbook.tracker.artifacts(scored_in, "rollouts") if path.endswith(".png")]
        card = model_card(self.model_name, bundle, checkpoint, scored, version.tags, run_id=scored_in, strips=strips)
        registry.describe(self.model_name, version.version, card)
        champion = registry.by_alias(self.model_name)
        alias = CHAMPION if champion is None or champion.version == version.version else "challenger"
        if champion is None:
            promote(self.store, registry, self.model_name, version.version, expected=None, because="the first model")
        elif alias == "challenger":
            registry.set_alias(self.model_name, alias, version.version)
        seconds = round(time.monotonic() - began, 3)
        return {
            "seconds": seconds,
            "name": version.name,
            "version": version.version,
            "alias": alias,
            "model_id": checkpoint.model_id,
        }

    def judged_pages(self, checkpoint_url: str) -> dict[str, str]:
        """Addresses of what an evaluation logged, by what is there: the model's run, and its videos."""
        run_id = self.logbook.training_id(read_marker(open_store(checkpoint_url)))
        pages = {"MLflow run": self.logbook.tracker.run_page(run_id)}
        if self.config.eval.videos:
            pages["Rollout videos"] = self.logbook.tracker.run_page(run_id, "rollouts")
        return pages

    def version_pages(self, registered: Result) -> dict[str, str]:
        """Address of a version in the registry, by its name."""
        name, version = registered["name"], registered["version"]
        return {f"{name} version {version}": self.logbook.tracker.version_page(name, version)}

    def checkpoint_url(self, model: str) -> str:
        """URL of a registered model, by any of its names, or of a checkpoint URL, which is returned as it is."""
        name = registered_name(model)
        return self.version(name).checkpoint.url if name else model

    def version(self, model: str) -> ModelVersion:
        """What the registry has under `name@alias` or `name@version`; a name alone is its champion."""
        name, _, wanted = model.partition("@")
        registry = Registry(self.logbook.tracker)
        listed: list[ModelVersion] = registry.versions(name)
        if not listed:
            raise NotFound(f"no registered model {name!r}; train one, or give the URL of a checkpoint")
        aliased = registry.by_alias(name, wanted or CHAMPION)
        for version in [*([aliased] if aliased else []), *listed]:
            if version.version == wanted or version.alias == (wanted or CHAMPION):
                return version
        raise NotFound(f"{name} has no version or alias {wanted!r}; versions: {', '.join(v.version for v in listed)}")

    # --------------------------------------------------------------------------------------------------- private

    def exam(self, suite: SuiteConfig) -> scoring.Exam:
        """One of the configuration's suites, with the chains that every model of this line is judged on."""
        config, site = self.config.eval, self.site
        opened = line_suite(config, suite)
        chains = opened.chains(suite.num)
        return scoring.Exam(opened, chains, config.control, site.rollout, site.most_workers, site.use_gpu)

    def _scores(self, checkpoint: Checkpoint) -> Result:
        config = self.config.eval
        found: dict[str, dict[str, Estimate]] = {}
        protocols: dict[str, str] = {}
        names = {checkpoint.url: self.model_name}
        for suite in config.suites:

            def told(policy: str, suite: SuiteConfig = suite) -> scoring.Progress:
                return self._counting(f"{suite.name}, {names.get(policy, policy)}: chains")

            policies = (checkpoint.url, *config.references)
            for policy, judged in scoring.judge(self.store, self.exam(suite), policies, progress=told).items():
                name, report = names.get(policy, policy), judged.report
                found.setdefault(name, {}).update(scores(report))
                protocols[suite.name] = report.fingerprint
        self.logbook.log_scores(checkpoint, {name: as_metrics(named) for name, named in found.items()}, protocols)
        if config.videos:
            films = scoring.film(self.exam(config.suites[0]), checkpoint.url, config.videos)
            self.logbook.log_films(checkpoint, films, protocols)
        return {
            "model_id": checkpoint.model_id,
            "scores": {name: {k: e._asdict() for k, e in named.items()} for name, named in found.items()},
            "protocols": protocols,
        }

    def _spec(self, kind: Literal["vq", "policy"], stage: StageConfig, plan: Result, **inputs: Any) -> TrainSpec:
        workers = {"num_workers": self.site.num_workers, "use_gpu": self.site.use_gpu}
        versions = {name: {"version": version} for name, version in plan["versions"].items()}
        return TrainSpec(
            kind=kind,
            store_url=self.site.store_url,
            stage=stage,
            engine=EngineConfig.model_validate(self.config.engine.model_dump() | workers),
            train_plan=plan["train"],
            validation_plan=plan["validation"],
            tracking=self.logbook.of_training({"train_plan": plan["train"], "datasets": versions}),
            **inputs,
        )

    def _train(self, spec: TrainSpec) -> Result:
        """As a Ray job that outlives this process; on a site without a job server, on this process's own Ray."""

        def on_line(line: str) -> None:
            share = share_done(line)
            self.progress(share if share is not None else -1.0, line)

        def work() -> Result:
            nested = self.logbook.nested(spec)
            if self.site.ray_jobs_url:
                result = run_training(self.store, nested, Jobs(self.site.ray_jobs_url), on_line=on_line)
            else:
                with connected(nested.environment | ALLOCATOR):
                    result = train(nested)
            if "url" in result:
                self.logbook.log_checkpoint(result["url"], self.store)
            return result

        result = once(self.store, spec.stage.name, {"spec": spec.key}, work)
        self.logbook.send_late(self.store.sub(spec.prefix))
        return result

    def _counting(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(done / max(1, total), f"{what} {done}/{total}")


def require_explained(config: LineConfig, meta: Mapping[str, Any], registered: Collection[str] = ()) -> None:
    """Refuse a model with bad steps that nobody has looked at, its own or of the stages before; `meta` is its
    checkpoint's. A parent whose id is among those `registered` was asked about its own by then."""
    stages = {name: getattr(config, name) for name in type(config).model_fields}
    known = {stage.name: (name, stage.guard.explained) for name, stage in stages.items() if type(stage) is StageConfig}
    passed = [{"stage": meta.get("stage"), **bad} for bad in meta.get("bad_steps", ())]
    if meta.get("parent") not in registered:
        passed = [*meta.get("bad_steps_before", ()), *passed]
    for stage_name in dict.fromkeys(bad["stage"] for bad in passed):
        name, explained = known.get(stage_name, ("", ()))
        if steps := unexplained([bad for bad in passed if bad["stage"] == stage_name], explained):
            where = f"{name}.guard.explained" if name else f"guard.explained of {stage_name}, in a config that has it"
            raise Mismatch(
                f"the run {meta.get('run')} passed over the bad steps {steps} of {stage_name}, so its model is not "
                f"registered: look at the samples that its meta.json names, then list the steps in {where}"
            )
