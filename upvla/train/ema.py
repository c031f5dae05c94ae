"""A moving average of the weights, kept in shards: every worker averages its own 1/W of every parameter.

    average <- decay * average + (1 - decay) * weights        after every optimiser step

so it costs 4 bytes a parameter divided by the workers, and the same arithmetic for every ZeRO stage and world size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from upvla.errors import Corrupt

Shards = Mapping[str, Tensor]
"""Parameter name -> this worker's flat part, ceil(numel / W) elements and fewer, or none, at the end."""


class Ema:
    """`shards()` gives this worker's parts of the live weights, `spread` writes parts back into the live module."""

    def __init__(self, shards: Callable[[], Shards], spread: Callable[[Shards], None], decay: float) -> None:
        self._shards, self._spread, self._decay = shards, spread, decay
        self.average = {name: tensor.clone() for name, tensor in shards().items()}

    def update(self) -> None:
        live = self._shards()
        torch._foreach_lerp_(list(self.average.values()), [live[name] for name in self.average], 1.0 - self._decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the module has the averaged weights; afterwards its own again, bit for bit. Collective."""
        trained = {name: tensor.clone() for name, tensor in self._shards().items()}
        self._spread(self.average)
        try:
            yield
        finally:
            self._spread(trained)

    def load(self, saved: Sequence[Shards], rank: int, world_size: int) -> None:
        """From the parts of all workers of another life, however many they were."""
        for name, mine in self.average.items():
            if any(name not in part for part in saved):
                raise Corrupt(f"the resume point holds no average of {name!r}: it was saved without `ema_decay`")
            whole = torch.cat([part[name] for part in saved])
            start = shard_size(len(whole), world_size) * rank
            mine.copy_(whole[start : start + len(mine)])


def shard_size(numel: int, world_size: int) -> int:
    """Elements of a parameter that one worker holds: ZeRO 3's own rule, so that its shards are these."""
    return -(-numel // world_size)


def shard_of(flat: Tensor, rank: int, world_size: int) -> Tensor:
    """This worker's part of a whole flat parameter: a view, empty where the last workers have nothing left."""
    size = shard_size(flat.numel(), world_size)
    return flat[min(rank * size, flat.numel()) : min((rank + 1) * size, flat.numel())]
