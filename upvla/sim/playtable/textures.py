"""Procedural textures: wood, made from a seed a scene. No image file ships."""

from __future__ import annotations

import cv2
import numpy as np

from upvla.sim.playtable.scene import Rgb, layout


def _noise(rng: np.random.Generator, cells: tuple[int, int], size: int) -> np.ndarray:
    """Smooth noise in [0, 1], f32[size,size], with that many cells along (rows, columns)."""
    return np.asarray(cv2.resize(rng.random(cells, dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC))


def _mix(low: Rgb, high: Rgb, weight: np.ndarray) -> np.ndarray:
    weight = np.clip(weight, 0, 1)[..., None]
    mixed = np.array(low) * (1 - weight) + np.array(high) * weight
    return (255 * np.clip(mixed, 0, 1)).astype(np.uint8)


def _wood(rng: np.random.Generator, light: Rgb, dark: Rgb, size: int = 256) -> np.ndarray:
    """Planks with rings and fine grain, u8[size,size,3]."""
    rows = np.arange(size, dtype=np.float32)[:, None] / size
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (7 * rows + 1.6 * _noise(rng, (5, 2), size)))
    grain = _noise(rng, (96, 5), size)
    image = _mix(dark, light, 0.15 + 0.5 * rings + 0.5 * (grain - 0.25)).astype(np.float32)
    for seam in range(0, size, size // 4):
        image[seam : seam + 2] *= 0.72
    return image.astype(np.uint8)


def textures(scene: str) -> dict[str, bytes]:
    """PNG files that the MJCF of this scene names, made from a seed of its own."""
    spec = layout(scene)
    rng = np.random.default_rng(sum(scene.encode()))
    images = {
        "desk.png": _wood(rng, *spec.desk),
        "front.png": _wood(rng, *spec.front),
    }
    return {name: cv2.imencode(".png", image[..., ::-1])[1].tobytes() for name, image in images.items()}
