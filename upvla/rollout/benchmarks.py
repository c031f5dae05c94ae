"""One door to every benchmark: a suite by name, a policy by name.

Numbers of the project's own playtable bear its name and are never CALVIN numbers; suites called `calvin-...` run
CALVIN's own code.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from upvla.errors import ConfigError
from upvla.rollout.client import RemotePolicy
from upvla.rollout.evaluate import EvalConfig, SuiteConfig
from upvla.rollout.references import RandomPolicy, StillPolicy
from upvla.sim import calvin, libero, metaworld
from upvla.sim.playtable import suite as playtable
from upvla.sim.suite import Finding, Suite
from upvla.store import open_store

if TYPE_CHECKING:
    from upvla.rollout.policy import UPVLAPolicy

BUILT_IN = ("random", "still", "expert")
SCRIPTED = ("expert", "replay")  # they never look
BLIND = (*SCRIPTED, "random", "still")  # nor do these: no image is rendered for them
SERVED = ("ws://", "wss://")  # how the address of a policy begins that a server has


@dataclass(frozen=True)
class Places:
    """Where benchmarks lie that are not part of this environment. Nothing here takes part in a fingerprint."""

    calvin: str = ""  # a checkout of mees/calvin with calvin_env in it
    libero: str = ""  # a Python that holds LIBERO
    cache: str = ".upvla/benchmarks"  # what takes minutes to work out


def suite_names() -> list[str]:
    return [*playtable.SUITES, *calvin.SUITES, *libero.SUITES, *metaworld.suites()]


def open_suite(name: str, places: Places) -> Suite:
    """Raises `ConfigError`: no such suite (with the nearest name), or its place is not given."""
    if name in playtable.SUITES:
        return playtable.playtable(name, Path(places.cache).expanduser())
    if name in calvin.SUITES:
        if not places.calvin:
            raise ConfigError(f"{name} runs from your checkout: name it with --calvin PATH (docs/benchmarks.md)")
        checkout = calvin.Checkout(Path(places.calvin).expanduser().resolve())
        return calvin.CalvinSuite(checkout, Path(places.cache).expanduser(), name)
    if name in libero.SUITES:
        return libero.LiberoSuite(name, places.libero)
    if name in (found := metaworld.suites()):
        return found[name]
    near = difflib.get_close_matches(name, suite_names(), 1, 0.5)
    listed = "playtable-{a,b,c,d,abc}[-tasks], calvin-{a,b,c,d}, "
    listed += "libero-{spatial,object,goal,10,90}, metaworld-{mt50,mt10,<task>}"
    raise ConfigError(f"no suite {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there is: {listed}"))


def line_suite(config: EvalConfig, suite: SuiteConfig) -> Suite:
    """One of a line's own suites of the playtable; its `chains(suite.num)` are those that are judged."""
    tasks = suite.tasks or playtable.ALL_TASKS
    return playtable.PlaytableSuite(suite.name, suite.kind, suite.scenes, tasks, suite.seed, config.max_steps)


def inspect(what: str, path: str) -> list[Finding]:
    """What the benchmark needs and whether it is there. Raises `ConfigError` for a benchmark that nobody knows."""
    if what == "metaworld":
        return metaworld.inspect()
    if what not in ("calvin", "libero"):
        raise ConfigError(f"no benchmark {what!r}: choose calvin, libero or metaworld")
    if not path:
        raise ConfigError(
            f"`upvla doctor {what} PATH`: PATH is " + ("the checkout" if what == "calvin" else "a Python")
        )
    return calvin.inspect(path) if what == "calvin" else libero.inspect(path)


def is_checkpoint(policy: str) -> bool:
    """Whether it is a model that some process of ours must load."""
    return "/" in policy and not policy.startswith(SERVED)


def load_policy(
    name: str, suite: Suite, *, slots: int = 1, device: str = "cpu"
) -> UPVLAPolicy | RandomPolicy | StillPolicy | RemotePolicy:
    """The model of an exported checkpoint's URL, or what `without_model` knows, for the suite's robot."""
    if not is_checkpoint(name):
        return without_model(name, suite)
    from upvla.checkpoint import load_bundle, read_marker  # torch and all, which other policies can do without
    from upvla.rollout.golden import proven

    model_id = read_marker(open_store(name)).model_id
    policy = proven(load_bundle(name), model_id, slots=slots, device=device)
    suite.action_space.require_equal(policy.action_space, ours=f"suite {suite.name}", theirs=f"model {name}")
    return policy


def without_model(name: str, suite: Suite) -> RandomPolicy | StillPolicy | RemotePolicy:
    """`random`, `still`, or ws://HOST:PORT of a server."""
    if name == "random":
        return RandomPolicy(suite.action_space)
    if name == "still":
        return StillPolicy(suite.action_space)
    if name.startswith(SERVED):
        remote = RemotePolicy(name, deadline_s=None)
        suite.action_space.require_equal(remote.action_space, ours=f"suite {suite.name}", theirs=f"server {name}")
        return remote
    raise ConfigError(f"no policy {name!r}: name one of {', '.join(BUILT_IN)}, or the URL of a checkpoint")
