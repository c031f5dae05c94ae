"""Row layouts and masks against grids drawn by hand."""

from __future__ import annotations

import torch

from tests.model.conftest import mini_config
from upvla.model.config import ModelConfig
from upvla.model.sequence import conditioned, join, qa_rows, robot_rows

ONE_CAMERA = {
    "vision_cameras": ("static",),
    "chunk": 2,
    "vq": {"image_size": 16, "channels": 8, "z_channels": 5},
}


def tiny_grid(vision_prompt: bool) -> ModelConfig:
    """Two patches, two codes, two action queries."""
    config = mini_config(
        vision_prompt=vision_prompt,
        trim=False,
        text_budget=4,
        system_ids=(7,),
        code_cameras=("static",) * 2,
        **ONE_CAMERA | {"vq": {"image_size": 8, "channels": 8, "z_channels": 5}},
        vision={"kind": "features", "image_size": 1, "width": 8, "num_patches": 2, "pool": (1,), "keypoints": 0},
    )
    assert config.num_patches == 2 and config.num_views * config.codes_per_view == 2
    return config


def drawn(picture: str) -> torch.Tensor:
    return torch.tensor([[cell == "x" for cell in line.split()] for line in picture.strip().splitlines()])


def words(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [320] * (width - len(row)) for row in rows]).long().view(len(rows), width)
    return ids, torch.tensor([len(row) for row in rows])


def test_robot_row_with_vision_prompt() -> None:
    config = tiny_grid(vision_prompt=True)
    rows = robot_rows(config, *words([11]), torch.tensor([[[3], [4]]]))
    c = config
    offset = c.image_offset
    assert rows.ids[0].tolist() == [
        *(c.predict_id, c.soi_id, c.pad_id, c.pad_id, c.eoi_id),
        *(c.pad_id, c.eot_id, 11, c.eot_id),
        *(c.soi_id, offset + 3, offset + 4, c.eoi_id, c.action_id, c.action_id),
    ]
    grid = drawn("""
        x . x x . . . . . . . . . . .
        x x x x . . . . . . . . . . .
        x x x x . . . . . . . . . . .
        x x x x . . . . . . . . . . .
        x x x x x . . . . . . . . . .
        . . . . . x . . . . . . . . .
        x x x x x . x . . . . . . . .
        x x x x x . x x . . . . . . .
        x x x x x . x x x . . . . . .
        x x x x x . x x x x x x x x x
        x x x x x . x x x x x x x x x
        x x x x x . x x x x x x x x x
        x x x x x . x x x x x x x x x
        x x x x x . x x x x x x x x .
        x x x x x . x x x x x x x x x
    """)
    assert torch.equal(rows.allowed[0, 0], grid)


def test_published_robot_row() -> None:
    config = tiny_grid(vision_prompt=False)
    rows = robot_rows(config, *words([]), torch.tensor([[[0], [1]]]))
    c = config
    assert rows.ids[0, :5].tolist() == [c.pad_id, c.pad_id, c.predict_id, c.eot_id, c.eot_id]
    grid = drawn("""
        x . . . . . . . . . .
        x x . . . . . . . . .
        . . x . . . . . . . .
        . . x x . . . . . . .
        . . x x x . . . . . .
        . . x x x x x x x x x
        . . x x x x x x x x x
        . . x x x x x x x x x
        . . x x x x x x x x x
        . . x x x x x x x x .
        . . x x x x x x x x x
    """)
    assert torch.equal(rows.allowed[0, 0], grid)


def test_question_row() -> None:
    config = tiny_grid(vision_prompt=True)
    rows = qa_rows(config, torch.tensor([[21, 22, config.pad_id]]))
    c = config
    assert rows.ids[0].tolist() == [c.mmu_id, 7, c.soi_id, c.pad_id, c.pad_id, c.eoi_id, 21, 22, c.pad_id]
    grid = drawn("""
        x . . x x . . . .
        x x . x x . . . .
        x x x x x . . . .
        x x x x x . . . .
        x x x x x . . . .
        x x x x x x . . .
        x x x x x x x . .
        x x x x x x x x .
        x x x x x x x x x
    """)
    assert torch.equal(rows.allowed[0, 0], grid)


