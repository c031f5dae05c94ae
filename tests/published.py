"""The published behaviour written down naively, and golden folders of other sizes made from it.

Loops over rows and positions, masks cell by cell, the decoder from its state dict: slow, and independent of `upvla`.
That it is right is itself tested: from a golden folder's weights and inputs it must give the folder's outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
IGNORED = -100


class Ids:
    """The special ids of a text vocabulary (method, section 1.3)."""

    def __init__(self, v: dict[str, Any]) -> None:
        first = v["tok_vocab"]
        self.eot, self.pad = first - 1, first
        self.soi, self.eoi, self.t2i, self.mmu, self.lvg = (first + k for k in (1, 2, 5, 6, 9))
        self.offset = first + 10

    def named(self) -> dict[str, int]:
        base = self.pad
        names = ("pad", "soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")
        return {f"<|{name}|>": base + k for k, name in enumerate(names)} | {
            "<|sot|>": self.eot,
            "<|eot|>": self.eot,
        }


# ------------------------------------------------------------------------------------------------------------- rows


def robot_row(v: dict[str, Any], text: Sequence[int], codes: Sequence[int]) -> list[int]:
    """`codes` carry the offset already."""
    ids = Ids(v)
    words = list(text)
    if not words or words[0] != ids.eot:
        words = [ids.eot, *words]
    prompt = [ids.t2i, *words, ids.eot]
    width = v["max_text"] + 1
    prompt = [*prompt[: width - 1], ids.eot] if len(prompt) > width else [ids.pad] * (width - len(prompt)) + prompt
    return [*prompt, ids.soi, *codes, ids.eoi, *[ids.lvg] * v["act_step"]]


def robot_mask(v: dict[str, Any], row: Sequence[int]) -> Tensor:
    """u8[1,L,L], 1 = may attend."""
    pad, soi, eoi = Ids(v).pad, row.index(Ids(v).soi), row.index(Ids(v).eoi)
    allowed = torch.zeros(1, len(row), len(row), dtype=torch.uint8)
    for q in range(len(row)):
        for k in range(len(row)):
            if row[q] == pad:
                allowed[0, q, k] = row[k] == pad and k <= q
            else:
                allowed[0, q, k] = row[k] != pad and (k <= q or soi <= q <= eoi)
    return allowed


def question_mask(system: int, patches: int, length: int) -> Tensor:
    allowed = torch.zeros(1, length, length, dtype=torch.uint8)
    first = 1 + system + 1
    for q in range(length):
        for k in range(length):
            allowed[0, q, k] = k <= q or first <= k < first + patches
    return allowed


# ---------------------------------------------------------------------------------------------------------- modules


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return (
        centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{name}.weight"]
        + state[f"{name}.bias"]
    )


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def rotate(x_BhLd: Tensor, fraction: float, theta: float) -> Tensor:
    """Dim i is paired with i + r/2 among the first r = fraction * d dims; positions 0..L-1."""
    r = int(x_BhLd.shape[-1] * fraction)
    angle = torch.arange(x_BhLd.shape[2])[:, None] * theta ** (-torch.arange(0, r, 2) / r)
    a, b, rest = x_BhLd[..., : r // 2], x_BhLd[..., r // 2 : r], x_BhLd[..., r:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)


def decoder(v: dict[str, Any], state: State, x: Tensor, allowed: Tensor) -> list[Tensor]:
    """Residual stream before each block, then after the final norm."""
    heads, eps, seen = v["heads"], v["layer_norm_eps"], []
    for i in range(v["layers"]):
        seen.append(x)
        at = f"showo.model.layers.{i}"
        n = norm(state, f"{at}.input_layernorm", x, eps)
        q, k, value = (
            linear(state, f"{at}.self_attn.{p}_proj", n).unflatten(-1, (heads, -1)).transpose(1, 2) for p in "qkv"
        )
        q, k = (
            rotate(norm(state, f"{at}.self_attn.{p}_layernorm", y, eps), v["prf"], v["theta"])
            for p, y in (("q", q), ("k", k))
        )
        score = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(allowed == 0, -torch.inf)
        attended = (score.softmax(-1) @ value).transpose(1, 2).flatten(2)
        h = linear(state, f"{at}.mlp.fc1", n)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(state, f"{at}.self_attn.dense", attended) + linear(state, f"{at}.mlp.fc2", h)
    return [*seen, norm(state, "showo.model.final_layernorm", x, eps)]


def project(state: State, x: Tensor) -> Tensor:
    h = linear(state, "mm_projector.0", x)
    return linear(state, "mm_projector.2", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))


def pool(v: dict[str, Any], state: State, x_BCD: Tensor) -> Tensor:
    def rms(name: str, x: Tensor) -> Tensor:
        scale = (x.square().sum(-1, keepdim=True).sqrt() * x.shape[-1] ** -0.5).clamp(min=1e-8)
        return x / scale * state[f"token_learner.{name}.g"]

    heads, d = 2 * v["map_heads"], x_BCD.shape[-1]
    y = linear(state, "token_learner.projection", x_BCD)
    latent = state["token_learner.latents"].expand(len(y), d)
    q = linear(state, "token_learner.attn.q", latent).unflatten(-1, (heads, -1))
    kv = linear(state, "token_learner.attn.kv", y)
    k, value = (part.unflatten(-1, (heads, -1)) for part in (kv[..., :d], kv[..., d:]))
    weight = (torch.einsum("bhd,bchd->bhc", q, k) * (d // heads) ** -0.5).softmax(-1)
    attended = torch.einsum("bhc,bchd->bhd", weight, value).flatten(1)
    latent = rms("attn_norm", latent + linear(state, "token_learner.attn.proj", attended))
    u, g = linear(state, "token_learner.mlp.0.project", latent).split(4 * d, -1)
    return rms("mlp_norm", latent + linear(state, "token_learner.mlp.1", u * g * torch.sigmoid(g)))


def encode(v: dict[str, Any], state: State, x: Tensor) -> Tensor:
    """Pixels to latents, f[B,z,h,w]."""
    x = conv(state, "encoder.conv_in", x)
    for i, blocks in enumerate(v["vq"]["enc_blk"]):
        for b in range(blocks):
            x = residual(state, f"encoder.down.{i}.block.{b}", x)
        if i + 1 < len(v["vq"]["enc_blk"]):
            x = conv(state, f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    x = middle(state, "encoder.mid", x)
    return conv(
        state, "encoder.quant_conv", conv(state, "encoder.conv_out", swish(group_norm(state, "encoder.norm_out", x)))
    )


def decode(v: dict[str, Any], state: State, codes_BN: Tensor, grid: tuple[int, int]) -> Tensor:
    z = state["quantize.embedding"][codes_BN].transpose(1, 2).unflatten(2, grid)
    x = conv(state, "decoder.conv_in", conv(state, "decoder.post_quant_conv", z))
    x = middle(state, "decoder.mid", x)
    for i in reversed(range(len(v["vq"]["dec_blk"]))):
        for b in range(v["vq"]["dec_blk"][i]):
            x = residual(state, f"decoder.up.{i}.block.{b}", x)
        if i:
            x = conv(state, f"decoder.up.{i}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(state, "decoder.conv_out", swish(group_norm(state, "decoder.norm_out", x)))


def bits_to_codes(z: Tensor) -> Tensor:
    """Channel 0 is the most significant bit; raster order."""
    code = torch.zeros_like(z[:, 0], dtype=torch.long)
    for channel in range(z.shape[1]):
        code = code * 2 + (z[:, channel] > 0).long()
    return code.flatten(1)


def conv(state: State, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], stride, weight.shape[-1] // 2 if padding is None else padding)


def group_norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def residual(state: State, name: str, x: Tensor) -> Tensor:
    y = conv(state, f"{name}.conv1", swish(group_norm(state, f"{name}.norm1", x)))
    y = conv(state, f"{name}.conv2", swish(group_norm(state, f"{name}.norm2", y)))
    return y + (conv(state, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in state else x)


def middle(state: State, name: str, x: Tensor) -> Tensor:
    x = residual(state, f"{name}.block_1", x)
    n = group_norm(state, f"{name}.attn_1.norm", x)
    q, k, value = (conv(state, f"{name}.attn_1.{part}", n).flatten(2) for part in "qkv")
    weight = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(-1)
    y = (value @ weight.transpose(1, 2)).view(x.shape)
    return residual(state, f"{name}.block_2", x + conv(state, f"{name}.attn_1.proj_out", y))


# ------------------------------------------------------------------------------------------------- one training step


def train_outputs(v: dict[str, Any], state: State, t: State) -> State:
    """Outputs, losses and gradients of the batch in `t`; `state` tensors get `.grad`."""
    ids = Ids(v)
    t["pre_allowed"] = torch.stack([robot_mask(v, row) for row in t["pre_input_ids"].tolist()])
    length = 3 + v["system_prompt_len"] + v["n_clip"] + v["mmu_text_len"]
    t["mmu_allowed"] = question_mask(v["system_prompt_len"], v["n_clip"], length).repeat(v["B_mmu"], 1, 1, 1)
    for tensor in state.values():
        tensor.requires_grad_().grad = None
    table, out = state["showo.model.embed_tokens.weight"], {}
    out["mmu_projected"] = project(state, t["mmu_clip_features"])
    front = 2 + v["system_prompt_len"]
    asked = table[t["mmu_ids_without_image"]]
    asked = torch.cat([asked[:, :front], out["mmu_projected"], asked[:, front:]], 1)
    out["input_embeddings"] = torch.cat([table[t["pre_input_ids"]], asked])
    hidden = decoder(v, state, out["input_embeddings"], torch.cat([t["pre_allowed"], t["mmu_allowed"]]))
    out |= {f"hidden_{i}": h for i, h in enumerate(hidden)}
    out["logits"] = linear(state, "showo.lm_head", hidden[-1])
    rows, chunk = v["B_pre"], v["act_step"]
    out["action_hidden"] = hidden[-1][:rows, -chunk:]
    out["pooled"] = pool(v, state, out["action_hidden"])
    out["actions"] = linear(state, "to_logits.0", out["pooled"]).view(rows, chunk, -1)
    first = v["max_text"] + 1
    at = slice(first, -chunk)
    out["loss_pre"] = F.cross_entropy(out["logits"][:rows, at].flatten(0, 1), t["pre_labels"][:, at].flatten())
    asked_logits, labels = out["logits"][rows:, :-1], t["mmu_labels"][:, 1:]
    out["loss_mmu"] = F.cross_entropy(asked_logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    out["loss_act"] = (out["actions"] - t["actions"]).square().mean()
    out["loss_total"] = sum(weight * out[f"loss_{name}"] for name, weight in v["loss_coeffs"].items())
    out["loss_total"].backward()
    span = slice(first + 1, -chunk - 1)
    codes = out["logits"][:rows, span, ids.offset : ids.offset + v["codebook_size"]].argmax(-1)
    return {f"out_{name}": value.detach() for name, value in out.items()} | {"out_future_codes": codes}


@torch.no_grad()
def greedy(v: dict[str, Any], state: State, prompt: Tensor, features: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Everything is read again for every token. Text ids only, as long as none of the others is likelier."""
    front, tokens, logits = 2 + v["system_prompt_len"], [], []
    for _ in range(steps):
        ids = torch.cat([prompt, torch.tensor([tokens], dtype=torch.long)], 1)
        x = state["showo.model.embed_tokens.weight"][ids]
        x = torch.cat([x[:, :front], project(state, features), x[:, front:]], 1)
        allowed = question_mask(v["system_prompt_len"], v["n_clip"], x.shape[1])[None]
        logits.append(linear(state, "showo.lm_head", decoder(v, state, x, allowed)[-1][0, -1]))
        tokens.append(int(logits[-1].argmax()))
    return torch.tensor(tokens), torch.stack(logits)


