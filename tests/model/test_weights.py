"""Published checkpoints by their real names: what loads, what stays fresh, what is refused, and how files are read."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.model.conftest import mini_config
from upvla.errors import ConfigError, Corrupt, Mismatch, NotFound
from upvla.model import weights
from upvla.model.config import ModelConfig, preset
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer

State = dict[str, Tensor]
HEADS = ("token_learner.", "to_logits.")
CLIP = {"kind": "clip", "image_size": 28, "patch": 14, "width": 32, "blocks": 2, "heads": 2, "mlp": 64, "frozen": True,
        "pool": (1, 1), "keypoints": 0, "stem": ()}  # fmt: skip


def values(shapes: dict[str, torch.Size], seed: int = 1) -> State:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def published(config: ModelConfig, *, heads: bool) -> State:
    """Show-o's state dict (without the action head) or UP-VLA's own, at the sizes of `config`."""
    shapes = weights.shapes_of(UPVLA(config))
    return values(
        {n: s for n, s in shapes.items() if not n.startswith("vision.") and (heads or not n.startswith(HEADS))}
    )


def plain_phi(config: ModelConfig, rows: int) -> State:
    state = {n.removeprefix("showo."): v for n, v in published(config, heads=False).items() if n.startswith("showo.")}
    state = {n: v for n, v in state.items() if "q_layernorm" not in n and "k_layernorm" not in n}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        state[name] = state[name][:rows]
    return state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def whole_clip(config: ModelConfig) -> State:
    shapes = {n: s for n, s in weights.shapes_of(UPVLA(config)).items() if n.startswith(weights.TOWER)}
    state = {f"vision_model.{n.removeprefix(weights.TOWER)}": v for n, v in values(shapes).items()}
    state |= {"vision_model.embeddings.position_ids": torch.arange(5)[None], "logit_scale": torch.ones(())}
    return state | {"text_model.final_layer_norm.weight": torch.ones(4), "visual_projection.weight": torch.ones(4, 4)}


def write(folder: Path, state: State, layout: str) -> Path:
    """The published layouts: a pickle, safetensors, shards, or accelerate's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "pickle":
        torch.save(state, folder / "pytorch_model.bin")
    elif layout == "unwrapped":
        (folder / "unwrapped_model").mkdir()
        torch.save(state, folder / "unwrapped_model" / "pytorch_model.bin")
    elif layout == "safetensors":
        safetensors.torch.save_file(state, folder / "model.safetensors")
    else:
        names = sorted(state)
        shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, held in shards.items():
            safetensors.torch.save_file({name: state[name] for name in held}, folder / file)
        places = {name: file for file, held in shards.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("layout", ["pickle", "unwrapped", "safetensors", "shards"])
def test_upvlas_own_checkpoint_in_every_layout(tmp_path: Path, layout: str) -> None:
    config = mini_config()
    state = published(config, heads=True)
    model = UPVLA(config)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    audit = weights.load_published("upvla", model, write(tmp_path, state, layout))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name.startswith("vision.") else state[name]), name
    assert set(audit.loaded) == {"embeddings", "decoder", "decoder q/k norms", "head", "projector", "action head"}
    assert set(audit.fresh) == {"vision tower"}
    assert sum(count.values for count in audit.loaded.values()) == sum(v.numel() for v in state.values())


def test_show_o_leaves_the_action_head_fresh() -> None:
    config = mini_config()
    model, state = UPVLA(config), published(config, heads=False)
    ours, audit = weights.convert("showo", state, weights.shapes_of(model))
    assert ours.keys() == state.keys()
    assert set(audit.fresh) == {"vision tower", "action head"}
    lines = str(audit).splitlines()
    assert any(line.startswith("fresh") and "action head" in line for line in lines) and "unexpected   none" in lines


def test_plain_phi_fills_the_first_rows_of_the_table_and_q_k_norms_start_neutral() -> None:
    config = mini_config()
    rows = config.text_vocab_size + 20  # Phi-1.5's own table is longer than its text vocabulary, too
    torch.manual_seed(0)
    model, state = UPVLA(config), plain_phi(config, rows)
    rest = model.showo.model.embed_tokens.weight[rows:].clone()
    ours, audit = weights.convert("phi", state, weights.shapes_of(model))
    weights.fill(model, ours)
    assert torch.equal(model.showo.model.embed_tokens.weight[:rows], state["model.embed_tokens.weight"])
    assert torch.equal(model.showo.model.embed_tokens.weight[rows:], rest)
    assert torch.equal(model.showo.lm_head.bias[:rows], state["lm_head.bias"])
    first = model.showo.model.layers[0]
    assert torch.equal(first.mlp.fc1.weight, state["model.layers.0.mlp.fc1.weight"])
    assert first.self_attn.q_layernorm.weight.eq(1).all() and first.self_attn.k_layernorm.bias.eq(0).all()
    assert audit.unused == 1 and "decoder q/k norms" in audit.fresh


def test_the_image_tokenizer_with_its_buffers() -> None:
    config = mini_config().vq
    source, target = VQTokenizer(config), VQTokenizer(config)
    ours, audit = weights.convert("magvit", source.state_dict(), weights.shapes_of(target))
    weights.fill(target, ours)
    assert target.id == source.id and audit.fresh == {} and audit.loaded["codebook"].tensors == 2


