"""One training worker: introduces data, model, engine, resume points and tracking to each other, then lets `fit` run.

Three stages take the same path. `vq` trains the image tokenizer on frames; `policy` trains UP-VLA on codes of a
trained one. What differs is the module, the reader and what is exported.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from upvla.checkpoint import Bundle, export, load_bundle
from upvla.data.derived import CodeTable
from upvla.data.descriptions import DescriptionTable
from upvla.data.features import FeatureTable
from upvla.data.loader import Loader
from upvla.data.mixture import Mixture, plan_from_json
from upvla.data.samples import Collator, SampleReader
from upvla.data.table import Dataset, load_manifest
from upvla.errors import AlreadyExists, BadStep, ConfigError, Mismatch
from upvla.launch.journal import Journal
from upvla.launch.tokenizers import load_text, load_vq, save_vq
from upvla.launch.train import FAILURE, RESULT, TrainSpec
from upvla.launch.weights import start_from, weights_id
from upvla.model.config import ModelConfig
from upvla.model.sequence import conditioned
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer, VQTraining, reconstructions
from upvla.store import Store, open_store
from upvla.train import resume
from upvla.train.config import accumulation_steps
from upvla.train.engine import Engine, build_engine
from upvla.train.loop import fit
from upvla.types import Batch, Losses, Sample

_PICTURED = 8  # held-out frames in the picture of an image tokenizer


@dataclass(frozen=True)
class Inputs:
    """What a stage is made from, opened: cheap to make, nothing is decoded yet."""

    store: Store
    config: ModelConfig
    train: Mixture
    validation: Mixture
    parent: Bundle | None
    text: TextTokenizer | None
    vq: VQTokenizer | None
    description_id: str = ""
    tower_id: str = ""

    def check(self, spec: TrainSpec) -> None:
        """Raise what would make every worker fail."""
        accumulation_steps(self.train.plan.global_batch, spec.engine.num_workers, spec.stage.micro_batch)
        for mixture in (self.train, self.validation):
            self.reader(mixture)
            if mixture.plan.lanes % spec.engine.num_workers:
                raise ConfigError(
                    f"{spec.engine.num_workers} workers do not divide the {mixture.plan.lanes} lanes of mixture "
                    f"{mixture.plan.plan_id}: choose a divisor, or set the mixture's `lanes`"
                )
            if self.parent is not None:
                self.parent.action_space.require_equal(
                    mixture.action_space, ours=spec.parent_url, theirs=f"mixture {mixture.plan.plan_id}"
                )
        self.train.stats.require_usable(f"mixture {self.train.plan.plan_id}")
        for url, expected in zip(spec.weights_urls, spec.weights_ids, strict=True):
            if weights_id(url) != expected:
                raise Mismatch(f"{spec.stage.name}: {url} holds weights {weights_id(url)}, the run is of {expected}")
        if spec.kind == "policy":
            self.bundle(UPVLA(self.config) if self.parent is None else self.parent.model, {})

    def reader(self, mixture: Mixture) -> SampleReader:
        """Samples with codes, or for the tokenizer's own training frames at the size it sees."""
        config = self.config
        if self.vq is None:
            return SampleReader(mixture, chunk=config.chunk, cameras=config.code_cameras, resize=config.vq_resize)
        return SampleReader(
            mixture,
            chunk=config.chunk,
            cameras=config.vision_cameras,
            resize=config.vision_resize,
            codes={name: CodeTable(dataset, self.vq.id) for name, dataset in mixture.datasets.items()},
            code_cameras=config.code_cameras,
            descriptions=self.descriptions(mixture),
            features={name: FeatureTable(dataset, self.tower_id) for name, dataset in mixture.datasets.items()}
            if self.tower_id
            else None,
        )

    def descriptions(self, mixture: Mixture) -> dict[str, DescriptionTable]:
        """What the stage's describer said of the datasets; none where the prompt is not conditioned on it."""
        if self.config.description is None or not self.description_id:
            return {}
        every = self.config.description.every_steps
        return {name: DescriptionTable(d, self.description_id, every) for name, d in mixture.datasets.items()}

    def bundle(self, model: UPVLA, meta: Mapping[str, Any]) -> Bundle:
        """The model with all it needs. A fine-tune keeps the statistics that its parent's weights were trained with."""
        assert self.vq is not None
        assert self.text is not None
        stats = self.train.stats.to_json() if self.parent is None else self.parent.stats
        return Bundle(self.config, model, self.vq, self.text, self.train.action_space, stats, meta)


