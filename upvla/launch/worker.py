"""One training worker: introduces data, model, engine, resume points and tracking to each other, then lets `fit` run.

Three stages take the same path. `vq` trains the image tokenizer on frames; `policy` trains UP-VLA on codes of a
trained one. What differs is the module, the reader and what is exported.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from upvla.data.loader import Loader
from upvla.data.mixture import Mixture
from upvla.data.samples import Collator
from upvla.errors import AlreadyOwned, BadStep, ConfigError, Corrupt, Mismatch, NoSpace, NotFound, StoreError
from upvla.launch.inputs import Inputs, open_inputs
from upvla.launch.journal import Journal
from upvla.launch.lease import require_owner
from upvla.launch.notices import Notices
from upvla.launch.results import finish, predicted_frames
from upvla.launch.train import BAD_STEPS, CLAIM, FAILURE, LEFT, RESULT, TrainSpec
from upvla.launch.weights import start_from
from upvla.model.sequence import conditioned, num_tokens
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer, VQTraining
from upvla.store import Store, content_hash, open_store
from upvla.train import group, resume
from upvla.train.config import micro_batch_of
from upvla.train.engine import Engine, build_engine
from upvla.train.guard import Best, Guard
from upvla.train.loop import Ended, fit, validate
from upvla.train.meter import Meter, forward_flops, peak_flops
from upvla.types import Batch, Losses, Sample

T = TypeVar("T")
log = logging.getLogger(__name__)

_STORE_PAUSE_S = 5.0
_STATUS = {"failed": "FAILED", "finished": "FINISHED", "early": "FINISHED", "superseded": ""}
"""Of the run in MLflow, by how a life ended for good; whoever was superseded leaves it as it is."""
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
    if _once_it_answers(lambda: place.exists(RESULT), spec.engine.start_timeout_s):
        return
    torch.set_num_threads(settings["threads"])
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    owns = partial(_require_owner, spec, place, settings)

    def tell(name: str, value: Mapping[str, Any]) -> None:
        """To the driver, by the first worker; a trainer that was taken over has nothing to say any more."""
        if rank == 0:
            with suppress(AlreadyOwned):
                owns()
                place.write_json(name, value)

    try:
        inputs = open_inputs(spec, world_size)
    except Corrupt as error:  # a parent's weights, which the driver does not read
        tell(FAILURE, {"code": error.code, "message": str(error)})
        return
    if world_size not in (fitting := inputs.world_sizes(spec)):
        # an elastic group was given a number between two that fit: the driver asks for the lower one
        most = max((n for n in fitting if n < world_size), default=fitting[0])
        tell(LEFT, {"reason": "resize", "num_workers": [fitting[0], most]})
        return
    journal = Journal(_tagged(spec, inputs) if rank == 0 else spec, rank, began, inputs.train)
    ended = Ended(0, "failed")
    try:
        ended = _train(_Life(spec, inputs, place, journal, settings, owns, tell))
    except (BadStep, NoSpace, ConfigError, Mismatch) as error:
        tell(FAILURE, {"code": error.code, "message": str(error)})
    except AlreadyOwned:
        ended = Ended(0, "superseded")  # whoever owns the key now says how it ends
    finally:
        if ended.reason not in _STATUS:  # first: the notice may be short, and MLflow slow
            reason, *nodes = ended.reason.split()
            tell(LEFT, {"reason": reason, "step": ended.step, "nodes": nodes})
        journal.close(_STATUS.get(ended.reason, "KILLED"), place)


class _Life(NamedTuple):
    """What one life of a worker has at hand."""

    spec: TrainSpec
    inputs: Inputs
    place: Store
    journal: Journal
    settings: Mapping[str, Any]
    owns: Callable[[], None]  # raises `AlreadyOwned` where a later trainer has the key
    tell: Callable[[str, Mapping[str, Any]], None]

    @property
    def points(self) -> Store:
        return self.place.sub("resume")

    def room_for_more(self, engine: Engine) -> Callable[[], bool]:
        """For the first worker of an elastic group: whether the next number that fits would find its places."""
        needs, now = self.settings.get("needs"), engine.world_size
        more = [number for number in self.inputs.world_sizes(self.spec) if number > now]
        if not needs or not more or engine.rank > 0:
            return lambda: False
        from upvla.launch.cluster import has_room_for, keeps_places_for  # a worker without Ray does without it

        run_id, total = self.place.read_json(CLAIM)["places_of"], more[0]
        asked = total <= self.settings["most"]  # else this group's number was lowered, and Ray keeps no more for it
        return lambda: has_room_for(total - now, needs) and (not asked or keeps_places_for(total, run_id, needs))

    def open_engine(self, step: int | None = None) -> tuple[Engine, resume.ResumePoint | None]:
        """As the newest resume point left it, or that of `step`."""
        spec = self.spec
        return resume.open_engine(
            partial(_build, spec, self.inputs if step is None else open_inputs(spec)),  # a module is wrapped only once
            self.points,
            identity=spec.identity,
            scratch=spec.scratch_folder,
            zero_stage=spec.engine.zero_stage,
            step=step,
        )


class _Learnt(NamedTuple):
    """How a life's training ended, and what its result says of it."""

    ended: Ended
    exported: int  # step whose weights are the result
    held_out: Sequence[Batch]
    shares: Mapping[str, float]
    bad_steps: list[dict[str, Any]]


