"""What a training step costs: the published row layout beside ours, one saving after the other.

    python benchmarks/model_step.py [--json [FILE]] [--only published|tiny] [--steps N] [--variants NAME ...]

`published` has the published sequence sizes (text budget 576, 1024 codes of a 512 px frame, 576 patches of a 336 px
frame, vocabulary 58,498); only width and depth are cut until a CPU bears it. `tiny` is the preset. Same weights, same
batch, float32 unless said otherwise. Each variant has a process of its own, so that its peak memory is its own; time is
the process's CPU time on one thread, which other work on the machine does not change.

online encoding      image codes of both frames and patches of the frozen tower are computed in the step, rows padded to
                     the text budget, logits of every position over the whole vocabulary (the published step)
cached codes         codes, and the frozen tower's patches, are read
trimmed              rows are as long as the batch's longest text
supervised head      logits where something is supervised, only
code softmax         image positions are normalised over the image codes
rows apart           each kind of row in its own pass of the decoder
checkpointing, bf16  switches, each on top of `rows apart`
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _figures import give, parse
from torch import Tensor

from upvla.model.config import ModelConfig, preset
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.types import Batch

VARIANTS: dict[str, dict[str, Any]] = {
    "online encoding": {"image_softmax": "full", "trim": False},
    "cached codes": {"image_softmax": "full", "trim": False},
    "trimmed": {"image_softmax": "full"},
    "supervised head": {"image_softmax": "full"},
    "code softmax": {"image_softmax": "codebook"},
    "rows apart": {"image_softmax": "codebook", "join_rows": False},
    "+ checkpointing": {"image_softmax": "codebook", "join_rows": False, "backbone": {"gradient_checkpointing": True}},
    "+ bf16": {"image_softmax": "codebook", "join_rows": False},
}
EVERY_POSITION = ("online encoding", "cached codes", "trimmed")
PUBLISHED = {
    "backbone": {"width": 64, "blocks": 2, "heads": 4, "mlp": 256},
    "vision": {"width": 64, "blocks": 3, "heads": 4, "mlp": 256},
    "vq": {
        "channels": 16,
        "encoder_multipliers": (1, 1, 1, 1, 1),
        "encoder_blocks": (1, 1, 1, 1, 1),
        "decoder_multipliers": (1, 1, 1, 1, 1),
        "decoder_blocks": (0, 0, 0, 0, 0),
    },
    "system_ids": tuple(range(100, 128)),
}
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {  # preset, changes, robot rows, question rows
    "published": ("base", PUBLISHED, 1, 1),
    "tiny": ("tiny", {}, 13, 3),
}
INSTRUCTION, CONVERSATION, ANSWER = 12, 120, 60  # tokens; capped by the budgets


def make_batch(config: ModelConfig, rows: int, questions: int) -> tuple[Batch, Tensor]:
    """Rows padded to the budgets, as the published loader hands them out, and the frames that the codes are of."""
    g = torch.Generator().manual_seed(0)
    text = torch.randint(1, 200, (rows, min(INSTRUCTION, config.text_budget - 2)), generator=g)
    ids = torch.full((questions, config.qa_budget), config.pad_id)
    said = min(CONVERSATION, config.qa_budget)
    ids[:, :said] = torch.randint(1, 200, (questions, said), generator=g)
    labels = torch.full_like(ids, -100)
    answer = slice(said - min(ANSWER, said // 2), said)
    labels[:, answer] = ids[:, answer]
    cameras, side = len(config.vision_cameras), config.vision.image_size
    height, width = config.vq.sides
    frames = torch.randint(0, 256, (2, rows * config.num_views, height, width, 3), generator=g).byte()
    batch = Batch(
        text_ids=text,
        text_len=torch.full((rows,), text.shape[1]),
        images=torch.randint(0, 256, (rows, cameras, side, side, 3), generator=g).byte(),
        codes=torch.zeros(rows, config.num_views, config.codes_per_view, dtype=torch.long),
        future_codes=torch.zeros(rows, config.num_views, config.codes_per_view, dtype=torch.long),
        actions=torch.rand(rows, config.chunk, config.action_dims, generator=g),
        action_is_pad=torch.zeros(rows, config.chunk, dtype=torch.bool),
        pre_mask=torch.ones(rows, dtype=torch.bool),
        act_mask=torch.ones(rows, dtype=torch.bool),
        qa_images=torch.randint(0, 256, (questions, cameras, side, side, 3), generator=g).byte(),
        qa_ids=ids,
        qa_labels=labels,
        positions=torch.arange(rows + questions),
    )
    return batch, frames


def with_codes(vq: VQTokenizer, batch: Batch, frames: Tensor) -> Batch:
    with torch.no_grad():
        current, future = (vq.encode_frames(part).view(batch.codes.shape) for part in frames)
    return batch._replace(codes=current, future_codes=future)


def with_features(model: UPVLA, batch: Batch) -> Batch:
    """The frozen tower's patches in place of frames; a tower that learns has to see the frames."""
    if not model.config.vision.frozen:
        return batch
    cameras = len(model.config.vision_cameras)
    with torch.no_grad():
        images, asked = (model.vision(part).unflatten(1, (cameras, -1)) for part in (batch.images, batch.qa_images))
    return batch._replace(images=images, qa_images=asked)


