"""`PlaytableEnv`: one scene in MuJoCo behind the `Env` protocol, bit-deterministic in (state, actions)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from upvla.errors import ConfigError, Mismatch, UpvlaError
from upvla.sim import contract as c
from upvla.sim.playtable import scene as s
from upvla.sim.playtable.cameras import Cameras, load_mujoco
from upvla.sim.playtable.textures import textures
from upvla.sim.suite import code_id
from upvla.types import CALVIN_RELATIVE, Observation

HOME = np.array((-1.218, 1.040, 2.120, -2.342, -0.870, 1.641, 0.553))  # arm joints, gripper down over the desk
DOWN = np.array((np.pi, 0.0, np.pi / 2))  # fingers down, opening along x
FINGER_OPEN = 0.04
SUBSTEPS = 8  # of 1/240 s
_LEASH_M, _LEASH_RAD = 0.04, 0.2  # how far the commanded pose may run ahead of the real one
_JOINTS = {c.SLIDER: ("slide", s.SLIDE_RANGE), c.DRAWER: ("drawer", s.DRAWER_RANGE),
           c.BUTTON: ("button", s.BUTTON_RANGE), c.SWITCH: ("switch", s.SWITCH_RANGE)}  # fmt: skip
_WORKSPACE = np.array(((-0.6, -0.7, 0.0), (0.6, 0.4, 1.2)))


class PlaytableEnv:
    """One scene. `observe` renders (static 200x200, gripper 84x84); stepping alone never does.

    Actions are clipped to +-1 and integrate into a commanded gripper pose that stays within a few centimetres of the
    real one; a damped least-squares inverse turns it into joint targets for force-limited position servos.
    """

    action_space = CALVIN_RELATIVE

    def __init__(self, scene: str, *, cameras: bool = True) -> None:
        """Without `cameras` nothing is ever rendered, and observations hold no images."""
        self.scene, self.name, self._sees = scene, f"playtable-{scene.lower()}", cameras
        self.layout = s.layout(scene)
        self._mj = mj = load_mujoco()
        self.model = mj.MjModel.from_xml_string(s.mjcf(scene), assets=textures(scene))
        self.data = mj.MjData(self.model)
        self._kinematics = mj.MjData(self.model)
        self._cameras: Cameras | None = None
        model = self.model
        self._tcp = model.site("tcp").id
        self._qpos = {i: model.joint(name).qposadr[0] for i, (name, _) in _JOINTS.items()}
        self._block_qpos = {b: model.joint(f"block_{b}").qposadr[0] for b in s.BLOCKS}
        self._block_dof = {b: model.joint(f"block_{b}").dofadr[0] for b in s.BLOCKS}
        self._labels = [self._label(i) for i in range(model.ngeom)]
        self._lamps = {
            name: (model.geom(name).id, model.material("light_off").id, model.material(f"{name}_on").id)
            for name in ("lightbulb", "led")
        }
        self._jacobian = np.zeros((6, model.nv))
        self._unstable = (mj.mjtWarning.mjWARN_BADQPOS, mj.mjtWarning.mjWARN_BADQVEL, mj.mjtWarning.mjWARN_BADQACC)
        self._pos, self._euler, self._gripper = np.zeros(3), DOWN.copy(), 1.0
        self._pressed, self._led, self._bulb = False, 0, 0
        robot, blocks = self.rest_state()
        self.reset(robot, blocks)

    def _label(self, geom: int) -> str:
        """What a contact with this geom is called."""
        body = self.model.body(self.model.geom_bodyid[geom])
        while body.parentid[0] and self.model.body(body.parentid[0]).id:
            body = self.model.body(body.parentid[0])
        return "plank" if self.model.geom(geom).name == "plank" else str(body.name)

    # ------------------------------------------------------------------------------------------------- states

    def rest_state(self) -> tuple[np.ndarray, np.ndarray]:
        """(f64[15], f64[24]): arm at home and open, everything shut and off, blocks in a row on the desk."""
        robot = self.robot_state_at(np.array((0.0, -0.13, 0.60)))
        scene = np.zeros(24)
        for i, where in enumerate(c.BLOCK_POSE.values()):
            scene[where] = (0.09 * i - 0.06, -0.09, s.DESK_Z + s.BLOCK_HEIGHT / 2, 0, 0, np.pi / 2)
        return robot, scene

    def robot_state_at(self, position: np.ndarray, euler: np.ndarray = DOWN) -> np.ndarray:
        """The 15-dim robot state with the open gripper at this pose. Raises `ConfigError` when out of reach."""
        joints = HOME.copy()
        for _ in range(60):
            joints = self._solve(joints, position, euler)
        place, turn = self._tcp_pose(joints)
        if np.linalg.norm(place - position) > 1e-3:
            raise ConfigError(f"the arm cannot reach {np.round(position, 3).tolist()}; choose a point over the desk")
        return np.array((*place, *turn, 2 * FINGER_OPEN, *joints, 1.0))

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None:
        """Put everything in this state, at rest. Raises `Mismatch` for a wrong shape, `ConfigError` outside limits."""
        robot, scene = _checked("robot state", robot_state, 15), _checked("scene state", scene_state, 24)
        self._check_limits(robot, scene)
        mj, model, data = self._mj, self.model, self.data
        mj.mj_resetData(model, data)
        finger = float(np.clip(robot[c.GRIPPER_WIDTH] / 2, 0, FINGER_OPEN))
        data.qpos[:7], data.qpos[7:9] = robot[c.ARM], finger
        for i, address in self._qpos.items():
            data.qpos[address] = np.clip(scene[i], 0, _JOINTS[i][1])
        for block, where in c.BLOCK_POSE.items():
            address = self._block_qpos[block]
            data.qpos[address : address + 3] = scene[where][:3]
            data.qpos[address + 3 : address + 7] = _to_quat(scene[where][3:])
        self._gripper = 1.0 if robot[c.GRIPPER_ACTION] >= 0 else -1.0
        self._pressed = bool(scene[c.BUTTON] > s.BUTTON_RANGE / 2)
        self._led, self._bulb = int(scene[c.LED] > 0.5), int(scene[c.SWITCH] > s.SWITCH_RANGE / 2)
        data.ctrl[:7], data.ctrl[7:9] = data.qpos[:7], FINGER_OPEN if self._gripper > 0 else 0.0
        mj.mj_forward(model, data)
        self._pos, self._euler = data.site_xpos[self._tcp].copy(), _to_euler(data.site_xmat[self._tcp])
        self._show_lamps()

    def _check_limits(self, robot: np.ndarray, scene: np.ndarray) -> None:
        for i, (low, high) in enumerate(s.ARM_LIMITS):
            _within(c.ROBOT_STATE[7 + i], robot[7 + i], low, high)
        _within("gripper_width", robot[c.GRIPPER_WIDTH], 0, 2 * FINGER_OPEN)
        for i, (_, high) in _JOINTS.items():
            _within(c.SCENE_STATE[i], scene[i], 0, high)
        for block, where in c.BLOCK_POSE.items():
            for axis, value, low, high in zip("xyz", scene[where], *_WORKSPACE, strict=False):
                _within(f"{block}_{axis}", value, low, high)

    def robot_state(self) -> np.ndarray:
        """f64[15], see `contract.ROBOT_STATE`."""
        d = self.data
        euler = _to_euler(d.site_xmat[self._tcp])
        return np.array((*d.site_xpos[self._tcp], *euler, d.qpos[7] + d.qpos[8], *d.qpos[:7], self._gripper))

    def scene_state(self) -> np.ndarray:
        """f64[24], see `contract.SCENE_STATE`."""
        state = np.zeros(24)
        for i, address in self._qpos.items():
            state[i] = self.data.qpos[address]
        state[c.LIGHTBULB], state[c.LED] = self._bulb, self._led
        for block, where in c.BLOCK_POSE.items():
            address = self._block_qpos[block]
            matrix = np.zeros(9)
            self._mj.mju_quat2Mat(matrix, self.data.qpos[address + 3 : address + 7])
            state[where] = (*self.data.qpos[address : address + 3], *_to_euler(matrix))
        return state

    # ------------------------------------------------------------------------------------------------- motion

    def step(self, action: np.ndarray) -> None:
        """One 30 Hz step of f[7]: motion clipped to +-1, gripper open from 0 up. NaN or another shape: `Mismatch`."""
        action = _checked("action", action, 7)
        mj, model, data = self._mj, self.model, self.data
        motion = np.maximum(np.minimum(action[:6], 1.0), -1.0)
        here, turn = data.site_xpos[self._tcp], _to_euler(data.site_xmat[self._tcp])
        ahead = self._pos + 0.02 * motion[:3] - here
        self._pos = here + ahead * min(1.0, _LEASH_M / max(1e-9, float(np.linalg.norm(ahead))))
        turned = _wrapped(self._euler + 0.05 * motion[3:] - turn)
        self._euler = turn + np.maximum(np.minimum(turned, _LEASH_RAD), -_LEASH_RAD)
        self._gripper = 1.0 if action[6] >= 0 else -1.0
        data.ctrl[:7] = self._solve(data.ctrl[:7], self._pos, self._euler)
        data.ctrl[7:9] = FINGER_OPEN if self._gripper > 0 else 0.0
        for _ in range(SUBSTEPS):
            mj.mj_step(model, data)
        if any(data.warning[kind].number for kind in self._unstable):
            raise UpvlaError(f"{self.name}: physics became unstable at {data.time:.2f} s; reset to go on")
        mj.mj_fwdPosition(model, data)  # poses and contacts of the state just reached
        self._switch_lamps()

    def _switch_lamps(self) -> None:
        pressed = bool(self.data.qpos[self._qpos[c.BUTTON]] > s.BUTTON_RANGE / 2)
        if pressed and not self._pressed:
            self._led = 1 - self._led
        self._pressed = pressed
        self._bulb = int(self.data.qpos[self._qpos[c.SWITCH]] > s.SWITCH_RANGE / 2)
        self._show_lamps()

    def _show_lamps(self) -> None:
        for name, lit in (("lightbulb", self._bulb), ("led", self._led)):
            geom, off, on = self._lamps[name]
            self.model.geom_matid[geom] = on if lit else off

    def _tcp_pose(self, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        k = self._kinematics
        k.qpos[:7] = joints
        self._mj.mj_kinematics(self.model, k)
        return k.site_xpos[self._tcp].copy(), _to_euler(k.site_xmat[self._tcp])

    def _solve(self, joints: np.ndarray, position: np.ndarray, euler: np.ndarray) -> np.ndarray:
        """One damped least-squares step from `joints` towards the pose, drawn to HOME where the pose leaves freedom."""
        mj, k, jacobian = self._mj, self._kinematics, self._jacobian
        k.qpos[:7] = joints
        mj.mj_kinematics(self.model, k)
        mj.mj_comPos(self.model, k)
        mj.mj_jacSite(self.model, k, jacobian[:3], jacobian[3:], self._tcp)
        error, current = np.empty(6), np.empty(4)
        error[:3] = position - k.site_xpos[self._tcp]
        mj.mju_mat2Quat(current, k.site_xmat[self._tcp])
        error[3:] = _rotation_between(current, _to_quat(euler))
        j = jacobian[:, :7]
        pull = 0.1 * (HOME - joints)
        change = pull + j.T @ np.linalg.solve(j @ j.T + _DAMPING, error - j @ pull)
        joints = joints + np.maximum(np.minimum(change, 0.15), -0.15)
        return np.maximum(np.minimum(joints, _ARM_RANGE[1]), _ARM_RANGE[0])

    # ------------------------------------------------------------------------------------------------- looking

    def observe(self) -> Observation:
        """Render both cameras: {"static": u8[200,200,3], "gripper": u8[84,84,3]}."""
        images = self._eyes().frames(self.model, self.data) if self._sees else {}
        return Observation(images, self.state(), self.scene_state().astype(np.float32))

    def state(self) -> np.ndarray:
        """f32[15], what a policy may know of the robot."""
        return self.robot_state().astype(np.float32)

    def truth(self) -> np.ndarray:
        return self.scene_state()

    def _eyes(self) -> Cameras:
        if self._cameras is None:
            self._cameras = Cameras.share(self._mj, self.model, self.scene)
        return self._cameras

    def visible(self) -> dict[str, np.ndarray]:
        """Which pixels of the static camera show what, bool[200,200] each: `lightbulb`, `led`, `gripper`, `blocks`."""
        geoms = self._eyes().geoms(self.model, self.data)
        names = [self.model.geom(i).name for i in range(self.model.ngeom)]
        bodies = [self.model.body(body).name for body in self.model.geom_bodyid]
        hand = ("hand", "finger_left", "finger_right")
        wanted = {
            "lightbulb": [i for i, name in enumerate(names) if name == "lightbulb"],
            "led": [i for i, name in enumerate(names) if name == "led"],
            "gripper": [i for i, body in enumerate(bodies) if body in hand],
            "blocks": [i for i, body in enumerate(bodies) if body.startswith("block_")],
        }
        return {name: np.isin(geoms, ids) for name, ids in wanted.items()}

    def contacts(self) -> dict[str, frozenset[str]]:
        """What touches the robot and each block: robot, table, plank, drawer, slide, button, switch, block_<colour>."""
        touching: dict[str, set[str]] = {"robot": set(), **{f"block_{b}": set() for b in s.BLOCKS}}
        for first, second in self.data.contact.geom[: self.data.ncon]:
            a, b = self._labels[first], self._labels[second]
            if a in touching:
                touching[a].add(b)
            if b in touching:
                touching[b].add(a)
        return {name: frozenset(others) for name, others in touching.items()}

    def info(self) -> Mapping[str, Any]:
        """Joint and light states, and of every block its position, quaternion (w first), velocities and contacts."""
        d, contacts = self.data, self.contacts()
        blocks = {}
        for b in s.BLOCKS:
            q, v = self._block_qpos[b], self._block_dof[b]
            blocks[b] = {
                "position": d.qpos[q : q + 3].copy(),
                "quaternion": d.qpos[q + 3 : q + 7].copy(),
                "velocity": d.qvel[v : v + 6].copy(),
                "contacts": contacts[f"block_{b}"],
            }
        doors = {"slider": float(d.qpos[self._qpos[c.SLIDER]]), "drawer": float(d.qpos[self._qpos[c.DRAWER]])}
        lights = {"lightbulb": self._bulb, "led": self._led}
        return {"doors": doors, "lights": lights, "blocks": blocks, "robot": {"contacts": contacts["robot"]}}

    def fingerprint(self) -> Mapping[str, str]:
        """Versions of MuJoCo, numpy and GL, and of the world's own code; scores of two fingerprints do not compare."""
        return {
            "env": self.name,
            "code": world_code(),
            "mujoco": self._mj.mj_versionString(),
            "numpy": np.__version__,
            "renderer": self._eyes().description() if self._sees else "none",
        }

    def close(self) -> None:
        if self._cameras is not None:
            self._cameras.close()
            self._cameras = None