# ------------------------------------------------------------------------------------------------------------- data


def windows(lengths: Sequence[int], actions: np.ndarray, chunk: int) -> tuple[list[int], np.ndarray]:
    """Flat index of the future frame, and the chunk, of every flat index (method, section 4.2)."""
    futures, chunks, first = [], [], 0
    for length in lengths:
        for t in range(length):
            future = min(t + chunk, length - 1)
            used = actions[first + t : first + max(future, t + 1)]
            rest = np.zeros((chunk - len(used), actions.shape[1]), np.float32)
            rest[:, -1] = used[-1, -1]
            futures.append(first + future)
            chunks.append(np.concatenate([used, rest]))
        first += length
    return futures, np.stack(chunks)


def transform(frame: np.ndarray, side: int) -> Tensor:
    """Shorter side to `side` by antialiased bicubic, centre crop, to [-1, 1]."""
    h, w = frame.shape[:2]
    size = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    image = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    top, left = (round((image.shape[i] - side) / 2) for i in (0, 1))
    crop = image[top : top + side, left : left + side]
    return torch.tensor(crop).permute(2, 0, 1).float() / 255 / 0.5 - 1


def learning_rate(step: int, base: float, warm: int, total: int) -> float:
    if step < warm:
        return base * step / warm
    return base * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


