"""Bad input: whatever is wrong with a recording, it is rejected under its reason and nothing of it runs."""

from __future__ import annotations

import codecs
import io
import multiprocessing
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_sources import png
from tests.factories import write_calvin
from upvla.data.quality import REASONS, QualityLimits, check
from upvla.data.sources import open_source
from upvla.data.sources.pickles import UnsafePickle, read_object_npy
from upvla.errors import BadEpisode, Corrupt
from upvla.images import decode_image, encode_jpeg
from upvla.types import Episode, Span

MUTATIONS = 1000
LIMITS = QualityLimits(frozen_steps=8)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_calvin(tmp_path_factory.mktemp("raw"), (8,), static=(24, 24, 3), gripper=(16, 16, 3))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    return dict(np.load(path))


def _file_faults(rng: np.random.Generator, path: Path) -> tuple[set[str], Callable[[], object]]:
    """(reasons that are right, the act) of one fault in one frame's file."""
    data, arrays = path.read_bytes(), _arrays(path)
    name = str(rng.choice(["rel_actions", "actions", "robot_obs", "scene_obs"]))
    place = int(rng.integers(len(arrays[name])))

    def changed(name: str, value: Any) -> Callable[[], object]:
        return lambda: np.savez(path, **{**arrays, name: value})

    def bomb() -> None:
        np.savez(path, **{k: v for k, v in arrays.items() if k != "robot_obs"})
        with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("robot_obs.npy", bytes(65 << 20))

    poisoned = arrays[name].astype(float)
    poisoned[place] = rng.choice([np.nan, np.inf, -np.inf])
    far = arrays["rel_actions"].copy()
    far[int(rng.integers(6))] = rng.choice([-1, 1]) * rng.uniform(1.1, 50)
    between = arrays["rel_actions"].copy()
    between[6] = rng.uniform(-0.9, 0.9)
    faults: list[tuple[set[str], Callable[[], object]]] = [
        ({"unreadable_frame"}, lambda: path.write_bytes(data[: int(rng.integers(len(data) - 1))])),
        ({"missing_frame"}, path.unlink),
        ({"missing_array"}, lambda: np.savez(path, **{k: v for k, v in arrays.items() if k != name})),
        ({"non_finite"}, changed(name, poisoned)),
        ({"shape"}, changed(name, arrays[name][:-1])),
        ({"shape"}, changed(name, np.zeros((3, 100_000)))),
        ({"dtype"}, changed(name, np.array(["x"] * len(arrays[name])))),
        ({"dtype"}, changed("rgb_static", arrays["rgb_static"].astype(np.float32))),
        ({"shape"}, changed("rgb_static", arrays["rgb_static"][:, :, 0])),
        ({"shape"}, changed("rgb_gripper", arrays["rgb_gripper"][:-2])),
        ({"unsafe_pickle"}, changed(name, np.array([{"a": 1}], object))),
        ({"zip_bomb"}, bomb),
        ({"action_bounds"}, changed("rel_actions", far)),
        ({"gripper_value"}, changed("rel_actions", between)),
    ]
    return faults[int(rng.integers(len(faults)))]


def _episode_fault(rng: np.random.Generator, episode: Episode) -> tuple[str, dict[str, Any]]:
    times, step = episode.timestamps.copy(), int(rng.integers(1, len(episode)))
    reversed_ = times.copy()
    reversed_[step] = reversed_[step - 1] - rng.uniform(0, 1)
    gap = times + (np.arange(len(times)) >= step) * rng.uniform(0.1, 100)
    static, span = list(episode.images["static"]), Span(0, 4, "open", "open")
    place, noise = int(rng.integers(len(static))), rng.integers(0, 256, 200, dtype=np.uint8).tobytes()
    picture, cut = decode_image(static[place]), int(rng.integers(len(static[place])))
    other = png(picture)

    def with_frame(frame: bytes) -> dict[str, Any]:
        return {"images": {**episode.images, "static": [*static[:place], frame, *static[place + 1 :]]}}

    faults: list[tuple[str, dict[str, Any]]] = [
        ("time", {"timestamps": reversed_}),
        ("time", {"timestamps": gap}),
        ("empty_language", {"spans": (replace(span, text=str(rng.choice(["", " ", "\n\t"]))),)}),
        ("span_range", {"spans": (replace(span, end=int(rng.integers(9, 10**6))),)}),
        ("span_range", {"spans": (replace(span, start=-int(rng.integers(1, 9))),)}),
        ("bad_id", {"id": str(rng.choice(["", "../x", "a/../b", "a\0b", "x" * 600, "a\nb"]))}),
        ("unreadable_image", with_frame(noise)),
        ("unreadable_image", with_frame(static[place][:cut])),
        ("unreadable_image", with_frame(static[place][:cut] + bytes(len(static[place]) - cut))),
        ("unreadable_image", with_frame(other[: int(rng.integers(len(other)))])),
        ("shape", with_frame(encode_jpeg(picture[:-1]))),
        ("frozen_camera", {"images": {**episode.images, "static": static[:1] * len(static)}}),
        (
            "too_short",
            {
                name: getattr(episode, name)[:1]
                for name in ("timestamps", "state", "actions", "absolute_actions", "scene_state")
            }
            | {"images": {camera: frames[:1] for camera, frames in episode.images.items()}, "spans": ()},
        ),
        ("frame_count", {"actions": episode.actions[:-1]}),
    ]
    return faults[int(rng.integers(len(faults)))]


