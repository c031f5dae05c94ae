"""What the actions of known data sets mean, what a source must declare, and how one meaning becomes another.

Nothing is guessed. A source either says what its actions mean (CALVIN by its format, robomimic in its controller's
settings) or is refused with the fields to fill; a conversion that would need knowledge we lack (an unknown camera or
base frame, another control rate) is refused by naming the dimension.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter, ValidationError

from upvla.errors import ConfigError, Mismatch, problems_of
from upvla.types import CALVIN_RELATIVE, ActionDim, ActionSpace

_XYZ = ("x", "y", "z")
ROTATIONS = {"euler_xyz": 3, "axis_angle": 3, "quat_xyzw": 4, "rot6d": 6}
"""Rotation layouts and their widths: euler_xyz turns about fixed axes; rot6d is the matrix's first two columns."""

_GRIPPER = re.compile(r"([+-]?[\d.]+)=open,([+-]?[\d.]+)=close(,continuous)?")
_RATE_TOLERANCE = 0.01  # of a period
_ADAPTER = TypeAdapter(ActionSpace)


def _pose(
    name: str, hz: float, gripper: ActionDim, *, scale: tuple[float, float], rotation: str, low: float, high: float
) -> ActionSpace:
    """A relative tool pose in the robot's base frame: `scale` metres and radians a unit."""
    metres, radians = scale
    return ActionSpace(
        name,
        (
            *(ActionDim(f"d{n}", "m", "world", "relative", metres, low, high) for n in _XYZ),
            *(ActionDim(f"dr{n}", "rad", "world", "relative", radians, low, high, rotation) for n in _XYZ),
            gripper,
        ),
        1 / hz,
    )


NO_ACTIONS = ActionSpace("none", (), dt_s=1.0)
"""Of pictures with questions: nothing moves."""

CALVIN_ABSOLUTE = ActionSpace(
    "calvin_absolute",
    (
        *(ActionDim(n, "m", "world", "absolute", low=-2, high=2) for n in _XYZ),
        *(ActionDim(f"r{n}", "rad", "world", "absolute", low=-7, high=7, convention="euler_xyz") for n in _XYZ),
        CALVIN_RELATIVE.dims[-1],
    ),
    dt_s=1 / 30,
)
LIBERO = _pose(
    "libero",
    20,
    ActionDim("gripper", "gripper", "none", "absolute", convention="-1=open,+1=close"),
    scale=(0.05, 0.5),
    rotation="axis_angle",
    low=-1.0,
    high=1.0,
)
"""robosuite's OSC_POSE as LIBERO and robomimic set it: 0.05 m and 0.5 rad a unit, gripper -1 open / +1 close, 20 Hz."""
BRIDGE_V2 = _pose(
    "bridge_v2",
    5,
    ActionDim("gripper", "gripper", "none", "absolute", low=0, high=1, convention="1=open,0=close,continuous"),
    scale=(1.0, 1.0),
    rotation="euler_xyz",
    low=-4.0,
    high=4.0,
)
DROID = ActionSpace(
    "droid",
    (
        *(ActionDim(n, "m", "world", "absolute", low=-2, high=2) for n in _XYZ),
        *(ActionDim(f"r{n}", "rad", "world", "absolute", low=-7, high=7, convention="euler_xyz") for n in _XYZ),
        ActionDim("gripper", "gripper", "none", "absolute", low=0, high=1, convention="0=open,1=close,continuous"),
    ),
    dt_s=1 / 15,
)
KNOWN = {space.name: space for space in (CALVIN_RELATIVE, CALVIN_ABSOLUTE, LIBERO, BRIDGE_V2, DROID, NO_ACTIONS)}


def declared_space(value: str | Mapping[str, Any] | None, source: str) -> ActionSpace:
    """The space that an import option declares: the name of a known one, or all its fields.

    `ConfigError` where it does not say, or not enough, listing what to fill in.
    """
    if value is None:
        raise ConfigError(
            f"{source} does not say what its actions mean. Declare it with the option action_space: one of "
            f"{', '.join(sorted(KNOWN))}, or a mapping {{name, dt_s, dims: [{{name, unit: m|rad|gripper|one, frame: "
            "world|tcp|joint|none, mode: relative|absolute, scale, low, high, convention}, ...]}; convention is "
            f"{'|'.join(ROTATIONS)} for rad, such as '+1=open,-1=close' for gripper (add ',continuous' where it may "
            "stand in between)"
        )
    if isinstance(value, str):
        if value not in KNOWN:
            raise ConfigError(f"{source}: no known action space {value!r}; there is: {', '.join(sorted(KNOWN))}")
        return KNOWN[value]
    if not isinstance(value, Mapping):
        raise ConfigError(f"{source}: action_space is {value!r}, neither a known name nor a mapping")
    try:
        space = _ADAPTER.validate_python(dict(value), extra="forbid")
    except ValidationError as error:
        raise ConfigError(f"{source}: action_space: {problems_of(error, 'action_space')}") from error
    _require_conventions(space, source)
    return space


