"""What every benchmark offers behind one door: its starts, its worlds, its judge, its words.

A suite pickles into worker processes; it holds names and paths, never an engine.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from upvla.store import content_hash
from upvla.types import ActionSpace, Chain, Env

Info = Mapping[str, Any]


class Finding(NamedTuple):
    """One thing that a benchmark needs. `detail` says what was found, or the next move where it is missing."""

    what: str
    found: bool
    detail: str


class World(Env, Protocol):
    """An environment that also says, without rendering, what an observation holds beside its images."""

    def state(self) -> np.ndarray:
        """f32[S], of the robot."""
        ...

    def truth(self) -> np.ndarray:
        """f64[Q], of the scene: for experts, recordings and judges, never for a policy."""
        ...


class Suite(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def action_space(self) -> ActionSpace: ...

    @property
    def max_steps(self) -> int:
        """Environment steps that a task may take before it counts as failed."""
        ...

    @property
    def has_expert(self) -> bool: ...

    def chains(self, num: int) -> list[Chain]:
        """The first `num` official chains; of a suite of single tasks, `num` official starts of every task."""
        ...

    def open(self, scene: str, *, cameras: bool = True) -> World:
        """A world of that scene; without `cameras` it renders nothing and observations hold no images."""
        ...

    def succeeded(self, task: str, start: Info, now: Info) -> bool: ...

    def instruction(self, task: str) -> str:
        """What a policy is told; it belongs to the protocol."""
        ...

    def paraphrases(self, task: str) -> Sequence[str]:
        """What may be said for the task in recordings."""
        ...

    def expert(self, env: World, task: str) -> Iterator[np.ndarray]:
        """Actions of a scripted expert, each after looking at the world; `ConfigError` where there is none."""
        ...


def chains_id(chains: Sequence[Chain]) -> str:
    """Hash of a list of chains. States count to the micrometre: the last bits of an inverse differ between CPUs."""
    return content_hash(
        [
            [chain.scene, chain.seed, list(chain.tasks), *((np.round(s, 6) + 0.0).tolist() for s in chain[1:3])]
            for chain in chains
        ]
    )


def code_id(*files: Path) -> str:
    """Hash of what Python files say, without comments, docstrings and layout."""
    return content_hash([[file.name, _said(ast.parse(file.read_text()))] for file in sorted(files)])


def _said(tree: ast.Module) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