# ---------------------------------------------------------------------------------------------------- a whole folder


def write_golden(folder: Path, like: Path, seed: int = 0, **sizes: Any) -> Path:
    """A golden folder with `sizes` in place of those of the folder `like`, whose tokenizer and texts it shares."""
    g = torch.Generator().manual_seed(seed)
    v = _sizes(json.loads((like / "config.json").read_text()) | sizes)
    tokenizer = (like / "tokenizer.json").read_text()
    words = tokenizers.Tokenizer.from_str(tokenizer)
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(tokenizer)
    state, vq_state = _random_state(v, g), _random_vq_state(v, g)
    batch, prompts = _batch(v, words, g), _prompt_cases(v, g)
    batch |= train_outputs(v, state, batch)
    gradients = {f"norm/{name}": p.grad.norm() for name, p in state.items()}
    gradients |= {
        f"full/{name}": p.grad for name, p in state.items() if name in ("to_logits.0.bias", "showo.lm_head.bias")
    }
    state = {name: p.detach() for name, p in state.items()}
    question = torch.tensor([words.encode(v["question"], add_special_tokens=False).ids])
    head = [Ids(v).mmu, *batch["mmu_system_ids"][0].tolist(), Ids(v).soi, Ids(v).eoi]
    prompt = torch.cat([torch.tensor([head]), question], 1)
    tokens, logits = greedy(v, state, prompt, batch["mmu_clip_features"][:1], 6)
    batch |= {"gen_prompt_ids_without_image": prompt, "gen_greedy_tokens": tokens, "gen_step_logits": logits}
    x = torch.randn(2, 5, v["hidden"], generator=g)
    pooled = pool(v, state, x)
    heads = {"x5": x, "y5": pooled, "a5": linear(state, "to_logits.0", pooled).view(2, v["act_step"], -1)}
    files = {
        "model_state": state,
        "vq_state": vq_state,
        "train_batch": batch,
        "prompts_masks": prompts,
        "gradients": gradients,
        "map_head": heads,
        "vq_io": _vq_io(v, vq_state, g),
        "data_windows": _data(v, g),
    }
    for name, tensors in files.items():
        save_file({k: value.clone().contiguous() for k, value in tensors.items()}, folder / f"{name}.safetensors")
    (folder / "config.json").write_text(json.dumps(v))
    return folder


