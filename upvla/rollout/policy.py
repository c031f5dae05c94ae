"""The trained model behind the `Policy` protocol, for one robot or for many worlds at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from upvla.checkpoint import Bundle
from upvla.errors import Mismatch
from upvla.images import resize
from upvla.model.sequence import conditioned, text_room
from upvla.rollout.play import Ask
from upvla.types import ActionSpace, Observation, Prediction

_SHORTEST = 16  # tokens: rooms for text are this, four times this, ...


class UPVLAPolicy:
    """One forward pass a chunk: frames -> the named resize -> image codes and patches -> actions and the future frame.

    Actions come back in the checkpoint's action space, pose in [-1, 1], gripper -1 or +1. Everything that touches the
    pixels (resize, cameras, VQ tokenizer) is read from the checkpoint, so serving cannot differ from training.

    Every pass has `slots` rows, filled up where fewer ask, and room for text that follows from a row's own text: the
    sums of a matrix product depend on its shape, so an answer would otherwise depend on who else asks. Policies with
    other `slots` agree to rounding, not to the bit.
    """

    def __init__(self, bundle: Bundle, name: str = "upvla", *, slots: int = 1, device: str = "cpu") -> None:
        self.name, self.slots = name, slots
        self.action_space: ActionSpace = bundle.action_space
        self._bundle, self._device = bundle, torch.device(device)
        self._model = bundle.model.eval().to(self._device)
        self._vq = bundle.vq.eval().to(self._device)
        self._told: str | None = None
        self._memory: dict[str, Any] = {}

    @property
    def instruction(self) -> str:
        return self._told or ""

    @property
    def description(self) -> str:
        """What the model said of the scene since `reset`, where its configuration asks for it."""
        return str(self._memory.get("description", ""))

    def reset(self, instruction: str) -> None:
        self._told, self._memory = instruction, {}

    def act(self, observation: Observation) -> Prediction:
        if self._told is None:
            raise Mismatch("policy: act() before reset(instruction): call reset once a subtask")
        return self.act_many([Ask(observation, self._told, self._memory)])[0]

    @torch.inference_mode()
    def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
        """Answers to any number of worlds. What is remembered of a subtask is put into each ask's `memory`."""
        seen = [self._look(ask.observation) for ask in asks]
        self._describe(asks, [images for images, _ in seen])
        texts = [self._text(ask) for ask in asks]
        groups: dict[int, list[int]] = defaultdict(list)
        for i, text in enumerate(texts):
            groups[self._room(len(text))].append(i)
        found: dict[int, Prediction] = {}
        for room, members in groups.items():
            for start in range(0, len(members), self.slots):
                part = members[start : start + self.slots]
                found |= zip(part, self._pass([(*seen[i], texts[i]) for i in part], room), strict=True)
        for ask in asks:
            ask.memory["chunks"] = ask.memory.get("chunks", 0) + 1
        return [found[i] for i in range(len(asks))]

    def _pass(self, rows: list[tuple[np.ndarray, np.ndarray, list[int]]], room: int) -> list[Prediction]:
        """(frames, frames to tokenise, text ids) of at most `slots` worlds."""
        count = len(rows)
        images, tokenised, texts = zip(*self._filled(rows), strict=True)
        pixels = self._tensor(np.stack(tokenised)).flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        codes = self._vq.encode(pixels).unflatten(0, (self.slots, -1))
        text_ids = np.full((self.slots, max(map(len, texts))), self._bundle.config.pad_id, np.int64)
        for row, text in zip(text_ids, texts, strict=True):
            row[: len(text)] = text
        lengths = np.array([len(text) for text in texts], np.int64)
        actions, future = self._model.predict(
            self._tensor(np.stack(images)), codes, self._tensor(text_ids), self._tensor(lengths), room
        )
        told, expected = actions[:count].float().cpu().numpy(), future[:count].cpu().numpy()
        return [Prediction(*row) for row in zip(told, expected, strict=True)]

    def _look(self, observation: Observation) -> tuple[np.ndarray, np.ndarray]:
        config = self._bundle.config
        images = [resize(_camera(observation.images, c), config.vision_resize) for c in config.vision_cameras]
        tokenised = [resize(_camera(observation.images, c), config.vq_resize) for c in config.code_cameras]
        return np.stack(images), np.stack(tokenised)

    def _describe(self, asks: Sequence[Ask], images: Sequence[np.ndarray]) -> None:
        """Let the model describe the scene anew where that is due."""
        config = self._bundle.config.description
        if config is None:
            return
        due = []
        for i, ask in enumerate(asks):
            chunks = ask.memory.get("chunks", 0)
            if chunks % config.every_chunks == 0 if config.every_chunks else chunks == 0:
                due.append(i)
        for start in range(0, len(due), self.slots):
            part = due[start : start + self.slots]
            shown = self._tensor(np.stack(self._filled([images[i] for i in part])))
            for i, said in zip(part, describe_frames(self._bundle, shown), strict=False):
                asks[i].memory["description"] = said

    def _text(self, ask: Ask) -> list[int]:
        """Ids of the instruction, after the description of the scene where the model is conditioned on one."""
        encode = self._bundle.text.encode
        return conditioned(self._bundle.config, encode(ask.memory.get("description", "")), encode(ask.instruction))

    def _room(self, length: int) -> int:
        """For how many tokens of text a row is laid out; its own length where it is alone anyway."""
        if self.slots == 1:
            return length
        room, most = _SHORTEST, text_room(self._bundle.config)
        while room < length:
            room *= 4
        return min(room, most)

    def _filled(self, rows: list[Any]) -> list[Any]:
        """With copies of the first up to `slots`; no row looks at another."""
        return rows + rows[:1] * (self.slots - len(rows))

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._device)

    @torch.inference_mode()
    def picture(self, codes: np.ndarray) -> np.ndarray:
        """Image codes i64[V,N] -> u8[V,H,W,3], what the model expects to see."""
        pixels = self._vq.decode(self._tensor(codes), self._vq.config.grid)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.inference_mode()
def describe_frames(bundle: Bundle, images: torch.Tensor) -> list[str]:
    """What the model says of frames u8[B,K,H,W,3] when asked its configuration's question; for training and rollout."""
    config = bundle.config.description
    if config is None:
        raise Mismatch("describe: the model's configuration has no `description`")
    question = torch.tensor(bundle.text.encode_question(config.question), dtype=torch.long, device=images.device)
    answers = bundle.model.eval().describe(images, question.expand(len(images), -1), config.budget)
    return [bundle.text.decode(answer.tolist()).strip() for answer in answers]


def _camera(images: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in images:
        raise Mismatch(f"policy: the model was trained on camera {name!r}; the observation has {sorted(images)}")
    return images[name]
