"""The three objectives (method, section 3): each a sum over what is supervised, with its count, and what is watched.

The LM head is run at supervised positions only: at the image span of robot rows, before answer tokens of question rows.

Legend: R robot rows, M question rows, L tokens, D width, C action chunk, A action dims, n supervised positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from upvla.model.backbone import SlicedHead
from upvla.model.config import ModelConfig
from upvla.model.sequence import Rows, qa_width
from upvla.types import Batch, Losses, Term

IGNORED = -100


def counts(config: ModelConfig, batch: Batch) -> dict[str, float]:
    """Supervised elements by objective, equal to the counts of the losses below."""
    rows, codes = float(batch.pre_mask.sum()), config.num_views * config.codes_per_view
    labels = batch.qa_labels[:, : qa_width(config, batch.qa_ids)]
    return {
        "pre": rows * (codes + (2 if config.image_softmax == "full" else 0)),
        "act": float(action_weight(config, batch).sum()) * config.action_dims,
        "mmu": float((labels != IGNORED).sum()),
    }


def prediction_loss(
    config: ModelConfig, head: SlicedHead, hidden_RLD: Tensor, rows: Rows, batch: Batch, weight: float
) -> Losses:
    """`pre`: cross-entropy of the future code at the *same* position, unshifted (3.1); `full` adds soi and eoi."""
    future, current = batch.future_codes.flatten(1), batch.codes.flatten(1)
    at = rows.at["image"]
    if config.image_softmax == "full":
        target = F.pad(future + config.image_offset, (1, 0), value=config.soi_id)
        target = F.pad(target, (0, 1), value=config.eoi_id)
        logits = head(hidden_RLD[:, at.start - 1 : at.stop + 1]).float()
        codes = logits[:, 1:-1, config.image_ids]
    else:
        target = future
        logits = codes = head(hidden_RLD[:, at], config.image_ids).float()
    counted_R1 = batch.pre_mask[:, None]
    target = target.where(counted_R1, IGNORED)
    total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    rows_counted = counted_R1.sum() * weight
    with torch.no_grad():
        right = (codes.argmax(-1) == future) & counted_R1
        changed = (future != current) & counted_R1
        watched = {
            "pre_accuracy": _term(right.sum() * weight, rows_counted * right.shape[1]),
            "pre_changed_accuracy": _term((right & changed).sum() * weight, changed.sum() * weight),
        }
    return Losses({"pre": _term(total * weight, rows_counted * target.shape[1])}, watched)


def action_loss(config: ModelConfig, raw_RCA: Tensor, batch: Batch, weight: float) -> Losses:
    """`act`: squared error over C*A entries; with `gripper: bce` the last dimension is a logit instead (3.2).

    Watched apart: `act_pose` (squared error), `act_gripper`, `act_gripper_accuracy`.
    """
    target = batch.actions.float()
    used_RC = action_weight(config, batch) * weight
    pose = ((raw_RCA[..., :-1] - target[..., :-1]).square().sum(-1) * used_RC).sum()
    if config.action_head.gripper == "bce":
        error = F.binary_cross_entropy_with_logits(raw_RCA[..., -1], (target[..., -1] + 1) / 2, reduction="none")
    else:
        error = (raw_RCA[..., -1] - target[..., -1]).square()
    gripper = (error * used_RC).sum()
    steps = used_RC.sum()
    with torch.no_grad():
        right = ((raw_RCA[..., -1] >= 0) == (target[..., -1] >= 0)) * used_RC
        watched = {
            "act_pose": _term(pose.detach(), steps * (config.action_dims - 1)),
            "act_gripper": _term(gripper.detach(), steps),
            "act_gripper_accuracy": _term(right.sum(), steps),
        }
    return Losses({"act": _term(pose + gripper, steps * config.action_dims)}, watched)


def understanding_loss(head: SlicedHead, hidden_MLD: Tensor, rows: Rows, batch: Batch, weight: float) -> Losses:
    """`mmu`: next-token cross-entropy on the supervised tokens of the conversations; 0 of 0 where there are none."""
    at = rows.at["text"]
    labels = batch.qa_labels[:, : at.stop - at.start]
    supervised = labels != IGNORED
    # The state that predicts a token is the one before it: the first is predicted from eoi.
    before = hidden_MLD[:, at.start - 1 : at.start - 1 + labels.shape[1]]
    logits = head(before[supervised]).float()
    target = labels[supervised]
    total = F.cross_entropy(logits, target, reduction="sum")
    with torch.no_grad():
        right = (logits.argmax(-1) == target).sum()
        watched = {"mmu_accuracy": _term(right * weight, target.numel() * weight)}
    return Losses({"mmu": _term(total * weight, target.numel() * weight)}, watched)


def action_weight(config: ModelConfig, batch: Batch) -> Tensor:
    """f32[R,C], 1 where a step of the chunk is supervised."""
    counted = batch.act_mask[:, None].expand_as(batch.action_is_pad)
    return (counted if config.action_head.supervise_padding else counted & ~batch.action_is_pad).float()


def _term(total: Tensor, count: float | Tensor) -> Term:
    return Term(total, torch.as_tensor(count, dtype=torch.float32, device=total.device))