def _sizes(v: dict[str, Any]) -> dict[str, Any]:
    """Whatever follows from the chosen sizes."""
    ids = Ids(v)
    v["codebook_size"] = 2 ** v["z"]
    v |= {"pad_id": ids.pad, "eot_id": ids.eot, "special_ids": ids.named(), "image_token_offset": ids.offset}
    v |= {"mask_token_id": ids.offset + v["codebook_size"], "vocab_size": ids.offset + v["codebook_size"] + 1}
    v["seq_len"] = v["max_text"] + 1 + 2 + v["views"] * v["num_vq"] + v["act_step"]
    v["mmu_text_len"] = v["seq_len"] - 3 - v["system_prompt_len"] - v["n_clip"]
    name = "lr_schedule_3e-4_warm7_total50"
    v = {k: value for k, value in v.items() if not k.startswith("lr_schedule")}
    return v | {name: {str(s): learning_rate(s, 3e-4, 7, 50) for s in (0, 3, 6, 7, 8, 30, 50)}}


def _random_state(v: dict[str, Any], g: torch.Generator) -> State:
    d, clip, inter, head_dim = v["hidden"], v["clip_dim"], v["inter"], v["hidden"] // v["heads"]
    shapes: dict[str, tuple[int, ...]] = {"showo.model.embed_tokens.weight": (v["vocab_size"], d)}

    def add(name: str, outer: int, inner: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outer, inner)
        if bias:
            shapes[f"{name}.bias"] = (outer,)

    def add_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    for i in range(v["layers"]):
        at = f"showo.model.layers.{i}"
        add_norm(f"{at}.input_layernorm", d)
        for part in ("q_proj", "k_proj", "v_proj", "dense"):
            add(f"{at}.self_attn.{part}", d, d)
        for part in ("q", "k"):
            add_norm(f"{at}.self_attn.{part}_layernorm", head_dim)
        add(f"{at}.mlp.fc1", inter, d)
        add(f"{at}.mlp.fc2", d, inter)
    add_norm("showo.model.final_layernorm", d)
    add("showo.lm_head", v["vocab_size"], d)
    add("mm_projector.0", d, clip)
    add("mm_projector.2", d, d)
    shapes |= {"token_learner.latents": (1, d), "token_learner.attn_norm.g": (d,), "token_learner.mlp_norm.g": (d,)}
    add("token_learner.projection", d, d)
    add("token_learner.attn.q", d, d, bias=False)
    add("token_learner.attn.kv", 2 * d, d, bias=False)
    add("token_learner.attn.proj", d, d)
    add("token_learner.mlp.0.project", 8 * d, d)
    add("token_learner.mlp.1", d, 4 * d)
    add("to_logits.0", v["act_step"] * 7, d)
    return _filled(shapes, g)


