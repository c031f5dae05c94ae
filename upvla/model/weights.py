"""Published weights into these modules: read from local files, renamed, audited group by group, never guessed.

    state = read_state(folder)                  pytorch_model.bin or safetensors, whole or in shards, by name
    ours, audit = convert(kind, state, shapes)  our names; refuses what is unexpected, missing or of another shape
    fill(module, ours)                          the module's other tensors keep the values it was built with

| kind     | what it is                                             | what stays as built (`fresh`)                   |
|----------|--------------------------------------------------------|-------------------------------------------------|
| `showo`  | Show-o with CLIP-ViT: decoder and projector            | action head, vision tower                       |
| `upvla`  | UP-VLA's own checkpoint                                | vision tower                                    |
| `phi`    | plain Phi-1.5; its table is a prefix of the longer one | q/k norms, projector, action head, vision tower |
| `magvit` | MAGVIT-v2 image tokenizer                              | nothing                                         |
| `clip`   | CLIP's vision tower, alone or out of a whole CLIP      | all but the tower                               |

Names and shapes are those of the method's section 1. A pickle is read by a loader that builds tensors and nothing else.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from upvla.errors import ConfigError, Corrupt, Mismatch, NotFound

Kind = Literal["showo", "upvla", "phi", "magvit", "clip"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TOWER = "vision.tower.clip."

_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "unwrapped_model/model.safetensors",
    "unwrapped_model/pytorch_model.bin",
)
_QK_NORMS = ("showo.model.layers.*.self_attn.?_layernorm.*",)
_HEADS = ("token_learner.*", "to_logits.*")
_GROUPS = {
    "showo.model.embed_tokens.*": "embeddings",
    _QK_NORMS[0]: "decoder q/k norms",
    "showo.model.*": "decoder",
    "showo.lm_head.*": "head",
    "mm_projector.*": "projector",
    "token_learner.*": "action head",
    "to_logits.*": "action head",
    "vision.*": "vision tower",
    "encoder.*": "image encoder",
    "quantize.*": "codebook",
    "decoder.*": "image decoder",
}


class _Rule(NamedTuple):
    rename: Callable[[str], str | None]  # a published name to ours; None: known, and of no use here
    fresh: tuple[str, ...]  # our names that files of this kind do not hold
    grows: tuple[str, ...] = ()  # tensors that may hold the first rows of ours only


def _same(name: str) -> str | None:
    return None if name.endswith(".rotary_emb.inv_freq") else name


def _from_phi(name: str) -> str | None:
    ours = _same(name)
    return ours and f"showo.{ours}"


def _from_clip(name: str) -> str | None:
    """Of a whole CLIP (`vision_model.*` beside the text side), of a vision tower with or without that prefix."""
    text_side = name.startswith(("text_model.", "text_projection.", "visual_projection.")) or name == "logit_scale"
    if text_side or name.endswith("embeddings.position_ids"):
        return None
    return TOWER + name.removeprefix("vision_model.")


_TABLES = ("showo.model.embed_tokens.weight", "showo.lm_head.weight", "showo.lm_head.bias")
_RULES: dict[Kind, _Rule] = {
    "showo": _Rule(_same, (*_HEADS, "vision.*")),
    "upvla": _Rule(_same, ("vision.*",)),
    "phi": _Rule(_from_phi, (*_QK_NORMS, "mm_projector.*", *_HEADS, "vision.*"), _TABLES),
    "magvit": _Rule(_same, ()),
    "clip": _Rule(_from_clip, ("showo.*", "mm_projector.*", *_HEADS)),
}


class Count(NamedTuple):
    """How much of a group there is."""

    tensors: int
    values: int


class Audit(NamedTuple):
    """What became of a file, by group of tensors. What is unexpected is not here: it was refused."""

    kind: str
    loaded: dict[str, Count]
    fresh: dict[str, Count]
    unused: int  # tensors of the file that are known and have no place here (a CLIP's text side, rotary tables)

    def __str__(self) -> str:
        rows = [(f"{count.tensors} tensors", count.values, group, "loaded") for group, count in self.loaded.items()]
        rows += [(f"{count.tensors} tensors", count.values, group, "fresh") for group, count in self.fresh.items()]
        lines = [f"{what:<8} {group:<18} {tensors:>12} {values:>15,}" for tensors, values, group, what in rows]
        return "\n".join([*lines, f"unused   {self.unused} tensors that have no place here", "unexpected   none"])


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a file, or of a folder that holds one of the published layouts; memory-mapped where possible.

    `NotFound` lists what was looked for, `Corrupt` names the file that cannot be read, `Mismatch` the entry of a
    pickle that is more than a tensor.
    """
    if path.is_dir():
        found = next((path / name for name in _FILES if (path / name).is_file()), None)
        if found is None:
            raise NotFound(f"{path} holds no weights; looked for {', '.join(_FILES)}")
        path = found
    if not path.is_file():
        raise NotFound(f"{path} does not exist: give a checkpoint's folder, or its .safetensors or .bin file")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        places: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{index} is no index of shards ({error!r}): download it again") from error
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise Corrupt(f"{index} names the shard {name!r}, which lies outside of its folder")
        state |= read_state(index.parent / name)
    if absent := sorted(places.keys() - state.keys()):
        raise Corrupt(f"{index} promises {absent[0]!r}, its shards do not hold it: download them again")
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise Corrupt(f"{path} is not a safetensors file ({error}): download it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise Mismatch(f"{path} is a pickle of more than tensors, it was not executed: {reason}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise Corrupt(f"{path} is not a PyTorch file ({error}): download it again") from error
    if not isinstance(state, Mapping):
        raise Mismatch(f"{path} holds a {type(state).__name__}, expected a mapping of names to tensors")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise Mismatch(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
    return dict(state)


def convert(
    kind: Kind, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], Audit]:
    """Tensors of a `kind` of file under our names. `shapes` are the target's, by name (a module on meta will do).

    Nothing is cast or copied. Raises `Mismatch` naming the tensor that is unexpected, missing, of another shape than
    expected, or not finite.
    """
    rule = _RULES[kind]
    renamed = {name: rule.rename(name) for name in state}
    ours = {ours: state[name] for name, ours in renamed.items() if ours is not None}
    published = {ours: name for name, ours in renamed.items() if ours is not None}
    if unexpected := sorted(name for ours, name in published.items() if ours not in shapes):
        raise Mismatch(
            f"{kind}: {len(unexpected)} unexpected tensors, the first is {unexpected[0]!r}: another kind or size?"
        )
    fresh = [name for name in shapes if name not in ours]
    if missing := sorted(name for name in fresh if not _any_match(name, rule.fresh)):
        raise Mismatch(f"{kind}: {len(missing)} tensors are missing, the first is {missing[0]!r}: is the file whole?")
    for name, value in ours.items():
        found, expected = tuple(value.shape), tuple(shapes[name])
        if not (found == expected or (name in rule.grows and found[1:] == expected[1:] and found[0] < expected[0])):
            raise Mismatch(f"{kind}: {published[name]!r} has shape {list(found)}, expected {list(expected)}")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise Mismatch(f"{kind}: {published[name]!r} holds values that are not finite")
    loaded = _by_group({name: value.shape for name, value in ours.items()})
    audit = Audit(kind, loaded, _by_group({name: shapes[name] for name in fresh}), len(state) - len(ours))
    return ours, audit


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of a module's tensors, as `convert` wants them."""
    return {name: value.shape for name, value in module.state_dict().items()}


@torch.no_grad()
def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy converted tensors into the module, in its dtype. A shorter table fills the first rows of its own."""
    target = module.state_dict()
    for name, value in state.items():
        if name not in target:
            raise Mismatch(f"weights: {name!r} has no place in this {type(module).__name__}")
        rows = target[name][: len(value)] if value.ndim else target[name]
        if rows.shape != value.shape:
            raise Mismatch(f"weights: {name!r} has shape {list(value.shape)}, expected {list(target[name].shape)}")
        rows.copy_(value)


def load_published(kind: Kind, module: nn.Module, path: Path) -> Audit:
    """Fill a module from a published file or folder; returns the audit."""
    ours, audit = convert(kind, read_state(path), shapes_of(module))
    fill(module, ours)
    return audit


def download(name: str) -> Path:
    """Local folder of the model `owner/name` on the hub, fetched where a network is; files already here are used."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such model, or downloads switched off
        raise ConfigError(
            f"{name!r} could not be downloaded ({type(error).__name__}): run `hf download {name} --local-dir FOLDER` "
            "where there is a network, bring the folder here and give its path"
        ) from error


def _any_match(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _by_group(shapes: Mapping[str, torch.Size]) -> dict[str, Count]:
    counts: dict[str, Count] = {}
    for name, shape in shapes.items():
        group = next((group for pattern, group in _GROUPS.items() if fnmatchcase(name, pattern)), "other")
        before = counts.get(group, Count(0, 0))
        counts[group] = Count(before.tensors + 1, before.values + shape.numel())
    return counts
