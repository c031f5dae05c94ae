"""Parity with the published classes: `python -m tests.golden DIR` compares every tensor of a golden folder with ours.

One row a tensor: name, largest error, tolerance, pass. Exit status 1 on any miss. All sizes come from the folder's
`config.json`; the state dicts go through the import path of real checkpoints (`upvla.model.weights`).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from upvla.data.samples import fill_chunk, window
from upvla.images import Resize, resize
from upvla.model import sequence
from upvla.model.config import ModelConfig
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer, to_pixels
from upvla.model.weights import load_published
from upvla.train.optimizer import lr_factor
from upvla.types import CALVIN_RELATIVE, Batch

FOLDER = Path(__file__).resolve().parent / "data" / "golden"
EXACT, HIDDEN, LOSS, PIXEL, GRADIENT = 0.0, 3e-5, 1e-5, 5e-5, 1e-3
CAMERAS = ("static", "gripper", "third", "fourth")
IGNORED = -100


class Row(NamedTuple):
    """One compared tensor; a tolerance of 0 means exact. Errors of gradients are relative."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # NaN is a miss


class Golden:
    """One golden folder as our configs, batches and modules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = json.loads((folder / "config.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    @cached_property
    def batch_tensors(self) -> dict[str, Tensor]:
        return self.tensors("train_batch")

    @cached_property
    def prompts(self) -> dict[str, Tensor]:
        return self.tensors("prompts_masks")

    def config(self, **changes: Any) -> ModelConfig:
        """The published row layout at the folder's sizes: fixed text budget, full-vocabulary softmax."""
        v, vq = self.values, self.values["vq"]
        codes = self.batch_tensors["pre_image_tokens"].shape[1] // v["views"]
        values = {
            "preset": "golden",
            "text_vocab_size": v["tok_vocab"],
            "eot_id": v["eot_id"],
            "text_budget": v["max_text"],
            "overlong": "cut",
            "qa_budget": v["mmu_text_len"],
            "system_ids": tuple(self.batch_tensors["mmu_system_ids"][0].tolist()),
            "vision_cameras": CAMERAS[:1],
            "code_cameras": CAMERAS[: v["views"]],
            "vision_prompt": False,
            "image_softmax": "full",
            "chunk": v["act_step"],
            "action_dims": self.batch_tensors["actions"].shape[-1],
            "trim": False,
            "backbone": {
                "width": v["hidden"],
                "blocks": v["layers"],
                "heads": v["heads"],
                "mlp": v["inter"],
                "rotary_fraction": v["prf"],
                "rotary_base": v["theta"],
                "norm_eps": v["layer_norm_eps"],
            },
            "vision": {"kind": "features", "image_size": 1, "width": v["clip_dim"], "num_patches": v["n_clip"]},
            "vq": {
                "image_size": tuple(2 ** (len(vq["enc_mult"]) - 1) * side for side in _grid(codes)),
                "channels": vq["ch"],
                "encoder_multipliers": vq["enc_mult"],
                "encoder_blocks": vq["enc_blk"],
                "decoder_multipliers": vq["dec_mult"],
                "decoder_blocks": vq["dec_blk"],
                "z_channels": v["z"],
            },
            "action_head": {"heads": v["map_heads"]},
        }
        return ModelConfig.model_validate(values | changes)

    def model(self, **changes: Any) -> UPVLA:
        model = UPVLA(self.config(**changes))
        load_published("upvla", model, self.folder / "model_state.safetensors")
        return model.eval()

    def vq(self) -> VQTokenizer:
        vq = VQTokenizer(self.config().vq)
        load_published("magvit", vq, self.folder / "vq_state.safetensors")
        return vq.eval()

    def text(self) -> TextTokenizer:
        return TextTokenizer((self.folder / "tokenizer.json").read_text(), self.values["tok_vocab"])

    def batch(self) -> Batch:
        t, config = self.batch_tensors, self.config()
        rows = self.values["B_pre"]
        texts = [t[f"pre_text_ids_{i}"] for i in range(rows)]
        shape = (rows, config.num_views, config.codes_per_view)
        return Batch(
            text_ids=pad_sequence(texts, batch_first=True, padding_value=config.pad_id),
            text_len=torch.tensor([len(text) for text in texts]),
            images=t["mmu_clip_features"].new_zeros(rows, 1, *t["mmu_clip_features"].shape[1:]),
            codes=(t["pre_image_tokens"] - config.image_offset).view(shape),
            future_codes=(t["pre_target_tokens"] - config.image_offset).view(shape),
            actions=t["actions"],
            action_is_pad=torch.zeros(t["actions"].shape[:2], dtype=torch.bool),
            pre_mask=torch.ones(rows, dtype=torch.bool),
            act_mask=torch.ones(rows, dtype=torch.bool),
            qa_images=t["mmu_clip_features"][:, None],
            qa_ids=t["mmu_text_ids"],
            qa_labels=t["mmu_text_labels"],
            positions=torch.arange(rows + self.values["B_mmu"]),
        )


