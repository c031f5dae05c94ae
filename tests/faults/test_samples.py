"""One sample of a stage cannot be read. It is named, and what becomes of the run is the policy's to say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.faults.rows import told
from tests.launch.stages import model, prepared, spec_of
from tests.launch.test_training import train_on
from tests.train.toy import Workers
from upvla.checkpoint import load_bundle
from upvla.data.samples import Fetched, SampleReader
from upvla.errors import Corrupt
from upvla.launch.train import FAILURE, RESULT, TrainSpec
from upvla.launch.worker import work
from upvla.store import Store

__all__ = ["model", "prepared"]  # fixtures

pytestmark = pytest.mark.seam

POSITION, STEP = 27, 4  # of global batches of 8; the held-out batch has positions 0 to 7


def work_on_damaged_data(settings: dict[str, Any]) -> None:
    """The worker's own body, on a reader that meets one damaged picture."""
    decode = SampleReader.decode

    def decodes_all_but_one(self: SampleReader, fetched: Fetched, out: Any = None) -> Any:
        if fetched.position == POSITION:
            raise Corrupt(f"sample {POSITION}: not a JPEG; take it out with `upvla data remove`")
        return decode(self, fetched, out)

    SampleReader.decode = decodes_all_but_one  # type: ignore[method-assign]
    try:
        work(settings)
    finally:
        SampleReader.decode = decode  # type: ignore[method-assign]


def spec_with(prepared: tuple[Store, dict[str, Any]], policy: str) -> TrainSpec:
    store, references = prepared
    stage = {"guard": {"on_bad_step": policy}, "save_every": STEP - 1, "keep_last": 10}
    return spec_of(store, references, name=f"damaged-{policy}", weights={"act": 1.0}, stage=stage)


def test_a_sample_that_cannot_be_read_is_skipped_and_recorded_and_no_other(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    """What is learnt is what a run learns that has the weights from before that batch and starts after it."""
    spec = spec_with(prepared, "skip")
    settings = {"spec": spec.model_dump_json(), "threads": 1}
    two_workers.run(work_on_damaged_data, settings)
    result = prepared[0].sub(spec.prefix).read_json(RESULT)
    assert (result["step"], result["ended"]) == (spec.stage.steps, "finished")
    (bad,) = result["bad_steps"]
    assert (bad["step"], bad["action"]) == (STEP, "skip")
    assert f"sample {POSITION}: not a JPEG" in bad["reason"]
    assert bad["positions"] == list(range(24, 32)) and len(bad["samples"]) == 8, "the whole batch, unread as it is"
    _, weights = two_workers.run(train_on, settings, STEP - 1, STEP)[0]
    exported = load_bundle(result["url"]).model.state_dict()
    equal = all(np.array_equal(exported[name].numpy(), weight) for name, weight in weights.items())
    told(f"sample {POSITION} cannot be read in step {STEP}: skipped", lost_steps=0, bit_identical=equal)
    assert weights and equal


def test_without_a_policy_it_ends_the_run_by_its_name(
    two_workers: Workers, prepared: tuple[Store, dict[str, Any]]
) -> None:
    spec = spec_with(prepared, "stop")
    two_workers.run(work_on_damaged_data, {"spec": spec.model_dump_json(), "threads": 1})
    place = prepared[0].sub(spec.prefix)
    failure = place.read_json(FAILURE)
    assert failure["code"] == "bad_step" and f"step {STEP}: " in failure["message"]
    assert f"sample {POSITION}: not a JPEG" in failure["message"]
    assert not place.exists(RESULT)
