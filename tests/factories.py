"""Small synthetic recordings in CALVIN's raw layout, for every room's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

STATIC, GRIPPER = (200, 200, 3), (84, 84, 3)
TASKS = (
    ("open_drawer", "pull the handle to open the drawer"),
    ("turn_on_led", "press the button to turn on the led"),
    ("lift_red_block_table", "pick up the red block"),
)


def write_calvin(
    folder: Path,
    lengths: Sequence[int] = (24, 30, 18, 40),
    *,
    seed: int = 0,
    scenes: Sequence[str] = ("calvin_scene_A", "calvin_scene_B"),
    compressed: bool = False,
    static: tuple[int, int, int] = STATIC,
    gripper: tuple[int, int, int] = GRIPPER,
) -> Path:
    """Write one recording a length, with two overlapping annotations each (16 steps at most); returns `folder`.

    Frames are smooth gradients that move with the step, so that they compress like pictures and differ. Blocks lie at
    random places; drawer, slider and lamps change half-way. Everything is a function of the arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(seed))
    save = np.savez_compressed if compressed else np.savez
    ranges, spans, texts, tasks = [], [], [], []
    scene_info: dict[str, list[int]] = {}
    start = 0
    for number, length in enumerate(lengths):
        phase, colour = rng.uniform(0, 6, 2), rng.uniform(60, 190, 3)
        blocks = rng.uniform((-0.3, -0.15, 0.46), (0.3, 0.05, 0.47), (3, 3))
        robot = rng.normal(0, 0.3, 15)
        for step in range(length):
            late = step >= length // 2
            objects = np.zeros(24)
            objects[:6] = (0.28 * late, 0.22 * (not late), 0.0, 0.08 * late, float(late), float(not late))
            for block in range(3):
                objects[6 + 6 * block : 9 + 6 * block] = blocks[block] + (0.002 * step, 0, 0)
            relative = np.clip(0.6 * np.sin(0.2 * step + np.arange(7) + phase[0]), -1, 1)
            relative[6] = -1.0 if late else 1.0
            robot = robot + np.r_[relative[:3] * 0.02, relative[3:6] * 0.05, np.zeros(9)]
            robot[14] = relative[6]
            save(
                folder / f"episode_{start + step:07d}.npz",
                actions=np.r_[robot[:6], relative[6]],
                rel_actions=relative,
                robot_obs=robot,
                scene_obs=objects,
                rgb_static=_frame(static, phase, colour, step),
                rgb_gripper=_frame(gripper, phase[::-1], colour[::-1], step),
            )
        ranges.append((start, start + length - 1))
        for offset in (0, max(0, length - 16)):
            task, text = TASKS[(number + offset) % len(TASKS)]
            spans.append((start + offset, start + min(offset + 16, length)))
            texts.append(text)
            tasks.append(task)
        scene = scenes[number * len(scenes) // len(lengths)]
        scene_info.setdefault(scene, [start, 0])[1] = start + length - 1
        start += length
    np.save(folder / "ep_start_end_ids.npy", np.array(ranges))
    np.save(folder / "ep_lens.npy", np.array(lengths))
    np.save(folder / "scene_info.npy", scene_info, allow_pickle=True)
    (folder / "lang_annotations").mkdir(exist_ok=True)
    annotations = {
        "language": {"ann": texts, "task": tasks, "emb": np.zeros((len(texts), 1, 4), np.float32)},
        "info": {"episodes": [], "indx": spans},
    }
    np.save(folder / "lang_annotations" / "auto_lang_ann.npy", annotations, allow_pickle=True)
    return folder


def _frame(shape: tuple[int, int, int], phase: np.ndarray, colour: np.ndarray, step: int) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float32) / 30
    waves = np.stack([np.sin(rows + phase[0] + 0.15 * step) + np.cos(k * columns + phase[1]) for k in (1, 2, 3)], -1)
    return np.clip(colour + 30 * waves, 0, 255).astype(np.uint8)
