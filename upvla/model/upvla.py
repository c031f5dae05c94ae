"""UP-VLA: understanding, prediction and action in one decoder (arXiv 2501.18867; the method's sections 1-3).

Legend: R robot rows, M question rows, B = R + M, L tokens, D width, P patches, V views, N codes a view, C action chunk,
A action dims, K cameras of the understanding encoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upvla.errors import Mismatch
from upvla.model import losses
from upvla.model.action_head import AttentionPooling
from upvla.model.backbone import Backbone, Cache
from upvla.model.config import ModelConfig
from upvla.model.inputs import check_question, check_shapes, check_text, check_values, expect, never_empty
from upvla.model.sequence import Rows, join, qa_rows, robot_rows
from upvla.model.vision import VisionEncoder, make_projector
from upvla.types import Batch, Losses


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
        """Objectives `pre`, `act`, `mmu` as sums with counts, and what is only watched (`upvla.model.losses`).

        Raises `Mismatch` naming the tensor whose shape is not the configured one.
        """
        config = self.config
        check_shapes(config, batch, self.vision.input_shapes)
        batch, robot_weight, qa_weight = never_empty(config, batch)
        robot, qa, robot_at, qa_at = self.states(batch)
        found = (
            losses.prediction_loss(config, self.showo.lm_head, robot, robot_at, batch, robot_weight),
            losses.action_loss(config, self._raw_actions(robot, robot_at), batch, robot_weight),
            losses.understanding_loss(self.showo.lm_head, qa, qa_at, batch, qa_weight),
        )
        return Losses(
            {name: term for part in found for name, term in part.objectives.items()},
            {name: term for part in found for name, term in part.watched.items()},
        )

    def counts(self, batch: Batch) -> dict[str, float]:
        """Supervised elements by objective, equal to the counts of `forward`, without running the model.

        Also the place where values are judged before a step: raises `Mismatch` for actions that are not finite, ids
        outside of their vocabulary and texts over budget.
        """
        check_shapes(self.config, batch, self.vision.input_shapes)
        check_values(self.config, batch)
        return losses.counts(self.config, batch)

    def states(self, batch: Batch) -> States:
        """Decoder states of a batch with at least one row of each kind."""
        config, count = self.config, len(batch.codes)
        robot = robot_rows(config, batch.text_ids, batch.text_len, batch.codes)
        qa = qa_rows(config, batch.qa_ids)
        images = torch.cat([batch.images, batch.qa_images]) if config.vision_prompt else batch.qa_images
        patches = self._patches(images)
        if config.join_rows:
            ids, allowed, positions = join(robot, qa, config.pad_id)
            embeds = self.showo.embed(ids)
            parts = self._with_patches(robot, embeds[:count], patches), _replace(embeds[count:], qa, patches)
            hidden = self.showo(torch.cat(parts), allowed, positions)
            return States(hidden[:count], hidden[count:], robot, qa)
        # One look-up for both kinds: each one's gradient is as large as the whole table.
        robot_embeds, qa_embeds = self.showo.embed(torch.cat([robot.ids.flatten(), qa.ids.flatten()])).split(
            (robot.ids.numel(), qa.ids.numel())
        )
        robot_embeds = self._with_patches(robot, robot_embeds.unflatten(0, robot.ids.shape), patches)
        qa_embeds = _replace(qa_embeds.unflatten(0, qa.ids.shape), qa, patches)
        return States(self._read(robot, robot_embeds), self._read(qa, qa_embeds), robot, qa)

    def _patches(self, images: Tensor) -> Tensor:
        """f[B,P,D], the understanding encoder's patches as decoder tokens."""
        patches: Tensor = self.mm_projector(self.vision(images))
        return patches

    def _with_patches(self, rows: Rows, embeds_RLD: Tensor, patches: Tensor) -> Tensor:
        """Robot rows take the first patches, where they have a vision prompt."""
        return _replace(embeds_RLD, rows, patches[: len(embeds_RLD)]) if self.config.vision_prompt else embeds_RLD

    def _read(self, rows: Rows, embeds_BLD: Tensor, cache: Cache | None = None) -> Tensor:
        return self.showo(embeds_BLD, rows.allowed, rows.positions, cache)

    # --------------------------------------------------------------------------------------------------- acting

    @torch.no_grad()
    def predict(
        self, images: Tensor, codes: Tensor, text_ids: Tensor, text_len: Tensor, text_room: int = 0
    ) -> tuple[Tensor, Tensor]:
        """One forward a chunk: u8[B,K,H,W,3], i64[B,V,N], i64[B,L], i64[B] -> actions f32[B,C,A], codes i64[B,V,N].

        With `text_room` the rows are laid out for at least so many tokens of text: their length then does not depend
        on the longest text that happens to be in the batch.

        Pose is clipped to [-1, 1]; the gripper is -1 or +1 by the sign of the head's last dimension, which is both
        the regression's nearest target and the logit's threshold. The codes are the future frame's, by argmax.
        """
        config = self.config
        expect("codes", codes, (None, config.num_views, config.codes_per_view))
        check_text(config, text_ids, text_len)
        rows = robot_rows(config, text_ids, text_len, codes, text_room)
        embeds = self.showo.embed(rows.ids)
        if config.vision_prompt:
            expect("images", images, *((len(codes), *shape) for shape in self.vision.input_shapes))
            embeds = _replace(embeds, rows, self._patches(images))
        hidden = self._read(rows, embeds)
        raw = self._raw_actions(hidden, rows)
        gripper = torch.where(raw[..., -1:] >= 0, 1.0, -1.0)
        future = self.showo.lm_head(hidden[:, rows.at["image"]], config.image_ids).argmax(-1)
        return torch.cat([raw[..., :-1].clamp(-1, 1), gripper], -1), future.view_as(codes)

    @torch.no_grad()
    def describe(
        self,
        images: Tensor,
        question_ids: Tensor,
        max_new: int = 32,
        *,
        sampling: Sampling | None = None,
    ) -> Tensor:
        """Answers: u8[B,K,H,W,3], right-padded prompts i64[B,L] (`encode_question`) -> i64[B,<=max_new].

        Greedy, or drawn as `sampling` says. An answer ends with eot; what follows it is padding. Keys and values are
        cached: the prompt is read once, then one token a step. Only ids of the text vocabulary are generated.
        """
        choose = sampling or Sampling(temperature=0.0)
        cache = self.showo.new_cache()
        hidden, rows = self.read_questions(images, question_ids, cache)
        length = rows.at["text"].start + (question_ids != self.config.pad_id).sum(1)  # tokens of each row, pads out
        seen = torch.arange(rows.ids.shape[1], device=length.device)[None] < length[:, None]
        last = hidden[torch.arange(len(hidden), device=length.device), length - 1]
        answers: list[Tensor] = []
        ended = torch.zeros_like(length, dtype=torch.bool)
        for step in range(max_new):
            token = choose(self.showo.lm_head(last, slice(0, self.config.text_vocab_size)))
            token = torch.where(ended, self.config.pad_id, token)
            answers.append(token)
            ended = ended | (token == self.config.eot_id)
            if bool(ended.all()) or step == max_new - 1:
                break
            seen = F.pad(seen, (0, 1), value=True)
            positions = (length + step)[:, None]
            last = self.showo(self.showo.embed(token[:, None]), seen[:, None, None], positions, cache)[:, 0]
        return torch.stack(answers, dim=1)

    def read_questions(self, images: Tensor, question_ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Rows]:
        """States f[B,L,D] of question rows, and the rows: what an answer is continued from."""
        expect("qa_images", images, *((len(question_ids), *shape) for shape in self.vision.input_shapes))
        check_question(self.config, question_ids)
        rows = qa_rows(self.config, question_ids)
        return self._read(rows, _replace(self.showo.embed(rows.ids), rows, self._patches(images)), cache), rows

    # ------------------------------------------------------------------------------------------------- the parts

    def _raw_actions(self, hidden_RLD: Tensor, rows: Rows) -> Tensor:
        pooled_RD = self.token_learner(hidden_RLD[:, rows.at["action"]])
        return self.to_logits(pooled_RD).float().unflatten(-1, (self.config.chunk, self.config.action_dims))

    @torch.no_grad()
    def _start_codes_as_bits(self) -> None:
        """Start image-code embeddings as a random projection of their bits: codes that differ little start similar."""
        embedding = self.showo.model.embed_tokens.weight
        if embedding.is_meta:
            return
        z = self.config.vq.z_channels
        bits = (torch.arange(2**z)[:, None] >> torch.arange(z - 1, -1, -1)) % 2 * 2.0 - 1.0
        projection = torch.randn(z, self.config.backbone.width) * (self.config.backbone.init_std / z**0.5)
        embedding[self.config.image_ids] = bits @ projection


