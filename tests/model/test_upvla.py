"""Losses, gradients and predictions of a small UPVLA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.model.conftest import mini_batch, mini_config, mini_model, take
from upvla.errors import Mismatch
from upvla.model.upvla import UPVLA, Sampling
from upvla.types import Batch, Losses

OBJECTIVES = ("pre", "act", "mmu")


def loss(losses: Losses) -> Tensor:
    return torch.stack([t.total / t.count.clamp(min=1) for t in losses.objectives.values()]).sum()


def gradients(model: UPVLA, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


TWO_VIEWS = {"code_cameras": ("static", "gripper"), "join_rows": False}  # with questions, which have their own length


@pytest.mark.parametrize(
    "changes", [{}, {"image_softmax": "full"}, {"action_head": {"supervise_padding": False}}, TWO_VIEWS]
)
def test_losses_do_not_depend_on_how_a_batch_is_split(changes: dict[str, object]) -> None:
    model = mini_model(**changes)
    batch = mini_batch(model.config, rows=5, questions=4)
    whole = model(batch)
    counts = {name: whole.objectives[name].count for name in OBJECTIVES}
    expected = gradients(model, torch.stack([whole.objectives[n].total / counts[n] for n in OBJECTIVES]).sum())
    parts = [model(take(batch, slice(0, 1), slice(0, 3))), model(take(batch, slice(1, 5), slice(3, 4)))]
    for kind in ("objectives", "watched"):
        for name, term in getattr(whole, kind).items():
            split = [getattr(part, kind)[name] for part in parts]
            torch.testing.assert_close(sum(t.count for t in split), term.count)
            torch.testing.assert_close(sum(t.total for t in split), term.total, rtol=1e-4, atol=1e-4)
    total = sum(part.objectives[n].total / counts[n] for part in parts for n in OBJECTIVES)
    found = gradients(model, total)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_counts_are_those_of_the_forward_pass(batch: Batch) -> None:
    for changes in ({}, {"image_softmax": "full"}, {"action_head": {"supervise_padding": False}}, {"qa_budget": 8}):
        model = mini_model(**changes)
        losses = model(batch)
        assert model.counts(batch) == {name: float(term.count) for name, term in losses.objectives.items()}


@pytest.mark.parametrize(("rows", "questions"), [(3, 0), (0, 2)])
def test_a_missing_kind_of_row_counts_nothing_and_still_runs_every_module(rows: int, questions: int) -> None:
    model = mini_model()
    batch = mini_batch(model.config, rows, questions)
    losses = model(batch)
    assert model.counts(batch) == {name: float(term.count) for name, term in losses.objectives.items()}
    assert {n for n, t in losses.objectives.items() if t.count == 0} == ({"mmu"} if rows else {"pre", "act"})
    found = gradients(model, loss(losses))
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(torch.isfinite(value).all() for value in found.values())


def test_rows_for_one_objective_count_for_that_one_alone(batch: Batch) -> None:
    model = mini_model()
    everything, rows = slice(None), len(batch.codes)
    own = torch.arange(rows) < 2
    masked = batch._replace(pre_mask=own, act_mask=~own)
    found = model(masked)
    assert model.counts(masked) == {name: float(term.count) for name, term in found.objectives.items()}
    for name, part in (("pre", slice(0, 2)), ("act", slice(2, rows))):
        alone = model(take(batch, part, everything))
        torch.testing.assert_close(found.objectives[name], alone.objectives[name])
        for watched, term in alone.watched.items():
            if watched.startswith(name):
                torch.testing.assert_close(found.watched[watched], term)


def test_questions_without_a_supervised_token_count_nothing(batch: Batch) -> None:
    model = mini_model()
    losses = model(batch._replace(qa_labels=torch.full_like(batch.qa_labels, -100)))
    assert float(losses.objectives["mmu"].total.detach()) == 0 == float(losses.objectives["mmu"].count)
    assert torch.isfinite(loss(losses))


def test_only_supervised_answer_tokens_make_the_understanding_loss(batch: Batch) -> None:
    model = mini_model()
    states = model.states(batch)
    at = states.qa_rows.at["text"].start
    logits = model.showo.lm_head(states.qa)
    total = torch.zeros(())
    for row, labels in enumerate(batch.qa_labels):
        for j, label in enumerate(labels.tolist()):
            if label != -100:
                total = total - logits[row, at + j - 1].log_softmax(-1)[label]
    torch.testing.assert_close(model(batch).objectives["mmu"].total, total, rtol=1e-4, atol=1e-3)


def test_bce_gripper_is_the_papers_loss_with_pose_and_gripper_apart(batch: Batch) -> None:
    batch = batch._replace(actions=torch.cat([batch.actions[..., :-1], batch.actions[..., -1:].sign()], -1))
    model = mini_model(action_head={"gripper": "bce"})
    losses = model(batch)
    states = model.states(batch)
    raw = model.to_logits(model.token_learner(states.robot[:, states.robot_rows.at["action"]])).view(5, 4, 7)
    pose = (raw[..., :6] - batch.actions[..., :6]).square().sum()
    p_open = raw[..., 6].sigmoid()
    gripper = -torch.where(batch.actions[..., 6] > 0, p_open, 1 - p_open).log().sum()
    torch.testing.assert_close(losses.objectives["act"].total, pose + gripper)
    torch.testing.assert_close(losses.watched["act_pose"].total, pose)
    torch.testing.assert_close(losses.watched["act_gripper"].total, gripper)
    assert float(losses.watched["act_gripper"].count) == 5 * 4


def test_a_prediction_does_not_depend_on_the_rows_beside_it_nor_on_trimming() -> None:
    model = mini_model()
    batch = mini_batch(model.config)
    together = model.predict(batch.images, batch.codes, batch.text_ids, batch.text_len)
    model.config = mini_config(trim=False)
    untrimmed = model.predict(batch.images, batch.codes, batch.text_ids, batch.text_len)
    model.config = mini_config()
    for row in range(len(batch.codes)):
        one = slice(row, row + 1)
        length = int(batch.text_len[row])
        alone = model.predict(batch.images[one], batch.codes[one], batch.text_ids[one, :length], batch.text_len[one])
        for ours in (together, untrimmed):
            torch.testing.assert_close(alone[0], ours[0][one], rtol=1e-4, atol=1e-5)
            assert torch.equal(alone[1], ours[1][one])


def test_predicted_actions_lie_in_the_action_space(batch: Batch) -> None:
    model = mini_model()
    with torch.no_grad():
        model.to_logits[0].weight.mul_(50)
    actions, codes = model.predict(batch.images, batch.codes, batch.text_ids, batch.text_len)
    assert actions.shape == batch.actions.shape and codes.shape == batch.codes.shape
    assert float(actions.abs().max()) == 1.0 and set(actions[..., -1].unique().tolist()) <= {-1.0, 1.0}
    assert int(codes.min()) >= 0 and int(codes.max()) < model.config.vq.codebook_size


def test_image_and_instruction_change_the_prediction(batch: Batch) -> None:
    model = mini_model()
    reference, _ = model.predict(batch.images, batch.codes, batch.text_ids, batch.text_len)
    for changed in (
        (255 - batch.images, batch.codes, batch.text_ids, batch.text_len),
        (batch.images, 31 - batch.codes, batch.text_ids, batch.text_len),
        (batch.images, batch.codes, batch.text_ids.flip(0), batch.text_len.flip(0)),
    ):
        actions, _ = model.predict(*changed)
        assert float((actions - reference).abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["phi", "llama", "qwen3"])
def test_cached_answers_equal_uncached_ones(family: str, batch: Batch) -> None:
    model = mini_model(backbone={"family": family, "init_std": 0.2})
    eot, pad, questions = model.config.eot_id, model.config.pad_id, batch.qa_ids
    answers = model.describe(batch.qa_images, questions, 6)
    for row in range(len(questions)):
        ids = questions[row][questions[row] != pad]
        for token in answers[row].tolist():
            one = batch._replace(qa_images=batch.qa_images[row : row + 1], qa_ids=ids[None], qa_labels=ids[None])
            states = model.states(one)
            text_logits = model.showo.lm_head(states.qa[0, states.qa_rows.at["text"].stop - 1])
            assert int(text_logits[: model.config.text_vocab_size].argmax()) == token
            if token == eot:
                break
            ids = torch.cat([ids, torch.tensor([token])])


def test_drawn_answers_equal_uncached_ones_and_depend_on_their_seed_only(batch: Batch) -> None:
    model = mini_model(backbone={"init_std": 0.2})
    eot, pad = model.config.eot_id, model.config.pad_id
    images, question = batch.qa_images[:1], batch.qa_ids[:1][batch.qa_ids[:1] != pad][None]
    answer = model.describe(images, question, 8, sampling=Sampling(0.8, top_k=20, seed=3))[0].tolist()
    assert answer == model.describe(images, question, 8, sampling=Sampling(0.8, top_k=20, seed=3))[0].tolist()
    others = [model.describe(images, question, 8, sampling=Sampling(0.8, 20, seed))[0].tolist() for seed in range(4, 8)]
    assert any(other != answer for other in others)
    again, draw = question, Sampling(0.8, top_k=20, seed=3)
    for token in answer:
        with torch.no_grad():
            logits = model.showo.lm_head(model.read_questions(images, again)[0][:, -1])
        assert int(draw(logits[:, : model.config.text_vocab_size])) == token
        if token == eot:
            break
        again = torch.cat([again, torch.tensor([[token]])], 1)


@pytest.mark.parametrize("changes", [{"join_rows": False}, {"trim": False}, {"backbone": {"attention": "eager"}}])
def test_switches_of_layout_and_attention_change_nothing(batch: Batch, changes: dict[str, object]) -> None:
    plain, other = mini_model(), mini_model(**changes)
    assert torch.equal(plain.to_logits[0].weight, other.to_logits[0].weight)
    ours, theirs = plain(batch), other(batch)
    for name in OBJECTIVES:
        torch.testing.assert_close(ours.objectives[name].total, theirs.objectives[name].total, rtol=2e-5, atol=1e-4)
    expected, found = gradients(plain, loss(ours)), gradients(other, loss(theirs))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_bfloat16_products_change_losses_by_less_than_two_percent(batch: Batch) -> None:
    model = mini_model()
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch)
    for name in OBJECTIVES:
        ours, theirs = (float(losses.objectives[name].total.detach()) for losses in (rounded, exact))
        assert ours == pytest.approx(theirs, rel=0.02) and ours != theirs
        assert rounded.objectives[name].total.dtype == torch.float32


def test_cached_features_of_a_frozen_tower_give_what_its_frames_give(batch: Batch) -> None:
    tower = {"kind": "clip", "patch": 16, "frozen": True, "keypoints": 0, "stem": (), "pool": (1, 1), "blocks": 2}
    model = mini_model(vision=tower)
    features = {name: model.vision(getattr(batch, name)).unflatten(1, (2, -1)) for name in ("images", "qa_images")}
    cached = batch._replace(**features)
    assert model.counts(cached) == model.counts(batch)
    for name, term in model(batch).objectives.items():
        torch.testing.assert_close(model(cached).objectives[name].total, term.total)


@pytest.mark.parametrize("family", ["phi", "llama"])
def test_overfits_a_few_rows(family: str) -> None:
    model = mini_model(backbone={"family": family})
    batch = mini_batch(model.config, rows=4, questions=2)
    batch = batch._replace(actions=torch.cat([batch.actions[..., :-1], batch.actions[..., -1:].sign()], -1))
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(120):
        optimizer.zero_grad()
        losses = model(batch)
        loss(losses).backward()
        optimizer.step()
    means = {
        name: float(term.total.detach() / term.count) for name, term in (losses.objectives | losses.watched).items()
    }
    assert means["act"] < 0.02 and means["mmu"] < 0.1 and means["pre_accuracy"] > 0.9, means
    actions, _ = model.predict(batch.images, batch.codes, batch.text_ids, batch.text_len)
    assert float((actions - batch.actions).abs().mean()) < 0.1


def test_gradient_checkpointing_changes_nothing(batch: Batch) -> None:
    plain, saved = mini_model().train(), mini_model(backbone={"gradient_checkpointing": True}).train()
    expected, found = gradients(plain, loss(plain(batch))), gradients(saved, loss(saved(batch)))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"codes": b.codes[..., :3]}, r"codes: expected shape \[5, 1, 16\], found \[5, 1, 3\]"),
        (lambda b: {"actions": b.actions[..., :6]}, r"actions: expected shape \[5, 4, 7\], found \[5, 4, 6\]"),
        (
            lambda b: {"images": b.images[:, :, :16]},
            r"images: expected shape \[5, 2, 32, 32, 3\], found \[5, 2, 16, 32, 3\]",
        ),
        (lambda b: {"future_codes": b.codes + 32}, r"future_codes: values must lie in \[0, 32\)"),
        (
            lambda b: {"text_ids": torch.full((5, 30), 7), "text_len": torch.tensor([2, 13, 30, 3, 13])},
            r"text_ids: row 2 has 30 tokens, model.text_budget leaves room for 13",
        ),
        (lambda b: {"actions": b.actions.index_fill(0, torch.tensor([2]), torch.nan)}, r"actions: row 2 .*not finite"),
    ],
)
def test_bad_batches_are_named_before_a_step(batch: Batch, change, message: str) -> None:
    model = mini_model()
    bad = batch._replace(**change(batch))
    with pytest.raises(Mismatch, match=message):
        model.counts(bad)
        model(bad)


def test_prompts_over_budget_are_refused_when_acting_and_asking(batch: Batch) -> None:
    model = mini_model()
    long = torch.full((1, 40), 7)
    with pytest.raises(Mismatch, match=r"40 tokens, model\.text_budget leaves room for 13"):
        model.predict(batch.images[:1], batch.codes[:1], long, torch.tensor([40]))
    with pytest.raises(Mismatch, match=r"question_ids: 40 tokens, model.qa_budget is 24"):
        model.describe(batch.images[:1], long)
    cut = mini_model(overlong="cut")
    actions, _ = cut.predict(batch.images[:1], batch.codes[:1], long, torch.tensor([40]))
    assert torch.isfinite(actions).all()


@pytest.mark.slow
def test_block_masks_read_forward_on_a_cpu_change_nothing_beyond_rounding(batch: Batch) -> None:
    plain, flex = (mini_model(backbone={"attention": kind}) for kind in ("sdpa", "flex"))
    with torch.no_grad():
        expected, found = plain(batch).objectives, flex(batch).objectives
    for name in OBJECTIVES:
        torch.testing.assert_close(found[name].total, expected[name].total, rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
def test_block_masks_on_a_gpu_change_nothing_beyond_rounding(batch: Batch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: FlexAttention has no backward pass on a CPU")
    on_gpu = Batch(*(value.cuda() for value in batch))
    plain, flex = (mini_model(backbone={"attention": kind}).cuda() for kind in ("sdpa", "flex"))
    expected, found = plain(on_gpu), flex(on_gpu)
    for name in OBJECTIVES:
        torch.testing.assert_close(found.objectives[name].total, expected.objectives[name].total, rtol=1e-3, atol=1e-3)
    ours, theirs = gradients(flex, loss(found)), gradients(plain, loss(expected))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-2, atol=1e-3, msg=name)
