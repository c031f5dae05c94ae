"""Parity with the published classes: the stored tensors, a folder of other sizes, and mistakes that must show."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.phi import modeling_phi

from tests import golden as parity
from tests import published
from tests.golden import FOLDER, Golden, compare
from upvla.model import action_head, losses, sequence, text, upvla, vq

OTHER: dict[str, Any] = {
    "hidden": 48,
    "layers": 3,
    "heads": 2,
    "inter": 72,
    "prf": 0.25,
    "theta": 5000.0,
    "num_vq": 6,
    "views": 2,
    "act_step": 6,
    "z": 5,
    "clip_dim": 20,
    "n_clip": 7,
    "max_text": 44,
    "map_heads": 3,
    "vq": {"ch": 32, "enc_mult": [1, 1, 2, 2], "enc_blk": [1, 0, 2, 1], "dec_mult": [1, 2, 1, 2],
           "dec_blk": [1, 1, 0, 2], "image": 24, "attn_res": [5]},
}  # fmt: skip


def missed(folder: Path) -> list[str]:
    return [row.name for row in compare(Golden(folder)) if not row.ok]


def test_every_golden_tensor() -> None:
    rows = list(compare(Golden(FOLDER)))
    assert [row for row in rows if not row.ok] == []
    assert len(rows) > 130


def test_the_naive_writing_of_the_published_code_is_right() -> None:
    """It gives the outputs of the published classes, so a folder made with it is as good as one made with them."""
    v = json.loads((FOLDER / "config.json").read_text())
    stored, state = (load_file(FOLDER / f"{name}.safetensors") for name in ("train_batch", "model_state"))
    inputs = {name: value.clone() for name, value in stored.items() if not name.startswith(("out_", "gen_"))}
    for name, found in published.train_outputs(v, state, inputs).items():
        torch.testing.assert_close(found, stored[name], atol=3e-5, rtol=0, msg=name)
    for name in ("pre_allowed", "mmu_allowed"):
        assert torch.equal(inputs[name], stored[name])
    rows = [
        published.robot_row(v, stored[f"pre_text_ids_{i}"].tolist(), stored["pre_image_tokens"][i].tolist())
        for i in range(3)
    ]
    assert rows == stored["pre_input_ids"].tolist()
    state = {name: value.detach() for name, value in state.items()}
    prompt = stored["gen_prompt_ids_without_image"]
    tokens, _ = published.greedy(v, state, prompt, stored["mmu_clip_features"][:1], 8)
    assert torch.equal(tokens, stored["gen_greedy_tokens"])
    vq_state, io = (load_file(FOLDER / f"{name}.safetensors") for name in ("vq_state", "vq_io"))
    torch.testing.assert_close(published.encode(v, vq_state, io["pixels"]), io["z"], atol=3e-5, rtol=0)
    assert torch.equal(published.bits_to_codes(io["z"]), io["indices"])
    decoded = published.decode(v, vq_state, io["nonsquare_indices"], (2, 3))
    torch.testing.assert_close(decoded, io["nonsquare_recon"], atol=5e-5, rtol=0)
    data = load_file(FOLDER / "data_windows.safetensors")
    futures, chunks = published.windows(data["episode_lengths"].tolist(), data["rel_actions"].numpy(), v["act_step"])
    assert futures == data["future_index"].tolist() and torch.equal(torch.tensor(chunks), data["chunks"])
    for camera in ("static", "gripper"):
        side = data[f"transformed_{camera}"].shape[-1]
        frame = published.transform(data[f"raw_{camera}"].numpy(), side)
        torch.testing.assert_close(frame, data[f"transformed_{camera}"], atol=1e-6, rtol=0)


def test_a_folder_of_other_sizes(tmp_path: Path) -> None:
    """Two views, chunk 6, three blocks, two heads, other rotary, four VQ levels, a 2 x 3 grid, MLP not four times."""
    folder = published.write_golden(tmp_path / "other", FOLDER, **OTHER)
    assert missed(folder) == []
    assert parity.main([str(folder)]) == 0


def test_golden_tensors_of_another_place() -> None:
    """Any further folder of the format: UPVLA_GOLDEN names it."""
    folder = os.environ.get("UPVLA_GOLDEN")
    if not folder:
        pytest.skip("UPVLA_GOLDEN names no further golden folder")
    assert missed(Path(folder)) == []


# --------------------------------------------------------------------------------------------------------- mutations

Mutation = Callable[[pytest.MonkeyPatch], None]


def sizes(**values: Any) -> Mutation:
    """Another value in the configuration, as if a size had been misread."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = Golden.config
        patch.setattr(Golden, "config", lambda self, **changes: original(self, **{**values, **changes}))

    return apply


def backbone(**values: Any) -> Mutation:
    def apply(patch: pytest.MonkeyPatch) -> None:
        original = Golden.config

        def config(self: Golden, **changes: Any) -> Any:
            found = original(self, **changes)
            return found.model_copy(update={"backbone": found.backbone.model_copy(update=values)})

        patch.setattr(Golden, "config", config)

    return apply


