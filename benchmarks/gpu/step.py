"""Training steps of the larger presets on one GPU: samples a second, tokens a second, model-FLOP utilisation.

    python benchmarks/gpu/step.py [--preset small] [--rows 16] [--steps 20] [--zero-stage 2] [--attention flex]
        [--compile] [--json [FILE]]

The engine as a run uses it: DeepSpeed, ZeRO 2, bf16, fused AdamW, on random batches in the published row layout that
are on the device already, so that only the step is timed. Utilisation counts the products of a forward pass, taken
three times, against the device's dense bf16 rate; what a frozen tower would save in the backward pass is not taken off.
Without a GPU this says so and ends well.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model_step import make_batch

from upvla.model.config import preset
from upvla.model.sequence import num_tokens
from upvla.model.upvla import UPVLA
from upvla.train.config import EngineConfig, OptimizerConfig, StageConfig
from upvla.train.engine import build_engine
from upvla.train.guard import Guard
from upvla.train.loop import train_step
from upvla.train.meter import forward_flops, peak_flops
from upvla.types import Batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=["tiny", "small", "base"])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--zero-stage", type=int, default=2, choices=[0, 1, 2, 3])
    parser.add_argument("--attention", default="flex", choices=["sdpa", "flex"])
    parser.add_argument("--compile", action="store_true", help="the decoder, by torch.compile")
    parser.add_argument("--json", type=Path, nargs="?", help="write the figures there, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.distributed.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    config, rows = preset(options.preset, backbone={"attention": options.attention}), options.rows
    batch, _ = make_batch(config, rows - rows // 4, rows // 4)
    batch = Batch(*(tensor.cuda() for tensor in batch))
    stage = StageConfig(
        name="gpu", steps=options.steps + 3, weights={"pre": 1.0, "act": 1.0, "mmu": 0.1}, micro_batch=rows
    )
    engine_config = EngineConfig(zero_stage=options.zero_stage, precision="bf16", use_gpu=True)
    model = UPVLA(config).train()
    if options.compile:
        model.showo.compile()
    engine = build_engine(model, engine_config, OptimizerConfig(), total_steps=stage.steps, micro_batch=rows)
    flops = 3 * forward_flops(engine, batch)
    seconds, guard = [], Guard(stage.guard)
    for step in range(1, stage.steps + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        train_step(engine, [batch], stage.weights, step, guard)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    step_s, peak = median(seconds[3:]), peak_flops(engine.device, "bf16", None)
    figures = {
        "device": torch.cuda.get_device_name(),
        "preset": options.preset,
        "attention": options.attention,
        "compiled": options.compile,
        "parameters": sum(p.numel() for p in engine.training_module.parameters()),
        "rows": rows,
        "step_s": step_s,
        "samples_per_s": rows / step_s,
        "tokens_per_s": num_tokens(config, batch) / step_s,
        "mfu_pct": 100.0 * flops / step_s / peak if peak else None,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