@cache
def world_code() -> str:
    """Hash of what decides an episode's outcome; experts and recorders do not."""
    folder = Path(__file__).parent
    return code_id(*(folder / f"{part}.py" for part in ("cameras", "env", "scene", "tasks", "textures", "wording")))


# ------------------------------------------------------------------------------------------------------ geometry

_ARM_RANGE = np.array(s.ARM_LIMITS).T
_DAMPING = 1e-4 * np.eye(6)


def _checked(what: str, value: np.ndarray, size: int) -> np.ndarray:
    value = np.asarray(value, np.float64)
    if value.shape != (size,):
        raise Mismatch(f"playtable: {what} has shape {value.shape}, must be ({size},)")
    if not np.isfinite(value).all():
        raise Mismatch(f"playtable: {what} has non-finite values at {np.flatnonzero(~np.isfinite(value)).tolist()}")
    return value


def _within(name: str, value: float, low: float, high: float, slack: float = 2e-2) -> None:
    """Servos and soft limits overshoot a little, so recorded states may lie a little outside."""
    margin = slack * (high - low) + 1e-6
    if not low - margin <= value <= high + margin:
        raise ConfigError(f"playtable: {name} = {value:.4f} lies outside [{low}, {high}]; give a reachable state")


def _wrapped(angle: np.ndarray) -> np.ndarray:
    return np.asarray((angle + np.pi) % (2 * np.pi) - np.pi)


