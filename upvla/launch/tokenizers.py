"""Where the tokenizers, and a frozen understanding encoder, lie on the store, under their content hashes.

text/<id>.json              byte-level BPE
vq/<id>.safetensors, .json  image tokenizer: weights, then its geometry, which completes it
towers/<id>.safetensors, .json  frozen understanding encoder, the same way
"""

from __future__ import annotations

import contextlib

import safetensors.torch
from pydantic import BaseModel
from torch import nn

from upvla.errors import AlreadyExists, Corrupt
from upvla.model.config import VisionConfig, VQConfig
from upvla.model.text import TextTokenizer
from upvla.model.vision import VisionEncoder
from upvla.model.vq import VQTokenizer
from upvla.store import Store


def save_text(store: Store, text: TextTokenizer) -> str:
    with contextlib.suppress(AlreadyExists):  # named by content: it is the same
        store.create(f"text/{text.id}.json", text.to_json().encode())
    return text.id


def load_text(store: Store, text_id: str) -> TextTokenizer:
    """`NotFound` where there is none, `Corrupt` where the content does not match the id."""
    text = TextTokenizer.from_json(store.read(f"text/{text_id}.json").decode())
    if text.id != text_id:
        raise Corrupt(f"{store.url}/text/{text_id}.json is text tokenizer {text.id}; train it again")
    return text


def save_vq(store: Store, vq: VQTokenizer) -> str:
    _save(store.sub("vq"), vq.id, vq, vq.config)
    return vq.id


def load_vq(store: Store, vq_id: str) -> VQTokenizer:
    """In evaluation mode. `NotFound` where there is none, `Corrupt` where geometry and weights do not give the id."""
    vq = VQTokenizer(VQConfig.model_validate(store.read_json(f"vq/{vq_id}.json")))
    _load(store.sub("vq"), vq_id, vq)
    return vq


def save_tower(store: Store, tower: VisionEncoder) -> str:
    _save(store.sub("towers"), tower.id, tower, tower.config)
    return tower.id


def load_tower(store: Store, tower_id: str) -> VisionEncoder:
    """As `load_vq`."""
    tower = VisionEncoder(VisionConfig.model_validate(store.read_json(f"towers/{tower_id}.json")))
    _load(store.sub("towers"), tower_id, tower)
    return tower


def _save(place: Store, name: str, module: nn.Module, config: BaseModel) -> None:
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in module.state_dict().items()}
    place.write(f"{name}.safetensors", safetensors.torch.save(weights))
    with contextlib.suppress(AlreadyExists):
        place.create_json(f"{name}.json", config.model_dump(mode="json"))


def _load(place: Store, name: str, module: VQTokenizer | VisionEncoder) -> None:
    try:
        module.load_state_dict(safetensors.torch.load(place.read(f"{name}.safetensors")))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise Corrupt(f"{place.url}/{name}.safetensors cannot be read ({error}); make it again") from error
    if module.id != name:
        raise Corrupt(f"{place.url}/{name} holds {module.id}; make it again")
    module.eval()