def _random_vq_state(v: dict[str, Any], g: torch.Generator) -> State:
    vq, z, ch = v["vq"], v["z"], v["vq"]["ch"]
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, outer: int, inner: int, kernel: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outer, inner, kernel, kernel), (outer,)

    def add_norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def block(name: str, inner: int, outer: int) -> int:
        add_norm(f"{name}.norm1", inner)
        add(f"{name}.conv1", outer, inner, 3)
        add_norm(f"{name}.norm2", outer)
        add(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            add(f"{name}.nin_shortcut", outer, inner, 1)
        return outer

    def mid(name: str, width: int) -> None:
        block(f"{name}.block_1", width, width)
        block(f"{name}.block_2", width, width)
        add_norm(f"{name}.attn_1.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.attn_1.{part}", width, width, 1)

    add("encoder.conv_in", ch, 3, 3)
    width = ch
    for i, (multiplier, blocks) in enumerate(zip(vq["enc_mult"], vq["enc_blk"], strict=True)):
        for b in range(blocks):
            width = block(f"encoder.down.{i}.block.{b}", width, ch * multiplier)
        if i + 1 < len(vq["enc_blk"]):
            add(f"encoder.down.{i}.downsample.conv", width, width, 3)
    mid("encoder.mid", width)
    add_norm("encoder.norm_out", width)
    add("encoder.conv_out", z, width, 3)
    add("encoder.quant_conv", z, z, 1)
    add("decoder.post_quant_conv", z, z, 1)
    width = ch * vq["dec_mult"][-1]
    add("decoder.conv_in", width, z, 3)
    mid("decoder.mid", width)
    for i in reversed(range(len(vq["dec_blk"]))):
        for b in range(vq["dec_blk"][i]):
            width = block(f"decoder.up.{i}.block.{b}", width, ch * vq["dec_mult"][i])
        if i:
            add(f"decoder.up.{i}.upsample.conv", width, width, 3)
    add_norm("decoder.norm_out", width)
    add("decoder.conv_out", 3, width, 3)
    powers = [2 ** (z - 1 - channel) for channel in range(z)]
    signs = [[1.0 if code & power else -1.0 for power in powers] for code in range(2**z)]
    return _filled(shapes, g) | {"quantize.power_vals": torch.tensor(powers), "quantize.embedding": torch.tensor(signs)}


def _filled(shapes: dict[str, tuple[int, ...]], g: torch.Generator) -> State:
    """Matrices by fan-in; gains about one, biases about zero, none of them trivial."""
    state = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=g)
        if len(shape) > 1:
            fan_in = math.prod(shape[1:])
            state[name] = noise * (0.5 if "embed_tokens" in name else fan_in**-0.5)
        else:
            state[name] = noise * 0.1 + (
                1.0 if name.endswith((".g", "norm.weight", "norm1.weight", "norm2.weight")) else 0.0
            )
    return state