def agreed_space(declared: str | Mapping[str, Any] | None, stated: ActionSpace | None, source: str) -> ActionSpace:
    """The space that an import option declares, or where there is none the one that the source itself states.

    `Mismatch` where they contradict each other. Whether a gripper may stand in between is no contradiction: who
    declares that it does not has recordings where it does in quarantine.
    """
    if declared is None and stated is not None:
        return stated
    space = declared_space(declared, source)
    if stated is not None:
        try:
            _without_betweens(space).require_equal(
                _without_betweens(stated), ours="the option action_space", theirs=source
            )
        except Mismatch as error:
            raise Mismatch(f"{error}; leave the option out, or correct the source where it is wrong") from error
    return space


def _without_betweens(space: ActionSpace) -> ActionSpace:
    dims = []
    for dim in space.dims:
        if dim.unit == "gripper":
            opened, closed, _ = gripper_values(dim)
            dim = replace(dim, convention=f"{opened:+g}=open,{closed:+g}=close")
        dims.append(dim)
    return replace(space, dims=tuple(dims))


def fits_rate(space: ActionSpace, rate_hz: float) -> bool:
    """Whether an action holds until the next one is due. Where nothing moves, any rate will do."""
    return not space.dims or abs(rate_hz * space.dt_s - 1) <= _RATE_TOLERANCE


def require_rate(space: ActionSpace, rate_hz: float, source: str) -> None:
    if not fits_rate(space, rate_hz):
        raise ConfigError(
            f"{source} runs at {rate_hz:g} Hz, the action space {space.name} holds for {space.dt_s:g} s; "
            "declare the one that is right"
        )


def gripper_values(dim: ActionDim) -> tuple[float, float, bool]:
    """(value of open, value of close, whether values in between mean something) of a gripper dimension."""
    found = _GRIPPER.fullmatch(dim.convention)
    if found is None:
        raise ConfigError(f"gripper dimension {dim.name!r}: convention {dim.convention!r} is not '+1=open,-1=close'")
    return float(found[1]), float(found[2]), bool(found[3])


def _require_conventions(space: ActionSpace, source: str) -> None:
    if not 0 < space.dt_s < math.inf:
        raise ConfigError(f"{source}: action_space.dt_s is {space.dt_s}, must be positive seconds")
    for i, dim in enumerate(space.dims):
        if dim.unit == "gripper":
            gripper_values(dim)
        if dim.unit in ("rad", "one") and dim.frame != "joint" and dim.convention not in ROTATIONS:
            raise ConfigError(
                f"{source}: action_space.dims.{i} ({dim.name}): convention is {dim.convention!r}, fill in one of "
                f"{', '.join(ROTATIONS)}"
            )
        if not (-math.inf < dim.low < dim.high < math.inf and 0 < dim.scale < math.inf):
            raise ConfigError(
                f"{source}: action_space.dims.{i} ({dim.name}): low < high and scale > 0 must hold, all of them finite"
            )
    _parts(space)


# ----------------------------------------------------------------------------------------------------- conversion


class _Part(NamedTuple):
    """Neighbouring dimensions that mean one thing together: a scalar, or a rotation in its layout."""

    kind: str  # "m", "rad" (a joint), "gripper" or "rotation"
    start: int
    stop: int
    dim: ActionDim

    @property
    def columns(self) -> slice:
        return slice(self.start, self.stop)


def _parts(space: ActionSpace) -> list[_Part]:
    parts, i = [], 0
    while i < len(space):
        dim = space.dims[i]
        width = ROTATIONS.get(dim.convention, 1)
        if width > 1:
            same = [replace(other, name=dim.name, low=dim.low, high=dim.high) for other in space.dims[i : i + width]]
            if same != [replace(dim)] * width:
                raise ConfigError(
                    f"action space {space.name}: dimension {i} ({dim.name}) begins a rotation as {dim.convention}, "
                    f"which takes {width} neighbouring dimensions of one unit, frame, mode and scale"
                )
        parts.append(_Part("rotation" if width > 1 else dim.unit, i, i + width, dim))
        i += width
    return parts


