"""Optimiser state that rests on a local disk (`offload: nvme`), into resume points and back.

DeepSpeed's own way copies its swap files, under ids that another process need not give again, and forgets the groups
too small to be swapped and how many steps there were. So here every group is brought into memory, one at a time, and
becomes a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from upvla.errors import Mismatch

_PART = "disk_{:05d}_{:05d}.pt"  # rank, group


class _Group(NamedTuple):
    """Parameters that are swapped together: this worker's part of them."""

    number: int
    weights: torch.Tensor  # flat float32
    state: dict[str, Any]  # the optimiser's
    options: dict[str, Any]  # those of the optimiser's group that it belongs to


def save(zero: Any, folder: Path, rank: int) -> None:
    """A file a group of the ZeRO 3 optimiser `zero`, into this worker's own `folder`."""
    for group in _groups(zero):
        tensors = {name: value.detach().clone() for name, value in group.state.items()}  # a view would bring its buffer
        part = {"weights": group.weights.detach().clone(), "lr": float(group.options["lr"]), "state": tensors}
        torch.save(part, folder / _PART.format(rank, group.number))


def load(zero: Any, folder: Path, rank: int) -> None:
    """What `save` wrote, into a new optimiser and the module's weights. Needs as many workers as wrote it."""
    zero._partition_all_parameters()
    for group in _groups(zero):
        part = torch.load(folder / _PART.format(rank, group.number), map_location="cpu", weights_only=True)
        group.weights.data.copy_(part["weights"])
        group.state.update(part["state"])  # a new one has none before its first step
        group.options["lr"] = part["lr"]
        zero._reassign_or_swap_out_partitioned_parameters(group.number)
    zero._post_step(set())  # small parameters that every worker has whole


def require_same_place(folder: Path, on_disk: bool) -> None:
    """Raise `Mismatch` where shards of a set come from the other place than they are asked to go."""
    if bool(list(folder.glob("disk_*.pt"))) != on_disk:
        was, now = ("none or cpu", "nvme") if on_disk else ("nvme", "none or cpu")
        raise Mismatch(
            f"this resume point was written with engine.offload={was}, the run has {now} or another number of workers: "
            "go on with what it was written with, or start a new run from an export"
        )


def _groups(zero: Any) -> Iterator[_Group]:
    """Each in memory while it is looked at, and written back to the disk then."""
    for number, weights in enumerate(zero.fp32_partitioned_groups_flat):
        zero._prepare_sub_group(number, set())
        options = zero.optimizer.param_groups[zero.sub_group_to_group_id[number]]
        yield _Group(number, weights, zero.optimizer.state[weights], options)
        zero._release_sub_group(number, set())
