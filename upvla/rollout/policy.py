"""Policies: the trained model behind the `Policy` protocol, and the two reference rows of every table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch

from upvla.checkpoint import Bundle
from upvla.errors import Mismatch
from upvla.images import resize
from upvla.model.sequence import conditioned
from upvla.types import ActionSpace, Observation, Prediction


class UPVLAPolicy:
    """One forward pass a chunk: frames -> the named resize -> image codes and patches -> actions and the future frame.

    Actions come back in the checkpoint's action space, pose in [-1, 1], gripper -1 or +1. Everything that touches the
    pixels (resize, cameras, VQ tokenizer) is read from the checkpoint, so serving cannot differ from training.
    """

    def __init__(self, bundle: Bundle, name: str = "upvla") -> None:
        self.name = name
        self.action_space: ActionSpace = bundle.action_space
        self._bundle = bundle
        self._model = bundle.model.eval()
        self._vq = bundle.vq.eval()
        self._instruction_ids: list[int] | None = None
        self._chunks = 0  # since the last reset
        self.instruction = ""
        self.description = ""  # what the model said of the scene, where its configuration asks for it

    def reset(self, instruction: str) -> None:
        self.instruction, self.description, self._chunks = instruction, "", 0
        self._instruction_ids = self._bundle.text.encode(instruction)

    @torch.inference_mode()
    def act(self, observation: Observation) -> Prediction:
        if self._instruction_ids is None:
            raise Mismatch("policy: act() before reset(instruction): call reset once a subtask")
        config = self._bundle.config
        images = np.stack([resize(_camera(observation.images, c), config.vision_resize) for c in config.vision_cameras])
        tokenised = np.stack([resize(_camera(observation.images, c), config.vq_resize) for c in config.code_cameras])
        pixels = torch.from_numpy(tokenised).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        codes = self._vq.encode(pixels)
        text = self._prompt(torch.from_numpy(images)[None])
        actions, future = self._model.predict(
            torch.from_numpy(images)[None], codes[None], text, torch.tensor([text.shape[1]])
        )
        self._chunks += 1
        return Prediction(actions[0].float().numpy(), future[0].numpy())

    def _prompt(self, images: torch.Tensor) -> torch.Tensor:
        """i64[1,L]: the instruction, after a description of the scene that is made anew when it is due."""
        assert self._instruction_ids is not None
        config = self._bundle.config.description
        if config is not None:
            due = self._chunks % config.every_chunks == 0 if config.every_chunks else self._chunks == 0
            if due:
                (self.description,) = describe_frames(self._bundle, images)
        ids = conditioned(self._bundle.config, self._bundle.text.encode(self.description), self._instruction_ids)
        return torch.tensor([ids], dtype=torch.long)

    @torch.inference_mode()
    def picture(self, codes: np.ndarray) -> np.ndarray:
        """Image codes i64[V,N] -> u8[V,H,W,3], what the model expects to see."""
        pixels = self._vq.decode(torch.from_numpy(codes), self._vq.config.grid)
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


@torch.inference_mode()
def describe_frames(bundle: Bundle, images: torch.Tensor) -> list[str]:
    """What the model says of frames u8[B,K,H,W,3] when asked its configuration's question; for training and rollout."""
    config = bundle.config.description
    if config is None:
        raise Mismatch("describe: the model's configuration has no `description`")
    question = torch.tensor(bundle.text.encode_question(config.question), dtype=torch.long)
    answers = bundle.model.eval().describe(images, question.expand(len(images), -1), config.budget)
    return [bundle.text.decode(answer.tolist()).strip() for answer in answers]


def _camera(images: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in images:
        raise Mismatch(f"policy: the model was trained on camera {name!r}; the observation has {sorted(images)}")
    return images[name]


class StillPolicy:
    """Does nothing: zero motion, gripper open, whichever sign that is."""

    name = "still"

    def __init__(self, action_space: ActionSpace, chunk: int = 10) -> None:
        self.action_space = action_space
        self._actions = np.zeros((chunk, len(action_space)), np.float32)
        self._actions[:, -1] = -1.0 if "-1=open" in action_space.dims[-1].convention else 1.0

    def reset(self, instruction: str) -> None:
        pass

    def act(self, observation: Observation) -> Prediction:
        return Prediction(self._actions.copy())


class RandomPolicy:
    """Uniform actions held over the chunk's steps; a pure function of what is seen, so that reruns agree."""

    name = "random"

    def __init__(self, action_space: ActionSpace, chunk: int = 10) -> None:
        self.action_space = action_space
        self._chunk = chunk
        self._instruction = ""

    def reset(self, instruction: str) -> None:
        self._instruction = instruction

    def act(self, observation: Observation) -> Prediction:
        digest = hashlib.sha256(np.asarray(observation.state, np.float32).tobytes() + self._instruction.encode())
        rng = np.random.Generator(np.random.Philox(int.from_bytes(digest.digest()[:8], "little")))
        actions = rng.uniform(-1.0, 1.0, (self._chunk, len(self.action_space))).astype(np.float32)
        actions[:, -1] = np.where(actions[:, -1] >= 0, 1.0, -1.0)
        return Prediction(actions)