def _batch(v: dict[str, Any], words: tokenizers.Tokenizer, g: torch.Generator) -> State:
    ids, rows, views = Ids(v), v["B_pre"], v["views"]
    t: State = {}
    for name in ("pre_image_tokens", "pre_target_tokens"):
        t[name] = torch.randint(0, v["codebook_size"], (rows, views * v["num_vq"]), generator=g) + ids.offset
    texts = [words.encode(text, add_special_tokens=False).ids for text in v["texts"]]
    t |= {f"pre_text_ids_{i}": torch.tensor(text, dtype=torch.long) for i, text in enumerate(texts)}
    for name, codes in (("pre_input_ids", "pre_image_tokens"), ("pre_labels", "pre_target_tokens")):
        t[name] = torch.tensor([robot_row(v, text, row) for text, row in zip(texts, t[codes].tolist(), strict=True)])
    t["pre_labels"] = t["pre_labels"].masked_fill(t["pre_labels"] == ids.pad, IGNORED)
    system = torch.tensor([words.encode(v["system"], add_special_tokens=False).ids] * v["B_mmu"])
    t["mmu_system_ids"] = system
    pairs = [_conversation(v, words, turns) for turns in v["conversations"]]
    t["mmu_text_ids"], t["mmu_text_labels"] = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))

    def column(token: int, width: int = 1) -> Tensor:
        return torch.full((v["B_mmu"], width), token)

    head = [column(ids.mmu), system, column(ids.soi), column(ids.eoi)]
    t["mmu_ids_without_image"] = torch.cat([*head, t["mmu_text_ids"]], 1)
    front = 3 + system.shape[1] + v["n_clip"]
    t["mmu_labels"] = torch.cat([column(IGNORED, front), t["mmu_text_labels"]], 1)
    t["mmu_clip_features"] = torch.randn(v["B_mmu"], v["n_clip"], v["clip_dim"], generator=g)
    t["actions"] = torch.rand(rows, v["act_step"], 7, generator=g) * 2 - 1
    t["actions"][..., -1] = t["actions"][..., -1].sign()
    return t