def _train(life: _Life) -> Ended:
    """From the last resume point, if there is one, to the result, or to where somebody asked everybody to leave."""
    group.agree(partial(life.inputs.require_space, life.spec))
    engine, point = life.open_engine()
    learnt = _learn(life, engine, point)
    if learnt.ended.reason not in ("finished", "early"):
        return learnt.ended
    if learnt.exported != learnt.ended.step:  # an earlier validation was the best
        group.wait_at_most(life.spec.engine.patience_s)
        del engine  # there need not be room for two
        gc.collect()
        engine, _ = life.open_engine(learnt.exported)
    weights = engine.full_weights()
    about = {"step": learnt.exported, "ended": learnt.ended.reason, "bad_steps": learnt.bad_steps}
    export = partial(
        finish, life.spec, life.inputs, weights, learnt.held_out, life.place, life.journal, learnt.shares, about
    )
    group.together(export if engine.rank == 0 else _nothing)  # nobody leaves, and tears the group down, before it
    return learnt.ended


def _learn(life: _Life, engine: Engine, point: resume.ResumePoint | None) -> _Learnt:
    """Let `fit` run with everything that it is handed. Nothing of that outlives this function."""
    spec, inputs, journal, settings = life.spec, life.inputs, life.journal, life.settings
    stage, threads, meta = spec.stage, settings["threads"], point.meta if point else {}
    guard = Guard(stage.guard, meta.get("guard"), partial(name_samples, stage.name, inputs.train, engine.rank))
    start = _after_rollback(life.place, engine, guard, point.step if point else 0)
    journal.begin(start, meta)
    with _loader(spec, inputs, inputs.validation, engine, 0, threads) as validation:
        held_out = [batch for _ in range(stage.eval_batches) for batch in next(validation)]
    if start == stage.steps and start not in journal.history:  # the last step was a bad one, and went back
        journal.log(validate(engine, held_out), start)
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
        life.points,
        identity=spec.identity,
        scratch=spec.scratch_folder,
        retention=resume.Retention(stage.keep_last, stage.keep_every),
        owns=life.owns,
    )

    def save(step: int) -> None:
        told = {**learnt_from, "position": step * inputs.train.plan.global_batch}
        told |= {**journal.state(), "meter": meter.state(), "guard": guard.state()}
        saver.save(step, told, keep=(best.step,) if best and best.step else ())

    def picture(step: int) -> None:  # on every worker: each may hold a part of the weights
        if (drawn := predicted_frames(inputs, engine, held_out)) is not None:
            journal.picture(drawn, f"predicted/step-{step:08d}.png")

    notices = Notices(life.place, settings, life.room_for_more(engine))
    with _loader(spec, inputs, inputs.train, engine, start, threads) as batches, notices as asked:
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
                asked=asked.reason,
            )
        except BadStep as bad:
            saver.wait()
            if not guard.rolls_back:
                raise
            life.tell(BAD_STEPS, {"go_on_after": bad.step, "bad_steps": guard.bad_steps})
            return _Learnt(Ended(bad.step, "rollback"), 0, (), {}, [])
    with meter.paused(stalls=True):
        saver.wait()
    if stage.best and best and best.step is None and ended.reason in ("finished", "early"):
        raise ConfigError(f"{stage.name}: no validation had a finite {stage.best.metric}, so none was the best")
    exported = best.step if best and best.step else ended.step
    return _Learnt(ended, exported, held_out, meter.shares(), guard.bad_steps)


def _require_owner(spec: TrainSpec, place: Store, settings: Mapping[str, Any]) -> None:
    if settings.get("owner"):
        require_owner(place, settings["owner"], f"training {spec.prefix}")


def _once_it_answers(ask: Callable[[], T], patience_s: float) -> T:
    """What the store says, when it can be reached again: a life that ends for it would count as a failure."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return ask()
        except StoreError as error:
            if time.monotonic() > until:
                raise
            log.warning("waiting for the store (%s)", error)
            time.sleep(_STORE_PAUSE_S)


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
    rows = _rows(spec, inputs.train, world_size)
    engine = build_engine(
        _module(spec, inputs),
        spec.engine,
        stage.optimizer,
        total_steps=stage.steps,
        micro_batch=rows,
        accumulation=inputs.train.plan.global_batch // (world_size * rows),
        freeze=stage.freeze,
        ema_decay=stage.ema_decay,
        universal=universal,
    )
    torch.manual_seed(spec.seed * 1_000_003 + engine.rank)  # dropout; a restored state replaces it
    return engine


def _rows(spec: TrainSpec, mixture: Mixture, world_size: int) -> int:
    """Of a micro-batch."""
    return micro_batch_of(mixture.plan.global_batch, world_size, spec.stage.micro_batch)


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
        condition = partial(conditioned, inputs.config) if inputs.config.description else None
        collate = Collator(reader.shape, text.encode, text.encode_turns, text.pad_id, condition)
    return Loader(
        mixture,
        reader,
        collate,
        rank=engine.rank,
        world_size=engine.world_size,
        micro_batch=_rows(spec, mixture, engine.world_size),
        start_step=start_step,
        threads=threads,
    )


def frames_only(samples: Sequence[Sample]) -> Batch:
    """Collate of the tokenizer's training: `images` u8[n,K,H,W,3] and `positions`; everything else is empty."""
    images = np.stack([np.stack(list(sample.images.values())) for sample in samples])
    empty = {name: np.zeros((len(samples), 0), np.int64) for name in Batch._fields}
    return Batch(**empty | {"images": images, "positions": np.array([sample.position for sample in samples])})