def published_loss(model: UPVLA, batch: Batch) -> Tensor:
    """The released loss: logits of every position of every row over the whole vocabulary, then sliced."""
    config, states = model.config, model.states(batch)
    logits = model.showo.lm_head(torch.cat([states.robot, states.qa]))
    rows = len(states.robot)
    at, asked = states.robot_rows.at["image"], states.qa_rows.at["text"]
    target = F.pad(batch.future_codes.flatten(1) + config.image_offset, (1, 1), value=config.soi_id)
    target[:, -1] = config.eoi_id
    pre = F.cross_entropy(logits[:rows, at.start - 1 : at.stop + 1].flatten(0, 1), target.flatten())
    labels = torch.full(logits.shape[:2], -100)[rows:]
    width = min(batch.qa_labels.shape[1], asked.stop - asked.start)
    labels[:, asked.start : asked.start + width] = batch.qa_labels[:, :width]
    mmu = F.cross_entropy(logits[rows:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    raw = model._raw_actions(states.robot, states.robot_rows)
    return pre + (raw - batch.actions).square().mean() + 0.1 * mmu


def our_loss(model: UPVLA, batch: Batch) -> Tensor:
    terms = model(batch).objectives
    weights = {"pre": 1.0, "act": 1.0, "mmu": 0.1}
    return torch.stack([weights[name] * term.total / term.count for name, term in terms.items()]).sum()


def measure(case: str, variant: str, steps: int) -> dict[str, float]:
    """One variant, in this process: CPU seconds a step (the best), peak memory in MB, the loss of the first step."""
    name, changes, rows, questions = CASES[case]
    config = preset(name, **{**changes, **_merged(changes, VARIANTS[variant])})
    torch.manual_seed(0)
    vq, model = VQTokenizer(config.vq).eval(), UPVLA(config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    raw, frames = make_batch(config, rows, questions)
    if variant == "online encoding":

        def batch() -> Batch:
            return with_codes(vq, raw, frames)

    else:
        ready = with_features(model, with_codes(vq, raw, frames))
        del vq, frames

        def batch() -> Batch:
            return ready

    loss_of: Callable[[UPVLA, Batch], Tensor] = published_loss if variant in EVERY_POSITION else our_loss
    seconds, first = [], float("nan")
    _forget_peak()
    for step in range(steps + 1):
        began = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=variant == "+ bf16"):
            loss = loss_of(model, batch())
        loss.backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
        first = float(loss.detach()) if step == 0 else first
    return {"seconds": min(seconds[1:]), "rows": rows + questions, "peak_mb": _peak_mb(), "loss": first}


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return {k: {**under.get(k, {}), **v} if isinstance(v, dict) else v for k, v in over.items()}


def _forget_peak() -> None:
    """From here on, where the kernel can do it: what building the model took is not the step's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def apart(case: str, variant: str, steps: int) -> dict[str, float]:
    """`measure` in a forked process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(measure(case, variant, steps)))
    process.start()
    theirs.close()
    try:
        return dict(ours.recv())
    except EOFError as error:
        process.join()
        raise RuntimeError(
            f"{case}, {variant}: the process ended with {process.exitcode}; too little memory?"
        ) from error
    finally:
        process.join()


def table(case: str, variants: Sequence[str], steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    print(f"\n{case}\n{'variant':<16} {'rows/s':>8} {'x':>6} {'peak MB':>8} {'of first':>8} {'loss':>8}")
    for variant in variants:
        found = {"variant": variant} | apart(case, variant, steps)
        found["rows_per_s"] = found["rows"] / found["seconds"]
        rows.append(found)
        base = rows[0]
        print(
            f"{variant:<16} {found['rows_per_s']:>8.3g} {found['rows_per_s'] / base['rows_per_s']:>6.2f} "
            f"{found['peak_mb']:>8.0f} {found['peak_mb'] / base['peak_mb']:>8.0%} {found['loss']:>8.4f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one that is not")
    options = parse(parser)
    torch.set_num_threads(1)  # before the forks; and so that CPU time is wall time on a free core
    cases = [case for case in CASES if options.only in (None, case)]
    found = {case: table(case, options.variants, options.steps) for case in cases}
    give(options, found)


if __name__ == "__main__":
    main()
