"""The rows that the decoder reads: one table a row kind, from which ids, positions and attention masks follow.

Legend: R robot rows, M question rows, B rows, L row length, W width of the text span, P patches, V views, N codes a
view, C action chunk.

A robot row (prediction and action in one, upvla.md 2.1) with the vision prompt of the paper's section 4.3:

    pre soi [ E1: P patches ] eoi | PAD.. bos text eot | soi [ V*N codes ] eoi | lvg x C
    `-- task, patches: causal + P seen by all --'  causal        full                causal

The released code's robot row has no vision prompt, and pads first: `PAD.. pre bos text eot | soi codes eoi | lvg x C`.
With the paper's MMU-conditioned prompt `text` is the model's own description of the scene, then the instruction.
A question row (upvla.md 2.2): `mmu system soi [ E1: P patches ] eoi | conversation PAD..`.

Who sees whom, for pre, soi, 2 patches, eoi, one pad, bos, a word, eot, soi, 2 codes, eoi, 2 action queries:

    query\\key  p s E E e _ b w t s c c e a a
    pre        x . x x . . . . . . . . . . .     causal, and E1's columns are seen by the whole row
    soi        x x x x . . . . . . . . . . .
    E1         x x x x . . . . . . . . . . .     bidirectional inside
    E1         x x x x . . . . . . . . . . .
    eoi        x x x x x . . . . . . . . . .
    PAD        . . . . . x . . . . . . . . .     earlier pads and itself, so that no row of the softmax is empty
    bos        x x x x x . x . . . . . . . .
    word       x x x x x . x x . . . . . . .
    eot        x x x x x . x x x . . . . . .
    soi        x x x x x . x x x x x x x x x     full: everything but pads, action queries to the right included
    code       x x x x x . x x x x x x x x x
    code       x x x x x . x x x x x x x x x
    eoi        x x x x x . x x x x x x x x x
    lvg        x x x x x . x x x x x x x x .     causal
    lvg        x x x x x . x x x x x x x x x

Positions are those of the row at its full text budget. Pads that the whole batch shares are cut out without moving any
other position, so a row's result depends neither on trimming nor on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from upvla.model.config import ModelConfig
from upvla.types import Batch

Role = Literal["causal", "full", "shared"]


class Span(NamedTuple):
    """A named run of tokens. `full` queries see all that is not padding; `shared` keys are seen by every query."""

    name: str
    length: int
    role: Role


class Rows(NamedTuple):
    """Rows of one kind, ready to be embedded; patch slots hold the pad id until the patches replace them."""

    ids: Tensor  # i64[B,L]
    allowed: Tensor  # bool[B,1,L,L], query x key
    positions: Tensor  # i64[B,L]
    at: dict[str, slice]  # where each span of the table lies


def robot_table(config: ModelConfig, text_width: int) -> tuple[Span, ...]:
    """Spans of a prediction/action row whose text span (task token included without vision prompt) is that wide."""
    prompt = (
        Span("task", 1, "causal"),
        Span("prompt_soi", 1, "causal"),
        Span("patches", config.num_patches, "shared"),
        Span("prompt_eoi", 1, "causal"),
    )
    return (
        *(prompt if config.vision_prompt else ()),
        Span("text", text_width, "causal"),
        Span("soi", 1, "full"),
        Span("image", config.num_views * config.codes_per_view, "full"),
        Span("eoi", 1, "full"),
        Span("action", config.chunk, "causal"),
    )


def qa_table(config: ModelConfig, text_width: int) -> tuple[Span, ...]:
    """Spans of a question row whose conversation is that wide."""
    return (
        Span("task", 1, "causal"),
        Span("system", len(config.system_ids), "causal"),
        Span("soi", 1, "causal"),
        Span("patches", config.num_patches, "shared"),
        Span("eoi", 1, "causal"),
        Span("text", text_width, "causal"),
    )


def robot_rows(
    config: ModelConfig, text_ids_RL: Tensor, text_len_R: Tensor, codes_RVN: Tensor, text_room: int = 0
) -> Rows:
    """Prediction/action rows. `text_ids` are right-padded and bare: task, bos and eot are added here. The text span is
    at least as wide as `text_room` tokens ask for.

    A leading bos is not doubled. A text over budget loses its tail, never its eot: `upvla.model.inputs` refuses it
    before, unless the config says `overlong: cut`.
    """
    rows, device = text_ids_RL.shape[0], text_ids_RL.device
    lead = (config.eot_id,) if config.vision_prompt else (config.predict_id, config.eot_id)
    budget = config.prompt_budget + len(lead) - 1
    text, width = _text_span(config, text_ids_RL, text_len_R, lead, budget, text_room)
    table = robot_table(config, width)

    def repeat(*ids: int) -> Tensor:
        return torch.tensor(ids, device=device).expand(rows, len(ids))

    parts = {
        "task": repeat(config.predict_id),
        "prompt_soi": repeat(config.soi_id),
        "patches": repeat(*[config.pad_id] * config.num_patches),
        "prompt_eoi": repeat(config.eoi_id),
        "text": text,
        "soi": repeat(config.soi_id),
        "image": codes_RVN.reshape(rows, -1) + config.image_offset,
        "eoi": repeat(config.eoi_id),
        "action": repeat(*[config.action_id] * config.chunk),
    }
    at = _places(table)
    ids = torch.cat([parts[span.name] for span in table], dim=1)
    padding = torch.zeros_like(ids, dtype=torch.bool)
    padding[:, at["text"]] = text == config.pad_id
    positions = torch.arange(ids.shape[1], device=device)
    positions = positions + (budget - width) * (positions >= at["text"].start)
    return Rows(ids, attention_mask(table, padding), positions.expand(rows, -1), at)


def conditioned(config: ModelConfig, description: Sequence[int], instruction: Sequence[int]) -> list[int]:
    """Text ids of the MMU-conditioned prompt: what the model said of the scene, cut to its budget, then what to do."""
    if config.description is None:
        return list(instruction)
    spoken = [token for token in description if token not in (config.eot_id, config.pad_id)]
    return [*spoken[: config.description.budget], *instruction]


def text_room(config: ModelConfig) -> int:
    """How many bare instruction and description ids fit a robot row: the budget without task token, bos and eot."""
    return config.prompt_budget - 2


def qa_rows(config: ModelConfig, qa_ids_ML: Tensor) -> Rows:
    """Question rows around conversations that are right-padded with the pad id, cut to `qa_budget`.

    As published there is no padding mask: pads lie to the right of all that is read, and their labels are ignored.
    """
    rows, device = qa_ids_ML.shape[0], qa_ids_ML.device
    text = qa_ids_ML[:, : qa_width(config, qa_ids_ML)]
    table = qa_table(config, text.shape[1])
    head = [config.mmu_id, *config.system_ids, config.soi_id, *[config.pad_id] * config.num_patches, config.eoi_id]
    ids = torch.cat([torch.tensor(head, device=device).expand(rows, -1), text], dim=1)
    positions = torch.arange(ids.shape[1], device=device).expand(rows, -1)
    return Rows(ids, attention_mask(table, torch.zeros_like(ids, dtype=torch.bool)), positions, _places(table))


def num_tokens(config: ModelConfig, batch: Batch) -> int:
    """Decoder positions of a batch that hold something: without padding, and without a text's own special tokens."""
    robot = sum(span.length for span in robot_table(config, 0)) * len(batch.codes) + int(batch.text_len.sum())
    qa = sum(span.length for span in qa_table(config, 0)) * len(batch.qa_ids)
    return robot + qa + int((batch.qa_ids != config.pad_id).sum())


