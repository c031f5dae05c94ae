"""`upvla weights import`: from a published file to a URL, and a model that starts from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from upvla.cli import app
from upvla.errors import AlreadyExists, ConfigError, Corrupt, Mismatch, NotFound
from upvla.launch.weights import import_weights, load_weights, start_from, weights_id
from upvla.model.config import ModelConfig, preset
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.store import Store, open_store

SIZES = ["backbone.width=32", "backbone.blocks=1", "backbone.heads=2", "backbone.mlp=64", "vq.channels=8"]


@pytest.fixture
def model() -> ModelConfig:
    return preset("tiny", backbone={"width": 32, "blocks": 1, "heads": 2, "mlp": 64}, vq={"channels": 8})


def checkpoint(folder: Path, model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """A pickled UP-VLA checkpoint as published; its tensors."""
    torch.manual_seed(seed)
    state = {n: v for n, v in UPVLA(model).state_dict().items() if not n.startswith("vision.")}
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")
    return state


def test_a_pickle_becomes_safetensors_on_the_store_and_a_model_starts_from_it(
    store: Store, tmp_path: Path, model: ModelConfig
) -> None:
    state = checkpoint(tmp_path / "published", model, 1)
    url = store.sub("weights/upvla").url
    result = import_weights("upvla", str(tmp_path / "published"), url, model)
    assert "action head" in result["audit"] and weights_id(url) == result["id"]
    assert import_weights("upvla", str(tmp_path / "published"), url, model) == result
    torch.manual_seed(2)
    fresh = UPVLA(model)
    tower = {n: v.clone() for n, v in fresh.state_dict().items() if n.startswith("vision.")}
    start_from(fresh, [url])
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, (state | tower)[name]), name
    checkpoint(tmp_path / "other", model, 3)
    with pytest.raises(AlreadyExists, match="holds other weights already"):
        import_weights("upvla", str(tmp_path / "other"), url, model)


def test_what_cannot_be_used_is_named(tmp_path: Path, model: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="unknown kind of weights 'llama'; known: showo, upvla, phi, magvit, clip"):
        import_weights("llama", str(tmp_path), str(tmp_path / "to"), model)
    with pytest.raises(NotFound, match="does not exist"):
        import_weights("upvla", str(tmp_path / "nowhere"), str(tmp_path / "to"), model)
    with pytest.raises(NotFound, match="holds no imported weights: run `upvla weights import"):
        load_weights(str(tmp_path))
    checkpoint(tmp_path / "published", model, 1)
    url = str(tmp_path / "to")
    import_weights("upvla", str(tmp_path / "published"), url, model)
    with pytest.raises(Mismatch, match="they start a policy, not a VQTokenizer"):
        start_from(VQTokenizer(model.vq), [url])
    (file,) = open_store(url).list("weights-")
    store = open_store(url)
    store.write(file, store.read(file)[:-1] + b"x")
    with pytest.raises(Corrupt, match="import the weights again"):
        load_weights(url)


def test_the_command_prints_the_audit(tmp_path: Path, model: ModelConfig) -> None:
    checkpoint(tmp_path / "published", model, 1)
    arguments = ["weights", "import", "upvla", str(tmp_path / "published"), "--to", str(tmp_path / "to")]
    arguments += ["--preset", "tiny", *(part for size in SIZES for part in ("--set", size))]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "loaded   decoder" in shown.output and "fresh    vision tower" in shown.output
    again = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(again.output)["id"] == weights_id(str(tmp_path / "to"))
