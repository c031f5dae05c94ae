"""DeepSpeed before an engine is built: importing it, its compiled operators, its settings, its conversion of shards."""

from __future__ import annotations

import argparse
import fcntl
import io
import logging
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from upvla.train.config import EngineConfig
from upvla.train.disk import require_same_place

TAG = "engine"
"""The folder of DeepSpeed's own within a set of shards."""
SWAPPED = "offloaded_tensors"
"""The folder therein where it copies its swap files to, and insists on finding them; `disk.py` does without."""
_NO_COMPILER = "TORCHDYNAMO_DISABLE"  # torch's own
_BUCKET_STEP = 1024  # elements; ZeRO wants buckets aligned
_BUCKET_MAX = 50_000_000


def swapped_of(rank: int, folder: Path) -> Path:
    from deepspeed.checkpoint.ds_to_universal import dp_index_to_str

    return folder / TAG / SWAPPED / f"rank{dp_index_to_str(rank)}"


def to_universal(folder: Path, converted: Path) -> None:
    """Make of the shards of all workers under `folder` a set that any number of workers can load.

    DeepSpeed's own conversion, one process, one parameter at a time. It unpickles: verify the hashes first. `Mismatch`
    for what was written with `offload: nvme`.
    """
    from deepspeed.checkpoint import ds_to_universal

    require_same_place(folder, on_disk=False)
    options = argparse.Namespace(
        input_folder=str(folder / TAG),
        output_folder=str(converted / TAG),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    (converted / TAG).mkdir(parents=True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # progress bars
        ds_to_universal.main(options)
    for path in folder.glob("average_*.pt"):  # these are cut the same way for everybody
        path.rename(converted / path.name)


def build_ops(use_gpu: bool = False) -> None:
    """Compile what DeepSpeed compiles at its first use, half a minute on two cores, so that no run waits for it.

    It is kept under TORCH_EXTENSIONS_DIR; where it is there already this takes a second. Torch marks a build in
    progress by a file that outlives a killed builder, and everyone after it would wait for ever: our own lock ends
    with its owner, and who holds it removes a mark left behind.
    """
    deepspeed = import_deepspeed(use_gpu)
    if use_gpu:
        return
    from torch.utils.cpp_extension import _get_build_directory

    scripts = sysconfig.get_path("scripts")  # our own ninja: another version takes what this one built for stale
    if os.environ.get("PATH", "").split(os.pathsep)[0] != scripts:
        os.environ["PATH"] = os.pathsep.join((scripts, os.environ.get("PATH", os.defpath)))
    builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with (folder / "upvla.lock").open("w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def deepspeed_json(module: nn.Module, config: EngineConfig, *, micro_batch: int, accumulation: int) -> dict[str, Any]:
    """Every value that matters is stated, since DeepSpeed's defaults move between releases."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    bucket = min(-(-trainable // _BUCKET_STEP) * _BUCKET_STEP, _BUCKET_MAX)
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.gradient_clipping,
        "zero_allow_untested_optimizer": True,  # torch's own AdamW: exact resume on CPU, no compiled CPUAdam
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": config.use_gpu,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "memory_efficient_linear": config.use_gpu,  # ZeRO 3's own product saves memory and takes longer
        }
        | _offload(config),
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # gradients are reduced in float32, whatever the world size
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def _offload(config: EngineConfig) -> dict[str, Any]:
    if config.offload == "none":
        return {}
    place: dict[str, Any] = {"device": config.offload, "pin_memory": config.use_gpu}
    if config.offload == "nvme":
        place["nvme_path"] = config.nvme_folder
        return {"offload_optimizer": place, "offload_param": place}
    return {"offload_optimizer": place}


def import_deepspeed(use_gpu: bool) -> ModuleType:
    """Late, because importing it takes seconds, reads the environment and configures logging.

    What it would load for parts that nobody uses here is left out, a third of the work of a worker's start: MLflow
    for its autotuner, and torch's compiler for its Muon optimiser, which it imports to look whether ours is that.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if use_gpu else "cpu"
    with _hidden("mlflow"):
        import deepspeed
    with _not_compiling():
        import deepspeed.runtime.zero.muon.muon_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # one line a collective otherwise: DeepSpeed 0.19 calls names that torch 2.13 has renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    return deepspeed


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Inside, a module that is not loaded yet cannot be imported: whoever can do without it does."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # how Python is told that there is none
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _not_compiling() -> Iterator[None]:
    """Functions that are defined inside with `torch.compile` stay as they are."""
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    try:
        yield
    finally:
        del os.environ[_NO_COMPILER]
        if before is not None:
            os.environ[_NO_COMPILER] = before
