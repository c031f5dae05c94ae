"""Policies judged on one suite: what was judged before, or before an interruption, is read back and not run again."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ray

from upvla.errors import ConfigError
from upvla.launch.cluster import connected, result_of
from upvla.launch.evaluate import Crew
from upvla.launch.steps import finished, once
from upvla.rollout.benchmarks import BLIND, is_checkpoint
from upvla.rollout.evaluate import Control, Layout, record_from_json, report_from_json, report_to_json, summarise
from upvla.rollout.judge import Recorded, SuiteJudge
from upvla.rollout.protocol import identity, protocol, self_test
from upvla.sim.suite import Suite
from upvla.store import Store, content_hash
from upvla.types import Chain, ChainRecord, EvalReport

SLOTS = 8  # rows of every forward pass in an evaluation: part of who is judged, see `UPVLAPolicy`
_SAVED_TOGETHER = 4  # records

Progress = Callable[[int, int], None]
"""(chains judged, chains in all)"""


class Exam(NamedTuple):
    """A suite with its chains, how chunks are executed there, and who does the work."""

    suite: Suite
    chains: Sequence[Chain]
    control: Control
    layout: Layout = Layout()
    num_workers: int = 1
    use_gpu: bool = False


class Recording(NamedTuple):
    """What `replay` plays."""

    dataset: str  # its content id
    actions: Recorded


class Judged(NamedTuple):
    report: EvalReport
    figures: Mapping[str, float]  # speed, of the run that counts
    self_test: Mapping[str, Any]


def run_key(policy: str, protocols: Mapping[str, str]) -> str:
    """Key of the MLflow run of who was judged under what protocols, {suite: fingerprint}."""
    return "/".join(["evaluation", *(f"{suite}/{mark}" for suite, mark in sorted(protocols.items())), policy])


def judge(
    store: Store,
    exam: Exam,
    policies: Sequence[str],
    *,
    expected: Mapping[str, Mapping[str, str]] | None = None,
    recording: Recording | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, Judged]:
    """Scores of each policy (a checkpoint's URL, `random`, `still`, `expert`, or `replay` of a recording), by name.

    Before any is scored, a world is opened and looked at, every policy is held against it, and the suite is tested
    with its own expert. Raises `Mismatch` or `ConfigError` naming what is wrong. `expected`: what a registry says.
    """
    asked, cameras = protocol(exam.suite, exam.chains, exam.control)
    if "expert" in policies and not exam.suite.has_expert:
        raise ConfigError(f"{exam.suite.name} has no expert; `upvla evaluate replay` plays recordings instead")
    who = {name: identity(name, exam.suite, cameras, SLOTS, (expected or {}).get(name)) for name in policies}
    for name in who.keys() - set(BLIND):
        who[name]["device"] = "cuda" if exam.use_gpu and exam.layout.model == "one" else "cpu"
    if recording:
        who["replay"] = {"name": "replay", "dataset": recording.dataset}
    for name, its in who.items():
        if its.get("chunk", exam.control.replan) < exam.control.replan:
            raise ConfigError(
                f"replan is {exam.control.replan}, {name} predicts {its['chunk']} at a time: ask for at most that"
            )
    keys = {name: {"who": its, "protocol": content_hash(asked)} for name, its in who.items()}
    test = {"protocol": content_hash(asked), "expert": identity("expert", exam.suite, cameras)}
    found = {}
    with _processes(exam, [name for name, key in keys.items() if finished(store, "judge", key) is None]) as crew:
        tested = once(store, "self-test", test, lambda: self_test(exam.suite, exam.chains))
        for name, key in keys.items():
            place, told = store.sub(f"evaluations/{content_hash(key)}"), progress(name) if progress else None
            actions = recording.actions if recording else ()
            work = partial(_judge, place, exam, crew, name, asked, who[name], actions, told)
            result = once(store, "judge", key, work)
            found[name] = Judged(report_from_json(result["report"]), result["figures"], tested)
    return found


@contextlib.contextmanager
def _processes(exam: Exam, policies: Sequence[str]) -> Iterator[Crew | None]:
    """Those on Ray that judge the policies, which begin to load the first model that they need. One worker is this
    process itself, which nothing watches."""
    if not policies or (exam.num_workers == 1 and exam.layout.model == "each"):
        yield None
        return
    num = min(exam.num_workers, len(exam.chains))
    with connected(), Crew(exam.suite, num, exam.layout, SLOTS, use_gpu=exam.use_gpu) as crew:
        for model in [name for name in policies if is_checkpoint(name)][:1]:
            crew.prepare(model)
        yield crew


def _judge(
    place: Store,
    exam: Exam,
    crew: Crew | None,
    policy: str,
    asked: Mapping[str, Any],
    who: Mapping[str, Any],
    actions: Recorded,
    progress: Progress | None,
) -> dict[str, Any]:
    began = time.monotonic()
    records = {r.number: r for key in place.list("records-") for r in map(record_from_json, place.read_json(key))}
    work = SuiteJudge(exam.suite, policy, exam.control, exam.layout.lanes, SLOTS, actions)
    if policy in BLIND:
        work.lanes = 1  # there is no model whose passes more worlds would fill
    unsaved: list[ChainRecord] = []

    def save() -> None:
        if unsaved:
            place.write_json(f"records-{unsaved[0].number:06d}.json", [list(record) for record in unsaved])
            unsaved.clear()

    def keep(found: Sequence[ChainRecord]) -> None:
        records.update({record.number: record for record in found})
        unsaved.extend(found)
        if len(unsaved) >= _SAVED_TOGETHER:
            save()
        if progress:
            progress(len(records), len(exam.chains))

    todo = [(i, exam.chains[i]) for i in range(len(exam.chains)) if i not in records]
    try:
        if crew:
            cost = crew.judge(work, todo, keep)
        else:
            for record in work.run(iter(todo)):
                keep([record])
            cost = work.cost
    finally:
        save()
    name = policy if policy in BLIND else str(who["name"])
    report = summarise(name, exam.suite.name, asked, who, records.values())
    return {"report": report_to_json(report), "figures": cost.figures(time.monotonic() - began, exam.num_workers)}


def film(exam: Exam, policy: str, num: int) -> dict[str, bytes]:
    """Videos and predicted-versus-real frames of chains that lie evenly in the list, by file name."""
    spread = [round(i * (len(exam.chains) - 1) / max(1, num - 1)) for i in range(num)]
    work = SuiteJudge(exam.suite, policy, exam.control, slots=SLOTS)
    numbered = [(i, exam.chains[i]) for i in dict.fromkeys(spread)]
    if exam.num_workers == 1:
        return {name: data for given in numbered for name, data in _film(work, *given).items()}
    with connected():
        task = ray.remote(num_cpus=1, max_retries=2)(_film)
        waiting = [task.remote(work, *given) for given in numbered]
        return {name: data for files in map(result_of, waiting) for name, data in files.items()}


def _film(work: SuiteJudge, number: int, chain: Chain) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="upvla-film-") as folder:
        return {path.name: path.read_bytes() for path in work.film(number, chain, Path(folder)).values()}
