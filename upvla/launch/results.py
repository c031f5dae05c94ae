"""What a training stage leaves behind: its exported model and result, and pictures of what it predicts on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from upvla.checkpoint import export
from upvla.errors import AlreadyExists
from upvla.launch.inputs import Inputs
from upvla.launch.journal import Journal
from upvla.launch.tokenizers import save_vq
from upvla.launch.train import RESULT, TrainSpec
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer, reconstructions, to_frames
from upvla.rollout.golden import record
from upvla.store import Store
from upvla.train.engine import Engine
from upvla.types import Batch

_PICTURED = 8  # held-out frames in a picture
_GOLDEN = 4  # held-out observations that go with an exported model


def finish(
    spec: TrainSpec,
    inputs: Inputs,
    weights: Mapping[str, torch.Tensor],
    held_out: Sequence[Batch],
    place: Store,
    journal: Journal,
    shares: Mapping[str, float],
    about: Mapping[str, Any],
) -> None:
    """Export what was learnt, then create the result."""
    result: dict[str, Any] = {"stage": spec.stage.name, **about, **journal.summary(about["step"], shares)}
    if spec.kind == "vq":
        vq = VQTokenizer(inputs.config.vq)
        vq.load_state_dict({name.removeprefix("objective.vq."): tensor for name, tensor in weights.items()})
        frames = torch.as_tensor(held_out[0].images[:_PICTURED]).flatten(0, 1)
        journal.picture(reconstructions(vq.eval(), frames).numpy(), "reconstructions.png")
        result |= {"vq_id": save_vq(inputs.store, vq)}
    else:
        model = UPVLA(inputs.config)
        model.load_state_dict(dict(weights))
        meta = {"run": spec.key, "step": about["step"], "stage": spec.stage.name, "losses": result["losses"]}
        if about["bad_steps"]:
            meta["bad_steps"] = about["bad_steps"]
        if before := bad_steps_before(spec, inputs):
            meta["bad_steps_before"] = before
        meta |= {"train_plan": spec.train_plan, "validation_plan": spec.validation_plan, "parent": spec.parent_id}
        meta["datasets"] = {
            name: {"version": dataset.manifest.version, "content_id": dataset.manifest.content_id}
            for name, dataset in inputs.train.datasets.items()
        }
        by = {} if spec.tracking is None else spec.tracking.tags
        meta |= {name: by[name] for name in ("config", "git_commit") if name in by}
        bundle = inputs.bundle(model, meta)
        images, told = inputs.observations(_GOLDEN)
        golden = record(bundle, images, told) if told else None
        checkpoint = export(inputs.store, f"models/{spec.key}/{spec.stage.name}", replace(bundle, golden=golden))
        result |= {"url": checkpoint.url, "model_id": checkpoint.model_id}
    journal.keep_unsent(place)
    try:
        place.create_json(RESULT, result)
    except AlreadyExists:
        return  # an earlier attempt had come so far; its result stands


def bad_steps_before(spec: TrainSpec, inputs: Inputs) -> list[dict[str, Any]]:
    """What the stages passed over whose weights this one started from, each with its stage's name."""
    if inputs.parent is None:
        return list(spec.bad_steps_before)
    meta = inputs.parent.meta
    its_own = [{"stage": meta.get("stage"), **bad} for bad in meta.get("bad_steps", ())]
    return [*meta.get("bad_steps_before", ()), *its_own]


def predicted_frames(inputs: Inputs, engine: Engine, held_out: Sequence[Batch]) -> np.ndarray | None:
    """u8[3H,B*W,3]: held-out frames now, predicted for a chunk later, and as they then were, from their codes.

    Collective: every worker may hold a part of the weights, or of their average, so each draws frames of its own. None
    where one holds only questions.
    """
    assert inputs.vq is not None
    batch = max(held_out, key=lambda batch: len(batch.codes))
    if not all(engine.gather(len(batch.codes) > 0)):
        return None
    rows = slice(0, min(_PICTURED, len(batch.codes)))
    read = [torch.as_tensor(getattr(batch, name)[rows]) for name in ("images", "codes", "text_ids", "text_len")]
    with engine.evaluating():
        _, future = engine.call("predict", *(tensor.to(engine.device) for tensor in read))
    grid = tuple(side // inputs.config.vq.downsampling for side in inputs.config.vq.sides)
    shown = [read[1], future.cpu(), torch.as_tensor(batch.future_codes[rows])]
    with torch.no_grad():
        frames = [to_frames(inputs.vq.decode(codes[:, 0], (grid[0], grid[1]))) for codes in shown]
    return torch.cat([torch.cat(list(row), dim=1) for row in frames]).numpy()