def test_a_thousand_mutated_recordings_are_each_rejected_for_the_right_reason(recording: Path) -> None:
    rng = np.random.Generator(np.random.Philox(7))
    source, key = open_source("calvin", str(recording)), "0000000-0000007"
    whole = source.read(key)
    check(whole, LIMITS)
    found: Counter[str] = Counter()
    for number in range(MUTATIONS):
        path = recording / f"episode_{int(rng.integers(8)):07d}.npz"
        saved = path.read_bytes()
        if number % 4 == 0:
            right, damage = _file_faults(rng, path)
            damage()
        else:
            reason, change = _episode_fault(rng, whole)
            right = {reason}
        with pytest.raises(BadEpisode) as caught:
            check(source.read(key) if number % 4 == 0 else replace(whole, **change), LIMITS)
        path.write_bytes(saved)
        assert caught.value.reason in right, (number, right, str(caught.value))
        found[caught.value.reason] += 1
    check(source.read(key), LIMITS)
    assert sum(found.values()) == MUTATIONS and found.keys() <= REASONS.keys() and len(found) >= 16


class _Call:
    def __init__(self, function: Any, *arguments: Any, state: Any = None):
        self._call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self._call


def _payloads(canary: Path) -> list[bytes]:
    """Pickles that would make `canary`, or import what could: every protocol, plain, nested, through numpy's names."""
    make: list[Any] = [
        _Call(os.mkdir, str(canary)),
        _Call(os.system, f"touch {canary}"),
        _Call(eval, f"__import__('os').mkdir({str(canary)!r})"),
        _Call(exec, f"open({str(canary)!r}, 'w')"),
        _Call(open, str(canary), "w"),
    ]
    found = [pickle.dumps(value, protocol) for protocol in range(6) for value in make[:3]]
    found += [pickle.dumps({"language": {"ann": [value]}}, 4) for value in make]
    text = f"c{{}}\n{{}}\n(S'{canary}'\ntR."
    names = (
        "numpy.testing._private.utils runstring",
        "numpy load",
        "numpy.f2py.crackfortran myeval",
        "builtins getattr",
        "numpy.distutils.exec_command exec_command",
        "pickle loads",
        "functools partial",
    )
    found += [text.format(*name.split()).encode() for name in names]
    return found


def npy_header() -> bytes:
    head = io.BytesIO()
    np.save(head, np.array({"a": 1}, object), allow_pickle=True)
    return head.getvalue()[: head.getvalue().index(b"\n") + 1]


def _dtype(name: str, *parts: Any, order: str = "|", size: int = -1, flags: int = 0) -> _Call:
    """A pickled dtype; parts: of a sub-array, names of fields, the fields."""
    described = (*parts, None, None, None)[:3]
    return _Call(np.dtype, name, False, True, state=(3, order, *described, size, size, flags))


def _array(dtype: Any, shape: Any, data: Any) -> _Call:
    (reconstruct, arguments, _) = np.zeros(0).__reduce__()  # type: ignore[misc]
    return _Call(reconstruct, *arguments, state=(1, shape, dtype, False, data))


