"""Draws docs/images/row-*.png from the code's own row tables and masks: `python docs/draw_rows.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch

from upvla.model.config import ModelConfig, preset
from upvla.model.sequence import Rows, qa_rows, qa_table, robot_rows, robot_table

FOLDER = Path(__file__).parent / "images"
COLOURS = {"causal": "#4878a8", "full": "#d8843b", "shared": "#5f9e54"}
SHORT = {"prompt_soi": "soi", "prompt_eoi": "eoi", "patches": "E1 patch", "image": "code", "action": "action query"}


def small(**changes: object) -> ModelConfig:
    """Four patches, four codes, three action queries: small enough to be read."""
    sizes = {
        "text_budget": 8,
        "chunk": 3,
        "trim": False,
        "vision_cameras": ("static",),
        "vision": {"kind": "features", "image_size": 1, "width": 8, "num_patches": 4, "pool": (1,), "keypoints": 0},
        "vq": {"image_size": 16},
        "backbone": {"width": 32, "blocks": 1, "heads": 2, "mlp": 32},
    }
    return preset("tiny", **(sizes | changes))


def draw(name: str, title: str, rows: Rows, roles: dict[str, str], words: list[str]) -> None:
    """One mask as a picture: a row is what a token may read, its colour says why."""
    allowed = rows.allowed[0, 0]
    length = len(allowed)
    picture = torch.ones(length, length, 3)
    for q in range(length):
        for k in range(length):
            if allowed[q, k]:
                role = roles[_span(rows, k)] if roles[_span(rows, k)] == "shared" else roles[_span(rows, q)]
                picture[q, k] = torch.tensor(matplotlib.colors.to_rgb(COLOURS[role]))
    figure, axes = plt.subplots(figsize=(0.3 * length + 2, 0.3 * length + 2))
    axes.imshow(picture.numpy())
    axes.set_xticks(range(length), words, rotation=90, fontsize=8)
    axes.set_yticks(range(length), words, fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xticks([i - 0.5 for i in range(length)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(length)], minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("may be read")
    axes.set_ylabel("reads")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    names = ["reads what is to its left", "reads everything but padding", "is read by the whole row"]
    axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncol=3, fontsize=8, frameon=False)
    axes.set_title(title, fontsize=10, pad=12)
    figure.savefig(FOLDER / f"{name}.png", dpi=110, bbox_inches="tight")
    plt.close(figure)


def _span(rows: Rows, position: int) -> str:
    return next(name for name, at in rows.at.items() if at.start <= position < at.stop)


def labels(rows: Rows, text: list[str]) -> list[str]:
    words = [SHORT.get(_span(rows, i), _span(rows, i)) for i in range(rows.ids.shape[1])]
    words[rows.at["text"]] = text
    return words


def main() -> None:
    codes = torch.zeros(1, 1, 4, dtype=torch.long)
    released, whole = small(vision_prompt=False), small(description={"budget": 4}, text_budget=6)
    for name, title, config, said, text in (
        (
            "row-robot",
            "prediction and action, as released",
            released,
            [11, 12, 13],
            "PAD PAD PAD pre bos open the drawer eot",
        ),
        (
            "row-prompted",
            "prediction and action with the MMU-conditioned prompt",
            whole,
            [11, 12, 13, 14, 15],
            "PAD PAD PAD bos drawer: closed open the drawer eot",
        ),
    ):
        rows = robot_rows(config, torch.tensor([said]), torch.tensor([len(said)]), codes)
        roles = {span.name: span.role for span in robot_table(config, 1)}
        draw(name, title, rows, roles, labels(rows, text.split()))
    config = small(system_ids=(5, 6))
    rows = qa_rows(config, torch.tensor([[11, 12, 13, 14, config.eot_id, config.pad_id]]))
    roles = {span.name: span.role for span in qa_table(config, 1)}
    draw(
        "row-question",
        "understanding",
        rows,
        roles,
        labels(rows, ["USER:", "question", "ASSISTANT:", "answer", "eot", "PAD"]),
    )


if __name__ == "__main__":
    main()
