from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.cpp_extension import _get_build_directory

from tests.conftest import ROOT
from tests.train.toy import ToyVLA
from upvla.errors import ConfigError, Mismatch
from upvla.train import disk
from upvla.train.config import StageConfig, micro_batch_of
from upvla.train.engine import EngineConfig, OptimizerConfig, build_engine
from upvla.train.optimizer import decay_groups, lr_factor
from upvla.train.zero import deepspeed_json

# the published recipe's schedule (linear warm-up, half cosine) at base 1e-4, 20 warm-up steps, 400 steps in all
PUBLISHED_LR = {0: 0.0, 1: 5e-6, 10: 5e-5, 19: 9.5e-5, 20: 1e-4, 21: 9.999829128320874e-05, 110: 8.678619553365659e-05,
                210: 5e-05, 399: 1.7087167912710478e-09, 400: 0.0}  # fmt: skip


def test_schedule_is_the_published_one() -> None:
    for step, rate in PUBLISHED_LR.items():
        assert 1e-4 * lr_factor(step, 20, 400) == pytest.approx(rate, abs=1e-18, rel=1e-9)


def test_constant_schedule_still_warms_up() -> None:
    assert [lr_factor(step, 2, 10, "constant") for step in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]


def test_only_matrices_of_layers_decay() -> None:
    module = ToyVLA()
    module.positions = nn.Parameter(torch.zeros(4, 4))
    names = {id(p): name for name, p in module.named_parameters()}
    decay, rest = ({names[id(p)] for p in group["params"]} for group in decay_groups(module, 0.1))
    assert decay == {"body.0.weight", "body.3.weight", "action_head.weight", "word_head.weight"}
    assert rest == set(names.values()) - decay
    assert [group["weight_decay"] for group in decay_groups(module, 0.1)] == [0.1, 0.0]


def test_a_head_that_shares_the_embedding_table_does_not_decay_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 8, bias=False)
            self.table = nn.Embedding(8, 4)
            self.head.weight = self.table.weight

    (rest,) = decay_groups(Tied(), 0.1)
    assert rest["weight_decay"] == 0.0


def test_frozen_parameters_are_in_no_group() -> None:
    module = ToyVLA()
    module.action_head.requires_grad_(False)
    kept = {id(p) for group in decay_groups(module, 0.1) for p in group["params"]}
    assert not kept & {id(p) for p in module.action_head.parameters()}


@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_what_deepspeed_would_default_is_stated(clip: float) -> None:
    values = deepspeed_json(ToyVLA(), EngineConfig(zero_stage=1, gradient_clipping=clip), micro_batch=2, accumulation=3)
    assert values["gradient_clipping"] == clip
    assert values["train_micro_batch_size_per_gpu"] == 2
    assert values["gradient_accumulation_steps"] == 3
    weights = sum(p.numel() for p in ToyVLA().parameters())
    assert weights <= values["zero_optimization"]["reduce_bucket_size"] < weights + 1024


def test_without_a_process_group_the_error_says_who_starts_one() -> None:
    with pytest.raises(ConfigError, match=r"upvla\.launch\.train"):
        build_engine(ToyVLA(), EngineConfig(), OptimizerConfig(), total_steps=1, micro_batch=1)


@pytest.mark.seam
def test_a_killed_builder_of_deepspeeds_operator_stops_nobody_after_it() -> None:
    left_behind = Path(_get_build_directory("deepspeed_shm_comm", verbose=False), "lock")
    left_behind.touch()
    code = "from upvla.train.zero import build_ops; build_ops()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
    assert not left_behind.exists()


_ENGINE = """
import sys
from torch.distributed import HashStore, init_process_group
from tests.train.toy import toy
from upvla.train.config import EngineConfig, OptimizerConfig
from upvla.train.engine import build_engine
init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
build_engine(toy(), EngineConfig(num_workers=1, zero_stage=2), OptimizerConfig(), total_steps=1, micro_batch=8)
assert not {"mlflow", "torch._inductor.compile_fx"} & set(sys.modules), "seconds of every worker's start"
import mlflow
"""


@pytest.mark.seam
def test_an_engine_loads_neither_mlflow_nor_a_compiler_and_mlflow_can_still_be_had() -> None:
    env = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    subprocess.run([sys.executable, "-c", _ENGINE], check=True, timeout=240, cwd=ROOT, env=env)


@pytest.mark.parametrize(("name", "on_disk"), [("disk_00000_00000.pt", False), ("average_00000.pt", True)])
def test_shards_of_a_local_disk_and_of_memory_are_not_mixed_up(tmp_path: Path, name: str, on_disk: bool) -> None:
    (tmp_path / name).touch()
    disk.require_same_place(tmp_path, not on_disk)
    with pytest.raises(Mismatch, match=f"engine.offload={'none or cpu' if on_disk else 'nvme'}, the run"):
        disk.require_same_place(tmp_path, on_disk)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offload": "nvme", "zero_stage": 2, "nvme_folder": "/scratch"}, "needs zero_stage >= 3"),
        ({"offload": "nvme", "zero_stage": 3}, "go together"),
        ({"offload": "nvme", "zero_stage": 3, "nvme_folder": "/scratch", "num_workers": [1, 4]}, "no range"),
    ],
)
def test_impossible_offloads_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig.model_validate(change)


def test_batch_arithmetic() -> None:
    for num_workers, most, rows in ((2, 3, 3), (2, 5, 4), (2, 100, 12), (8, 16, 3), (24, 16, 1), (1, 1, 1)):
        assert micro_batch_of(24, num_workers, most) == rows
    with pytest.raises(ConfigError, match="does not divide among num_workers=5"):
        micro_batch_of(24, 5, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"act": 0.0}}, "no objective has a positive weight"),
        ({"weights": {"act": 1.0, "pre": -1.0}}, "'pre' has a negative weight"),
        ({"optimizer": {"warmup_steps": 10}}, "leaves none of steps=10"),
    ],
)
def test_impossible_stages_are_refused(change: dict, message: str) -> None:
    values = {"name": "stage1", "steps": 10, "weights": {"act": 1.0}, "micro_batch": 2}
    with pytest.raises(ValueError, match=message):
        StageConfig.model_validate(values | change)


def test_cosine_never_leaves_its_range() -> None:
    factors = [lr_factor(step, 3, 17) for step in range(30)]
    assert all(0.0 <= f <= 1.0 for f in factors)
    assert math.isclose(max(factors), 1.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure")
def test_what_is_measured_on_a_gpu_says_so_where_there_is_none() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "step.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert (done.returncode, done.stdout) == (0, "no GPU here: nothing was measured\n"), done.stderr