def built(change: Callable[[upvla.UPVLA], None]) -> Mutation:
    """A mistake in a model that is built and loaded."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = Golden.model

        def model(self: Golden, **changes: Any) -> upvla.UPVLA:
            found = original(self, **changes)
            change(found)
            return found

        patch.setattr(Golden, "model", model)

    return apply


def replaced(owner: Any, name: str, value: Any) -> Mutation:
    return lambda patch: patch.setattr(owner, name, value)


def wrapped(owner: Any, name: str, around: Callable[..., Any]) -> Mutation:
    """`around(original, *arguments)` in place of a function or method."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *a, **k: around(original, *a, **k))

    return apply


def exact_gelu(model: upvla.UPVLA) -> None:
    for layer in model.showo.model.layers:
        layer.mlp.activation_fn = nn.GELU()


def no_qk_norm(model: upvla.UPVLA) -> None:
    for layer in model.showo.model.layers:
        layer.self_attn.qk_layernorm = False


def interleaved(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def roles(table: str, span: str, role: str) -> Mutation:
    def change(original: Callable[..., Any], *arguments: Any) -> Any:
        return tuple(s._replace(role=role) if s.name == span else s for s in original(*arguments))

    return wrapped(sequence, table, change)


def mask_off_by_one(original: Callable[..., Tensor], table: Any, padding: Tensor) -> Tensor:
    allowed = original(table, padding)
    return allowed | F.pad(allowed, (1, -1))  # every query also sees one key further


def swapped_gate(self: action_head.GatedProjection, x: Tensor) -> Tensor:
    g, u = self.project(x).chunk(2, dim=-1)
    return u * F.silu(g)


def least_significant_first(self: vq.LookupFreeQuantizer, z: Tensor) -> Tensor:
    return ((z > 0) * self.power_vals.flip(0)[:, None, None]).sum(1)


def shifted(field: str) -> Callable[..., Any]:
    def change(original: Callable[..., Any], *arguments: Any) -> Any:
        *rest, batch, weight = arguments
        return original(*rest, batch._replace(**{field: getattr(batch, field).roll(1, -1)}), weight)

    return change


MUTATIONS: dict[str, Mutation] = {
    "GELU without the tanh": built(exact_gelu),
    "projector GELU with the tanh": built(lambda m: m.mm_projector.__setitem__(1, nn.GELU(approximate="tanh"))),
    "rotary pairs interleaved": replaced(modeling_phi, "rotate_half", interleaved),
    "rotary on the whole head": backbone(rotary_fraction=1.0),
    "another rotary base": backbone(rotary_base=5000.0),
    "q and k not normalised": built(no_qk_norm),
    "another norm epsilon": backbone(norm_eps=1e-3),
    "pooling heads not doubled": sizes(action_head={"heads": 2}),
    "mask off by one": wrapped(sequence, "attention_mask", mask_off_by_one),
    "image span causal": roles("robot_table", "image", "causal"),
    "action queries see each other": roles("robot_table", "action", "full"),
    "patches causal": roles("qa_table", "patches", "causal"),
    "one text token less": sizes(text_budget=39),
    "no system prompt": sizes(system_ids=()),
    "image labels shifted": wrapped(losses, "prediction_loss", shifted("future_codes")),
    "text labels shifted": wrapped(losses, "understanding_loss", shifted("qa_labels")),
    "image loss without delimiters": sizes(image_softmax="codebook"),
    "gripper as a logit": sizes(action_head={"heads": 4, "gripper": "bce"}),
    "gate and value swapped": replaced(action_head.GatedProjection, "forward", swapped_gate),
    "lowest bit first": replaced(vq.LookupFreeQuantizer, "codes", least_significant_first),
    "padding on the left and top": replaced(
        vq.Downsample, "forward", lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0)))
    ),
    "smooth upsampling": replaced(
        vq.Upsample, "forward", lambda self, x: self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))
    ),
    "chunk to its true end": wrapped(parity, "window", lambda original, *a, **k: original(*a)),
    "gripper stands still too": wrapped(
        parity, "fill_chunk",
        lambda original, a, n, space: (F.pad(torch.tensor(a), (0, 0, 0, n - len(a))).numpy(), None),
    ),
    "warm-up one step late": wrapped(parity, "lr_factor", lambda original, step, *a: original(max(0, step - 1), *a)),
    "resize without anti-aliasing": wrapped(
        parity, "resize", lambda original, frame, spec: original(frame, spec.model_copy(update={"filter": "cubic"}))
    ),
    "answers without their leading blank": replaced(
        text.TextTokenizer,
        "encode_question",
        lambda self, question: self.encode(f"USER: {text._plain(question)} ASSISTANT: "),
    ),
    "actions read from the row's start": wrapped(
        upvla.UPVLA,
        "_raw_actions",
        lambda original, self, hidden, rows: original(self, hidden.flip(1), rows),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(MUTATIONS) >= 15
    MUTATIONS[name](monkeypatch)
    assert any(not row.ok for row in compare(Golden(FOLDER))), f"nothing in {FOLDER} notices: {name}"
