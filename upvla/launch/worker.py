"""One training worker: introduces data, model, engine, resume points and tracking to each other, then lets `fit` run.

Three stages take the same path. `vq` trains the image tokenizer on frames; `policy` trains UP-VLA on codes of a
trained one. What differs is the module, the reader and what is exported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from upvla.checkpoint import export
from upvla.data.loader import Loader
from upvla.data.mixture import Mixture
from upvla.data.samples import Collator
from upvla.errors import AlreadyExists, AlreadyOwned, BadStep, NoSpace, NotFound
from upvla.launch.inputs import Inputs, open_inputs
from upvla.launch.journal import Journal
from upvla.launch.lease import require_owner
from upvla.launch.notices import Notices
from upvla.launch.tokenizers import save_vq
from upvla.launch.train import BAD_STEPS, FAILURE, LEFT, RESULT, TrainSpec
from upvla.launch.weights import start_from
from upvla.model.sequence import conditioned, num_tokens
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer, VQTraining, reconstructions, to_frames
from upvla.rollout.golden import record
from upvla.store import Store, content_hash, open_store
from upvla.train import group, resume
from upvla.train.config import accumulation_steps
from upvla.train.engine import Engine, build_engine
from upvla.train.guard import Best, Guard
from upvla.train.loop import Ended, fit
from upvla.train.meter import Meter, forward_flops, peak_flops
from upvla.types import Batch, Losses, Sample

_PICTURED = 8  # held-out frames in the picture of an image tokenizer
_GOLDEN = 4  # held-out observations that go with an exported model
_NAMED = 16  # samples of a bad step in the log; its record has all


# ----------------------------------------------------------------------------------------------------- one worker


def work(settings: Mapping[str, Any]) -> None:
    """Body of every worker of an initialised process group. It runs again, and resumes, when one of them was lost.

    What no retry would change is everybody's: all workers end in good order and the record says why. So is leaving
    before the end: the record says for what, and the driver decides what comes next.
    """
    began = time.monotonic()
    spec = TrainSpec.model_validate_json(settings["spec"])
    place = open_store(spec.store_url).sub(spec.prefix)
    if place.exists(RESULT):
        return
    torch.set_num_threads(settings["threads"])
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    inputs = open_inputs(spec, world_size)
    if world_size not in (fitting := inputs.world_sizes(spec)):
        if rank == 0:  # an elastic group was given a number between two that fit: the driver asks for the lower one
            most = max((n for n in fitting if n < world_size), default=fitting[0])
            place.write_json(LEFT, {"reason": "resize", "num_workers": [fitting[0], most]})
        return
    journal = Journal(_tagged(spec, inputs) if rank == 0 else spec, rank, began, inputs.train)
    ended = Ended(0, "failed")
    try:
        ended = _train(spec, inputs, place, journal, settings)
    except (BadStep, NoSpace, AlreadyOwned) as error:
        if rank == 0 and not isinstance(error, AlreadyOwned):
            place.write_json(FAILURE, {"code": error.code, "message": str(error)})
    finally:
        journal.close({"failed": "FAILED", "finished": "FINISHED", "early": "FINISHED"}.get(ended.reason, "KILLED"))
    if rank == 0 and ended.reason not in ("failed", "finished", "early"):
        reason, *nodes = ended.reason.split()
        place.write_json(LEFT, {"reason": reason, "step": ended.step, "nodes": nodes})


def _train(spec: TrainSpec, inputs: Inputs, place: Store, journal: Journal, settings: Mapping[str, Any]) -> Ended:
    """From the last resume point, if there is one, to the result, or to where somebody asked everybody to leave."""
    stage, threads, what = spec.stage, settings["threads"], f"training {spec.prefix}"
    points, identity = place.sub("resume"), {"key": spec.key, "train_plan": spec.train_plan}
    scratch = spec.scratch_folder

    def open_engine(step: int | None = None) -> tuple[Engine, resume.ResumePoint | None]:
        return resume.open_engine(
            partial(_build, spec, inputs if step is None else open_inputs(spec)),  # a module is wrapped only once
            points,
            identity=identity,
            scratch=scratch,
            zero_stage=spec.engine.zero_stage,
            step=step,
        )

    engine, point = open_engine()
    meta = point.meta if point else {}
    guard = Guard(stage.guard, meta.get("guard"), partial(name_samples, stage.name, inputs.train, engine.rank))
    start = _after_rollback(place, engine, guard, point.step if point else 0)
    journal.begin(start, meta)
    with _loader(spec, inputs, inputs.validation, engine, 0, threads) as validation:
        held_out = [batch for _ in range(stage.eval_batches) for batch in next(validation)]
    meter = Meter(
        meta.get("meter"),
        began=settings.get("began"),
        tokens=partial(num_tokens, inputs.config) if spec.kind == "policy" else None,
        flops_per_row=3 * forward_flops(engine, held_out[0]) / len(held_out[0].positions),
        peak_flops=peak_flops(engine.device, spec.engine.precision, spec.engine.peak_tflops),
    )
    best = Best(stage.best, journal.history) if stage.best else None
    learnt_from = _learnt_from(spec, inputs)
    saver = resume.Saver(
        engine,
        points,
        identity=identity,
        scratch=scratch,
        retention=resume.Retention(stage.keep_last, stage.keep_every),
        owns=lambda: require_owner(place, settings["owner"], what) if settings.get("owner") else None,
    )

    def save(step: int) -> None:
        told = {**learnt_from, "position": step * inputs.train.plan.global_batch}
        told |= {**journal.state(), "meter": meter.state(), "guard": guard.state()}
        saver.save(step, told, keep=(best.step,) if best and best.step else ())

    def picture(step: int) -> None:  # on every worker: each holds a part of an average
        journal.picture(predicted_frames(inputs, engine, held_out[0]), f"predicted/step-{step:08d}.png")

    with _loader(spec, inputs, inputs.train, engine, start, threads) as batches, Notices(place, settings) as notices:
        try:
            ended = fit(
                engine,
                batches,
                stage,
                start_step=start,
                validation=held_out,
                log=journal.log,
                save=save,
                picture=picture,
                meter=meter,
                guard=guard,
                best=best,
                asked=notices.reason,
            )
        except BadStep as bad:
            saver.wait()
            if not guard.rolls_back:
                raise
            if engine.rank == 0:
                place.write_json(BAD_STEPS, {"go_on_after": bad.step, "bad_steps": guard.bad_steps})
            return Ended(bad.step, "rollback")
    with meter.paused(stalls=True):
        saver.wait()
    if ended.reason not in ("finished", "early"):
        return ended
    exported = ended.step
    if best and best.step not in (None, ended.step):
        exported = int(best.step or 0)
        with engine.patient():
            engine, _ = open_engine(exported)
    weights = engine.full_weights()
    shares = meter.shares()
    about = {"step": exported, "ended": ended.reason, "bad_steps": guard.bad_steps}
    finish = partial(_finish, spec, inputs, weights, held_out, place, journal, shares, about)
    group.together(finish if engine.rank == 0 else _nothing)  # nobody leaves, and tears the group down, before it
    return ended


def _tagged(spec: TrainSpec, inputs: Inputs) -> TrainSpec:
    """With the id of its statistics for whoever looks at its curves; the line does not open the data."""
    if spec.tracking is None:
        return spec
    tags = spec.tracking.tags | {"stats_id": content_hash(inputs.stats)}
    return spec.model_copy(update={"tracking": spec.tracking.model_copy(update={"tags": tags})})


def _learnt_from(spec: TrainSpec, inputs: Inputs) -> dict[str, Any]:
    """What a resume point says of its data and its configuration, to whoever finds it."""
    versions = {name: dataset.manifest.version for name, dataset in inputs.train.datasets.items()}
    datasets = [f"{name}@{version}" for name, version in sorted(versions.items())]
    return {"datasets": datasets, "stats_id": content_hash(inputs.stats), "config": spec.config}


def _build(spec: TrainSpec, inputs: Inputs, universal: bool) -> Engine:
    stage, world_size = spec.stage, torch.distributed.get_world_size()
    engine = build_engine(
        _module(spec, inputs),
        spec.engine,
        stage.optimizer,
        total_steps=stage.steps,
        micro_batch=stage.micro_batch,
        accumulation=accumulation_steps(inputs.train.plan.global_batch, world_size, stage.micro_batch),
        freeze=stage.freeze,
        ema_decay=stage.ema_decay,
        universal=universal,
    )
    torch.manual_seed(spec.seed * 1_000_003 + engine.rank)  # dropout; a restored state replaces it
    return engine


def _after_rollback(place: Store, engine: Engine, guard: Guard, start: int) -> int:
    """The step to go on from: where a bad step has sent the run back, the weights are older than the data."""
    try:
        told = place.read_json(BAD_STEPS)
    except NotFound:
        return start
    if told["go_on_after"] <= start:
        return start
    guard.bad_steps = list(told["bad_steps"])
    engine.skip_schedule(told["go_on_after"] - start)
    return int(told["go_on_after"])


def name_samples(stage: str, mixture: Mixture, rank: int, positions: Sequence[int]) -> list[dict[str, Any]]:
    """The samples of a bad step, by what they can be looked up by; the first worker says so."""
    samples = [mixture.origin(position) for position in positions]
    if rank == 0 and samples:
        said = [f"{s['dataset']} {s['recording']} step {s['step']}" for s in samples[:_NAMED]]
        more = f" and {len(samples) - _NAMED} more" if len(samples) > _NAMED else ""
        print(f"{stage}: a bad step, of samples {', '.join(said)}{more}", flush=True)
    return samples


def _nothing() -> None:
    """What the workers do that leave a collective task to one of them."""


def _finish(
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


def _module(spec: TrainSpec, inputs: Inputs) -> nn.Module:
    torch.manual_seed(spec.seed)
    if spec.kind == "vq":
        return FrameObjective(VQTokenizer(inputs.config.vq))
    if inputs.parent is not None:
        return inputs.parent.model.train()
    model = UPVLA(inputs.config)
    start_from(model, spec.weights_urls)
    return model


def predicted_frames(inputs: Inputs, engine: Engine, batch: Batch) -> np.ndarray:
    """u8[3H,B*W,3]: held-out frames now, predicted for a chunk later, and as they then were, from their codes.

    Collective: with averaged weights every worker brings its part of them.
    """
    assert inputs.vq is not None
    rows = slice(0, min(_PICTURED, len(batch.codes)))
    read = [torch.as_tensor(getattr(batch, name)[rows]) for name in ("images", "codes", "text_ids", "text_len")]
    with engine.evaluating():
        model = cast(UPVLA, engine.training_module)
        images, codes, text_ids, text_len = (tensor.to(engine.device) for tensor in read)
        _, future = model.predict(images, codes, text_ids, text_len)
    grid = tuple(side // inputs.config.vq.downsampling for side in inputs.config.vq.sides)
    shown = [read[1], future.cpu(), torch.as_tensor(batch.future_codes[rows])]
    with torch.no_grad():
        frames = [to_frames(inputs.vq.decode(codes[:, 0], (grid[0], grid[1]))) for codes in shown]
    return torch.cat([torch.cat(list(row), dim=1) for row in frames]).numpy()


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
