"""What a batch must look like before a step: shapes, values, lengths. Every error names tensor, expected and found."""

from __future__ import annotations

import torch
from torch import Tensor

from upvla.errors import Mismatch
from upvla.model.config import ModelConfig
from upvla.model.sequence import text_room
from upvla.types import Batch

Shape = tuple[int | None, ...]


def check_shapes(config: ModelConfig, batch: Batch, image_shapes: tuple[Shape, ...]) -> None:
    """Raise `Mismatch` where a tensor is not of the configured shape. `image_shapes`: those of one observation."""
    rows, questions = len(batch.codes), len(batch.qa_ids)
    if rows + questions == 0:
        raise Mismatch("batch: it has neither robot rows nor question rows")
    if rows:
        for name in ("codes", "future_codes"):
            expect(name, getattr(batch, name), (rows, config.num_views, config.codes_per_view))
        expect("actions", batch.actions, (rows, config.chunk, config.action_dims))
        expect("action_is_pad", batch.action_is_pad, (rows, config.chunk))
        expect("pre_mask", batch.pre_mask, (rows,))
        expect("act_mask", batch.act_mask, (rows,))
        expect("text_ids", batch.text_ids, (rows, None))
        expect("text_len", batch.text_len, (rows,))
        if config.vision_prompt:
            expect("images", batch.images, *((rows, *shape) for shape in image_shapes))
    if questions:
        expect("qa_labels", batch.qa_labels, tuple(batch.qa_ids.shape))
        expect("qa_images", batch.qa_images, *((questions, *shape) for shape in image_shapes))


def check_values(config: ModelConfig, batch: Batch) -> None:
    """Raise `Mismatch` for actions that are not finite, ids outside of their vocabulary, and texts over budget."""
    if not bool(torch.isfinite(batch.actions).all()):
        row = int((~torch.isfinite(batch.actions)).flatten(1).any(1).nonzero()[0])
        raise Mismatch(f"actions: row {row} (position {int(batch.positions[row])}) is not finite")
    limits = {"codes": config.vq.codebook_size, "future_codes": config.vq.codebook_size}
    limits |= {"text_ids": config.text_vocab_size + 1, "qa_ids": config.text_vocab_size + 1}
    for name, limit in limits.items():
        ids: Tensor = getattr(batch, name)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= limit):
            raise Mismatch(f"{name}: values must lie in [0, {limit}), found {int(ids.min())}..{int(ids.max())}")
    check_text(config, batch.text_ids, batch.text_len)


def check_text(config: ModelConfig, text_ids_RL: Tensor, text_len_R: Tensor) -> None:
    """Raise `Mismatch` for the first text that its row has no room for, unless the configuration cuts such texts."""
    if config.overlong == "cut" or not text_len_R.numel():
        return
    leading_bos = (text_ids_RL[:, :1] == config.eot_id).any(1) & (text_len_R > 0)
    length_R = text_len_R - leading_bos.long()
    if int(length_R.max()) > text_room(config):
        row = int(length_R.argmax())
        raise Mismatch(
            f"text_ids: row {row} has {int(length_R[row])} tokens, model.text_budget leaves room for "
            f"{text_room(config)}: raise it, or set model.overlong to 'cut'"
        )


def check_question(config: ModelConfig, question_ids_ML: Tensor) -> None:
    """Raise `Mismatch` for a question that would be cut: its end is what asks for an answer."""
    length = int((question_ids_ML != config.pad_id).sum(1).max())
    if length > config.qa_budget:
        raise Mismatch(f"question_ids: {length} tokens, model.qa_budget is {config.qa_budget}: ask a shorter question")


def expect(name: str, value: Tensor, *shapes: Shape) -> None:
    """Raise `Mismatch` unless `value` has one of the shapes; None stands for any length."""
    found = tuple(value.shape)
    for shape in shapes:
        if len(found) == len(shape) and all(e is None or e == f for e, f in zip(shape, found, strict=True)):
            return
    wanted = " or ".join(f"[{', '.join('*' if e is None else str(e) for e in shape)}]" for shape in shapes)
    raise Mismatch(f"{name}: expected shape {wanted}, found {list(found)}")


def never_empty(config: ModelConfig, batch: Batch) -> tuple[Batch, float, float]:
    """A missing kind of row becomes one blank row of weight 0, so that every rank runs the same modules.

    Returns the batch, and the weights (0 or 1) of robot rows and of question rows.
    """
    robot_weight, qa_weight = float(len(batch.codes) > 0), float(len(batch.qa_ids) > 0)
    device = batch.codes.device
    blank: dict[str, Tensor] = {}
    if not robot_weight:
        codes = torch.zeros(1, config.num_views, config.codes_per_view, dtype=torch.long, device=device)
        blank |= {
            "text_ids": torch.zeros(1, 0, dtype=torch.long, device=device),
            "text_len": torch.zeros(1, dtype=torch.long, device=device),
            "images": torch.zeros_like(batch.qa_images[:1]),
            "codes": codes,
            "future_codes": codes,
            "actions": torch.zeros(1, config.chunk, config.action_dims, device=device),
            "action_is_pad": torch.zeros(1, config.chunk, dtype=torch.bool, device=device),
            "pre_mask": torch.ones(1, dtype=torch.bool, device=device),
            "act_mask": torch.ones(1, dtype=torch.bool, device=device),
        }
    if not qa_weight:
        blank |= {
            "qa_images": torch.zeros_like(batch.images[:1]),
            "qa_ids": torch.full((1, 1), config.eot_id, device=device),
            "qa_labels": torch.full((1, 1), config.eot_id, device=device),
        }
    return batch._replace(**blank), robot_weight, qa_weight
