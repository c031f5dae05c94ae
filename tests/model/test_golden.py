"""Numerical parity with the published classes; tolerances are those of the golden set's README."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden import Golden, default_folder
from upvla.model.action_head import AttentionPooling
from upvla.model.sequence import attention_mask, qa_table, robot_rows
from upvla.model.upvla import UPVLA
from upvla.types import Losses

HIDDEN, LOSS, PIXEL = 3e-5, 1e-5, 5e-5


@pytest.fixture(scope="module")
def golden() -> Golden:
    folder = default_folder()
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not here: set UPVLA_SHARED to the folder that holds golden/")
    return Golden(folder)


@pytest.fixture(scope="module")
def model(golden: Golden) -> UPVLA:
    return golden.model()


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def mean(losses: Losses, name: str) -> Tensor:
    term = losses.objectives[name]
    return term.total / term.count


def test_state_dict_has_the_published_names_and_shapes(golden: Golden, model: UPVLA) -> None:
    published = {name: value.shape for name, value in golden.tensors("model_state").items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == published
    vq = {name: (value.shape, value.dtype) for name, value in golden.tensors("vq_state").items()}
    assert {name: (value.shape, value.dtype) for name, value in golden.vq().state_dict().items()} == vq


def test_special_ids(golden: Golden) -> None:
    config, ids = golden.config(), golden.values["special_ids"]
    ours = {"pad": config.pad_id, "soi": config.soi_id, "eoi": config.eoi_id, "t2i": config.predict_id}
    ours |= {"mmu": config.mmu_id, "lvg": config.action_id}
    assert ours == {name: ids[f"<|{name}|>"] for name in ours}
    assert (config.image_offset, config.mask_id, config.vocab_size) == tuple(
        golden.values[name] for name in ("image_token_offset", "mask_token_id", "vocab_size")
    )


def test_text_ids_and_conversations(golden: Golden) -> None:
    text, t = golden.text(), golden.batch_tensors
    for i, instruction in enumerate(golden.values["texts"]):
        assert text.encode(instruction) == t[f"pre_text_ids_{i}"].tolist()
    for i, conversation in enumerate(golden.values["conversations"]):
        turns = [(q["value"], a["value"]) for q, a in zip(conversation[::2], conversation[1::2], strict=True)]
        ids, labels = text.encode_turns(turns)
        padding = t["mmu_text_ids"].shape[1] - len(ids)
        assert ids + [golden.values["pad_id"]] * padding == t["mmu_text_ids"][i].tolist()
        assert labels + [-100] * padding == t["mmu_text_labels"][i].tolist()
    assert text.encode(golden.values["system"]) == t["mmu_system_ids"][0].tolist()


def test_rows_of_the_training_batch(golden: Golden, model: UPVLA) -> None:
    t, batch = golden.batch_tensors, golden.batch()
    states = model.states(batch)
    assert torch.equal(states.robot_rows.ids, t["pre_input_ids"])
    assert torch.equal(states.robot_rows.allowed, t["pre_allowed"].bool())
    assert torch.equal(states.qa_rows.allowed, t["mmu_allowed"].bool())
    patches = states.qa_rows.at["patches"]
    without = torch.cat([states.qa_rows.ids[:, : patches.start], states.qa_rows.ids[:, patches.stop :]], 1)
    assert torch.equal(without, t["mmu_ids_without_image"])
    future = robot_rows(golden.config(), batch.text_ids, batch.text_len, batch.future_codes).ids
    assert torch.equal(torch.where(future == golden.values["pad_id"], -100, future), t["pre_labels"])


@pytest.mark.parametrize("views", [1, 2])
def test_prompts_of_every_length(golden: Golden, views: int) -> None:
    t = golden.tensors("prompts_masks")
    config = golden.config(code_cameras=("static", "gripper")[:views])
    texts = [t[f"case_text_ids_{i}"] for i in range(6)]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=config.pad_id)
    codes = (t[f"pre_v{views}_image_tokens"] - config.image_offset).view(6, views, -1)
    rows = robot_rows(config, padded, torch.tensor([len(text) for text in texts]), codes)
    assert torch.equal(rows.ids, t[f"pre_v{views}_input_ids"])
    assert torch.equal(rows.allowed, t[f"pre_v{views}_allowed"].bool())


def test_question_masks_at_other_sizes_and_at_the_real_one(golden: Golden) -> None:
    t = golden.tensors("prompts_masks")
    small = {0: t["mmu_small_S0_allowed"], 11: t["mmu_small_S11_allowed"]}
    cases = [(s, golden.values["n_clip"], allowed[0, 0].bool()) for s, allowed in small.items()]
    packed = t["mmu_real576_S28_allowed_packed"].numpy()
    cases.append((28, 576, torch.from_numpy(np.unpackbits(packed, axis=1)[:, : len(packed)]).bool()))
    for system, patches, allowed in cases:
        vision = {"kind": "features", "image_size": 1, "width": 8, "num_patches": patches}
        config = golden.config(system_ids=(1,) * system, vision=vision)
        table = qa_table(config, len(allowed) - 3 - system - patches)
        assert torch.equal(attention_mask(table, torch.zeros(1, len(allowed), dtype=torch.bool))[0, 0], allowed)


def test_every_hidden_state_and_logit(golden: Golden, model: UPVLA) -> None:
    t = golden.batch_tensors
    seen: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, a, k: seen.append(a[0] if a else k["hidden_states"]),
                                             with_kwargs=True) for layer in model.showo.model.layers]  # fmt: skip
    with torch.no_grad():
        states = model.states(golden.batch())
    for hook in hooks:
        hook.remove()
    seen.append(torch.cat([states.robot, states.qa]))
    for i, hidden in enumerate(seen):
        close(hidden, t[f"out_hidden_{i}"], HIDDEN)
    close(seen[0], t["out_input_embeddings"], HIDDEN)
    close(model.showo.lm_head(seen[-1]), t["out_logits"], HIDDEN)
    close(model.mm_projector(t["mmu_clip_features"]), t["out_mmu_projected"], HIDDEN)
    close(states.robot[:, states.robot_rows.at["action"]], t["out_action_hidden"], HIDDEN)
    close(model.token_learner(t["out_action_hidden"]), t["out_pooled"], HIDDEN)


def test_losses(golden: Golden, model: UPVLA) -> None:
    losses = model(golden.batch())
    for name in ("pre", "act", "mmu"):
        close(mean(losses, name), golden.batch_tensors[f"out_loss_{name}"], LOSS)
    assert model.counts(golden.batch()) == {name: float(term.count) for name, term in losses.objectives.items()}


@pytest.mark.parametrize("trim", [False, True])
def test_gradients_with_and_without_padding_columns(golden: Golden, trim: bool) -> None:
    model, t = golden.model(trim=trim), golden.tensors("gradients")
    losses = model(golden.batch())
    weights = golden.values["loss_coeffs"]
    torch.stack([weights[name] * mean(losses, name) for name in weights]).sum().backward()
    parameters = dict(model.named_parameters())
    for name, expected in t.items():
        kind, _, parameter = name.partition("/")
        found = parameters[parameter].grad
        assert found is not None, parameter
        # With the pads of all rows cut out, the pad token's embedding row has no part in anything.
        if kind == "norm" and not (trim and parameter.endswith("embed_tokens.weight")):
            assert float((found.norm() - expected).abs()) <= 1e-3 * max(1e-3, float(expected)), parameter
        if kind == "full":
            close(found, expected, 1e-3 * float(expected.abs().max()))


def test_actions_and_future_codes(golden: Golden, model: UPVLA) -> None:
    t, batch = golden.batch_tensors, golden.batch()
    actions, codes = model.predict(batch.images, batch.codes, batch.text_ids, batch.text_len)
    assert torch.equal(codes.flatten(1), t["out_future_codes"])
    close(actions[..., :-1], t["out_actions"][..., :-1].clamp(-1, 1), HIDDEN)
    assert torch.equal(actions[..., -1] > 0, t["out_actions"][..., -1] >= 0)


def test_pooling_head(golden: Golden, model: UPVLA) -> None:
    t = golden.tensors("map_head")
    head: AttentionPooling = model.token_learner
    close(head(t["x1"]), t["y1"], HIDDEN)
    close(head(t["x17"]), t["y17"], HIDDEN)
    close(model.to_logits(head(t["x17"])).view(t["a17"].shape), t["a17"], HIDDEN)


def test_greedy_answer(golden: Golden, model: UPVLA) -> None:
    t = golden.batch_tensors
    prompt = t["gen_prompt_ids_without_image"][:, 3 + t["mmu_system_ids"].shape[1] :]
    assert golden.text().encode(golden.values["question"]) == prompt[0].tolist()
    answer = model.describe(t["mmu_clip_features"][:1, None], prompt, len(t["gen_greedy_tokens"]))
    assert torch.equal(answer[0], t["gen_greedy_tokens"])


def test_image_tokenizer(golden: Golden) -> None:
    vq, t = golden.vq(), golden.tensors("vq_io")
    with torch.no_grad():
        close(vq.encoder(t["pixels"]), t["z"], HIDDEN)
        assert torch.equal(vq.encode(t["pixels"]), t["indices"])
        close(vq.decode(t["indices"]), t["recon"], PIXEL)
        close(vq.decode(t["nonsquare_indices"], (2, 3)), t["nonsquare_recon"], PIXEL)
        quantized, commitment, entropy, diversity = vq.quantize(t["z"])
    close(quantized, t["z_q"], 1e-6)
    close(0.125 * commitment, t["quantizer_loss"], 1e-6)
    close(0.1 * (entropy - diversity), t["entropy_loss"], 1e-6)
