"""`upvla evaluate --suite` and `upvla collect --env`: any benchmark by name, on one process or on Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from upvla.data.table import Dataset
from upvla.data.versions import open_version
from upvla.errors import ConfigError, Mismatch, shown
from upvla.launch.scores import Exam, Judged, Progress, Recording, film, judge, run_key
from upvla.rollout.benchmarks import BUILT_IN, Places, open_suite
from upvla.rollout.evaluate import Control, Layout, as_metrics, compare, report_from_json, report_to_json, scores
from upvla.sim.recording import load_expert, record_suite
from upvla.sim.suite import Suite
from upvla.store import Store, open_store
from upvla.tracking import Tracker, protocol_tags
from upvla.types import Chain

_SUMMARY = ("average_length", "average_length_interval", "success", "success_intervals")


def evaluate_suite(
    policy: str,
    suite_name: str,
    places: Places,
    *,
    num: int,
    workers: int = 1,
    control: Control | None = None,
    layout: Layout | None = None,
    use_gpu: bool = False,
    references: bool = True,
    expected: Mapping[str, str] | None = None,
    against: Mapping[str, Any] | None = None,
    videos: int = 0,
    out: str = "",
    tracker: Tracker | None = None,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, Any]:
    """Scores of a built-in policy or a checkpoint's URL over a suite's first `num` chains, beside references, as JSON.

    `against`: an earlier result to compare with. Videos are written to the folder `out`, and to `tracker`'s MLflow with
    the scores. What was judged once under the same protocol is read back.
    """
    suite = open_suite(suite_name, places)
    exam = Exam(suite, suite.chains(num), control or Control(), layout or Layout(), workers, use_gpu)
    rows = [name for name in BUILT_IN if references and (name != "expert" or suite.has_expert)]
    policies = list(dict.fromkeys((policy, *rows)))
    earlier = report_from_json(against) if against is not None else None
    found = judge(open_store(places.cache), exam, policies, expected={policy: expected or {}}, progress=progress)
    result = _result(found[policy], {name: found[name] for name in policies if name != policy})
    if earlier is not None:
        gain = compare(earlier, found[policy].report)
        result["compared"] = {
            "with": earlier.policy,
            "average_length": gain.average_length._asdict(),
            "success": [estimate._asdict() for estimate in gain.success],
        }
    films = film(exam, policy, min(videos, len(exam.chains))) if videos else {}
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        for name, data in films.items():
            Path(out, name).write_bytes(data)
    if tracker is not None:
        for name in policies:
            _publish(tracker, name, found[name], films if name == policy else {})
    return result


def _result(judged: Judged, references: Mapping[str, Judged]) -> dict[str, Any]:
    report = report_to_json(judged.report)
    rows = {name: report_to_json(its.report) for name, its in references.items()}
    return {
        **report,
        "env_steps": sum(sum(record.steps) for record in judged.report.records),
        "references": {name: {key: row[key] for key in _SUMMARY} for name, row in rows.items()},
        "self_test": dict(judged.self_test),
        "speed": dict(judged.figures),
    }


def _publish(tracker: Tracker, policy: str, judged: Judged, films: Mapping[str, bytes]) -> None:
    """A run for who was judged under what protocol: metrics of the same names as everywhere, report, videos."""
    report = judged.report
    judged_by = {report.suite: report.fingerprint}
    key = run_key(report.policy, judged_by)
    tags = {"protocol": report.fingerprint, "suite": report.suite, "policy": shown(policy)} | protocol_tags(judged_by)
    run = tracker.start(key, f"{report.suite}: {report.policy}", tags=tags, params={"protocol": report.protocol})
    try:
        run.log(as_metrics(scores(report)), 0)
        run.record(report_to_json(report), "report.json")
        with tempfile.TemporaryDirectory(prefix="upvla-films-") as folder:
            for name, data in films.items():
                Path(folder, name).write_bytes(data)
                run.artifact(Path(folder, name), "rollouts")
    finally:
        run.close()


def replay_dataset(
    store: Store, dataset: str, suite_name: str, places: Places, *, num: int | None = None, workers: int = 1,
    progress: Callable[[str], Progress] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Reset to every recorded segment's first state, play its actions, ask the oracle: does this simulator agree with
    the recordings? `num` limits the segments. Of a suite of real CALVIN, each in the scene it was recorded in."""
    suite = open_suite(suite_name, places)
    chains, recording = recorded_segments(store, dataset, suite, num)
    exam = Exam(suite, chains, Control(), Layout(), workers)
    found = judge(open_store(places.cache), exam, ["replay"], recording=recording, progress=progress)
    return _result(found["replay"], {})


def recorded_segments(store: Store, dataset: str, suite: Suite, num: int | None) -> tuple[list[Chain], Recording]:
    """(one-task chains, their actions) of the annotated segments of `NAME@VERSION`. Only worlds that can be set to a
    recorded state will do, CALVIN's and the playtable's; recordings from elsewhere are refused."""
    homes = {"calvin": "calvin_scene_", "playtable": "playtable_"}
    if (family := suite.name.partition("-")[0]) not in homes:
        raise ConfigError(
            f"replay needs worlds that can be set to a recorded state, which {suite.name}'s cannot: calvin-d"
        )
    table = Dataset(store, open_version(store, dataset))
    table.manifest.action_space.require_equal(
        suite.action_space, ours=f"dataset {dataset}", theirs=f"suite {suite.name}"
    )
    chains: list[Chain] = []
    recorded: list[tuple[np.ndarray, ...]] = []
    for number, row in enumerate(table.episodes):
        if not row.scene.startswith(homes[family]):
            raise Mismatch(
                f"{dataset}: {row.source_key} was recorded in {row.scene!r}, not in a world of {family}: it cannot "
                "tell whether this simulator is the one that it was recorded in"
            )
        for span in row.spans:
            steps = range(span.start, min(span.end + 1, row.length))  # some sources count an end as the last step
            found = table.read(number, steps, ("state", "scene_state", "action"))
            robot, scene = (np.asarray(found[name][0], np.float64) for name in ("state", "scene_state"))
            chains.append(Chain(row.scene.removeprefix(homes[family]), robot, scene, (span.task,), len(chains)))
            recorded.append((np.asarray(found["action"]),))
    if not chains:
        raise ConfigError(f"{dataset} has no annotated segment to replay")
    order = sorted(range(len(chains)), key=lambda i: chains[i].scene)[:num]
    content = table.manifest.content_id
    return [chains[i] for i in order], Recording(content, tuple(recorded[i] for i in order))


def collect_suite(
    suite_name: str, places: Places, out_dir: str, *, num: int, expert: str = "", seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Record an expert (the suite's own, or `module:function`) over `num` chains into CALVIN's raw layout."""
    suite = open_suite(suite_name, places)
    plug_in = load_expert(expert) if expert else None
    found = record_suite(suite, suite.chains(num), out_dir, expert=plug_in, seed=seed, progress=progress)
    return {"source_url": f"{out_dir}/training", **found}
