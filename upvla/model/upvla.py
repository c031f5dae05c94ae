"""UP-VLA: understanding, prediction and action in one decoder (arXiv 2501.18867; upvla.md sections 1-3).

Legend: R robot rows, M question rows, B = R + M, L tokens, D width, P patches, V views, N codes a view, C action chunk,
A action dims, K cameras of the understanding encoder, n supervised positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upvla.errors import Mismatch
from upvla.model.action_head import AttentionPooling
from upvla.model.backbone import Backbone
from upvla.model.config import ModelConfig
from upvla.model.sequence import Rows, join, qa_rows, qa_width, robot_rows
from upvla.model.vision import VisionEncoder, make_projector
from upvla.types import Batch, Losses, Term

IGNORED = -100


class States(NamedTuple):
    """What the decoder made of a batch: final-norm states of each kind of row, and where their spans lie."""

    robot: Tensor  # [R,L,D]
    qa: Tensor  # [M,L,D]
    robot_rows: Rows
    qa_rows: Rows


class UPVLA(nn.Module):
    """State dict: `showo.*`, `mm_projector.*`, `token_learner.*`, `to_logits.*` as published, plus `vision.*`.

    Everything is run through module calls and every call runs every module, so that ranks stay in step under ZeRO-3.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.showo = Backbone(config.backbone, config.vocab_size)
        self.vision = VisionEncoder(config.vision)
        self.mm_projector = make_projector(config.vision.width, config.backbone.width)
        self.token_learner = AttentionPooling(config.backbone.width, config.action_head.heads)
        self.to_logits = nn.Sequential(nn.Linear(config.backbone.width, config.chunk * config.action_dims))
        self._start_codes_as_bits()

    # ------------------------------------------------------------------------------------------------- training

    def forward(self, batch: Batch) -> Losses:
        """Objectives `pre`, `act`, `mmu` as sums with counts, and what is only watched.

        pre  cross-entropy of the future code at the *same* position, unshifted (3.1); `full` adds soi and eoi.
        act  squared error over C*A entries; with `gripper: bce` the last dimension is a logit instead (3.2). Watched
             apart as `act_pose` (squared error), `act_gripper` and `act_gripper_accuracy`.
        mmu  next-token cross-entropy on the supervised tokens of the conversations.
        Raises `Mismatch` naming the tensor whose shape is not the configured one.
        """
        self._check_shapes(batch)
        batch, robot_weight, qa_weight = self._never_empty(batch)
        states = self.states(batch)
        losses = Losses({}, {})
        self._prediction(states, batch, robot_weight, losses)
        self._action(states, batch, robot_weight, losses)
        self._understanding(states, batch, qa_weight, losses)
        return losses

    def counts(self, batch: Batch) -> dict[str, float]:
        """Supervised elements by objective, equal to the counts of `forward`, without running the model.

        Also the place where values are judged before a step: raises `Mismatch` for actions that are not finite and
        for ids outside of the vocabulary.
        """
        self._check_shapes(batch)
        if not bool(torch.isfinite(batch.actions).all()):
            row = int((~torch.isfinite(batch.actions)).flatten(1).any(1).nonzero()[0])
            raise Mismatch(f"actions: row {row} (position {int(batch.positions[row])}) is not finite")
        self._check_range("codes", batch.codes, self.config.vq.codebook_size)
        self._check_range("future_codes", batch.future_codes, self.config.vq.codebook_size)
        self._check_range("text_ids", batch.text_ids, self.config.text_vocab_size + 1)
        self._check_range("qa_ids", batch.qa_ids, self.config.text_vocab_size + 1)
        rows, codes = batch.codes.shape[0], self.config.num_views * self.config.codes_per_view
        labels = batch.qa_labels[:, : qa_width(self.config, batch.qa_ids)]
        return {
            "pre": float(rows * (codes + (2 if self.config.image_softmax == "full" else 0))),
            "act": float(self._action_weight(batch).sum()) * self.config.action_dims,
            "mmu": float((labels != IGNORED).sum()),
        }

    def states(self, batch: Batch) -> States:
        """Decoder states of a batch with at least one row of each kind."""
        robot = robot_rows(self.config, batch.text_ids, batch.text_len, batch.codes)
        qa = qa_rows(self.config, batch.qa_ids)
        count = robot.ids.shape[0]
        ids, allowed, positions = join(robot, qa, self.config.pad_id)
        embeds = self.showo.embed(ids)
        images = torch.cat([batch.images, batch.qa_images]) if self.config.vision_prompt else batch.qa_images
        patches = self.mm_projector(self.vision(images))
        robot_embeds = embeds[:count]
        if self.config.vision_prompt:
            robot_embeds = _replace(robot_embeds, robot.at["patches"], patches[:count])
        qa_embeds = _replace(embeds[count:], qa.at["patches"], patches[-qa.ids.shape[0] :])
        hidden = self.showo(torch.cat([robot_embeds, qa_embeds]), allowed, positions)
        return States(hidden[:count], hidden[count:], robot, qa)

    def _prediction(self, states: States, batch: Batch, weight: float, losses: Losses) -> None:
        future = batch.future_codes.flatten(1)
        current = batch.codes.flatten(1)
        at = states.robot_rows.at["image"]
        if self.config.image_softmax == "full":
            target = F.pad(future + self.config.image_offset, (1, 0), value=self.config.soi_id)
            target = F.pad(target, (0, 1), value=self.config.eoi_id)
            logits = self.showo.lm_head(states.robot[:, at.start - 1 : at.stop + 1]).float()
            codes = self._image_logits(logits[:, 1:-1])
        else:
            target = future
            logits = codes = self.showo.lm_head(states.robot[:, at], self._image_ids).float()
        total = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        losses.objectives["pre"] = _term(total * weight, target.numel() * weight)
        with torch.no_grad():
            right = codes.argmax(-1) == future
            changed = future != current
            losses.watched["pre_accuracy"] = _term(right.sum() * weight, right.numel() * weight)
            losses.watched["pre_changed_accuracy"] = _term((right & changed).sum() * weight, changed.sum() * weight)

    def _action(self, states: States, batch: Batch, weight: float, losses: Losses) -> None:
        raw = self._raw_actions(states.robot, states.robot_rows)
        target = batch.actions.float()
        used = self._action_weight(batch) * weight  # [R,C]
        pose = ((raw[..., :-1] - target[..., :-1]).square().sum(-1) * used).sum()
        if self.config.action_head.gripper == "bce":
            error = F.binary_cross_entropy_with_logits(raw[..., -1], (target[..., -1] + 1) / 2, reduction="none")
        else:
            error = (raw[..., -1] - target[..., -1]).square()
        gripper = (error * used).sum()
        steps = used.sum()
        losses.objectives["act"] = _term(pose + gripper, steps * self.config.action_dims)
        with torch.no_grad():
            right = ((raw[..., -1] >= 0) == (target[..., -1] >= 0)) * used
            losses.watched["act_pose"] = _term(pose.detach(), steps * (self.config.action_dims - 1))
            losses.watched["act_gripper"] = _term(gripper.detach(), steps)
            losses.watched["act_gripper_accuracy"] = _term(right.sum(), steps)

    def _understanding(self, states: States, batch: Batch, weight: float, losses: Losses) -> None:
        at = states.qa_rows.at["text"]
        labels = batch.qa_labels[:, : at.stop - at.start]
        supervised = labels != IGNORED
        # The state that predicts a token is the one before it: the first is predicted from eoi.
        before = states.qa[:, at.start - 1 : at.start - 1 + labels.shape[1]]
        logits = self.showo.lm_head(before[supervised]).float()
        target = labels[supervised]
        total = F.cross_entropy(logits, target, reduction="sum")
        losses.objectives["mmu"] = _term(total * weight, target.numel() * weight)
        with torch.no_grad():
            right = (logits.argmax(-1) == target).sum()
            losses.watched["mmu_accuracy"] = _term(right * weight, target.numel() * weight)

    # --------------------------------------------------------------------------------------------------- acting

    @torch.no_grad()
    def predict(self, images: Tensor, codes: Tensor, text_ids: Tensor, text_len: Tensor) -> tuple[Tensor, Tensor]:
        """One forward a chunk: u8[B,K,H,W,3], i64[B,V,N], i64[B,L], i64[B] -> actions f32[B,C,A], codes i64[B,V,N].

        Pose is clipped to [-1, 1]; the gripper is -1 or +1 by the sign of the head's last dimension, which is both
        the regression's nearest target and the logit's threshold. The codes are the future frame's, by argmax.
        """
        _expect("codes", codes, (None, self.config.num_views, self.config.codes_per_view))
        if self.config.vision_prompt:
            _expect("images", images, (len(codes), *self.vision.input_shape))
        rows = robot_rows(self.config, text_ids, text_len, codes)
        embeds = self.showo.embed(rows.ids)
        if self.config.vision_prompt:
            embeds = _replace(embeds, rows.at["patches"], self.mm_projector(self.vision(images)))
        hidden = self.showo(embeds, rows.allowed, rows.positions)
        raw = self._raw_actions(hidden, rows)
        gripper = torch.where(raw[..., -1:] >= 0, 1.0, -1.0)
        future = self.showo.lm_head(hidden[:, rows.at["image"]], self._image_ids).argmax(-1)
        return torch.cat([raw[..., :-1].clamp(-1, 1), gripper], -1), future.view_as(codes)

    @torch.no_grad()
    def describe(self, images: Tensor, question_ids: Tensor, max_new: int = 32) -> Tensor:
        """Greedy answers: u8[B,K,H,W,3], right-padded prompts i64[B,L] (`encode_question`) -> i64[B,<=max_new].

        An answer ends with eot; what follows it is padding. Keys and values are cached: the prompt is read once, then
        one token a step. Only ids of the text vocabulary are generated.
        """
        _expect("images", images, (len(question_ids), *self.vision.input_shape))
        rows = qa_rows(self.config, question_ids)
        embeds = _replace(self.showo.embed(rows.ids), rows.at["patches"], self.mm_projector(self.vision(images)))
        cache = self.showo.new_cache()
        hidden = self.showo(embeds, rows.allowed, rows.positions, cache)
        length = rows.at["text"].start + (question_ids != self.config.pad_id).sum(1)  # tokens of each row, pads out
        seen = torch.arange(rows.ids.shape[1], device=length.device)[None] < length[:, None]
        last = hidden[torch.arange(len(hidden)), length - 1]
        answers: list[Tensor] = []
        ended = torch.zeros_like(length, dtype=torch.bool)
        for step in range(max_new):
            token = self.showo.lm_head(last, slice(0, self.config.text_vocab_size)).argmax(-1)
            token = torch.where(ended, self.config.pad_id, token)
            answers.append(token)
            ended = ended | (token == self.config.eot_id)
            if bool(ended.all()) or step == max_new - 1:
                break
            seen = F.pad(seen, (0, 1), value=True)
            positions = (length + step)[:, None]
            last = self.showo(self.showo.embed(token[:, None]), seen[:, None, None], positions, cache)[:, 0]
        return torch.stack(answers, dim=1)

    # ------------------------------------------------------------------------------------------------- the parts

    @property
    def _image_ids(self) -> slice:
        return slice(self.config.image_offset, self.config.mask_id)

    def _image_logits(self, logits: Tensor) -> Tensor:
        return logits[..., self._image_ids]

    def _raw_actions(self, hidden_RLD: Tensor, rows: Rows) -> Tensor:
        pooled_RD = self.token_learner(hidden_RLD[:, rows.at["action"]])
        return self.to_logits(pooled_RD).float().unflatten(-1, (self.config.chunk, self.config.action_dims))

    def _action_weight(self, batch: Batch) -> Tensor:
        """f32[R,C], 1 where a step of the chunk is supervised."""
        if self.config.action_head.supervise_padding:
            return torch.ones_like(batch.action_is_pad, dtype=torch.float32)
        return (~batch.action_is_pad).float()

    @torch.no_grad()
    def _start_codes_as_bits(self) -> None:
        """Start image-code embeddings as a random projection of their bits: codes that differ little start similar."""
        embedding = self.showo.model.embed_tokens.weight
        if embedding.is_meta:
            return
        z = self.config.vq.z_channels
        bits = (torch.arange(2**z)[:, None] >> torch.arange(z - 1, -1, -1)) % 2 * 2.0 - 1.0
        projection = torch.randn(z, self.config.backbone.width) * (self.config.backbone.init_std / z**0.5)
        embedding[self._image_ids] = bits @ projection

    def _never_empty(self, batch: Batch) -> tuple[Batch, float, float]:
        """A missing kind of row becomes one blank row of weight 0, so that every rank runs the same modules."""
        robot_weight, qa_weight = float(len(batch.codes) > 0), float(len(batch.qa_ids) > 0)
        blank: dict[str, Tensor] = {}
        if not robot_weight:
            c, device = self.config, batch.codes.device
            blank |= {
                "text_ids": torch.zeros(1, 0, dtype=torch.long, device=device),
                "text_len": torch.zeros(1, dtype=torch.long, device=device),
                "images": torch.zeros_like(batch.qa_images[:1]),
                "codes": torch.zeros(1, c.num_views, c.codes_per_view, dtype=torch.long, device=device),
                "future_codes": torch.zeros(1, c.num_views, c.codes_per_view, dtype=torch.long, device=device),
                "actions": torch.zeros(1, c.chunk, c.action_dims, device=device),
                "action_is_pad": torch.zeros(1, c.chunk, dtype=torch.bool, device=device),
            }
        if not qa_weight:
            blank |= {
                "qa_images": torch.zeros_like(batch.images[:1]),
                "qa_ids": torch.full((1, 1), self.config.eot_id, device=batch.codes.device),
                "qa_labels": torch.full((1, 1), self.config.eot_id, device=batch.codes.device),
            }
        return batch._replace(**blank), robot_weight, qa_weight

    def _check_shapes(self, batch: Batch) -> None:
        c = self.config
        rows, questions = len(batch.codes), len(batch.qa_ids)
        if rows + questions == 0:
            raise Mismatch("batch: it has neither robot rows nor question rows")
        if rows:
            for name in ("codes", "future_codes"):
                _expect(name, getattr(batch, name), (rows, c.num_views, c.codes_per_view))
            _expect("actions", batch.actions, (rows, c.chunk, c.action_dims))
            _expect("action_is_pad", batch.action_is_pad, (rows, c.chunk))
            _expect("text_ids", batch.text_ids, (rows, None))
            if c.vision_prompt:
                _expect("images", batch.images, (rows, *self.vision.input_shape))
        if questions:
            _expect("qa_labels", batch.qa_labels, tuple(batch.qa_ids.shape))
            _expect("qa_images", batch.qa_images, (questions, *self.vision.input_shape))

    def _check_range(self, name: str, ids: Tensor, limit: int) -> None:
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= limit):
            raise Mismatch(f"{name}: values must lie in [0, {limit}), found {int(ids.min())}..{int(ids.max())}")


def _replace(embeds_BLD: Tensor, at: slice, patches_BPD: Tensor) -> Tensor:
    """Embeddings with the span `at` replaced by projected patches."""
    expected = at.stop - at.start
    if patches_BPD.shape[1] != expected:
        raise Mismatch(f"images: the encoder made {patches_BPD.shape[1]} patches, the rows have room for {expected}")
    patches_BPD = patches_BPD.to(embeds_BLD.dtype)
    return torch.cat([embeds_BLD[:, : at.start], patches_BPD, embeds_BLD[:, at.stop :]], dim=1)


def _expect(name: str, value: Tensor, shape: tuple[int | None, ...]) -> None:
    found = tuple(value.shape)
    if len(found) != len(shape) or any(e is not None and e != f for e, f in zip(shape, found, strict=False)):
        wanted = ", ".join("*" if e is None else str(e) for e in shape)
        raise Mismatch(f"{name}: expected shape [{wanted}], found {list(found)}")


def _term(total: Tensor, count: float | Tensor) -> Term:
    return Term(total, torch.as_tensor(count, dtype=torch.float32, device=total.device))
