"""An exported model: a folder of safetensors and JSON that stands alone, complete once its marker exists.

    <url>/model-<sha>.safetensors   decoder, vision encoder, projector, action head
    <url>/vq-<sha>.safetensors      image tokenizer
    <url>/config-<sha>.json         ModelConfig, every value spelt out
    <url>/text-<sha>.json           text tokenizer
    <url>/action_space-<sha>.json   what the actions mean
    <url>/stats-<sha>.json          statistics of the data that the weights were trained on
    <url>/meta-<sha>.json           where it came from: run, step, data versions, scores; no part of the identity
    <url>/golden-<sha>.safetensors  held-out observations and the trainer's answers to them; no part of the identity
    <url>/CHECKPOINT.json           the marker, written last: size and sha256 of every file, and the model id

Files are named by content, so a second, different export can never be read under the first one's marker.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from pydantic import ValidationError

from upvla.errors import AlreadyExists, Corrupt, Mismatch, NotFound
from upvla.model.config import ModelConfig
from upvla.store import Store, content_hash, open_store
from upvla.types import ActionSpace, Checkpoint

if TYPE_CHECKING:  # seconds of imports, which nobody needs who reads no weights
    import torch

    from upvla.model.text import TextTokenizer
    from upvla.model.upvla import UPVLA
    from upvla.model.vq import VQTokenizer

MARKER = "CHECKPOINT.json"
_FORMAT = 1
_GOLDEN = "golden.safetensors"
_TOLD_OF_IT = ("meta.json", _GOLDEN)  # what is told of a model, beside what it is
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Golden:
    """What a robot may see, and what the model answered where it was trained: wherever it runs, it answers the same."""

    images: Mapping[str, np.ndarray]  # camera -> u8[N,H,W,3], as they are stored: at no model's size
    instructions: tuple[str, ...]  # N
    actions: np.ndarray  # f32[N,C,A]


@dataclass(frozen=True)
class Bundle:
    """A model and all that it cannot be used without. Parts that contradict each other raise `Mismatch`."""

    config: ModelConfig
    model: UPVLA
    vq: VQTokenizer
    text: TextTokenizer
    action_space: ActionSpace
    stats: Mapping[str, Any]
    meta: Mapping[str, Any] = field(default_factory=dict)  # `step` and `run` become the reference's
    golden: Golden | None = None  # none where a model was made by hand

    def __post_init__(self) -> None:
        pairs = {
            "text vocabulary": (self.config.text_vocab_size, self.text.vocab_size),
            "end token id": (self.config.eot_id, self.text.eot_id),
            "image codes": (self.config.vq.codebook_size, self.vq.config.codebook_size),
            "action dimensions": (self.config.action_dims, len(self.action_space)),
        }
        for name, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise Mismatch(f"bundle: the model is configured for {name} {ours}, its part brings {theirs}")


def export(store: Store, prefix: str, bundle: Bundle) -> Checkpoint:
    """Write `bundle` under `prefix`, marker last. The same content again is a no-op, other content `AlreadyExists`."""
    target = store.sub(prefix)
    contents = {
        "model.safetensors": _tensors(bundle.model),
        "vq.safetensors": _tensors(bundle.vq),
        "config.json": _json(bundle.config.model_dump(mode="json")),
        "text.json": bundle.text.to_json().encode(),
        "action_space.json": _json(bundle.action_space.to_json()),
        "stats.json": _json(bundle.stats),
        "meta.json": _json(bundle.meta),
    }
    if bundle.golden is not None:
        contents[_GOLDEN] = _golden_to_bytes(bundle.golden)
    files = {}
    for name, data in contents.items():
        sha256 = hashlib.sha256(data).hexdigest()
        stem, _, suffix = name.rpartition(".")
        files[name] = {"key": f"{stem}-{sha256[:16]}.{suffix}", "bytes": len(data), "sha256": sha256}
    model_id = content_hash({name: file["sha256"] for name, file in files.items() if name not in _TOLD_OF_IT})
    checkpoint = Checkpoint(target.url, model_id, int(bundle.meta.get("step", 0)), str(bundle.meta.get("run", "")))
    marker = {"format": _FORMAT, "model_id": model_id, "step": checkpoint.step, "run": checkpoint.run, "files": files}
    if not target.exists(MARKER):
        for name, data in contents.items():
            target.write(str(files[name]["key"]), data)
        try:
            target.create_json(MARKER, marker)
        except AlreadyExists:
            pass  # another attempt finished first: what it wrote decides, below
        else:
            return checkpoint
    found = read_marker(target)
    if found.model_id != model_id:
        raise AlreadyExists(f"{target.url} holds model {found.model_id}, not {model_id}: export to another prefix")
    return found


def registered_name(model: str) -> str:
    """`NAME@VERSION` or `NAME@ALIAS` of what a person calls a registered model: so, or MLflow's models:/NAME@ALIAS and
    models:/NAME/VERSION. Empty for what is a URL or a folder."""
    name = model.removeprefix("models:/").replace("/", "@") if model.startswith("models:/") else model
    return "" if "/" in name else name


def read_marker(store: Store) -> Checkpoint:
    """The reference of the checkpoint that lies at `store`, from its marker alone."""
    marker = _marker(store)
    return Checkpoint(store.url, marker["model_id"], marker["step"], marker["run"])


def copy_checkpoint(url: str, to: str) -> Checkpoint:
    """Copy a checkpoint to another URL, every hash checked, its marker last. Again, it is a no-op.

    Raises `AlreadyExists` where another model lies there, `Corrupt` naming a file that is not what the marker says.
    """
    source, target = open_store(url), open_store(to)
    marker = _marker(source)
    if not target.exists(MARKER):
        for file in marker["files"].values():
            target.write(file["key"], _verified(source, file))
        with contextlib.suppress(AlreadyExists):
            target.create_json(MARKER, marker)
    found = read_marker(target)
    if found.model_id != marker["model_id"]:
        raise AlreadyExists(f"{to} holds model {found.model_id}, not {marker['model_id']}: export to another place")
    return found


def read_meta(url: str) -> dict[str, Any]:
    """Where a checkpoint came from, without reading its weights."""
    store = open_store(url)
    return dict(json.loads(_verified(store, _marker(store)["files"]["meta.json"])))


def load_bundle(url: str, *, weights: bool = True) -> Bundle:
    """Read a checkpoint onto the CPU, in evaluation mode. Hashes are verified before anything is parsed.

    Without `weights` the policy's own are not read: it has shapes only, on torch's device `meta`.
    Raises `NotFound` where there is no finished checkpoint, `Corrupt` naming the file whose bytes are not what the
    marker says, `Mismatch` naming the weight or part that does not fit its config.
    """
    import safetensors.torch
    import torch

    from upvla.model.text import TextTokenizer
    from upvla.model.upvla import UPVLA
    from upvla.model.vq import VQTokenizer

    parts = _Parts(open_store(url))
    facts = _facts(parts)
    with torch.device("cpu" if weights else "meta"):
        model = UPVLA(facts.config)
    vq = VQTokenizer(facts.config.vq)
    for module, name in ((model, "model.safetensors"), (vq, "vq.safetensors"))[not weights :]:
        _fill(module, parts.parsed(name, safetensors.torch.load, safetensors.SafetensorError), f"{url}/{name}")
    return Bundle(
        config=facts.config,
        model=model.eval(),
        vq=vq.eval(),
        text=parts.parsed("text.json", lambda raw: TextTokenizer.from_json(raw.decode())),
        action_space=facts.action_space,
        stats=facts.stats,
        meta=parts.parsed("meta.json", json.loads),
        golden=parts.parsed(_GOLDEN, _golden_from_bytes, safetensors.SafetensorError) if _GOLDEN in parts else None,
    )


class Facts(NamedTuple):
    """What a checkpoint says of its model."""

    model_id: str
    config: ModelConfig
    action_space: ActionSpace
    stats: Mapping[str, Any]


def read_facts(url: str) -> Facts:
    """Of the checkpoint at `url`, without its weights and all that they need. Raises what `load_bundle` does."""
    return _facts(_Parts(open_store(url)))


def _facts(parts: _Parts) -> Facts:
    return Facts(
        parts.model_id,
        parts.parsed("config.json", ModelConfig.model_validate_json),
        parts.parsed("action_space.json", lambda raw: ActionSpace.from_json(json.loads(raw))),
        parts.parsed("stats.json", json.loads),
    )


class _Parts:
    """The files that a checkpoint's marker names."""

    def __init__(self, store: Store) -> None:
        marker = _marker(store)
        self.model_id: str = marker["model_id"]
        self._store, self._files = store, marker["files"]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def parsed(self, name: str, parse: Callable[[bytes], _Value], *errors: type[Exception]) -> _Value:
        """Its hash is verified first. `errors`: what else `parse` raises at bytes that it cannot read."""
        if name not in self._files:
            raise Corrupt(f"{self._store.url}: its marker names no {name}")
        data = _verified(self._store, self._files[name])
        unreadable: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, ValidationError, *errors)
        try:
            return parse(data)
        except unreadable as error:
            raise Mismatch(f"{self._store.url}/{name}: this version cannot read it: {error}") from error


