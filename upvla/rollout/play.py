"""Chains as coroutines: a world advances until it needs a prediction, so that one model answers many worlds at once.

    plays = (play(env, chain, number, ...) for ...)
    for record in drive(plays, answers(policy), lanes=8): ...

Whoever needs a prediction waits until all lanes do; then they are answered in one batch of one fixed shape. What a lane
sees and gets depends on nobody else, so records do not depend on lanes, workers or order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from upvla.errors import Mismatch
from upvla.rollout.evaluate import Control
from upvla.rollout.failures import why_failed
from upvla.rollout.film import Film
from upvla.types import ActionSpace, Chain, ChainRecord, Env, Observation, Policy, Prediction


class Ask(NamedTuple):
    """A world waits for the next chunk.

    `memory` is new in every subtask, and belongs to the policy: what it remembers lies with who asks, so one policy
    serves many worlds.
    """

    observation: Observation
    instruction: str
    memory: dict[str, Any]


Play = Generator[Ask, Prediction, ChainRecord]
Answer = Callable[[Sequence[Ask]], Sequence[Prediction | Exception]]
Script = Callable[[str], Iterator[np.ndarray]]
"""Actions of a task that nobody has to be asked for: an expert's or a recording's. Where they end so does the task."""
Info = Mapping[str, Any]


@runtime_checkable
class BatchPolicy(Protocol):
    """A policy whose answers depend only on what is asked: it may answer several worlds together."""

    name: str
    action_space: ActionSpace

    def act_many(self, asks: Sequence[Ask]) -> Sequence[Prediction]: ...


@dataclass(frozen=True)
class Rules:
    """What decides a subtask: the oracle, the words, the limit, and how chunks are executed."""

    succeeded: Callable[[str, Info, Info], bool]
    instruction: Callable[[str], str]
    max_steps: int
    control: Control = field(default_factory=Control)


def play(
    env: Env, chain: Chain, number: int, rules: Rules, film: Film | None = None, script: Script | None = None
) -> Play:
    """One chain until its first failure. What the policy or the world does wrong ends this chain only, with `error`."""
    steps: list[int] = []
    try:
        env.reset(chain.robot_state, chain.scene_state)
        for task in chain.tasks:
            used, why = yield from _subtask(env, task, rules, film, script)
            steps.append(used)
            if why:
                return ChainRecord(number, chain.scene, chain.tasks, len(steps) - 1, tuple(steps), "", why)
    except Exception as error:
        blame = f"{type(error).__name__}: {error}"
        return ChainRecord(number, chain.scene, chain.tasks, len(steps), (*steps, 0), blame, "error")
    return ChainRecord(number, chain.scene, chain.tasks, len(steps), tuple(steps))


def _subtask(
    env: Env, task: str, rules: Rules, film: Film | None, script: Script | None
) -> Generator[Ask, Prediction, tuple[int, str]]:
    """(environment steps used, why it failed or nothing)."""
    text, start, control = rules.instruction(task), env.info(), rules.control
    scripted = script(task) if script else None
    seen: list[Observation] = []
    memory: dict[str, Any] = {}
    chunks: deque[tuple[int, np.ndarray]] = deque()  # (step it was made at, actions f32[C,A]), oldest first
    for step in range(rules.max_steps):
        if step % control.replan == 0:
            observation = env.observe()
            seen.append(observation._replace(images={}))
            prediction = None
            if scripted is None:
                prediction = yield Ask(observation, text, memory)
                _check(prediction, len(env.action_space), control.replan)
                if control.execution == "chunk":
                    chunks.clear()
                chunks.append((step, prediction.actions))
            if film is not None:
                film.plan(observation, prediction, text)
        action = next(scripted, None) if scripted else _current(chunks, step, control.decay)
        if action is None:
            return step, why_failed(task, seen)
        env.step(action)
        if film is not None and step % film.every == film.every - 1:
            film.frame(env.observe())
        if rules.succeeded(task, start, env.info()):
            if film is not None:
                film.mark(env.observe(), text, True)
            return step + 1, ""
    if film is not None:
        film.mark(env.observe(), text, False)
    return rules.max_steps, why_failed(task, seen)


def _current(chunks: deque[tuple[int, np.ndarray]], step: int, decay: float) -> np.ndarray:
    """What the chunks that still speak about `step` say together; those that are spent are dropped."""
    while step - chunks[0][0] >= len(chunks[0][1]):
        chunks.popleft()
    return _blend([made[step - since] for since, made in chunks], decay)


def _blend(actions: Sequence[np.ndarray], decay: float) -> np.ndarray:
    """The weighted mean of what several chunks say about one step, oldest first; the gripper by majority."""
    if len(actions) == 1:
        return actions[0]
    weights = np.exp(-decay * np.arange(len(actions)))
    mean = np.average(np.stack(actions), axis=0, weights=weights).astype(np.float32)
    mean[-1] = 1.0 if mean[-1] >= 0 else -1.0
    return mean


def _check(prediction: Prediction, dims: int, replan: int) -> None:
    if not isinstance(prediction, Prediction):
        raise Mismatch(f"policy: it answered with a {type(prediction).__name__}, expected a Prediction")
    actions = np.asarray(prediction.actions)
    if actions.ndim != 2 or actions.shape[1] != dims or len(actions) < replan:
        raise Mismatch(f"policy: chunk has shape {actions.shape}, expected (>={replan}, {dims})")
    if not np.isfinite(actions).all():
        bad = np.argwhere(~np.isfinite(actions))[0]
        raise Mismatch(f"policy: action is not finite at chunk step {bad[0]}, dimension {bad[1]}")


# ---------------------------------------------------------------------------------------------------------- driving


def drive(plays: Iterator[Play | None], answer: Answer, lanes: int) -> Iterator[ChainRecord]:
    """Records as they come, of up to `lanes` plays at a time.

    None among the plays means that there is no more for now; it may come only while others are running.
    """
    asking: list[tuple[Play, Ask]] = []
    while True:
        while len(asking) < lanes and (fresh := next(plays, None)) is not None:
            yield from _advance(fresh, None, asking)
        if not asking:
            return
        waiting, asking = asking, []
        for (one, _), reply in zip(waiting, answer([ask for _, ask in waiting]), strict=True):
            yield from _advance(one, reply, asking)


def _advance(one: Play, reply: Any, asking: list[tuple[Play, Ask]]) -> Iterator[ChainRecord]:
    try:
        ask = one.throw(reply) if isinstance(reply, Exception) else one.send(reply)
    except StopIteration as end:
        yield end.value
    else:
        asking.append((one, ask))


def answers(policy: Policy | BatchPolicy) -> tuple[Answer, int | None]:
    """How a policy answers, and how many lanes it can serve: None for any number, 1 where it remembers its subtask."""
    if isinstance(policy, BatchPolicy):
        return _together(policy), None

    def one(asks: Sequence[Ask]) -> list[Prediction | Exception]:
        (ask,) = asks
        if not ask.memory:
            policy.reset(ask.instruction)
            ask.memory["told"] = ask.instruction
        return [_caught(lambda one: policy.act(one.observation), ask)]

    return one, 1


def _together(policy: BatchPolicy) -> Answer:
    def answer(asks: Sequence[Ask]) -> list[Prediction | Exception]:
        tried = [ask._replace(memory=dict(ask.memory)) for ask in asks]
        try:
            replies: list[Prediction | Exception] = list(policy.act_many(tried))
            if len(replies) != len(asks):
                raise Mismatch(f"policy {policy.name}: {len(replies)} answers to {len(asks)} worlds")
        except Exception:  # whose was it? Each alone, from the memory it had
            return [_caught(lambda one: policy.act_many([one])[0], ask) for ask in asks]
        for ask, done in zip(asks, tried, strict=True):
            ask.memory.update(done.memory)
        return replies

    return answer


def _caught(act: Callable[[Ask], Prediction], ask: Ask) -> Prediction | Exception:
    try:
        return act(ask)
    except Exception as error:
        return error
