"""The far side of a process boundary: `python host.py FD FILE:CLASS OPTIONS`, and the wire that both sides speak.

Runs in whatever Python holds the simulator, which need not know this project: only numpy and the standard library are
imported here, and the world's own file is run by its path. Nothing is pickled. A message is

    u32 header length | header: JSON, an array as {"$array": [dtype, shape]} | the arrays' bytes, in order

A world whose class says `forks = True` is loaded once and never touched again: each `fresh` request is served by a new
fork of it, so that what a simulator keeps from earlier episodes cannot reach the next one.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
from typing import Any

import numpy as np

_FRESH = 7  # exit status of a fork that asks for the next one


def send(connection: socket.socket, value: Any) -> None:
    """`value`: JSON, with numpy arrays and scalars anywhere in it. Raises `TypeError` for anything else."""
    arrays: list[np.ndarray] = []
    header = json.dumps(_pack(value, arrays)).encode()
    connection.sendall(b"".join([struct.pack("!I", len(header)), header, *(array.tobytes() for array in arrays)]))


def receive(connection: socket.socket) -> Any:
    """The next message. Raises `EOFError` when the other side is gone."""
    (length,) = struct.unpack("!I", _exactly(connection, 4))
    return _unpack(json.loads(_exactly(connection, length)), connection)


def _pack(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise TypeError(f"an array of {value.dtype} does not cross a process boundary")
        arrays.append(value)
        return {"$array": [value.dtype.str, list(value.shape)]}
    if isinstance(value, dict):
        return {str(key): _pack(item, arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item, arrays) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _unpack(value: Any, connection: socket.socket) -> Any:
    if isinstance(value, list):
        return [_unpack(item, connection) for item in value]
    if not isinstance(value, dict):
        return value
    if "$array" in value:
        dtype, shape = np.dtype(value["$array"][0]), value["$array"][1]
        data = bytearray(_exactly(connection, dtype.itemsize * math.prod(shape)))
        return np.frombuffer(data, dtype).reshape(shape)
    return {key: _unpack(item, connection) for key, item in value.items()}


def _exactly(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(min(1 << 20, length - len(parts)))
        if not part:
            raise EOFError("the other side closed the connection")
        parts += part
    return bytes(parts)


def _serve(connection: socket.socket, world: Any) -> int:
    """Answer until the other side leaves, or wants a fresh world."""
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    send(connection, {"value": "ready"})
    while True:
        try:
            request = receive(connection)
        except EOFError:
            return 0
        if request["call"] == "fresh":
            return _FRESH
        try:
            send(connection, {"value": getattr(world, request["call"])(**request["arguments"])})
        except Exception as error:  # whatever a simulator raises is the caller's to hear
            send(connection, {"error": f"{type(error).__name__}: {error}"})


def _end_with(connection: socket.socket) -> None:
    """Kill this process group when the other side is gone, though it be in the middle of a long call."""
    watcher = select.poll()
    watcher.register(connection, select.POLLRDHUP)
    watcher.poll()
    os.killpg(0, signal.SIGKILL)


def _serve_forks(connection: socket.socket, world: Any) -> int:
    while True:
        child = os.fork()
        if child == 0:
            os._exit(_serve(connection, world))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != _FRESH:
            return status if status >= 0 else 128 - status


def main() -> int:
    descriptor, place, options = sys.argv[1:]
    os.dup2(2, 1)  # simulators print; nobody reads it but a person after a failure
    connection = socket.socket(fileno=int(descriptor))
    file, _, name = place.rpartition(":")
    try:
        world = runpy.run_path(file)[name](**json.loads(options))
    except Exception as error:
        send(connection, {"error": f"{type(error).__name__}: {error}"})
        return 1
    return (_serve_forks if getattr(world, "forks", False) else _serve)(connection, world)


if __name__ == "__main__":
    sys.exit(main())