def open_inputs(spec: TrainSpec) -> Inputs:
    """Raises `NotFound`, `Corrupt` or `Mismatch` naming the reference that is wrong."""
    store = open_store(spec.store_url)
    parent = load_bundle(spec.parent_url) if spec.parent_url else None
    config = parent.config if parent is not None else spec.model
    if config is None:
        raise ConfigError(f"{spec.stage.name}: neither a model configuration nor a checkpoint to start from")
    if parent is not None and spec.model is not None and spec.model != parent.config:
        raise Mismatch(f"{spec.stage.name}: {spec.parent_url} is another model than the run's; leave `model` out")
    text: TextTokenizer | None = None
    vq: VQTokenizer | None = None
    if spec.kind == "policy":
        text = parent.text if parent is not None else load_text(store, spec.text_id)
        vq = parent.vq if parent is not None else load_vq(store, spec.vq_id)
    mixtures = [_open_mixture(store, plan_id) for plan_id in (spec.train_plan, spec.validation_plan)]
    return Inputs(store, config, mixtures[0], mixtures[1], parent, text, vq, spec.description_id, spec.tower_id)


def _open_mixture(store: Store, plan_id: str) -> Mixture:
    plan = plan_from_json(store.read_json(f"mixtures/{plan_id}.json"))
    pinned = {source.dataset: source.version for source in plan.sources}
    return Mixture(
        plan, {name: Dataset(store, load_manifest(store, name, version)) for name, version in pinned.items()}
    )


# ----------------------------------------------------------------------------------------------------- one worker


def work(settings: Mapping[str, Any]) -> None:
    """Body of every worker of an initialised process group. It runs again, and resumes, when one of them was lost.

    A `BadStep` is everybody's: all workers end in good order, the record says why, and no retry repeats it.
    """
    began = time.monotonic()
    spec = TrainSpec.model_validate_json(settings["spec"])
    place = open_store(spec.store_url).sub(spec.prefix)
    if place.exists(RESULT):
        return
    torch.set_num_threads(settings["threads"])
    inputs = open_inputs(spec)
    global_batch, stage = inputs.train.plan.global_batch, spec.stage
    engine = build_engine(
        _module(spec, inputs),
        spec.engine,
        stage.optimizer,
        total_steps=stage.steps,
        micro_batch=stage.micro_batch,
        accumulation=accumulation_steps(global_batch, spec.engine.num_workers, stage.micro_batch),
        freeze=stage.freeze,
    )
    torch.manual_seed(spec.seed * 1_000_003 + engine.rank)  # dropout; a restored state replaces it
    scratch = Path(spec.scratch or tempfile.gettempdir(), "upvla-resume")  # one for all workers of a machine
    journal = Journal(spec, engine.rank, began)
    try:
        _train(spec, inputs, engine, place, journal, scratch, settings["threads"])
    except BadStep as error:
        journal.close("FAILED")
        if engine.rank == 0:
            place.write_json(FAILURE, {"code": error.code, "message": str(error)})
    except BaseException:
        journal.close("FAILED")
        raise
    else:
        journal.close("FINISHED")


def _train(
    spec: TrainSpec, inputs: Inputs, engine: Engine, place: Store, journal: Journal, scratch: Path, threads: int
) -> None:
    points, identity = place.sub("resume"), {"key": spec.key, "train_plan": spec.train_plan}
    point = resume.restore(engine, points, identity=identity, scratch=scratch)
    start = point.step if point else 0
    journal.begin(start, point.meta if point else {})
    validation = _loader(spec, inputs, inputs.validation, engine, 0, threads)
    with validation:
        held_out = [batch for _ in range(spec.stage.eval_batches) for batch in next(validation)]
    with _loader(spec, inputs, inputs.train, engine, start, threads) as batches:
        fit(
            engine,
            batches,
            spec.stage,
            start_step=start,
            validation=held_out,
            log=journal.log,
            save=lambda step: resume.save(
                engine, points, step, identity=identity, meta=journal.meta(), scratch=scratch
            ),
        )
    weights = engine.full_weights()
    if engine.rank == 0:
        _finish(spec, inputs, weights, held_out, place, journal)
    engine.gather(None)  # nobody leaves, and tears the group down, before the result is there