def _conversation(
    v: dict[str, Any], words: tokenizers.Tokenizer, turns: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """The template's text tokenised whole; the masks are found round by round as in LLaVA's phi-1.5 preprocessing."""
    said = [turn["value"].replace("<image>", "").strip() for turn in turns]
    rounds = [f"USER: {q} ASSISTANT: {a}" for q, a in zip(said[::2], said[1::2], strict=True)]
    ids, labels, eot = [], [], Ids(v).eot
    for text in rounds:
        tokens = words.encode(text, add_special_tokens=False).ids
        prefix = text[: text.index(" ASSISTANT: ") + len(" ASSISTANT: ")]
        masked = len(words.encode(prefix, add_special_tokens=False).ids) - 1
        ids += [*tokens, eot]
        labels += [*[IGNORED] * masked, *tokens[masked:], eot]
    padding = v["mmu_text_len"] - len(ids)
    return ids + [Ids(v).pad] * padding, labels + [IGNORED] * padding


def _prompt_cases(v: dict[str, Any], g: torch.Generator) -> State:
    """Empty, short, one below full, exactly full, over-long, already starting with bos; 1 to 3 views."""
    room, ids = v["max_text"] - 2, Ids(v)
    texts = [torch.randint(0, ids.eot, (n,), generator=g) for n in (0, 4, room - 1, room, room + 20)]
    texts.append(torch.cat([torch.tensor([ids.eot]), texts[1][:3]]))
    t = {f"case_text_ids_{i}": text for i, text in enumerate(texts)}
    for views in (1, 2, 3):
        for name in ("image", "target"):
            shape = (len(texts), views * v["num_vq"])
            t[f"pre_v{views}_{name}_tokens"] = torch.randint(0, v["codebook_size"], shape, generator=g) + ids.offset
        rows, labels = (
            torch.tensor([robot_row(v, text.tolist(), row) for text, row in zip(texts, t[name].tolist(), strict=True)])
            for name in (f"pre_v{views}_image_tokens", f"pre_v{views}_target_tokens")
        )
        t[f"pre_v{views}_input_ids"] = rows
        t[f"pre_v{views}_labels"] = labels.masked_fill(labels == ids.pad, IGNORED)
        t[f"pre_v{views}_allowed"] = torch.stack([robot_mask(v, row) for row in rows.tolist()])
    t["mmu_small_S4_allowed"] = question_mask(4, v["n_clip"], 30).repeat(2, 1, 1, 1)
    return t


@torch.no_grad()
def _vq_io(v: dict[str, Any], state: State, g: torch.Generator) -> State:
    down = 2 ** (len(v["vq"]["enc_mult"]) - 1)
    side = v["vq"]["image"]
    pixels = torch.rand(2, 3, side, side, generator=g) * 2 - 1
    z = encode(v, state, pixels)
    codes = bits_to_codes(z)
    odd = torch.randint(0, v["codebook_size"], (1, 6), generator=g)
    sign = torch.where(z > 0, 1.0, -1.0)
    p = torch.sigmoid(4 * z)
    mean = p.mean((0, 2, 3))
    entropy, diversity = (-(q * (q + 1e-8).log() + (1 - q) * (1 - q + 1e-8).log()) for q in (p, mean))
    return {
        "pixels": pixels,
        "z": z,
        "z_q": z + (sign - z),
        "indices": codes,
        "recon": decode(v, state, codes, (side // down, side // down)),
        "nonsquare_indices": odd,
        "nonsquare_recon": decode(v, state, odd, (2, 3)),
        "power_vals": state["quantize.power_vals"],
        "codebook": state["quantize.embedding"],
        "quantizer_loss": 0.125 * (sign - z).square().mean(),
        "entropy_loss": 0.1 * (entropy.mean() - diversity.mean()),
    }


def _data(v: dict[str, Any], g: torch.Generator) -> State:
    lengths = [1, 5, 9, 14]
    actions = torch.rand(sum(lengths), 7, generator=g).numpy() * 2 - 1
    actions[:, -1] = np.sign(actions[:, -1])
    futures, chunks = windows(lengths, actions, v["act_step"])
    raw = {
        name: torch.randint(0, 256, size, generator=g).byte()
        for name, size in (("static", (21, 34, 3)), ("gripper", (11, 8, 3)))
    }
    side = v["vq"]["image"]
    return {
        "episode_lengths": torch.tensor(lengths),
        "rel_actions": torch.tensor(actions),
        "future_index": torch.tensor(futures),
        "chunks": torch.tensor(chunks),
        **{f"raw_{name}": frame for name, frame in raw.items()},
        **{f"transformed_{name}": transform(frame.numpy(), side) for name, frame in raw.items()},
    }