def test_a_long_instruction_keeps_its_end_token_and_a_leading_bos_is_not_doubled() -> None:
    config = tiny_grid(vision_prompt=False)  # five tokens of text span: task, bos, two words, eot
    codes = torch.zeros(3, 2, 1, dtype=torch.long)
    rows = robot_rows(config, *words([11, 12, 13, 14], [config.eot_id, 11], [11]), codes)
    task, eot, pad = config.predict_id, config.eot_id, config.pad_id
    assert rows.ids[:, rows.at["text"]].tolist() == [
        [task, eot, 11, 12, eot],
        [pad, task, eot, 11, eot],
        [pad, task, eot, 11, eot],
    ]


def test_a_conditioned_prompt_is_the_description_cut_to_its_budget_then_the_instruction() -> None:
    plain, spoken = mini_config(), mini_config(description={"budget": 3})
    eot, pad = spoken.eot_id, spoken.pad_id
    assert conditioned(plain, [5, 6], [11, 12]) == [11, 12]
    assert conditioned(spoken, [5, 6, eot, pad], [11, 12]) == [5, 6, 11, 12]
    assert conditioned(spoken, [5, 6, 7, 8], [11, 12]) == [5, 6, 7, 11, 12]
    assert spoken.max_robot_length == plain.max_robot_length + 3
    text = conditioned(spoken, [5, 6, 7], [11] * (plain.text_budget - 2))
    codes = torch.zeros(1, spoken.num_views, spoken.codes_per_view, dtype=torch.long)
    rows = robot_rows(spoken, *words(text), codes)
    assert rows.ids[0, rows.at["text"]].tolist() == [eot, *text, eot]


def test_rows_of_three_views_at_an_image_that_is_not_square() -> None:
    config = mini_config(code_cameras=("static", "gripper", "third"), vq={"image_size": (16, 48)})
    codes = torch.arange(2 * 3 * 12).view(2, 3, 12) % 32
    rows = robot_rows(config, *words([11], [12, 13]), codes)
    assert config.vq.grid == (2, 6) and config.codes_per_view == 12
    assert torch.equal(rows.ids[:, rows.at["image"]] - config.image_offset, codes.flatten(1))
    assert rows.allowed.shape[-1] == rows.ids.shape[1] == rows.at["action"].stop
    assert config.vq_resize.size == 16 and config.vq_resize.width == 48


def test_trimming_cuts_only_shared_padding_and_moves_no_position() -> None:
    for prompt in (True, False):
        full = mini_config(vision_prompt=prompt, trim=False)
        trimmed = mini_config(vision_prompt=prompt, trim=True)
        codes = torch.zeros(2, full.num_views, full.codes_per_view, dtype=torch.long)
        a = robot_rows(full, *words([11], [11, 12, 13]), codes)
        b = robot_rows(trimmed, *words([11], [11, 12, 13]), codes)
        cut = a.ids.shape[1] - b.ids.shape[1]
        assert cut == full.text_budget - 6 + (0 if prompt else 1) + (1 if prompt else 0)
        start = a.at["text"].start
        kept = [*range(start), *range(start + cut, a.ids.shape[1])]
        assert torch.equal(a.ids[:, kept], b.ids)
        assert torch.equal(a.positions[:, kept], b.positions)
        assert torch.equal(a.allowed[:, :, kept][..., kept], b.allowed)


def test_joined_rows_see_nothing_of_each_other_and_no_row_is_empty(config: ModelConfig) -> None:
    codes = torch.zeros(2, config.num_views, config.codes_per_view, dtype=torch.long)
    robot, qa = robot_rows(config, *words([11], [12]), codes), qa_rows(config, torch.tensor([[21, 22]]))
    ids, allowed, positions = join(robot, qa, config.pad_id)
    width = qa.ids.shape[1]
    assert ids.shape[1] == robot.ids.shape[1] > width
    assert torch.equal(allowed[:2], robot.allowed) and torch.equal(allowed[2:, :, :width, :width], qa.allowed)
    assert not allowed[2:, :, :width, width:].any()
    assert allowed.any(-1).all()
    assert torch.equal(ids[2, :width], qa.ids[0]) and torch.equal(positions[2, :width], qa.positions[0])
