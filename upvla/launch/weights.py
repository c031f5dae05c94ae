"""Published weights on the store: imported once from a local folder, then named by URL wherever a fresh model starts.

<url>/weights-<sha>.safetensors   the tensors under our names
<url>/WEIGHTS.json                the marker, written last: kind, file, sha256, audit
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from upvla.errors import AlreadyExists, ConfigError, Corrupt, Mismatch, NotFound
from upvla.model import weights
from upvla.model.config import ModelConfig
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.store import open_store

MARKER = "WEIGHTS.json"
HUB = "hub:"
_FORMAT = 1


def import_weights(kind: str, path: str, to_url: str, model: ModelConfig) -> dict[str, Any]:
    """Audit the weights at `path` (local file or folder, or `hub:owner/name`) against `model`, write them to a URL.

    Returns kind, url, id, and the audit as text. Weights that do not fit are refused before anything is written.
    """
    if kind not in weights.KINDS:
        raise ConfigError(f"unknown kind of weights {kind!r}; known: {', '.join(weights.KINDS)}")
    source = weights.download(path.removeprefix(HUB)) if path.startswith(HUB) else Path(path)
    with torch.device("meta"):
        target: nn.Module = VQTokenizer(model.vq) if kind == "magvit" else UPVLA(model)
    state, audit = weights.convert(kind, weights.read_state(source), weights.shapes_of(target))
    store = open_store(to_url)
    with tempfile.TemporaryDirectory(prefix="upvla-weights-") as folder:
        file = Path(folder, "weights.safetensors")
        safetensors.torch.save_file({name: value.clone().contiguous() for name, value in state.items()}, file)
        with file.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        key = f"weights-{sha256[:16]}.safetensors"
        store.upload(file, key)
        size = file.stat().st_size
    marker = {
        "format": _FORMAT,
        "kind": kind,
        "file": key,
        "bytes": size,
        "sha256": sha256,
        "loaded": {group: list(count) for group, count in audit.loaded.items()},
        "fresh": {group: list(count) for group, count in audit.fresh.items()},
    }
    try:
        store.create_json(MARKER, marker)
    except AlreadyExists:
        if weights_id(to_url) != sha256[:16]:
            raise AlreadyExists(f"{to_url} holds other weights already: import to another URL") from None
    return {"kind": kind, "url": store.url, "id": sha256[:16], "audit": str(audit)}


def weights_id(url: str) -> str:
    """Content hash of imported weights, from their marker alone."""
    return str(_marker(url)["sha256"])[:16]


def weights_kind(url: str) -> str:
    return str(_marker(url)["kind"])


def load_weights(url: str) -> tuple[str, dict[str, Tensor]]:
    """Kind and tensors of imported weights; `Corrupt` where the bytes are not those that were imported."""
    marker = _marker(url)
    with tempfile.TemporaryDirectory(prefix="upvla-weights-") as folder:
        file = Path(folder, "weights.safetensors")
        open_store(url).download(marker["file"], file)
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != marker["sha256"]:
                raise Corrupt(f"{url}/{marker['file']}: its sha256 is not the marker's: import the weights again")
        return str(marker["kind"]), safetensors.torch.load(file.read_bytes())


def start_from(module: nn.Module, urls: Sequence[str]) -> None:
    """Fill a module from imported weights, in order. Raises `Mismatch` for a kind that is not of this module."""
    for url in urls:
        kind, state = load_weights(url)
        if (kind == "magvit") != isinstance(module, VQTokenizer):
            wanted = "image tokenizer" if kind == "magvit" else "policy"
            raise Mismatch(
                f"{url} holds weights of kind {kind!r}: they start a {wanted}, not a {type(module).__name__}"
            )
        weights.fill(module, state)


def _marker(url: str) -> dict[str, Any]:
    try:
        marker = open_store(url).read_json(MARKER)
    except NotFound as error:
        raise NotFound(f"{url} holds no imported weights: run `upvla weights import KIND PATH --to {url}`") from error
    if not isinstance(marker, dict) or marker.get("format") != _FORMAT:
        raise Mismatch(f"{url}/{MARKER} is not of format {_FORMAT}: import the weights again")
    return marker
