"""Being connected to Ray: the running cluster, or one for the time being."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import AuthenticationError, RayError, RayTaskError

from upvla.errors import JobFailed, StackError, UpvlaError

_ANSWER_S = 15.0
_COORDINATOR = "AutoscalingCoordinator"  # of Ray Data and Ray Train, in a namespace of its own


@contextlib.contextmanager
def connected(environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Inside, `ray` is connected: to the cluster that RAY_ADDRESS names or that runs here, else to one of our own.

    A connection that was there before stays when the context ends; one that was made here is closed. `environment` is
    that of the processes which Ray starts for us; what this process has it has as a part of a Ray job, and Ray hands
    it on.
    """
    if ray.is_initialized():
        yield
        return
    _connect({name: value for name, value in (environment or {}).items() if name not in os.environ})
    try:
        yield
    finally:
        ray.shutdown()


def _connect(environment: Mapping[str, str]) -> None:
    runtime_env = {"env_vars": dict(environment)} if environment else None
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        _require_answer(address)
    except ConnectionError as error:
        raise StackError(f"no Ray cluster at {address}: `upvla up` starts one; else correct RAY_ADDRESS") from error
    try:
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=True)
    except (AuthenticationError, ConnectionError) as error:  # a wrong token may come as either
        if isinstance(error, AuthenticationError) or "RAY_ADDRESS" in os.environ:
            raise StackError(
                f"no Ray cluster at {address} lets us in: check its token, RAY_AUTH_TOKEN_PATH (`upvla env`), or start "
                "one with `upvla up`"
            ) from error
        ray.init(address="local", runtime_env=runtime_env, log_to_driver=True)  # with its pages: Ray Train asks them


def _require_answer(address: str) -> None:
    """Raise `ConnectionError` where nobody listens at `host:port`: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
        except OSError as error:
            raise ConnectionError(str(error)) from error


def has_room_for(more: int, needs: Mapping[str, float]) -> bool:
    """Whether so many workers would find free what each of them `needs`, on one node. False where Ray does not say."""
    try:
        from ray._private.state import available_resources_per_node  # its public sum says nothing of single nodes

        nodes = available_resources_per_node()
    except (ImportError, RayError, OSError):
        return False
    return _workers_on(nodes.values(), needs) >= more


def keeps_places_for(total: int, run_id: str, needs: Mapping[str, float]) -> bool:
    """Whether Ray keeps places for so many workers of an elastic Ray Train run: it would start them."""
    try:
        coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
        reserved: ray.ObjectRef = coordinator.get_reserved_resources.remote(f"train-{run_id}")
        nodes: Mapping[str, Mapping[str, float]] = ray.get(reserved, timeout=_ANSWER_S)
    except (ValueError, AttributeError, RayError, OSError):
        return False
    return _workers_on(nodes.values(), needs) >= total


def _workers_on(nodes: Iterable[Mapping[str, float]], needs: Mapping[str, float]) -> int:
    return sum(int(min(node.get(name, 0.0) // each for name, each in needs.items())) for node in nodes)


def give_back(run_id: str) -> None:
    """Release the places of a Ray Train run whose driver was killed.

    Ray hands out places to runs that have asked for them within three minutes. Nobody takes back what a killed one has
    asked for, and an elastic run would find its own places taken by its predecessor for that long.
    """
    with contextlib.suppress(ValueError, AttributeError, RayError):  # not there (yet, or in this Ray): then it waits
        coordinator = ray.get_actor(_COORDINATOR, namespace=_COORDINATOR)
        ray.get(coordinator.cancel_request.remote(f"train-{run_id}"), timeout=_ANSWER_S)


def result_of(ref: ray.ObjectRef) -> Any:
    """What a task returned. An error of our own comes back as it was raised, without the worker's traceback in it; a
    task whose every try was lost with its process or node is a `JobFailed`."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UpvlaError):
            raise error.cause from error
        raise
    except RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise JobFailed(
            f"a task on Ray was lost, and so were its retries ({type(error).__name__}: {reason}); what other tasks "
            "finished is kept: see that memory and disk suffice, and run it again"
        ) from error