class ActionMap:
    """Actions of one space as actions of another, dimension by dimension in the order of their kinds.

    Units and scales are multiplied, gripper polarity and range are mapped (a target without in-betweens gets the
    nearer end), rotation layouts go through matrices, absolute positions and euler angles become relative ones where
    the pose is given (CALVIN's rule: difference, wrapped to +-pi, over the scale). Values are held inside the target's
    declared range, as a controller would. What would need a guess is a `Mismatch` that names the dimension.
    """

    def __init__(self, source: ActionSpace, target: ActionSpace):
        self.source, self.target = source, target
        ours, theirs = _parts(source), _parts(target)
        self._pairs = []
        for wanted in theirs:
            place = [part.kind for part in theirs[: theirs.index(wanted)]].count(wanted.kind)
            same_kind = [part for part in ours if part.kind == wanted.kind]
            if place >= len(same_kind):
                raise Mismatch(
                    f"action map {source.name} -> {target.name}: nothing gives dimension {wanted.start} "
                    f"({wanted.dim.name}, {wanted.dim.unit})"
                )
            self._require_convertible(same_kind[place], wanted)
            self._pairs.append((same_kind[place], wanted))
        if len(ours) > len(theirs):
            lost = next(part for part in ours if part not in [pair[0] for pair in self._pairs])
            raise Mismatch(
                f"action map {source.name} -> {target.name}: dimension {lost.start} ({lost.dim.name}) has no target"
            )
        if abs(source.dt_s - target.dt_s) > 1e-6:
            raise Mismatch(
                f"action map {source.name} -> {target.name}: dt_s differs ({source.dt_s:g} s, {target.dt_s:g} s); "
                "resample the recordings, or declare a target space of the source's rate"
            )
        self.needs_pose = any(a.dim.mode != b.dim.mode for a, b in self._pairs)

    def __call__(self, actions: np.ndarray, pose: np.ndarray | None = None) -> np.ndarray:
        """f32[T,A] -> f32[T,B]. pose: f32[T,6] tool position (m) and euler_xyz (rad), where modes differ."""
        if actions.shape[1] != len(self.source):
            raise Mismatch(f"{self.source.name} has {len(self.source)} dimensions, the actions {actions.shape[1]}")
        if self.needs_pose and pose is None:
            raise Mismatch(f"action map {self.source.name} -> {self.target.name} needs the tool pose of every step")
        result = np.empty((len(actions), len(self.target)), np.float32)
        positions = 0
        for ours, theirs in self._pairs:
            values = actions[:, ours.columns].astype(np.float64)
            if theirs.kind == "gripper":
                values = _regripped(values, ours.dim, theirs.dim)
            else:
                values = values * ours.dim.scale
                if theirs.kind == "rotation" and ours.dim.convention != theirs.dim.convention:
                    values = from_matrix(to_matrix(values, ours.dim.convention), theirs.dim.convention)
                if ours.dim.mode != theirs.dim.mode:
                    assert pose is not None
                    now = pose[:, 3:6] if theirs.kind == "rotation" else pose[:, positions : positions + 1]
                    values = values - now if theirs.dim.mode == "relative" else values + now
                    if theirs.kind == "rotation":
                        values = (values + np.pi) % (2 * np.pi) - np.pi
                values = values / theirs.dim.scale
            positions += theirs.kind == "m"
            bounds = [(dim.low, dim.high) for dim in self.target.dims[theirs.columns]]
            low, high = np.array(bounds).T
            result[:, theirs.columns] = np.clip(values, low, high)
        return result

    def _require_convertible(self, ours: _Part, theirs: _Part) -> None:
        a, b, where = ours.dim, theirs.dim, f"action map {self.source.name} -> {self.target.name}"
        if a.frame != b.frame:
            raise Mismatch(
                f"{where}: dimension {theirs.start} ({b.name}) is in frame {b.frame!r}, {a.name} in {a.frame!r}; "
                "what lies between them is not recorded"
            )
        if a.mode != b.mode and (
            a.unit == "gripper" or a.frame != "world" or {a.convention, b.convention} - {"", "euler_xyz"}
        ):
            raise Mismatch(
                f"{where}: dimension {theirs.start} ({b.name}) is {b.mode}, {a.name} {a.mode}; convert it first"
            )


def to_matrix(values: np.ndarray, layout: str) -> np.ndarray:
    """[T,width] rotations in a layout of `ROTATIONS` -> f64[T,3,3]."""
    from scipy.spatial.transform import Rotation

    if layout == "rot6d":
        first = values[:, :3] / np.linalg.norm(values[:, :3], axis=1, keepdims=True)
        second = values[:, 3:] - (first * values[:, 3:]).sum(1, keepdims=True) * first
        second /= np.linalg.norm(second, axis=1, keepdims=True)
        return np.stack([first, second, np.cross(first, second)], axis=2)
    read = {"axis_angle": Rotation.from_rotvec, "quat_xyzw": Rotation.from_quat}
    turned = Rotation.from_euler("xyz", values) if layout == "euler_xyz" else read[layout](values)
    return np.asarray(turned.as_matrix())


def from_matrix(matrices: np.ndarray, layout: str) -> np.ndarray:
    """f64[T,3,3] -> [T,width]; quaternions with w >= 0, so that neighbours do not jump to the antipode."""
    from scipy.spatial.transform import Rotation

    if layout == "rot6d":
        return np.concatenate([matrices[:, :, 0], matrices[:, :, 1]], axis=1)
    turned = Rotation.from_matrix(matrices)
    if layout == "quat_xyzw":
        return np.asarray(turned.as_quat(canonical=True))
    return np.asarray(turned.as_euler("xyz") if layout == "euler_xyz" else turned.as_rotvec())


def _regripped(values: np.ndarray, ours: ActionDim, theirs: ActionDim) -> np.ndarray:
    opened, closed, _ = gripper_values(ours)
    share = (values - closed) / (opened - closed)  # 1 is open
    opened, closed, between = gripper_values(theirs)
    return closed + (share if between else np.round(np.clip(share, 0, 1))) * (opened - closed)


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[T] or [T,n] arrays side by side: f32[T, sum of n]."""
    return np.concatenate([a.reshape(len(a), -1) for a in arrays], axis=1).astype(np.float32)
