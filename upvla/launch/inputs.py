"""What a training stage is made from, opened and checked: model configuration, mixtures, tokenizers, the parent.

The driver opens it before it asks for workers, so that what is wrong fails there; every worker opens it again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from upvla.checkpoint import Bundle, load_bundle
from upvla.data.derived import CodeTable
from upvla.data.descriptions import DescriptionTable
from upvla.data.features import FeatureTable
from upvla.data.mixture import Mixture, open_mixture, plan_from_json
from upvla.data.samples import SampleReader
from upvla.errors import ConfigError, Mismatch
from upvla.images import decode_image
from upvla.launch.tokenizers import load_text, load_vq
from upvla.launch.train import TrainSpec
from upvla.launch.weights import weights_id
from upvla.model.config import ModelConfig
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer, VQTraining
from upvla.store import Store, open_store
from upvla.train.config import world_sizes
from upvla.train.optimizer import freeze_parameters
from upvla.train.resume import require_space
from upvla.types import ActionSpace

_OBJECTIVES = {"vq": ("vq",), "policy": ("act", "mmu", "pre")}
_SEARCHED = 64  # held-out batches, for one of the robot's: most rows may be questions
_SAVED_BYTES = 16  # a parameter takes in a resume point: weight, master copy and two moments


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
        self.world_sizes(spec)
        _require_known(spec)
        if spec.stage.picture_every and spec.kind != "policy":
            raise ConfigError(f"{spec.stage.name}: picture_every is a policy's, a tokenizer has no future to predict")
        if spec.stage.ema_decay and spec.engine.offload == "nvme":
            raise ConfigError(f"{spec.stage.name}: ema_decay averages weights in memory, with offload=nvme none are")
        for mixture in (self.train, self.validation):
            self.reader(mixture)
            if self.parent is not None:
                self.parent.action_space.require_equal(
                    mixture.action_space, ours=spec.parent_url, theirs=f"mixture {mixture.plan.plan_id}"
                )
        if spec.stage.weights.get("act", 0.0) > 0:
            if not self.train.has_actions:
                raise ConfigError(
                    f"{spec.stage.name}: weights.act is {spec.stage.weights['act']} and no source of mixture "
                    f"{self.train.plan.plan_id} has actions that count: give one the kind robot or action, or set "
                    "weights.act to 0"
                )
            _require_answerable(self.train.action_space, f"{spec.stage.name}: mixture {self.train.plan.plan_id}")
        self.train.stats.require_usable(f"mixture {self.train.plan.plan_id}")
        for url, expected in zip(spec.weights_urls, spec.weights_ids, strict=True):
            if weights_id(url) != expected:
                raise Mismatch(f"{spec.stage.name}: {url} holds weights {weights_id(url)}, the run is of {expected}")
        module = self._shapes(spec)
        if isinstance(module, UPVLA):
            self.bundle(module, {})
        freeze_parameters(nn.ModuleDict({"objective": module}) if spec.kind == "vq" else module, spec.stage.freeze)

    def require_space(self, spec: TrainSpec) -> None:
        """Raise `NoSpace` where a resume point of this stage has no room on this machine on its way to the store."""
        require_space(spec.scratch_folder, _SAVED_BYTES * sum(p.numel() for p in self._shapes(spec).parameters()))

    def _shapes(self, spec: TrainSpec) -> nn.Module:
        """What is trained, without weights: a driver need not have room for a large model."""
        with torch.device("meta"):
            return VQTraining(VQTokenizer(self.config.vq)) if spec.kind == "vq" else UPVLA(self.config)

    def world_sizes(self, spec: TrainSpec) -> list[int]:
        """Numbers of workers that this run may have."""
        plan = self.train.plan
        lanes = math.gcd(plan.lanes, self.validation.plan.lanes)
        return world_sizes(plan.global_batch, lanes, spec.engine)

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
            codes={
                name: CodeTable(dataset, self.vq.id, config.code_cameras, config.vq_resize)
                for name, dataset in mixture.datasets.items()
            },
            code_cameras=config.code_cameras,
            descriptions=self.descriptions(mixture),
            features={
                name: FeatureTable(dataset, self.tower_id, config.vision_cameras, config.vision_resize)
                for name, dataset in mixture.datasets.items()
            }
            if self.tower_id
            else None,
        )

    def descriptions(self, mixture: Mixture) -> dict[str, DescriptionTable]:
        """What the stage's describer said of the datasets; none where the prompt is not conditioned on it."""
        if self.config.description is None or not self.description_id:
            return {}
        every = self.config.description.every_steps
        return {name: DescriptionTable(d, self.description_id, every) for name, d in mixture.datasets.items()}

    def observations(self, count: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """Up to `count` held-out frames {camera: u8[N,H,W,3]}, as the first robot source of the mixture stores them,
        and their instructions."""
        mixture, frames, told = self.validation, defaultdict[str, list[np.ndarray]](list), list[str]()
        found = (mixture.sample_at(position) for position in range(_SEARCHED * mixture.plan.global_batch))
        robots = (ref for ref in found if ref.kind == "robot")
        first = list(islice(robots, 1))
        for ref in [*first, *islice((ref for ref in robots if ref.source == first[0].source), count - 1)]:
            source = mixture.plan.sources[ref.source]
            dataset = mixture.datasets[source.dataset]
            stored = {camera: source.cameras.get(camera, camera) for camera in self.config.cameras}
            columns = {f"image_{name}": (ref.step,) for name in stored.values() if name}
            images = dataset.read_each(ref.episode, columns)
            for camera, name in stored.items():  # a view that this source lacks is black, as in training
                black = np.zeros((self.config.vision_resize.size,) * 2 + (3,), np.uint8)
                frames[camera].append(decode_image(images[f"image_{name}"][0]) if name else black)
            told.append(dataset.episodes[ref.episode].spans[ref.span].text)
        return {camera: np.stack(each) for camera, each in frames.items()}, told

    @property
    def stats(self) -> Mapping[str, Any]:
        """A fine-tune keeps the statistics that its parent's weights were trained with."""
        return self.train.stats.to_json() if self.parent is None else self.parent.stats

    def bundle(self, model: UPVLA, meta: Mapping[str, Any]) -> Bundle:
        """The model with all it needs."""
        assert self.vq is not None
        assert self.text is not None
        return Bundle(self.config, model, self.vq, self.text, self.train.action_space, self.stats, meta)


def _require_known(spec: TrainSpec) -> None:
    """Objectives have the names that the model counts, wherever the stage speaks of them."""
    stage, known = spec.stage, _OBJECTIVES[spec.kind]
    if wrong := sorted(set(stage.weights) - set(known)):
        raise ConfigError(f"{stage.name}: weights.{wrong[0]} is no objective of this stage; those are {known}")
    losses = [f"val_loss/{name}" for name in known]
    if stage.best and stage.best.metric not in losses and not stage.best.metric.startswith("val_watch/"):
        raise ConfigError(
            f"{stage.name}: best.metric={stage.best.metric!r} is nothing that is validated: one of {losses}, or a "
            "`val_watch/` that the stage's curves have"
        )


def _require_answerable(space: ActionSpace, what: str) -> None:
    """An action head that cannot say what it learns from would fail on the robot and nowhere before."""
    for number, dim in enumerate(space.dims):
        if dim.low < -1.0 or dim.high > 1.0 or (dim.unit == "gripper" and (dim.low, dim.high) != (-1.0, 1.0)):
            raise ConfigError(
                f"{what}: action dimension {number} ({dim.name}) goes from {dim.low:g} to {dim.high:g}, and the action "
                "head answers poses in [-1, 1] and grippers with -1 or 1: give the mixture an `action_space` that the "
                "data is converted to, or set the weight of `act` to 0"
            )


def open_inputs(spec: TrainSpec, world_size: int = 1, *, weights: bool = True) -> Inputs:
    """For one of `world_size` workers; without `weights` a parent's model has shapes only. `NotFound`, `Corrupt` or
    `Mismatch` name the reference that is wrong."""
    store = open_store(spec.store_url)
    parent = load_bundle(spec.parent_url, weights=weights) if spec.parent_url else None
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
    mixtures = [open_plan(store, plan_id, world_size) for plan_id in (spec.train_plan, spec.validation_plan)]
    return Inputs(store, config, mixtures[0], mixtures[1], parent, text, vq, spec.description_id, spec.tower_id)


def open_plan(store: Store, plan_id: str, world_size: int = 1) -> Mixture:
    """The stored plan's mixture, with a pool of row groups for one of `world_size` workers."""
    return open_mixture(store, plan_from_json(store.read_json(f"mixtures/{plan_id}.json")), world_size)
