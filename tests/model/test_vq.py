"""The image tokenizer: shapes, bits, identity, learning."""

from __future__ import annotations

import pytest
import torch

from tests.model.conftest import mini_config
from upvla.errors import Mismatch
from upvla.model.vq import VQTokenizer, VQTraining, reconstructions, to_frames, to_pixels


@pytest.fixture
def vq() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(mini_config().vq)


def test_shapes_square_and_not(vq: VQTokenizer) -> None:
    for height, width in ((32, 32), (16, 48)):
        grid = (height // 8, width // 8)
        codes = vq.encode(torch.rand(2, 3, height, width) * 2 - 1)
        assert codes.shape == (2, grid[0] * grid[1]) and codes.dtype == torch.int64
        assert int(codes.min()) >= 0 and int(codes.max()) < 32
        assert vq.decode(codes, grid).shape == (2, 3, height, width)


def test_sizes_that_do_not_fit_are_refused(vq: VQTokenizer) -> None:
    with pytest.raises(Mismatch, match="divisible by 8"):
        vq.encode(torch.zeros(1, 3, 20, 32))
    with pytest.raises(Mismatch, match="12 codes do not fill a 3 x 3 grid"):
        vq.decode(torch.zeros(1, 12, dtype=torch.long))


def test_codes_and_latents_are_inverse_with_the_first_channel_most_significant(vq: VQTokenizer) -> None:
    codes = torch.arange(32).view(2, 4, 4)
    bits = vq.quantize.embedding[codes].permute(0, 3, 1, 2)
    assert torch.equal(vq.quantize.codes(bits), codes)
    assert vq.quantize.embedding[16].tolist() == [1, -1, -1, -1, -1]


def test_frames_round_trip_through_pixels() -> None:
    frames = torch.randint(0, 256, (2, 8, 8, 3)).byte()
    assert torch.equal(to_frames(to_pixels(frames)), frames)


def test_frames_stand_over_what_their_codes_keep(vq: VQTokenizer) -> None:
    frames = torch.randint(0, 256, (3, 16, 32, 3)).byte()
    picture = reconstructions(vq, frames)
    assert picture.shape == (32, 96, 3) and picture.dtype == torch.uint8
    assert torch.equal(picture[:16, 32:64], frames[1])
    assert torch.equal(picture[16:, 32:64], to_frames(vq.decode(vq.encode_frames(frames[1:2]), (2, 4)))[0])


def test_identity_follows_weights_and_geometry_but_not_the_training_loss(vq: VQTokenizer) -> None:
    before = vq.id
    other_loss = VQTokenizer(vq.config.model_copy(update={"loss": vq.config.loss.model_copy(update={"l1": 0.5})}))
    other_loss.load_state_dict(vq.state_dict())
    assert other_loss.id == before
    with torch.no_grad():
        vq.decoder.conv_out.bias[0] += 1e-3
    assert vq.id != before


def test_learns_to_reconstruct(vq: VQTokenizer) -> None:
    training = VQTraining(vq)
    frames = torch.full((4, 32, 32, 3), 60, dtype=torch.uint8)
    for i in range(4):
        frames[i, 4 + 5 * i : 10 + 5 * i, 8:14] = torch.tensor([230, 30 * i, 40]).byte()
    optimizer = torch.optim.AdamW(vq.parameters(), 3e-3)
    first = float(training(frames).watched["vq_mse"].total) / 4
    for _ in range(80):
        optimizer.zero_grad()
        losses = training(frames)
        term = losses.objectives["vq"]
        (term.total / term.count).backward()
        optimizer.step()
    assert training.counts(frames) == {"vq": 4.0} == {"vq": float(term.count)}
    with torch.no_grad():
        rebuilt = to_frames(vq.decode(vq.encode_frames(frames))).float()
    assert float((rebuilt / 127.5 - frames.float() / 127.5).square().mean()) < first / 10
    inside = (slice(5, 9), slice(9, 13))
    assert float((rebuilt[0, *inside] - frames[0, *inside]).abs().mean()) < 40