def qa_width(config: ModelConfig, qa_ids_ML: Tensor) -> int:
    """How many conversation columns are kept: the budget, or with `trim` the batch's longest conversation."""
    width = min(qa_ids_ML.shape[1], config.qa_budget)
    if config.trim:
        used = (qa_ids_ML[:, :width] != config.pad_id).any(0).nonzero()
        width = int(used[-1]) + 1 if len(used) else 0
    return width


def join(robot: Rows, qa: Rows, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both kinds in one batch, robot rows first, the shorter kind padded on the right: ids, allowed, positions."""
    length = max(robot.ids.shape[1], qa.ids.shape[1])
    count = robot.ids.shape[0]
    ids = robot.ids.new_full((count + qa.ids.shape[0], length), pad_id)
    positions = torch.arange(length, device=ids.device).repeat(ids.shape[0], 1)
    allowed = torch.eye(length, dtype=torch.bool, device=ids.device).repeat(ids.shape[0], 1, 1, 1)
    for rows, where in ((robot, slice(None, count)), (qa, slice(count, None))):
        width = rows.ids.shape[1]
        ids[where, :width] = rows.ids
        positions[where, :width] = rows.positions
        allowed[where, :, :width, :width] = rows.allowed
    return ids, allowed, positions


def attention_mask(table: tuple[Span, ...], padding_BL: Tensor) -> Tensor:
    """bool[B,1,L,L] from the table's roles and where the padding is; see the picture above."""
    device = padding_BL.device
    full_L = torch.cat([torch.full((span.length,), span.role == "full", device=device) for span in table])
    shared_L = torch.cat([torch.full((span.length,), span.role == "shared", device=device) for span in table])
    length = padding_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    real_LL = causal_LL | full_L[:, None] | shared_L[None, :]
    key_is_pad = padding_BL[:, None, :]
    allowed = torch.where(padding_BL[:, :, None], causal_LL & key_is_pad, real_LL & ~key_is_pad)
    return allowed[:, None]


def _places(table: tuple[Span, ...]) -> dict[str, slice]:
    places, start = {}, 0
    for span in table:
        places[span.name] = slice(start, start + span.length)
        start += span.length
    return places


def _text_span(
    config: ModelConfig, text_ids_RL: Tensor, text_len_R: Tensor, lead: tuple[int, ...], budget: int, room: int
) -> tuple[Tensor, int]:
    """`PAD.. lead text eot`, i64[R,W] with W the budget or, with `trim`, what the longest row or `room` needs."""
    if text_ids_RL.shape[1] == 0:
        text_ids_RL = text_ids_RL.new_full((text_ids_RL.shape[0], 1), config.pad_id)
    device = text_ids_RL.device
    skip_R = ((text_ids_RL[:, 0] == config.eot_id) & (text_len_R > 0)).long()
    fixed = len(lead) + 1
    length_R = (text_len_R - skip_R).clamp(min=0, max=budget - fixed)
    width = min(budget, fixed + max(int(length_R.max()), room)) if config.trim else budget
    place_RW = torch.arange(width, device=device)[None] - (width - fixed - length_R)[:, None]
    source_RW = (place_RW - len(lead) + skip_R[:, None]).clamp(0, text_ids_RL.shape[1] - 1)
    ids = text_ids_RL.gather(1, source_RW)
    for index, token in enumerate(lead):
        ids = torch.where(place_RW == index, token, ids)
    ids = torch.where(place_RW == (len(lead) + length_R)[:, None], config.eot_id, ids)
    return torch.where(place_RW < 0, config.pad_id, ids), width
