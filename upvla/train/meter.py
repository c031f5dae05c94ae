"""How fast training goes and where its time goes: one clock a worker, read together.

    wall = trained + validated + stalled for resume points + started up + what a killed life had not saved

Goodput is the trained share of the wall clock since the run's very first start, so a restart, a recomputed step and a
stall all lower it. It needs what earlier lives have trained, waited and stalled: `state()` travels in the resume point.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from upvla.train.engine import Engine
from upvla.types import Batch

GPU_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.0, "A10": 125.0, "T4": 65.0}
"""Dense bf16 (T4: fp16) products by device name, as their data sheets state them."""

_SPENT = ("trained_s", "waited_s", "stalled_s")  # of all lives
_PROBE_SIDE, _PROBE_S = 1024, 0.1


class Meter:
    """`tokens(batch)` counts decoder positions without padding; `flops_per_row` is forward and backward of one row.
    `began` is when this life was asked for (Unix time, s): of the run's first one it starts the clock.
    """

    def __init__(
        self,
        state: Mapping[str, float] | None = None,
        *,
        began: float | None = None,
        tokens: Callable[[Batch], int] | None = None,
        flops_per_row: float = 0.0,
        peak_flops: float = 0.0,
    ) -> None:
        state = state or {}
        self._tokens, self._flops_per_row, self._peak_flops = tokens, flops_per_row, peak_flops
        self._first_start = float(state.get("first_start_unix_s", began or time.time()))
        self._trained_s, self._waited_s, self._stalled_s = (float(state.get(name, 0.0)) for name in _SPENT)
        self.restart()

    def restart(self) -> None:
        """Begin an interval: what came before (validation, a stall) is not training time."""
        self._began = time.perf_counter()
        self._waited = self._stalled = 0.0
        self._rows = self._steps = self._seen_tokens = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self, *, stalls: bool = False) -> Iterator[None]:
        """Around what is not training; a stall for a resume point is reported against the interval's steps."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self._began += spent
        self._stalled += spent if stalls else 0.0

    def count(self, micro_batches: Sequence[Batch]) -> None:
        self._rows += sum(len(batch.positions) for batch in micro_batches)
        if self._tokens is not None:
            self._seen_tokens += sum(self._tokens(batch) for batch in micro_batches)
        self._steps += 1

    def read(self, engine: Engine) -> dict[str, float]:
        """Means over the interval and the workers; begins the next interval. Collective."""
        elapsed = max(time.perf_counter() - self._began, 1e-9)
        self._trained_s += elapsed
        self._waited_s += self._waited
        self._stalled_s += self._stalled
        mine = [elapsed, self._rows, self._waited, self._stalled, self._seen_tokens, peak_memory_bytes()]
        wall, rows, waited, stalled, tokens, memory = engine.sum_over_workers(mine)
        elapsed, steps = wall / engine.world_size, max(self._steps, 1)
        lived = max(time.time() - self._first_start, elapsed)
        found = {
            "speed/samples_per_s": rows / elapsed,
            "speed/step_s": elapsed / steps,
            "speed/data_wait_pct": 100.0 * waited / wall,
            "speed/checkpoint_stall_pct": 100.0 * stalled / wall,
            "speed/goodput_pct": 100.0 * min(1.0, self._trained_s / lived),
            "memory/peak_gb": memory / engine.world_size / 1e9,
        }
        if self._tokens is not None:
            found["speed/tokens_per_s"] = tokens / elapsed
        if self._flops_per_row and self._peak_flops:
            found["speed/mfu_pct"] = 100.0 * rows * self._flops_per_row / (wall * self._peak_flops)
        self.restart()
        return found

    def shares(self) -> dict[str, float]:
        """Of the whole run until now, as this worker saw it: waits and stalls beside its training, and goodput."""
        spent = self.state()
        trained = max(spent["trained_s"], 1e-9)
        lived = max(time.time() - self._first_start, trained)
        return {
            "data_wait_pct": 100.0 * spent["waited_s"] / trained,
            "checkpoint_stall_pct": 100.0 * spent["stalled_s"] / trained,
            "goodput_pct": 100.0 * spent["trained_s"] / lived,
        }

    def state(self) -> dict[str, float]:
        now = (time.perf_counter() - self._began, self._waited, self._stalled)
        before = (self._trained_s, self._waited_s, self._stalled_s)
        spent = {name: old + new for name, old, new in zip(_SPENT, before, now, strict=True)}
        return {"first_start_unix_s": self._first_start, **spent}


def peak_memory_bytes() -> float:
    """The most this worker has held: of its GPU where it has one, else of main memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def forward_flops(engine: Engine, batch: Batch) -> float:
    """Operations of the products of one forward pass, by torch's formulas. Leaves no trace. Collective."""
    with torch.random.fork_rng(), engine.evaluating(), _Products() as products:
        engine.forward(batch)
    return products.flops


class _Products(TorchDispatchMode):
    """Adds up what every kernel that torch has a formula for costs. (Its own counter follows modules, too, with hooks
    that do not bear a parameter as an argument.)"""

    flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def peak_flops(device: torch.device, precision: str, stated_tflops: float | None) -> float:
    """What a worker's device could do in a second: as stated, by the GPU's name, or by trying products on a CPU."""
    if stated_tflops is not None:
        return stated_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((1e12 * tflops for known, tflops in GPU_TFLOPS.items() if known in name), 0.0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(_PROBE_SIDE, _PROBE_SIDE, dtype=dtype)
    a @ a
    began, products = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < _PROBE_S:
        a @ a
        products += 1
    return 2.0 * _PROBE_SIDE**3 * products / spent