@pytest.mark.parametrize("prefix", [True, False])
def test_clips_tower_out_of_a_whole_clip_or_alone(prefix: bool) -> None:
    config = mini_config(vision=CLIP)
    model, state = UPVLA(config), whole_clip(config)
    if not prefix:
        state = {n.removeprefix("vision_model."): v for n, v in state.items() if n.startswith("vision_model.")}
    ours, audit = weights.convert("clip", state, weights.shapes_of(model))
    weights.fill(model, ours)
    assert set(audit.loaded) == {"vision tower"} and audit.unused == (4 if prefix else 1)
    name = "encoder.layers.1.mlp.fc2.weight"
    found = model.state_dict()[weights.TOWER + name]
    assert torch.equal(found, state[f"vision_model.{name}" if prefix else name])


def test_base_takes_the_real_names_and_shapes_on_the_meta_device() -> None:
    config = preset("base")
    with torch.device("meta"):
        shapes = weights.shapes_of(UPVLA(config))
    trained = {name: shape for name, shape in shapes.items() if not name.startswith("vision.")}
    assert trained == {name: torch.Size(shape) for name, shape in section_1().items()}


def section_1() -> dict[str, tuple[int, ...]]:
    """Names and shapes of UP-VLA's checkpoint, from the tables of the method's section 1."""
    d, rows = 2048, 58498
    table: dict[str, tuple[int, ...]] = {"showo.model.embed_tokens.weight": (rows, d)}

    def pair(name: str, outer: int, *inner: int) -> None:
        table[f"{name}.weight"], table[f"{name}.bias"] = (outer, *inner), (outer,)

    for i in range(24):
        at = f"showo.model.layers.{i}"
        pair(f"{at}.input_layernorm", d)
        for part in ("q_proj", "k_proj", "v_proj", "dense"):
            pair(f"{at}.self_attn.{part}", d, d)
        for part in ("q_layernorm", "k_layernorm"):
            pair(f"{at}.self_attn.{part}", 64)
        pair(f"{at}.mlp.fc1", 8192, d)
        pair(f"{at}.mlp.fc2", d, 8192)
    pair("showo.model.final_layernorm", d)
    pair("showo.lm_head", rows, d)
    pair("mm_projector.0", d, 1024)
    pair("mm_projector.2", d, d)
    table |= {"token_learner.latents": (1, d), "token_learner.attn_norm.g": (d,), "token_learner.mlp_norm.g": (d,)}
    pair("token_learner.projection", d, d)
    table |= {"token_learner.attn.q.weight": (d, d), "token_learner.attn.kv.weight": (2 * d, d)}
    pair("token_learner.attn.proj", d, d)
    pair("token_learner.mlp.0.project", 16384, d)
    pair("token_learner.mlp.1", d, 8192)
    pair("to_logits.0", 70, d)
    return table


def test_what_does_not_fit_is_named() -> None:
    config = mini_config()
    shapes, state = weights.shapes_of(UPVLA(config)), published(config, heads=True)
    name = "showo.model.layers.1.mlp.fc2.bias"
    bad: list[tuple[State, str]] = [
        (state | {"showo.extra": torch.ones(1)}, r"upvla: 1 unexpected tensors, the first is 'showo.extra'"),
        ({n: v for n, v in state.items() if n != name}, rf"1 tensors are missing, the first is '{name}'"),
        (state | {name: torch.ones(7)}, rf"'{name}' has shape \[7\], expected \[32\]"),
        (state | {name: torch.full((32,), torch.nan)}, rf"'{name}' holds values that are not finite"),
        ({n: v for n, v in state.items() if not n.startswith(HEADS)}, r"missing, the first is 'to_logits.0.bias'"),
    ]
    for wrong, message in bad:
        with pytest.raises(Mismatch, match=message):
            weights.convert("upvla", wrong, shapes)
    with pytest.raises(Mismatch, match="unexpected tensors"):
        weights.convert("showo", plain_phi(config, 40), shapes)


class Trap:
    """A pickle that would run code when it is loaded without restrictions."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("1/0",))


def test_files_that_are_not_weights_are_refused_without_being_executed(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"holds no weights; looked for model\.safetensors"):
        weights.read_state(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(pickle.dumps({"a": Trap()}, protocol=2))
    with pytest.raises(Mismatch, match="a pickle of more than tensors, it was not executed"):
        weights.read_state(tmp_path)
    torch.save({"a": torch.ones(1), "step": 3}, file)
    with pytest.raises(Mismatch, match="entry 'step' is a int, expected a tensor"):
        weights.read_state(tmp_path)
    torch.save([torch.ones(1)], file)
    with pytest.raises(Mismatch, match="holds a list"):
        weights.read_state(tmp_path)
    file.write_bytes(b"nonsense")
    with pytest.raises((Corrupt, Mismatch), match=r"pytorch_model\.bin is"):
        weights.read_state(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(Corrupt, match="is not a safetensors file"):
        weights.read_state(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(Corrupt, match="lies outside of its folder"):
        weights.read_state(tmp_path)


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="run `hf download showlab/show-o --local-dir FOLDER`"):
        weights.download("showlab/show-o")