def about_memory() -> dict[str, bytes]:
    """Pickles that numpy, asked by itself, takes for more or other memory than they have."""
    pointer, objects, floats = b"\x41" * 8, _dtype("O8", flags=63), _dtype("f8", order="<")
    scalar, (_, eight) = np.float64(0).__reduce__()  # type: ignore[misc]
    from_buffer = np.zeros(1).__reduce_ex__(5)[0]
    hidden = _dtype("V8", None, ("a",), {"a": (objects, 0)}, size=8)
    many: Any = ()
    for _ in range(60):
        many = (many, many)
    own: list[Any] = []
    own.append(_array(objects, (1,), own))
    values: dict[str, Any] = {
        "a hidden object": _array(hidden, (1,), pointer),
        "a hidden object as a scalar": _Call(scalar, hidden, pointer),
        "a hidden object in a buffer": _Call(from_buffer, pointer, hidden, (1,), "C"),
        "an object in fields of text": _array(_dtype("S8", None, ("a",), {"a": (objects, 0)}, size=8), (1,), pointer),
        "an array in every element": _array(_dtype("V8", (objects, (1,)), size=8), (1,), pointer),
        "objects without the flag of objects": _array(_dtype("O8"), (1,), pointer),
        "an object as bytes": _Call(scalar, objects, pointer),
        "a type without a state": _array(_Call(np.dtype, "V8"), (1,), pointer),
        "an array as a type": _array(_array(floats, (1,), eight), (1,), eight),
        "times": _array(_dtype("M8", order="<"), (1,), eight),
        "a huge shape": _array(floats, (1 << 40, 1 << 40), eight),
        "a huge shape of objects": _array(objects, (1 << 60,), [None]),
        "a huge text": _array(_dtype("U99999999", order="<", size=4), (1,), eight),
        "a negative shape": _array(floats, (-1,), eight),
        "a shape that is positive by two wrongs": _array(floats, (-1, -1), eight),
        "more dimensions than numpy has": _array(floats, (1,) * 200, eight),
        "a shape of words": _array(floats, ("1",), eight),
        "bytes too few": _array(floats, (2,), eight),
        "bytes too many": _array(floats, (1,), eight * 2),
        "a list of numbers": _array(floats, (1,), [0.0]),
        "fewer objects than places": _array(objects, (2,), [None]),
        "text that is no Unicode": _array(_dtype("U2", order="<", size=8), (1,), b"\xff" * 8),
        "no state": _Call(_array(floats, (1,), eight)._call[0], np.ndarray, (0,), b"b"),
        "itself": own,
        "an encoding that takes an age to be said": _Call(codecs.encode, "x", many),
        "a shape that takes an age to be said": _array(floats, many, eight),
        "a dtype": floats,
        "a class": np.ndarray,
    }
    found = {f"{name}, protocol {p}": pickle.dumps(value, p) for name, value in values.items() for p in (2, 4)}
    found["a place far out in the memo"] = b"\x80\x02}r\xff\xff\xff\x7f0cnumpy\nndarray\n."
    found["a state for a function"] = b"\x80\x02c_codecs\nencode\n}X\x01\0\0\0aK\x01sb."
    return found


def _read_each(payloads: dict[str, bytes], results: Any) -> None:
    for name, payload in payloads.items():
        try:
            results.send((name, repr(read_object_npy(npy_header() + payload, "x.npy"))))
        except Corrupt:
            results.send((name, "refused"))


def test_no_pickle_makes_numpy_take_bytes_for_objects() -> None:
    """In a process of its own: where one did, that would not see the next."""
    payloads, context = about_memory(), multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_read_each, args=(payloads, theirs))
    child.start()
    theirs.close()
    for name in payloads:
        assert ours.recv() == (name, "refused")  # EOFError: the child crashed
    child.join()
    assert child.exitcode == 0


def test_no_malicious_pickle_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payloads, header = _payloads(canary), npy_header()
    assert len(payloads) >= 30
    for payload in payloads:
        with pytest.raises(UnsafePickle, match="nothing of it was run"):
            read_object_npy(header + payload, "auto_lang_ann.npy")
        assert not canary.exists()
    for size in range(0, len(header), 9):  # cut anywhere, it is damaged and no more
        with pytest.raises(Corrupt):
            read_object_npy(header[:size], "cut.npy")
    with pytest.raises(FileNotFoundError):
        pickle.loads(payloads[-6])  # np.load of a file that is not there: trusted pickles do call