def compare(golden: Golden) -> Iterator[Row]:
    """Every tensor of the folder against ours, the cheap comparisons first."""
    for check in CHECKS:
        yield from check(golden)


def _vocabulary(golden: Golden) -> Iterator[Row]:
    config, v = golden.config(), golden.values
    ours = {"pad": config.pad_id, "soi": config.soi_id, "eoi": config.eoi_id, "t2i": config.predict_id}
    ours |= {"mmu": config.mmu_id, "lvg": config.action_id, "sot": config.eot_id, "eot": config.eot_id}
    for name, token in ours.items():
        yield _exact(f"special_ids/<|{name}|>", token, v["special_ids"][f"<|{name}|>"])
    yield _exact("image_token_offset", config.image_offset, v["image_token_offset"])
    yield _exact("mask_token_id", config.mask_id, v["mask_token_id"])
    yield _exact("vocab_size", config.vocab_size, v["vocab_size"])


def _text(golden: Golden) -> Iterator[Row]:
    text, t, pad = golden.text(), golden.batch_tensors, golden.values["pad_id"]
    for i, instruction in enumerate(golden.values["texts"]):
        yield _exact(f"pre_text_ids_{i}", text.encode(instruction), t[f"pre_text_ids_{i}"])
    width = t["mmu_text_ids"].shape[1]
    encoded = []
    for conversation in golden.values["conversations"]:
        turns = [(q["value"], a["value"]) for q, a in zip(conversation[::2], conversation[1::2], strict=True)]
        ids, labels = text.encode_turns(turns)
        encoded.append((_right_padded(ids, width, pad), _right_padded(labels, width, IGNORED)))
    yield _exact("mmu_text_ids", [ids for ids, _ in encoded], t["mmu_text_ids"])
    yield _exact("mmu_text_labels", [labels for _, labels in encoded], t["mmu_text_labels"])
    system = text.encode(golden.values["system"])
    yield _exact("mmu_system_ids", [system] * golden.values["B_mmu"], t["mmu_system_ids"])
    yield _exact("question", text.encode(golden.values["question"]), _question(golden)[0])


def _prompts(golden: Golden) -> Iterator[Row]:
    t = golden.prompts
    cases = sorted(int(name.rpartition("_")[2]) for name in t if name.startswith("case_text_ids_"))
    texts = [t[f"case_text_ids_{i}"] for i in cases]
    lengths = torch.tensor([len(text) for text in texts])
    for views in (int(found[1]) for name in sorted(t) if (found := re.fullmatch(r"pre_v(\d+)_input_ids", name))):
        config = golden.config(code_cameras=CAMERAS[:views])
        padded = pad_sequence(texts, batch_first=True, padding_value=config.pad_id)
        current, future = (
            (t[f"pre_v{views}_{name}_tokens"] - config.image_offset).view(len(texts), views, -1)
            for name in ("image", "target")
        )
        rows = sequence.robot_rows(config, padded, lengths, current)
        yield _exact(f"pre_v{views}_input_ids", rows.ids, t[f"pre_v{views}_input_ids"])
        yield _exact(f"pre_v{views}_allowed", rows.allowed, t[f"pre_v{views}_allowed"])
        labels = sequence.robot_rows(config, padded, lengths, future).ids
        yield _exact(f"pre_v{views}_labels", _labels(labels, config), t[f"pre_v{views}_labels"])


