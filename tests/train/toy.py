"""A small module that obeys UPVLA's training contract, and batches for it, and a group of real worker processes."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import nn

from upvla.types import Batch, Losses, Term

GLOBAL_BATCH = 8
CHUNK, DIMS = 3, 2
_ANSWER_S = 600  # a machine that does other things, too


class ToyVLA(nn.Module):
    """Instruction ids -> actions (`act`, padded steps ignored); questions -> next id (`mmu`, -100 ignored)."""

    def __init__(self, vocabulary: int = 16, width: int = 12, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.body = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout)
        )
        self.latents = nn.Parameter(torch.randn(1, width) * 0.1)
        self.action_head = nn.Linear(width, CHUNK * DIMS)
        self.word_head = nn.Linear(width, vocabulary)

    def forward(self, batch: Batch) -> Losses:
        hidden = self.body(self.table(batch.text_ids).mean(1) + self.latents)
        actions = self.action_head(hidden).view(-1, CHUNK, DIMS)
        real = (~batch.action_is_pad).float()
        squared = ((actions.float() - batch.actions).square().mean(-1) * real).sum()
        logits = self.word_head(self.body(self.table(batch.qa_ids))).float()
        words = nn.functional.cross_entropy(logits.flatten(0, 1), batch.qa_labels.flatten(), reduction="sum")
        return Losses(
            {"act": Term(squared, real.sum()), "mmu": Term(words, (batch.qa_labels != -100).sum().float())},
            {"act_max": Term(actions.detach().abs().amax(), torch.ones(()))},
        )

    def counts(self, batch: Batch) -> dict[str, float]:
        return {"act": float((~batch.action_is_pad).sum()), "mmu": float((batch.qa_labels != -100).sum())}


def row(position: int, vocabulary: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(position))
    ids = rng.integers(0, vocabulary, 5)
    labels = np.where(rng.random(5) < 0.6, (ids * 3 + 1) % vocabulary, -100)
    pad = np.arange(CHUNK) >= rng.integers(1, CHUNK + 1)
    return {
        "ids": ids,
        "labels": labels,
        "actions": np.sin(ids[: CHUNK * DIMS].sum() + np.arange(CHUNK * DIMS)),
        "pad": pad,
    }


def collate(positions: list[int]) -> Batch:
    rows = [row(p) for p in positions]
    ids = np.stack([r["ids"] for r in rows])
    nothing = np.zeros((len(rows), 0), np.uint8)
    return Batch(
        text_ids=ids,
        text_len=np.full(len(rows), 5),
        images=nothing,
        codes=nothing,
        future_codes=nothing,
        actions=np.stack([r["actions"] for r in rows]).reshape(-1, CHUNK, DIMS).astype(np.float32),
        action_is_pad=np.stack([r["pad"] for r in rows]),
        pre_mask=np.ones(len(rows), np.bool_),
        act_mask=np.ones(len(rows), np.bool_),
        qa_images=nothing,
        qa_ids=ids,
        qa_labels=np.stack([r["labels"] for r in rows]),
        positions=np.asarray(positions),
    )


def batches(rank: int, world_size: int, accumulation: int = 1, start_step: int = 0) -> Iterator[list[Batch]]:
    """Global batch k holds positions [8k, 8k+8); a rank takes every world_size-th, in `accumulation` micro-batches."""
    step = start_step
    while True:
        mine = [p for p in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH) if p % world_size == rank]
        size = len(mine) // accumulation
        yield [collate(mine[i * size : (i + 1) * size]) for i in range(accumulation)]
        step += 1


def toy(dropout: float = 0.0, width: int = 12) -> ToyVLA:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return ToyVLA(dropout=dropout, width=width)


class Workers:
    """`world_size` processes in one gloo group; `run(fn, *args)` calls it on each and returns results by rank."""

    def __init__(self, world_size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world_size, port), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((fn, args, kwargs))
        answers = [
            pipe.recv() if pipe.poll(_ANSWER_S) else ("failed", f"no answer in {_ANSWER_S} s") for pipe in self._pipes
        ]
        for status, value in answers:
            if status == "raised":
                raise value
            if status == "failed":
                raise RuntimeError(value)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(pipe: Any, rank: int, world_size: int, port: int) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    from upvla.errors import UpvlaError
    from upvla.train.group import wait_at_most

    while True:
        fn, args, kwargs = pipe.recv()
        wait_at_most(_ANSWER_S)  # an engine before has left its own limit
        try:
            pipe.send(("done", fn(*args, **kwargs)))
        except UpvlaError as error:
            pipe.send(("raised", error))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
