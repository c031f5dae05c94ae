"""Can these choices learn? Five questions to the `tiny` preset, answered in at most 25 minutes on two cores.

    python benchmarks/learning_gate.py [--json [FILE]] [--pictures DIR] [--home DIR] [--set key=value ...]

overfit      trained on 20 recordings, does the policy succeed closed-loop from their own initial states (>= 80 %)?
controls     does it fail there with a blanked image, and with the instruction of another task?
generalise   trained for at most 10 minutes on the demo's data, does it succeed from unseen initial states of the seen
             scenes on at least two tasks, beyond a random and a do-nothing policy (95 % intervals apart)?
tokenizer    what do image codes keep of what matters: lamp, LED, gripper, blocks?
understanding are held-out questions answered better than with a blanked image?

Initial states of the overfit set are shared: the same state is recorded once for each of several tasks, so that only
the instruction tells them apart. Everything runs on a local Ray without servers; a second call with the same --home
goes on where the first one was.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from _figures import give, parse

from upvla.checkpoint import Bundle, load_bundle
from upvla.config import RunConfig, SiteConfig, load
from upvla.data.table import Dataset, load_manifest
from upvla.images import decode_image, resize
from upvla.launch.cluster import connected
from upvla.launch.evaluate import judge_chains
from upvla.launch.pretrain import Pretraining
from upvla.launch.scores import SLOTS
from upvla.launch.train import ALLOCATOR
from upvla.model.vq import to_frames
from upvla.rollout.evaluate import EvalConfig, Layout, wilson
from upvla.rollout.judge import SuiteJudge
from upvla.rollout.play import Ask
from upvla.rollout.policy import UPVLAPolicy
from upvla.sim.playtable import tasks
from upvla.sim.playtable.env import PlaytableEnv
from upvla.sim.playtable.suite import PlaytableSuite
from upvla.types import Chain, ChainRecord, Estimate, Observation, Prediction

OVERFIT = ["data.collect.recordings_per_scene=0", "data.collect.starts_per_task=4", "data.collect.scenes=[A]",
           "data.collect.noise=0.15", "data.ingest.dataset=overfit", "data.ingest.validation_fraction=0.05",
           "mixture.sources=[{dataset: overfit, kind: robot, weight: 0.9}, {dataset: overfit, kind: qa, weight: 0.1}]",
           "stage2.steps=1100", "stage2.eval_every=1100", "stage2.save_every=1100"]  # fmt: skip


class Blinded(UPVLAPolicy):
    """The same policy behind closed eyes."""

    def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
        return super().act_many([ask._replace(observation=_blank(ask.observation)) for ask in asks])


class Misled(UPVLAPolicy):
    """The same policy told to do another of the tasks that it was trained on."""

    trained: Sequence[str] = ()

    def act_many(self, asks: Sequence[Ask]) -> list[Prediction]:
        wordings = [tasks.instruction(task) for task in self.trained]
        return super().act_many(
            [ask._replace(instruction=wordings[(wordings.index(ask.instruction) + 3) % len(wordings)]) for ask in asks]
        )


def _blank(observation: Observation) -> Observation:
    return observation._replace(images={name: np.full_like(image, 128) for name, image in observation.images.items()})


def judge(policy: str | UPVLAPolicy, config: EvalConfig, chains: Sequence[Chain]) -> dict[str, Estimate]:
    """Success by task, and over `all`, of one-task chains."""
    layout, records = Layout(), list[ChainRecord]()
    suite = PlaytableSuite("gate", "tasks", ("A", "B", "C"), max_steps=config.max_steps)
    work = SuiteJudge(suite, policy, config.control, layout.lanes, SLOTS)
    judge_chains(work, list(enumerate(chains)), 2, layout, records.extend)
    outcomes: dict[str, list[bool]] = {"all": [record.succeeded > 0 for record in records]}
    for record in records:
        outcomes.setdefault(record.tasks[0], []).append(record.succeeded > 0)
    return {task: wilson(sum(done), len(done)) for task, done in outcomes.items()}


def own_starts(dataset: Dataset) -> list[Chain]:
    """The initial states of the training recordings, each with its task."""
    chains = []
    for row, episode in enumerate(dataset.episodes):
        if episode.split == "train":
            first = dataset.read(row, [0], ["state", "scene_state"])
            scene = episode.scene.removeprefix("playtable_")
            robot, furniture = (np.asarray(first[name][0], np.float64) for name in ("state", "scene_state"))
            chains.append(Chain(scene, robot, furniture, (episode.spans[0].task,), 0))
    return chains


def tokenizer(bundle: Bundle, pictures: Path, seed: int = 5) -> dict[str, float]:
    """PSNR over whole frames and over the pixels that matter; decoded frames as a picture."""
    frames: list[np.ndarray] = []
    masks: dict[str, list[np.ndarray]] = {}
    for scene in "ABCD":
        env = PlaytableEnv(scene)
        for chain in PlaytableSuite("pictures", "tasks", (scene,), seed=seed).chains(4):
            env.reset(chain.robot_state, chain.scene_state)
            frames.append(resize(env.observe().images["static"], bundle.config.vq_resize))
            for name, mask in env.visible().items():
                small = cv2.resize(mask.astype(np.uint8), frames[-1].shape[1::-1], interpolation=cv2.INTER_AREA)
                masks.setdefault(name, []).append(small > 0)
        env.close()
    original = np.stack(frames)
    with torch.inference_mode():
        codes = bundle.vq.encode_frames(torch.from_numpy(original))
        decoded = to_frames(bundle.vq.decode(codes)).numpy()
    chosen = np.linspace(0, len(original) - 1, 12).astype(int)
    rows = [np.concatenate(list(stack[chosen]), 1) for stack in (original, decoded)]
    picture = cv2.resize(np.concatenate(rows), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    cv2.imwrite(str(pictures / "tokenizer.png"), picture[..., ::-1])
    error = ((original.astype(np.float64) - decoded) ** 2).mean(-1)
    figures = {"psnr_db": _psnr(error)} | {f"psnr_{name}_db": _psnr(error[np.stack(m)]) for name, m in masks.items()}
    with torch.inference_mode():
        again = bundle.vq.encode_frames(torch.from_numpy(decoded))
    cell = bundle.config.vq.downsampling
    same = (again == codes).numpy().reshape(len(codes), original.shape[1] // cell, original.shape[2] // cell)
    figures["code_accuracy"] = float(same.mean())  # codes that survive decode and encode
    for name, mask in masks.items():
        touched = np.stack(mask).reshape(len(codes), same.shape[1], cell, same.shape[2], cell).any((2, 4))
        figures[f"code_accuracy_{name}"] = float(same[touched].mean())
    figures["codes_used"] = float(len(codes.unique()))
    return figures


def _psnr(squared_error: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / squared_error.mean()))


def understanding(bundle: Bundle, dataset: Dataset, limit: int = 1500) -> dict[str, Estimate]:
    """Exact answers to held-out questions about validation recordings, with the picture and with a grey one."""
    rows = [
        q for q in dataset.qa if q.template_split == "held_out" and dataset.episodes[q.episode].split == "validation"
    ]
    rows = rows[:: max(1, len(rows) // limit)]
    right = {"seen": 0, "blank": 0}
    for start in range(0, len(rows), 32):
        part = rows[start : start + 32]
        frames = []
        for row in part:
            found = dataset.read(row.episode, [row.step], [f"image_{c}" for c in bundle.config.vision_cameras])
            shown = [decode_image(found[f"image_{c}"][0]) for c in bundle.config.vision_cameras]
            frames.append(np.stack([resize(frame, bundle.config.vision_resize) for frame in shown]))
        prompts = [bundle.text.encode_question(row.question) for row in part]
        ids = torch.full((len(part), max(map(len, prompts))), bundle.text.pad_id)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)
        images = torch.from_numpy(np.stack(frames))
        for name, shown_images in (("seen", images), ("blank", torch.full_like(images, 128))):
            answers = bundle.model.describe(shown_images, ids, max_new=12)
            texts = [bundle.text.decode(answer.tolist()).strip() for answer in answers]
            right[name] += sum(text == row.answer for text, row in zip(texts, part, strict=True))
    return {name: wilson(count, len(rows)) for name, count in right.items()}


def apart(better: Estimate, worse: Estimate) -> bool:
    return better.low > worse.high


def run(home: Path, pictures: Path, overrides: Sequence[str], say: Any = print) -> dict[str, Any]:
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        since = time.monotonic()
        result = work()
        seconds[name] = round(
            result["seconds"] if isinstance(result, dict) and "seconds" in result else time.monotonic() - since, 1
        )
        say(f"{name}: {seconds[name]} s")
        return result

    site = SiteConfig(home=home, store_url=str(home / "store"), tracking_url="", ray_jobs_url="", num_workers=2)
    line = Pretraining(site, load("pretrain/full", RunConfig, overrides))
    small = Pretraining(site, load("pretrain/full", RunConfig, [*overrides, *OVERFIT]))
    recorded = timed("collect", line.collect)
    timed("ingest", lambda: line.ingest(recorded["source_url"]))
    plan = line.mix()
    text = line.train_text(plan)
    vq = timed("vq", lambda: line.train_vq(plan))
    timed("encode", lambda: line.encode(plan, vq))
    first = timed("stage1", lambda: line.train_stage("stage1", plan, text, vq))
    model = timed("stage2", lambda: line.train_stage("stage2", plan, text, vq, first))

    own = timed("collect 20", small.collect)
    small.ingest(own["source_url"])
    own_plan = small.mix()
    small.encode(own_plan, vq)
    fitted = timed("stage2 on 20", lambda: small.train_stage("stage2", own_plan, text, vq, first))

    config = line.config.eval
    starts = own_starts(Dataset(small.store, load_manifest(small.store, "overfit")))
    asked = line.config.data.collect.tasks
    unseen = PlaytableSuite("gate", "tasks", ("A", "B", "C"), asked, seed=20_077).chains(8)

    def overfit() -> dict[str, Estimate]:
        misled = Misled(load_bundle(fitted["url"]), slots=SLOTS)
        misled.trained = small.config.data.collect.tasks
        return {
            "policy": judge(fitted["url"], config, starts)["all"],
            "blank image": judge(Blinded(load_bundle(fitted["url"]), slots=SLOTS), config, starts)["all"],
            "other instruction": judge(misled, config, starts)["all"],
        }

    on_own = timed("judge 20", overfit)
    policies = {"policy": model["url"], "random": "random", "still": "still"}
    on_unseen = timed("judge unseen", lambda: {n: judge(p, config, unseen) for n, p in policies.items()})
    bundle = load_bundle(model["url"])
    codes = tokenizer(bundle, pictures)
    answers = understanding(bundle, Dataset(line.store, load_manifest(line.store, line.config.data.ingest.dataset)))
    beaten = [
        task
        for task, score in on_unseen["policy"].items()
        if task != "all" and all(apart(score, on_unseen[other][task]) for other in ("random", "still"))
    ]
    gates = {
        "overfit >= 80 %": on_own["policy"].value >= 0.8,
        "blank image lower": apart(on_own["policy"], on_own["blank image"]),
        "other instruction lower": apart(on_own["policy"], on_own["other instruction"]),
        "two unseen tasks above random and still": len(beaten) >= 2,
        "training <= 10 minutes": seconds["stage1"] + seconds["stage2"] <= 600,
        "understanding above blank": apart(answers["seen"], answers["blank"]),
    }
    parameters = sum(p.numel() for p in bundle.model.parameters())
    return {
        "gates": gates,
        "overfit": {name: score._asdict() for name, score in on_own.items()},
        "generalise": {n: {task: s._asdict() for task, s in table.items()} for n, table in on_unseen.items()},
        "tasks_learnt": beaten,
        "tokenizer": codes,
        "understanding": {name: score._asdict() for name, score in answers.items()},
        "model": {
            "parameters": parameters,
            "image_px": bundle.config.vq.image_size,
            "codes_per_view": bundle.config.codes_per_view,
            "views": bundle.config.num_views,
            "row_tokens": bundle.config.max_robot_length,
            # 6 x parameters x tokens of forward and backward; the embedding table does no arithmetic
            "train_gflop_per_row": 6e-9
            * (parameters - bundle.model.showo.model.embed_tokens.weight.numel())
            * bundle.config.max_robot_length,
        },
        "losses": {"stage1": first["losses"], "stage2": model["losses"], "overfit": fitted["losses"]},
        "speed": {"stage1": first["speed"], "stage2": model["speed"]},
        "seconds": seconds | {"all": round(time.monotonic() - began, 1)},
    }


def show(found: dict[str, Any]) -> None:
    def text(score: dict[str, float]) -> str:
        return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**score)

    print(f"\n{'own initial states (20 recordings)':<40}")
    for name, score in found["overfit"].items():
        print(f"  {name:<38}{text(score)}")
    names = list(found["generalise"])
    print(f"\n{'unseen initial states, scenes A-C':<40}" + "".join(f"{name:>22}" for name in names))
    for task in found["generalise"]["policy"]:
        print(f"  {task:<38}" + "".join(f"{text(found['generalise'][name][task]):>22}" for name in names))
    print("\nheld-out questions")
    for name, score in found["understanding"].items():
        print(f"  {name:<38}{text(score)}")
    for part in ("tokenizer", "model", "seconds"):
        print(f"\n{part}\n" + "\n".join(f"  {name:<38}{value}" for name, value in found[part].items()))
    print("\ngates\n" + "\n".join(f"  {'pass' if ok else 'FAIL'}  {name}" for name, ok in found["gates"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(), help="folder for pictures")
    parser.add_argument("--home", type=Path, help="keep everything here, and go on with what it holds")
    parser.add_argument("--set", action="append", default=[], help="override of configs/pretrain/full.yaml")
    options = parse(parser)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("RAY_ADDRESS", "local")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would let training yield to everything else here
    os.environ.update(ALLOCATOR)
    with tempfile.TemporaryDirectory(prefix="learning-gate-") as scratch:
        home = (options.home or Path(scratch)).resolve()
        options.pictures.mkdir(parents=True, exist_ok=True)
        with connected():
            found = run(home, options.pictures, options.set)
    show(found)
    give(options, found)
    if not all(found["gates"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