def _question_masks(golden: Golden) -> Iterator[Row]:
    """At the folder's size and at the real one; the latter is packed to bits along its last axis."""
    for name, stored in golden.prompts.items():
        if found := re.fullmatch(r"mmu_small_S(\d+)_allowed", name):
            system, patches, allowed = int(found[1]), golden.values["n_clip"], stored[0, 0]
        elif found := re.fullmatch(r"mmu_real(\d+)_S(\d+)_allowed_packed", name):
            system, patches = int(found[2]), int(found[1])
            allowed = torch.from_numpy(np.unpackbits(stored.numpy(), axis=1)[:, : len(stored)])
        else:
            continue
        vision = {"kind": "features", "image_size": 1, "width": 8, "num_patches": patches}
        config = golden.config(system_ids=(1,) * system, vision=vision)
        table = sequence.qa_table(config, len(allowed) - 3 - system - patches)
        padding = torch.zeros(1, len(allowed), dtype=torch.bool)
        yield _exact(name, sequence.attention_mask(table, padding)[0, 0], allowed)


def _windows(golden: Golden) -> Iterator[Row]:
    t, chunk = golden.tensors("data_windows"), golden.values["act_step"]
    futures, chunks, first = [], [], 0
    for length in t["episode_lengths"].tolist():
        actions = t["rel_actions"][first : first + length].numpy()
        for step in range(length):
            found = window(0, length, step, chunk, published=True)
            futures.append(first + found.future)
            chunks.append(fill_chunk(actions[step : found.action_end], chunk, CALVIN_RELATIVE)[0])
        first += length
    yield _exact("future_index", futures, t["future_index"])
    yield _exact("chunks", np.stack(chunks), t["chunks"])
    for camera in ("static", "gripper"):
        expected = t[f"transformed_{camera}"]
        frame = resize(t[f"raw_{camera}"].numpy(), Resize(size=expected.shape[-1], filter="pil_bicubic"))
        yield _close(f"transformed_{camera}", to_pixels(torch.tensor(frame)[None])[0], expected, 1e-6)


def _schedule(golden: Golden) -> Iterator[Row]:
    for name, rates in golden.values.items():
        if found := re.fullmatch(r"lr_schedule_(\S+?)_warm(\d+)_total(\d+)", name):
            base, warm, total = float(found[1]), int(found[2]), int(found[3])
            ours = [base * lr_factor(int(step), warm, total) for step in rates]
            yield _close(name, torch.tensor(ours), torch.tensor(list(rates.values())), 1e-9)