def _marker(store: Store) -> dict[str, Any]:
    try:
        marker = store.read_json(MARKER)
    except NotFound as error:
        raise NotFound(f"{store.url} holds no finished checkpoint: {MARKER} is missing, was its export cut?") from error
    except ValueError as error:
        raise Corrupt(f"{store.url}/{MARKER} is not JSON: {error}") from error
    written = marker.get("format") if isinstance(marker, dict) else None
    if isinstance(written, int) and written > _FORMAT:
        raise Mismatch(
            f"{store.url}/{MARKER} is of format {written}, this upvla reads up to {_FORMAT}; upgrade upvla, or take "
            "a checkpoint from before"
        )
    if written != _FORMAT:
        raise Mismatch(f"{store.url}/{MARKER} marks no checkpoint; export the model again, or correct the URL")
    return marker


def _verified(store: Store, file: Mapping[str, Any]) -> bytes:
    try:
        data = store.read(file["key"])
    except NotFound as error:
        raise Corrupt(f"{store.url}/{file['key']} is missing though the marker names it: use another one") from error
    if len(data) != file["bytes"]:
        raise Corrupt(f"{store.url}/{file['key']}: {len(data)} bytes, the marker says {file['bytes']}")
    if hashlib.sha256(data).hexdigest() != file["sha256"]:
        raise Corrupt(f"{store.url}/{file['key']}: its sha256 is not the marker's: use the previous good checkpoint")
    return data


def _fill(module: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    expected = module.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            raise Mismatch(f"{where}: weight {name!r} is {'missing' if name in expected else 'unexpected'}")
        if state[name].shape != expected[name].shape:
            raise Mismatch(
                f"{where}: weight {name!r} has shape {list(state[name].shape)}, expected {list(expected[name].shape)}"
            )
    module.load_state_dict(state)


def _tensors(module: torch.nn.Module) -> bytes:
    import safetensors.torch

    return safetensors.torch.save({name: value.cpu().contiguous() for name, value in module.state_dict().items()})


def _golden_to_bytes(golden: Golden) -> bytes:
    from safetensors.numpy import save

    instructions = np.frombuffer(_json(golden.instructions), np.uint8)
    images = {f"image_{camera}": frames for camera, frames in golden.images.items()}
    return save({"actions": golden.actions, "instructions": instructions, **images})


def _golden_from_bytes(data: bytes) -> Golden:
    from safetensors.numpy import load

    found = load(data)
    images = {name.removeprefix("image_"): frames for name, frames in found.items() if name.startswith("image_")}
    return Golden(images, tuple(json.loads(found["instructions"].tobytes())), found["actions"])


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