class Sampling:
    """Chooses a token from logits: the likeliest at temperature 0, else drawn, among the `top_k` likeliest if set.

    The draws are a function of `seed` and of how many came before: use a new one for every `describe`.
    """

    def __init__(self, temperature: float, top_k: int = 0, seed: int = 0) -> None:
        self._temperature, self._top_k = temperature, top_k
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """i64[B]."""
        if self._temperature == 0:
            return logits_BV.argmax(-1)
        logits = logits_BV.float().cpu() / self._temperature
        if self._top_k:
            least = logits.topk(min(self._top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=self._generator)[:, 0]
        return drawn.to(logits_BV.device)


def _replace(embeds_BLD: Tensor, rows: Rows, patches_BPD: Tensor) -> Tensor:
    """Embeddings with the rows' patch span replaced by the last `B` projected patches."""
    at = rows.at["patches"]
    if patches_BPD.shape[1] != at.stop - at.start:
        raise Mismatch(f"images: the encoder made {patches_BPD.shape[1]} patches, the rows have {at.stop - at.start}")
    patches_BPD = patches_BPD[-len(embeds_BLD) :].to(embeds_BLD.dtype)
    return torch.cat([embeds_BLD[:, : at.start], patches_BPD, embeds_BLD[:, at.stop :]], dim=1)
