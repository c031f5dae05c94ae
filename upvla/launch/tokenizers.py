"""Where the two tokenizers lie on the store, under their content hashes.

text/<id>.json              byte-level BPE
vq/<id>.safetensors, .json  image tokenizer: weights, then its geometry, which completes it
"""

from __future__ import annotations

import contextlib

import safetensors.torch

from upvla.errors import AlreadyExists, Corrupt
from upvla.model.config import VQConfig
from upvla.model.text import TextTokenizer
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
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in vq.state_dict().items()}
    store.write(f"vq/{vq.id}.safetensors", safetensors.torch.save(weights))
    with contextlib.suppress(AlreadyExists):
        store.create_json(f"vq/{vq.id}.json", vq.config.model_dump(mode="json"))
    return vq.id


def load_vq(store: Store, vq_id: str) -> VQTokenizer:
    """In evaluation mode. `NotFound` where there is none, `Corrupt` where geometry and weights do not give the id."""
    vq = VQTokenizer(VQConfig.model_validate(store.read_json(f"vq/{vq_id}.json")))
    try:
        vq.load_state_dict(safetensors.torch.load(store.read(f"vq/{vq_id}.safetensors")))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise Corrupt(f"{store.url}/vq/{vq_id}.safetensors cannot be read ({error}); train it again") from error
    if vq.id != vq_id:
        raise Corrupt(f"{store.url}/vq/{vq_id} is image tokenizer {vq.id}; train it again")
    return vq.eval()
