"""What a policy server adds to a prediction on loopback: `python benchmarks/serving.py [--json [FILE]]`.

Exports an untrained model of a preset, serves it with `upvla serve` in a process of its own, and asks it and the same
model in this process in turns, one thread each, so that whatever else the machine does meets both alike.
Processor time is what both spent beyond a prediction in this process: on a busy machine only that means something.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from _figures import give, parse

from upvla.checkpoint import Bundle, export, load_bundle
from upvla.model.config import preset
from upvla.model.text import TextTokenizer
from upvla.model.upvla import UPVLA
from upvla.model.vq import VQTokenizer
from upvla.rollout.client import TOKEN, RemotePolicy
from upvla.rollout.policy import UPVLAPolicy
from upvla.store import open_store
from upvla.types import CALVIN_RELATIVE, Observation

INSTRUCTION = "open the drawer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=int, default=300)
    options = parse(parser)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        url = make_checkpoint(folder, options.preset)
        token, home = "for-this-benchmark", Path(folder, "home")
        command = [sys.executable, "-m", "upvla.cli", "serve", url, "--port", "0"]
        environment = {**os.environ, TOKEN: token, "UPVLA_HOME": str(home)}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as server:
            try:
                figures = measure(url, _address(server), token, options.rounds, psutil.Process(server.pid))
            finally:
                server.terminate()
    figures |= {"preset": options.preset, "rounds": options.rounds, "load": [round(n, 2) for n in os.getloadavg()]}
    for name in ("in_process_ms", "remote_ms", "added_ms", "transport_ms"):
        print(f"{name:<16} p50 {figures[name][0]:7.2f}   p95 {figures[name][1]:7.2f}   p99 {figures[name][2]:7.2f}")
    print(f"processor time of both sides beyond a prediction: {figures['cpu_added_ms']:.2f} ms a request")
    print(f"{figures['bytes']} bytes a request; load average {figures['load'][0]}")
    give(options, figures)


def make_checkpoint(folder: str, name: str) -> str:
    text = TextTokenizer.train([INSTRUCTION, "turn on the light"], 300)
    config = preset(name, text_vocab_size=300, eot_id=text.eot_id)
    bundle = Bundle(config, UPVLA(config), VQTokenizer(config.vq), text, CALVIN_RELATIVE, {})
    return export(open_store(folder), "model", bundle).url


def measure(url: str, address: str, token: str, rounds: int, server: psutil.Process) -> dict[str, Any]:
    """p50, p95 and p99 in ms. `added` is remote - in process, round by round; `transport` what is not prediction."""
    rng = np.random.Generator(np.random.Philox(0))
    frames = {"static": (200, 200, 3), "gripper": (84, 84, 3)}
    seen = [
        Observation({n: rng.integers(0, 255, s, np.uint8) for n, s in frames.items()}, np.zeros(15, np.float32))
        for _ in range(16)
    ]
    local = UPVLAPolicy(load_bundle(url))
    rows, here = [], [0.0, 0.0]
    with RemotePolicy(address, token, deadline_s=2.0) as remote:
        for policy in (local, remote):
            policy.reset(INSTRUCTION)
            for observation in seen:
                policy.act(observation)
        there = sum(server.cpu_times()[:2])
        for i in range(rounds):
            spent, began = time.process_time(), time.perf_counter()
            expected = local.act(seen[i % len(seen)])
            spent_between, between = time.process_time(), time.perf_counter()
            answer = remote.act(seen[i % len(seen)])
            spent_ended, ended = time.process_time(), time.perf_counter()
            here[0] += spent_between - spent
            here[1] += spent_ended - spent_between
            np.testing.assert_allclose(answer.actions, expected.actions, atol=1e-6)
            own, its = 1000 * (between - began), 1000 * (ended - between)
            rows.append((own, its, its - own, its - remote.timing["predict_ms"]))
        there = sum(server.cpu_times()[:2]) - there
    columns = np.percentile(np.array(rows), [50, 95, 99], axis=0).T.round(3).tolist()
    figures = dict(zip(("in_process_ms", "remote_ms", "added_ms", "transport_ms"), columns, strict=True))
    figures["cpu_added_ms"] = 1000 * (here[1] + there - here[0]) / rounds
    return figures | {"bytes": sum(int(np.prod(shape)) for shape in frames.values())}


def _address(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    for line in server.stderr:
        if "ws://" in line:
            return "ws://" + line.rpartition("ws://")[2].strip()
    raise RuntimeError(f"the server ended with {server.wait()}")


if __name__ == "__main__":
    main()