def _to_quat(euler: np.ndarray) -> np.ndarray:
    """Euler xyz about fixed axes -> unit quaternion, w first."""
    halves = [float(angle) / 2 for angle in euler]
    (sx, sy, sz), (cx, cy, cz) = map(math.sin, halves), map(math.cos, halves)
    return np.array((
        cx * cy * cz + sx * sy * sz, sx * cy * cz - cx * sy * sz,
        cx * sy * cz + sx * cy * sz, cx * cy * sz - sx * sy * cz,
    ))  # fmt: skip


def _to_euler(matrix: np.ndarray) -> np.ndarray:
    """f64[9] rotation, row major -> euler xyz about fixed axes."""
    m = matrix.tolist()
    return np.array((math.atan2(m[7], m[8]), math.atan2(-m[6], math.hypot(m[0], m[3])), math.atan2(m[3], m[0])))


def _rotation_between(current: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Rotation vector in the world frame that takes one unit quaternion to the other, the short way."""
    (cw, cx, cy, cz), (gw, gx, gy, gz) = current.tolist(), goal.tolist()
    w = gw * cw + gx * cx + gy * cy + gz * cz
    x = cw * gx - gw * cx - gy * cz + gz * cy
    y = cw * gy - gw * cy - gz * cx + gx * cz
    z = cw * gz - gw * cz - gx * cy + gy * cx
    norm = math.sqrt(x * x + y * y + z * z)
    scale = math.copysign(2 * math.atan2(norm, abs(w)), w) / norm if norm > 1e-12 else 0.0
    return np.array((x * scale, y * scale, z * scale))
