"""What a person looks at: a rollout as video with its instruction, and predicted frames beside what really came."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import imageio.v2 as imageio
import numpy as np

from upvla.types import Observation, Prediction

_PANEL = 256  # px, side of one panel
_BAR = 40  # px, height of the caption under the panels
_FPS_HZ = 10


class Film:
    """Collects one chain: static camera | gripper camera | predicted future frame, the instruction below."""

    def __init__(self, picture: Callable[[np.ndarray], np.ndarray] | None, every: int = 3) -> None:
        """`picture` decodes predicted codes i64[V,N] to u8[V,H,W,3]; without it the third panel stays dark."""
        self.every = every  # env steps between two frames
        self._picture = picture
        self._frames: list[np.ndarray] = []
        self._predicted: np.ndarray | None = None
        self._text = ""
        self._plans: list[tuple[np.ndarray, np.ndarray | None]] = []

    def plan(self, observation: Observation, prediction: Prediction | None, text: str) -> None:
        """A new chunk, or the same place in a script that predicts nothing."""
        self._text = text
        if self._picture is not None and prediction is not None and prediction.future_codes is not None:
            self._predicted = self._picture(prediction.future_codes)[0]
        self._plans.append((observation.images["static"], self._predicted))
        self.frame(observation)

    def frame(self, observation: Observation, colour: tuple[int, int, int] = (235, 235, 235)) -> None:
        dark = np.zeros((_PANEL, _PANEL, 3), np.uint8)
        panels = [_panel(observation.images["static"])]
        panels.append(_panel(observation.images["gripper"]) if "gripper" in observation.images else dark)
        panels.append(dark if self._predicted is None else _panel(self._predicted))
        bar = np.full((_BAR, _PANEL * 3, 3), 24, np.uint8)
        cv2.putText(bar, self._text, (10, 26), cv2.FONT_HERSHEY_SIMPLEX, 0.6, colour, 1, cv2.LINE_AA)
        self._frames.append(np.concatenate([np.concatenate(panels, 1), bar]))

    def mark(self, observation: Observation, text: str, success: bool) -> None:
        self._text = f"{'done' if success else 'failed'}: {text}"
        for _ in range(_FPS_HZ // 2):
            self.frame(observation, (110, 220, 110) if success else (240, 100, 90))

    def save_video(self, path: Path) -> Path:
        """H.264 mp4, static | gripper | predicted future."""
        frames = list[Any](self._frames)
        imageio.mimwrite(path, frames, fps=_FPS_HZ, codec="libx264", macro_block_size=8, ffmpeg_log_level="error")
        return path

    def strip(self, columns: int = 6) -> np.ndarray | None:
        """u8[3*PANEL, columns*PANEL, 3]: rows seen now, predicted for the next plan, really seen then."""
        pairs = [
            (now, guess, then)
            for (now, guess), (then, _) in zip(self._plans, self._plans[1:], strict=False)
            if guess is not None
        ]
        if not pairs:
            return None
        chosen = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(columns, len(pairs))).astype(int)]
        return np.concatenate([np.concatenate([_panel(f) for f in column], 0) for column in chosen], 1)


def _panel(frame: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.resize(frame, (_PANEL, _PANEL), interpolation=cv2.INTER_NEAREST))
