"""Pre-training: the stages that only a first model needs, from recordings to both tokenizers and both stages."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from upvla.config import RunConfig, SiteConfig, fingerprint, load
from upvla.data.report import render_summary
from upvla.data.table import Dataset, load_manifest
from upvla.errors import ConfigError, UpvlaError, require_no_login, shown
from upvla.launch.ingest import landed, run_ingest
from upvla.launch.inputs import open_plan
from upvla.launch.line import Line, Progress, Result
from upvla.launch.steps import once
from upvla.launch.tokenizers import save_text, save_tower, save_vq
from upvla.launch.weights import load_weights, start_from, weights_id, weights_kind
from upvla.model.config import ModelConfig
from upvla.model.text import TextTokenizer
from upvla.model.vision import VisionEncoder
from upvla.model.vq import VQTokenizer
from upvla.model.weights import fill
from upvla.rollout.evaluate import as_metrics
from upvla.sim.playtable.recorder import collect
from upvla.store import content_hash, open_store
from upvla.train.config import StageConfig
from upvla.types import Estimate, MixtureSource


def open_pretraining(
    config: str, site: str, overrides: Sequence[str] = (), progress: Progress | None = None
) -> Pretraining:
    """The line of `configs/<config>.yaml` on `configs/site/<site>.yaml`."""
    return Pretraining(load(f"site/{site}", SiteConfig), load(config, RunConfig, overrides), progress)


class Pretraining(Line):
    """From recordings to the checkpoint of the second stage; `Line` has the rest."""

    config: RunConfig

    def __init__(self, site: SiteConfig, config: RunConfig, progress: Progress | None = None) -> None:
        super().__init__(site, config, config.model_name, progress)

    def collect(self) -> Result:
        """Scripted experts -> recordings in CALVIN's raw layout, in a folder of their own under the site's.

        The folder itself says what is done: it lies on this machine, so a record on the store could outlive it.
        """
        began, config = time.monotonic(), self.config.data.collect
        folder = self.site.raw_folder / f"{self.config.data.ingest.dataset}-{config.fingerprint()}"
        summary = collect(config, folder, progress=self._counting("recordings"))
        return {
            "source_url": str(folder / "training"),
            "recordings": summary["recordings"],
            "frames": summary["frames"],
            "seconds": round(time.monotonic() - began, 3),
        }

    def ingest(self, source_url: str, held: Collection[str] = ()) -> Result:
        """Recordings -> a version of the dataset. What is new there becomes its next version; nothing new, no work.

        held: files whose recordings are left for another time.
        """
        config = self.config.data.ingest
        found = run_ingest(self.store, config, source_url, progress=self._counting("recordings"), held=held)
        if self.site.tracking_url:
            self._log_report(f"{config.dataset}@{found['version']}", found["content_id"], found["report"])
        return {"dataset": config.dataset, **found}

    def data_report(self, ingested: Result) -> str:
        """What an ingest came to, as Markdown; the version's HTML page (`report`) has more. Empty where it skipped."""
        if "version" not in ingested:
            return ""
        manifest = load_manifest(self.store, ingested["dataset"], ingested["version"])
        return f"{render_summary(Dataset(self.store, manifest))}\n\nThe whole report: `{ingested['report']}`"

    def watch(self, source_url: str = "", settle_s: float = 60.0) -> Result:
        """`ingest` of what others put under a prefix, by default `inbox` of the site's raw recordings.

        A set that was written to less than `settle_s` ago is left for the next time, and named in `waiting` with its
        last write: its recordings may be halves. One that cannot be read keeps no other out: its error comes last.
        """
        url, config = source_url or str(self.site.raw_folder / "inbox"), self.config.data.ingest
        require_no_login("source_url", url)
        sets, waiting = landed(open_store(url), config, settle_s)
        since = {
            name or url: datetime.fromtimestamp(last, UTC).isoformat(" ", "seconds") for name, last in waiting.items()
        }
        about: Result = {"source_url": url, "dataset": config.dataset} | ({"waiting": since} if since else {})
        if not sets:
            return {**about, "skipped": "still being written to" if since else "nothing there yet"}
        found: list[Result] = []
        failed: list[UpvlaError] = []
        for name, written in sets.items():
            place = f"{url}/{name}" if name else url
            key = {"source": place, "written": content_hash(written), "ingest": config.model_dump(mode="json")}
            work = partial(self.ingest, place, waiting)
            try:
                found.append(once(self.store, "watch", key, work) if name else work())
            except UpvlaError as error:
                failed.append(error)
        if failed:
            raise failed[0]
        return {**max(found, key=lambda result: int(result["version"])), **about}

    def train_text(self, plan: Result) -> Result:
        """Byte-level BPE on the instructions, their paraphrases and the questions of the training split, or the one
        that `init` brings.
        """

        def work() -> Result:
            if self.config.init.text:
                folder, _, name = self.config.init.text.rpartition("/")
                given = TextTokenizer(open_store(folder).read(name).decode(), self.config.model.text_vocab_size)
                return {"text_id": save_text(self.store, given), "texts": 0}
            mixture = open_plan(self.store, plan["train"])
            texts = {text for one in mixture.plan.sources for text in _texts(mixture.datasets[one.dataset], one)}
            text = TextTokenizer.train(texts, self.config.model.text_vocab_size)
            return {"text_id": save_text(self.store, text), "texts": len(texts)}

        key = {"plan": plan["train"], "vocab": self.config.model.text_vocab_size}
        return once(self.store, "text", key | ({"given": self.config.init.text} if self.config.init.text else {}), work)

    def train_vq(self, plan: Result) -> Result:
        """The image tokenizer, on the frames of the training split, or the one that `init` brings."""
        if self.config.init.vq:

            def work() -> Result:
                vq = VQTokenizer(self.config.model.vq)
                start_from(vq, [self.config.init.vq])
                return {"vq_id": save_vq(self.store, vq)}

            return once(self.store, "vq", {"weights": weights_id(self.config.init.vq)}, work)
        return self._train(self._spec("vq", self.config.vq, plan, model=self.config.model))

    def model_config(self, source: Result) -> ModelConfig:
        return self.config.model

    def tower_id(self, source: Result) -> str:
        """A frozen tower is the one that `init.weights` brings; there is no use for one with random weights."""
        vision = self.config.model.vision
        if not vision.frozen:
            return ""
        urls = [url for url in self.config.init.weights if weights_kind(url) == "clip"]
        if not urls:
            raise ConfigError("model.vision is frozen and init.weights name no weights of kind clip: import them first")

        def work() -> Result:
            tower = VisionEncoder(vision)
            state = load_weights(urls[-1])[1]
            fill(tower, {name.removeprefix("vision."): value for name, value in state.items()})
            return {"tower_id": save_tower(self.store, tower)}

        made = once(
            self.store, "tower", {"weights": weights_id(urls[-1]), "vision": vision.model_dump(mode="json")}, work
        )
        return str(made["tower_id"]) if vision.cacheable else ""

    def train_stage(self, name: str, plan: Result, text: Result, vq: Result, parent: Result | None = None) -> Result:
        """`stage1` (prediction and understanding) or `stage2` (and action, from the weights of `parent`).

        A first stage starts from the weights that `init` names. Where a run has no `stage1` nothing is trained for it,
        and stage 2 is the first.
        """
        stage: StageConfig | None = getattr(self.config, name)
        if stage is None:
            return {}
        if not parent:
            if self.config.model.description and "act" in stage.weights:
                raise ConfigError("model.description needs a stage1: its weights describe what the action stage reads")
            urls = self.config.init.weights
            spec = self._spec(
                "policy",
                stage,
                plan,
                model=self.config.model,
                text_id=text["text_id"],
                vq_id=vq["vq_id"],
                tower_id=self.tower_id(vq),
                weights_urls=urls,
                weights_ids=tuple(weights_id(url) for url in urls),
                bad_steps_before=tuple({"stage": self.config.vq.name, **bad} for bad in vq.get("bad_steps", ())),
            )
        else:
            from_parent = {"tower_id": self.tower_id(vq), "parent_url": parent["url"], "parent_id": parent["model_id"]}
            if "act" in stage.weights:
                from_parent["description_id"] = self.describe(plan, parent)
            spec = self._spec("policy", stage, plan, **from_parent)
        return self._train(spec)

    def train_all(self) -> Result:
        """Mixture, tokenizers and both stages; the exported checkpoint of the last."""
        plan = self.mix()
        text, vq = self.train_text(plan), self.train_vq(plan)
        self.encode(plan, vq)
        return self.train_stage("stage2", plan, text, vq, self.train_stage("stage1", plan, text, vq))

    def conclude(self, stages: Mapping[str, Result]) -> Result:
        """One report of a finished line, written to the store and to the pipeline's run: what `upvla demo` prints."""
        trained = {name: stages[name] for name in ("vq", "stage1", "stage2") if "losses" in stages[name]}
        first = "stage1" if "stage1" in trained else "stage2"
        learnt_in = {"vq": "vq", "pre": first, "mmu": first, "act": "stage2"}
        plan, scored = stages["mix"], stages["evaluate"]["scores"]
        report = {
            "stage_seconds": {name: float(result["seconds"]) for name, result in stages.items() if result},
            "losses": {
                name: trained[stage]["losses"][name]
                for name, stage in learnt_in.items()
                if name in trained.get(stage, {}).get("losses", {})
            },
            "scores": scored,
            "versions": {f"dataset {name}": version for name, version in plan["versions"].items()}
            | {"mixture": plan["train"], "text": stages["text"]["text_id"], "vq": stages["vq"]["vq_id"]}
            | {"model": "{name} v{version} ({alias})".format(**stages["register"])},
            "figures": {
                "collect": "{recordings} recordings, {frames} frames".format(**stages["collect"]),
                "ingest": "{recordings} recordings, {segments} segments, {steps} steps".format(**stages["ingest"]),
                **{
                    name: "{samples_per_s:.0f} rows/s, data wait {data_wait_pct:.1f} %".format(**stages[name]["speed"])
                    for name in trained
                },
            },
        }
        self.store.write_json(self.report_key, report)
        ours = {name: Estimate(**score) for name, score in scored[self.model_name].items()}
        with self.logbook.pipeline(params=json.loads(shown(self.config.model_dump_json()))) as run:
            run.log(as_metrics(ours), 0)
            run.record(report, "report.json")
        return report

    @property
    def report_key(self) -> str:
        return f"reports/{fingerprint(self.config)}.json"

    def _log_report(self, version: str, content_id: str, url: str) -> None:
        """The dataset's page, where the curves are looked at too."""
        folder, _, name = url.rpartition("/")
        with (
            self.logbook.run(f"dataset/{content_id}", f"dataset {version}", parent=self.logbook.parent_id()) as run,
            tempfile.TemporaryDirectory() as local,
        ):
            open_store(folder).download(name, Path(local, name))
            run.artifact(Path(local, name), "data")


def _texts(dataset: Dataset, source: MixtureSource) -> set[str]:
    spans = [span for episode in dataset.episodes if episode.split == "train" for span in episode.spans]
    told = {text for span in spans for text in (span.text, *source.paraphrases.get(span.task, ()))}
    asked = [row for row in dataset.qa if row.template_split == "train"]
    return told | {row.question for row in asked} | {row.answer for row in asked}