def _image_tokenizer(golden: Golden) -> Iterator[Row]:
    vq, t = golden.vq(), golden.tensors("vq_io")
    yield _exact("power_vals", vq.quantize.power_vals, t["power_vals"])
    yield _exact("codebook", vq.quantize.embedding, t["codebook"])
    with torch.no_grad():
        z = vq.encoder(t["pixels"])
        yield _close("z", z, t["z"], HIDDEN)
        yield _exact("indices", vq.encode(t["pixels"]), t["indices"])
        yield _close("recon", vq.decode(t["indices"], tuple(z.shape[2:])), t["recon"], PIXEL)
        downsampling = vq.config.downsampling
        grid = tuple(side // downsampling for side in t["nonsquare_recon"].shape[2:])
        yield _close("nonsquare_recon", vq.decode(t["nonsquare_indices"], grid), t["nonsquare_recon"], PIXEL)
        quantized, commitment, entropy, diversity = vq.quantize(t["z"])
    yield _close("z_q", quantized, t["z_q"], 1e-6)
    yield _close("quantizer_loss", 0.125 * commitment, t["quantizer_loss"], LOSS)
    yield _close("entropy_loss", 0.1 * (entropy - diversity), t["entropy_loss"], LOSS)


@torch.no_grad()
def _pooling(golden: Golden) -> Iterator[Row]:
    model, t = golden.model(), golden.tensors("map_head")
    for name in sorted(name for name in t if name.startswith("x")):
        pooled = model.token_learner(t[name])
        yield _close(f"map_head/y{name[1:]}", pooled, t[f"y{name[1:]}"], HIDDEN)
        if (expected := t.get(f"a{name[1:]}")) is not None:
            yield _close(f"map_head/a{name[1:]}", model.to_logits(pooled).view(expected.shape), expected, HIDDEN)


@torch.no_grad()
def _states(golden: Golden) -> Iterator[Row]:
    t, model = golden.batch_tensors, golden.model()
    seen: list[Tensor] = []

    def remember(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(args[0] if args else named["hidden_states"])

    hooks = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in model.showo.model.layers]
    states = model.states(golden.batch())
    for hook in hooks:
        hook.remove()
    qa, config = states.qa_rows, golden.config()
    yield _exact("pre_input_ids", states.robot_rows.ids, t["pre_input_ids"])
    yield _exact("pre_allowed", states.robot_rows.allowed, t["pre_allowed"])
    yield _exact("mmu_allowed", qa.allowed, t["mmu_allowed"])
    patches = qa.at["patches"]
    without = torch.cat([qa.ids[:, : patches.start], qa.ids[:, patches.stop :]], 1)
    yield _exact("mmu_ids_without_image", without, t["mmu_ids_without_image"])
    front = torch.full((len(qa.ids), qa.at["text"].start), IGNORED)
    yield _exact("mmu_labels", torch.cat([front, golden.batch().qa_labels], 1), t["mmu_labels"])
    batch = golden.batch()
    labels = sequence.robot_rows(config, batch.text_ids, batch.text_len, batch.future_codes).ids
    yield _exact("pre_labels", _labels(labels, config), t["pre_labels"])
    yield _close("out_mmu_projected", model.mm_projector(t["mmu_clip_features"]), t["out_mmu_projected"], HIDDEN)
    seen.append(torch.cat([states.robot, states.qa]))
    yield _close("out_input_embeddings", seen[0], t["out_input_embeddings"], HIDDEN)
    for i, hidden in enumerate(seen):
        yield _close(f"out_hidden_{i}", hidden, t[f"out_hidden_{i}"], HIDDEN)
    yield _close("out_logits", model.showo.lm_head(seen[-1]), t["out_logits"], HIDDEN)
    queries = states.robot[:, states.robot_rows.at["action"]]
    yield _close("out_action_hidden", queries, t["out_action_hidden"], HIDDEN)
    pooled = model.token_learner(queries)
    yield _close("out_pooled", pooled, t["out_pooled"], HIDDEN)
    yield _close("out_actions", model.to_logits(pooled).view(t["out_actions"].shape), t["out_actions"], HIDDEN)


def _losses_and_gradients(golden: Golden) -> Iterator[Row]:
    t, model, weights = golden.batch_tensors, golden.model(), golden.values["loss_coeffs"]
    losses = model(golden.batch()).objectives
    means = {name: losses[name].total / losses[name].count for name in weights}
    total = torch.stack([weights[name] * mean for name, mean in means.items()]).sum()
    for name, mean in means.items():
        yield _close(f"out_loss_{name}", mean, t[f"out_loss_{name}"], LOSS)
    yield _close("out_loss_total", total, t["out_loss_total"], LOSS)
    counts = model.counts(golden.batch())
    yield _exact("counts", list(counts.values()), [float(losses[name].count) for name in counts])
    total.backward()
    parameters = dict(model.named_parameters())
    for name, expected in golden.tensors("gradients").items():
        kind, _, parameter = name.partition("/")
        found = parameters[parameter].grad
        assert found is not None
        found = found.norm() if kind == "norm" else found
        scale = max(float(expected.abs().max()), 1e-6)
        yield _close(f"gradient {name}", found / scale, expected / scale, GRADIENT)


def _acting(golden: Golden) -> Iterator[Row]:
    t, batch = golden.batch_tensors, golden.batch()
    actions, codes = golden.model().predict(batch.images, batch.codes, batch.text_ids, batch.text_len)
    yield _exact("out_future_codes", codes.flatten(1), t["out_future_codes"])
    expected = t["out_actions"]
    yield _close("predict: pose", actions[..., :-1], expected[..., :-1].clamp(-1, 1), HIDDEN)
    yield _exact("predict: gripper", actions[..., -1], torch.where(expected[..., -1] >= 0, 1.0, -1.0))


def _answering(golden: Golden) -> Iterator[Row]:
    t, model = golden.batch_tensors, golden.model()
    patches, expected = t["mmu_clip_features"][:1, None], t["gen_greedy_tokens"]
    answer = model.describe(patches, _question(golden), len(expected))[0]
    yield _exact("gen_greedy_tokens", answer, expected[: len(answer)])
    yield _exact("gen_greedy_tokens: length", len(answer), len(expected))
    for step, logits in enumerate(t["gen_step_logits"]):
        ids = torch.cat([_question(golden), expected[None, :step]], 1)
        with torch.no_grad():
            last = model.showo.lm_head(model.read_questions(patches, ids)[0][0, -1])
        yield _close(f"gen_step_logits[{step}]", last, logits, HIDDEN)


CHECKS: tuple[Callable[[Golden], Iterator[Row]], ...] = (
    _vocabulary,
    _text,
    _prompts,
    _question_masks,
    _windows,
    _schedule,
    _pooling,
    _states,
    _acting,
    _image_tokenizer,
    _losses_and_gradients,
    _answering,
)


def _question(golden: Golden) -> Tensor:
    """i64[1,L]: the question behind the special tokens and the system prompt of the stored generation prompt."""
    t = golden.batch_tensors
    return t["gen_prompt_ids_without_image"][:, 3 + t["mmu_system_ids"].shape[1] :]


def _labels(ids: Tensor, config: ModelConfig) -> Tensor:
    return torch.where(ids == config.pad_id, IGNORED, ids)


def _right_padded(row: list[int], width: int, value: int) -> list[int]:
    return row + [value] * (width - len(row))


def _grid(codes: int) -> tuple[int, int]:
    """Rows and columns that hold so many codes, as square as can be."""
    rows = max(r for r in range(1, int(codes**0.5) + 1) if codes % r == 0)
    return rows, codes // rows


def _exact(name: str, ours: Any, theirs: Any) -> Row:
    a, b = (torch.as_tensor(value).to(torch.float64) for value in (ours, theirs))
    return Row(name, float("inf") if a.shape != b.shape else _largest(a - b), EXACT)


def _close(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> Row:
    if ours.shape != theirs.shape:
        return Row(name, float("inf"), tolerance)
    return Row(name, _largest(ours.detach().double() - theirs.double()), tolerance)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def main(arguments: list[str]) -> int:
    (folder,) = arguments or [str(FOLDER)]
    rows = list(compare(Golden(Path(folder))))
    width = max(len(row.name) for row in rows)
    print(f"{'tensor':<{width}}  {'max error':>10}  {'tolerance':>9}  pass")
    for row in rows:
        print(f"{row.name:<{width}}  {row.error:>10.2e}  {row.tolerance:>9.0e}  {'yes' if row.ok else 'NO'}")
    missed = [row.name for row in rows if not row.ok]
    print(
        f"{len(rows) - len(missed)} of {len(rows)} tensors agree" + (f"; missed: {', '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
