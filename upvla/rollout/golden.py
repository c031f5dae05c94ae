"""A model's answers where it was trained, and whether it still gives them where it is used.

Between the two lie an export, a store, another process, often another machine: a resize, a tokenizer or a library that
does something else there moves a robot wrongly and says nothing. So whoever loads a checkpoint asks it first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from upvla.checkpoint import Bundle, Golden
from upvla.errors import Mismatch
from upvla.rollout.play import Ask
from upvla.rollout.policy import UPVLAPolicy
from upvla.types import Observation

TOLERANCE = 1e-3
"""Of an action's range of 2. One machine repeats itself to 1e-6; other kernels and devices round otherwise."""


def record(bundle: Bundle, images: Mapping[str, np.ndarray], instructions: Sequence[str]) -> Golden:
    """`bundle`'s own answers to frames {camera: u8[N,H,W,3]} and their instructions."""
    return Golden(images, tuple(instructions), _answers(UPVLAPolicy(bundle), images, instructions))


def proven(bundle: Bundle, name: str, *, slots: int = 1, device: str = "cpu") -> UPVLAPolicy:
    """The policy of a bundle, which has answered the bundle's golden observations as it did where it was trained.

    Raises `Mismatch` naming the dimension that differs most. A bundle without any is taken as it is.
    """
    policy, golden = UPVLAPolicy(bundle, name, slots=slots, device=device), bundle.golden
    if golden is None:
        return policy
    found = _answers(policy, golden.images, golden.instructions)
    if found.shape != golden.actions.shape:
        raise Mismatch(f"{name}: answers have shape {found.shape}, where it was trained {golden.actions.shape}")
    difference = np.nan_to_num(np.abs(found - golden.actions), nan=np.inf)
    if difference.max() > TOLERANCE:
        row, step, dim = np.unravel_index(difference.argmax(), difference.shape)
        raise Mismatch(
            f"{name}: answers its golden observation {row} ({golden.instructions[row]!r}) with "
            f"{policy.action_space.dims[dim].name} {found[row, step, dim]:.5f} at step {step}, where it was trained it "
            f"said {golden.actions[row, step, dim]:.5f}: something between there and here differs. Compare the "
            "versions of both places (`upvla doctor`); do not put it on a robot"
        )
    return policy


def _answers(policy: UPVLAPolicy, images: Mapping[str, np.ndarray], instructions: Sequence[str]) -> np.ndarray:
    """f32[N,C,A]"""
    nothing_felt = np.zeros(0, np.float32)  # this model reads no state
    seen = [{camera: frames[i] for camera, frames in images.items()} for i in range(len(instructions))]
    asks = [Ask(Observation(frames, nothing_felt), told, {}) for frames, told in zip(seen, instructions, strict=True)]
    return np.stack([prediction.actions for prediction in policy.act_many(asks)])