def _finish(
    spec: TrainSpec,
    inputs: Inputs,
    weights: Mapping[str, torch.Tensor],
    held_out: Sequence[Batch],
    place: Store,
    journal: Journal,
) -> None:
    """Export what was learnt, then create the result."""
    result: dict[str, Any] = {"stage": spec.stage.name, "step": spec.stage.steps, **journal.summary()}
    if spec.kind == "vq":
        vq = VQTokenizer(inputs.config.vq)
        vq.load_state_dict({name.removeprefix("objective.vq."): tensor for name, tensor in weights.items()})
        frames = torch.as_tensor(held_out[0].images[:_PICTURED]).flatten(0, 1)
        journal.picture(reconstructions(vq.eval(), frames).numpy(), "reconstructions.png")
        result |= {"vq_id": save_vq(inputs.store, vq)}
    else:
        model = UPVLA(inputs.config)
        model.load_state_dict(dict(weights))
        meta = {"run": spec.key, "step": spec.stage.steps, "stage": spec.stage.name, "losses": result["losses"]}
        meta |= {"train_plan": spec.train_plan, "validation_plan": spec.validation_plan, "parent": spec.parent_id}
        meta["datasets"] = {
            name: {"version": dataset.manifest.version, "content_id": dataset.manifest.content_id}
            for name, dataset in inputs.train.datasets.items()
        }
        checkpoint = export(inputs.store, f"models/{spec.key}/{spec.stage.name}", inputs.bundle(model, meta))
        result |= {"url": checkpoint.url, "model_id": checkpoint.model_id}
    try:
        place.create_json(RESULT, result)
    except AlreadyExists:
        return  # an earlier attempt had come so far; its result stands


def _module(spec: TrainSpec, inputs: Inputs) -> nn.Module:
    torch.manual_seed(spec.seed)
    if spec.kind == "vq":
        return FrameObjective(VQTokenizer(inputs.config.vq))
    if inputs.parent is not None:
        return inputs.parent.model.train()
    model = UPVLA(inputs.config)
    start_from(model, spec.weights_urls)
    return model


class FrameObjective(nn.Module):
    """The tokenizer's training behind the loop's contract: its frames are the batch's images, whatever the camera."""

    def __init__(self, vq: VQTokenizer) -> None:
        super().__init__()
        self.objective = VQTraining(vq)

    def forward(self, batch: Batch) -> Losses:
        return self.objective(batch.images.flatten(0, 1))

    def counts(self, batch: Batch) -> dict[str, float]:
        return self.objective.counts(batch.images.flatten(0, 1))


def _loader(
    spec: TrainSpec, inputs: Inputs, mixture: Mixture, engine: Engine, start_step: int, threads: int
) -> Loader[Batch]:
    reader = inputs.reader(mixture)
    collate: Callable[[Sequence[Sample]], Batch] = frames_only
    if (text := inputs.text) is not None:
        reader.paraphrases = dict(spec.paraphrases)
        condition = partial(conditioned, inputs.config) if inputs.config.description else None
        collate = Collator(reader.shape, text.encode, text.encode_turns, text.pad_id, condition)
    return Loader(
        mixture,
        reader,
        collate,
        rank=engine.rank,
        world_size=engine.world_size,
        micro_batch=spec.stage.micro_batch,
        start_step=start_step,
        threads=threads,
    )


def frames_only(samples: Sequence[Sample]) -> Batch:
    """Collate of the tokenizer's training: `images` u8[n,K,H,W,3] and `positions`; everything else is empty."""
    images = np.stack([np.stack(list(sample.images.values())) for sample in samples])
    empty = {name: np.zeros((len(samples), 0), np.int64) for name in Batch._fields}
    return Batch(**empty | {"images": images, "positions": np.array([sample.position for sample in samples])})
