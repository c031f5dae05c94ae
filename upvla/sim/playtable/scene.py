"""Scenes A-D as MJCF text, built from primitives in code.

World frame as in CALVIN: x to the right along the desk, y away from the robot, z up, metres. The desk surface is at
`DESK_Z`; the robot stands at its left front corner.

         y ^   back wall (lamp, LED)
           |   cabinet: plank behind a sloped sliding door with a handle
           |   desk surface: blocks, button, switch
           |   front edge; the drawer with its bar handle comes out towards -y
    robot  +-------------------------------------------------------------> x
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from upvla.errors import ConfigError

DESK_Z = 0.44
BLOCK_HEIGHT, BLOCK_WIDTH = 0.04, 0.04
DRAWER_FLOOR = 0.298
DESK_FRONT_Y = -0.18
SHELF = 0.004  # thickness of the cabinet's floor
SHELF_X, SHELF_Y, SHELF_APART = 0.12, 0.10, 0.09  # blocks in a half of the cabinet: from its middle, and between two
BLOCKS = ("red", "blue", "pink")
ROBOT_BASE = (-0.34, -0.40, 0.24)
SLIDE_RANGE, DRAWER_RANGE, BUTTON_RANGE, SWITCH_RANGE = 0.28, 0.22, 0.02, 0.088
DRAWER_BAR = (-0.294, 0.362)  # (y, z) of the drawer's handle bar when shut
DOOR_HANDLE = (0.022, DESK_Z + 0.088)  # (y, z) of the middle of the door's handle
SWITCH_Y, BUTTON_Y = -0.15, -0.09  # the switch when off
STATIC_SIZE, GRIPPER_SIZE = 200, 84

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """Where a scene's furniture stands (x in m), and what it looks like."""

    cabinet_x: float  # middle of the two compartments
    drawer_x: float
    switch_x: float
    button_x: float
    blocks_x: tuple[float, float]  # where blocks may lie on the desk
    lamp_x: float
    led_x: float
    desk: tuple[Rgb, Rgb]  # light and dark grain
    front: tuple[Rgb, Rgb]  # drawer and door
    floor: Rgb
    handle: Rgb
    light: Rgb
    light_from: tuple[float, float, float]
    block_length: tuple[float, float, float]  # of red, blue, pink

    @property
    def handle_x(self) -> float:
        """x of the door handle with the slider at 0 (fully right)."""
        return self.cabinet_x + SLIDE_RANGE / 2


LAYOUTS: dict[str, Layout] = {
    "A": Layout(
        -0.02, 0.14, 0.285, -0.29, (-0.095, 0.095), 0.21, 0.02,
        ((0.80, 0.62, 0.42), (0.62, 0.44, 0.27)), ((0.55, 0.36, 0.22), (0.42, 0.26, 0.15)),
        (0.58, 0.60, 0.63), (0.15, 0.15, 0.17), (0.80, 0.80, 0.78), (0.8, -0.9, 2.0), (0.056, 0.064, 0.050),
    ),
    "B": Layout(
        0.00, 0.06, -0.29, 0.28, (-0.095, 0.09), -0.02, 0.16,
        ((0.72, 0.55, 0.40), (0.50, 0.34, 0.24)), ((0.86, 0.78, 0.64), (0.74, 0.64, 0.50)),
        (0.46, 0.50, 0.47), (0.62, 0.45, 0.18), (0.86, 0.80, 0.70), (-0.6, -1.0, 2.0), (0.050, 0.064, 0.056),
    ),
    "C": Layout(
        0.00, 0.15, 0.29, -0.28, (-0.09, 0.10), 0.02, 0.20,
        ((0.88, 0.80, 0.66), (0.76, 0.66, 0.50)), ((0.60, 0.66, 0.62), (0.50, 0.56, 0.53)),
        (0.66, 0.62, 0.57), (0.30, 0.31, 0.34), (0.74, 0.78, 0.84), (0.2, -1.2, 2.2), (0.064, 0.050, 0.056),
    ),
    "D": Layout(
        -0.04, 0.10, 0.28, -0.285, (-0.095, 0.09), 0.19, 0.00,
        ((0.66, 0.48, 0.34), (0.46, 0.30, 0.20)), ((0.78, 0.60, 0.40), (0.64, 0.46, 0.29)),
        (0.52, 0.55, 0.62), (0.84, 0.84, 0.82), (0.82, 0.78, 0.74), (0.9, -0.4, 2.1), (0.056, 0.050, 0.064),
    ),
}  # fmt: skip


def layout(scene: str) -> Layout:
    """Raises `ConfigError` for a scene that does not exist."""
    if scene not in LAYOUTS:
        raise ConfigError(f"playtable has no scene {scene!r}; choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[scene]


# ------------------------------------------------------------------------------------------------------- MJCF


def _v(values: tuple[float, ...] | np.ndarray) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _box(pos: tuple[float, float, float], half: tuple[float, float, float], material: str, extra: str = "") -> str:
    return f'<geom type="box" pos="{_v(pos)}" size="{_v(half)}" material="{material}" {extra}/>'


TCP_OFFSET = 0.1034  # from the hand's frame to between the finger tips
ARM_LIMITS = (
    (-2.8973, 2.8973), (-1.7628, 1.7628), (-2.8973, 2.8973), (-3.0718, -0.0698),
    (-2.8973, 2.8973), (-0.0175, 3.7525), (-2.8973, 2.8973),
)  # fmt: skip

_TURN = np.pi / 2
_LINKS = (  # offset from the parent, turn about x, capsule, radius, mass, material
    ((0, 0, 0.333), 0, (0, 0, -0.19, 0, 0, 0), 0.062, 2.7, "shell"),
    ((0, 0, 0), -_TURN, (0, 0, 0, 0, -0.22, 0), 0.060, 2.7, "shell"),
    ((0, -0.316, 0), _TURN, (0, 0, -0.07, 0.0825, 0, 0), 0.056, 2.0, "joint"),
    ((0.0825, 0, 0), _TURN, (0, 0, 0, -0.0825, 0.08, 0), 0.054, 2.0, "shell"),
    ((-0.0825, 0.384, 0), -_TURN, (0, 0, -0.24, 0, 0.02, -0.06), 0.050, 1.6, "shell"),
    ((0, 0, 0), _TURN, (0, 0, 0, 0.088, 0, 0), 0.050, 1.0, "joint"),
    ((0.088, 0, 0), _TURN, (0, 0, -0.01, 0, 0, 0.075), 0.044, 0.6, "shell"),
)


def _robot() -> str:
    """Seven joints after Panda's published kinematics, and a parallel gripper that opens along the hand's y."""
    text = f'<body name="robot" pos="{_v(ROBOT_BASE)}">'
    text += '<geom class="robot" type="cylinder" pos="0 0 0.07" size="0.075 0.07" material="joint"/>'
    text += (
        f'<geom class="robot" type="cylinder" pos="0 0 {-ROBOT_BASE[2] / 2}" size="0.07 {ROBOT_BASE[2] / 2}" '
        'material="joint"/>'
    )
    for i, (offset, turn, ends, radius, mass, material) in enumerate(_LINKS):
        text += (
            f'<body name="link{i + 1}" pos="{_v(offset)}" euler="{turn:.15g} 0 0" gravcomp="1">'
            f'<joint name="arm{i + 1}" axis="0 0 1" range="{_v(ARM_LIMITS[i])}" armature="0.1" damping="2"/>'
            f'<geom class="robot" type="capsule" fromto="{_v(ends)}" size="{radius}" mass="{mass}" '
            f'material="{material}"/>'
        )
    text += (
        f'<body name="hand" pos="0 0 0.107" euler="0 0 {-_TURN / 2:.15g}" gravcomp="1">'
        + _box((0, 0, 0.032), (0.026, 0.092, 0.030), "shell", 'class="robot" mass="0.4"')
        + _box((0, 0, 0.012), (0.029, 0.060, 0.012), "accent", 'class="robot" mass="0.1"')
        + f'<site name="tcp" pos="0 0 {TCP_OFFSET}" size="0.002" rgba="0 0 0 0"/>'
        '<camera name="gripper" pos="-0.09 0 0.035" xyaxes="0 1 0 0.84 0 -0.545" fovy="75"/>'
    )
    for side, sign in (("left", 1), ("right", -1)):
        text += (
            f'<body name="finger_{side}" pos="0 0 0.0584" gravcomp="1">'
            f'<joint name="finger_{side}" type="slide" axis="0 {sign} 0" range="0 0.04" armature="0.05" damping="8"/>'
            + _box((0, sign * 0.009, 0.012), (0.009, 0.009, 0.020), "finger", 'class="robot" mass="0.03"')
            + _box((0, sign * 0.007, 0.040), (0.016, 0.007, 0.016), "finger", 'class="pad" mass="0.03"')
            + "</body>"
        )
    return text + "</body>" * 9


def _floor() -> str:
    """Tiles: flat colour and thin lines, which render three times as fast as a texture that fills the background."""
    lines = "".join(
        _box((x, 0.5, 0), (0.006, 2.5, 0.001), "tile_joint", 'class="picture"')
        + _box((-0.5, x + 0.3, 0), (2.5, 0.006, 0.001), "tile_joint", 'class="picture"')
        for x in np.arange(-2.2, 2.0, 0.6)
    )
    return f'<geom class="picture" type="plane" size="4 4 0.1" material="floor"/>{lines}'


def _furniture(spec: Layout) -> str:
    top, back, cabinet = DESK_Z, 0.19, spec.cabinet_x
    half = 0.31  # of the cabinet's width
    desk = [
        _box((0, 0.02, top - 0.015), (0.40, 0.20, 0.015), "desk"),
        _box((0, back, 0.22), (0.38, 0.012, 0.19), "desk"),
        *(_box((x, 0.02, 0.20), (0.016, 0.185, 0.205), "desk") for x in (-0.38, 0.38)),
        *(_box((spec.drawer_x + side * 0.155, 0.0, 0.345), (0.012, 0.175, 0.066), "desk") for side in (-1, 1)),
        _box((cabinet, back, top + 0.095), (half, 0.012, 0.095), "desk"),
        *(_box((cabinet + side * half, 0.10, top + 0.025), (0.010, 0.08, 0.025), "desk") for side in (-1, 1)),
        _box((cabinet, 0.013, top + 0.006), (half, 0.008, 0.006), "metal"),
        _box((cabinet, 0.10, top + SHELF / 2), (half - 0.01, 0.078, SHELF / 2), "plank", 'name="plank"'),
        f'<geom class="picture" type="cylinder" pos="{_v((spec.lamp_x, back, top + 0.20))}" size="0.024 0.012" '
        'material="handle"/>',
        f'<geom name="lightbulb" class="picture" type="sphere" pos="{_v((spec.lamp_x, back, top + 0.235))}" '
        'size="0.036" material="light_off"/>',
        f'<geom class="picture" type="box" pos="{_v((spec.led_x, back, top + 0.205))}" size="0.062 0.018 0.016" '
        'material="handle"/>',
        f'<geom name="led" class="picture" type="box" pos="{_v((spec.led_x, back - 0.004, top + 0.209))}" '
        'size="0.055 0.018 0.016" material="light_off"/>',
        # the base plates of button and switch
        f'<geom class="picture" type="cylinder" pos="{_v((spec.button_x, BUTTON_Y, top))}" size="0.046 0.004" '
        'material="handle"/>',
        _box((spec.switch_x, SWITCH_Y + 0.05, top), (0.036, 0.085, 0.004), "handle", 'class="picture"'),
    ]
    # the door leans back by 30 degrees; its handle stands upright so that a gripper can straddle it from above
    door_up, door_normal = np.array((0, 0.5, 0.866)), np.array((0, -0.866, 0.5))
    middle = np.array((0, 0.062, 0.103))
    slide = (
        f'<body name="slide" pos="{_v((spec.handle_x, 0, top))}">'
        f'<joint name="slide" type="slide" axis="-1 0 0" range="0 {SLIDE_RANGE}" frictionloss="1.5" damping="6" '
        'armature="0.3"/>'
        f'<geom type="box" pos="{_v(middle)}" size="0.138 0.098 0.006" mass="0.5" material="front" '
        f'xyaxes="1 0 0 {_v(door_up)}"/>'
        + _box((0, DOOR_HANDLE[0], DOOR_HANDLE[1] - top), (0.010, 0.010, 0.034), "handle", 'mass="0.05"')
        + _box((0, 0.040, 0.075), (0.009, 0.020, 0.009), "handle", 'mass="0.02"')
        + f'<geom class="picture" type="box" pos="{_v(middle + 0.006 * door_normal)}" size="0.035 0.05 0.002" '
        f'material="handle" xyaxes="1 0 0 {_v(door_up)}"/></body>'
    )
    drawer = (
        f'<body name="drawer" pos="{_v((spec.drawer_x, -0.20, 0))}">'
        f'<joint name="drawer" type="slide" axis="0 -1 0" range="0 {DRAWER_RANGE}" frictionloss="1.5" damping="6" '
        'armature="0.3"/>'
        + _box((0, 0.0, 0.345), (0.150, 0.010, 0.060), "front", 'mass="0.3"')
        + _box((0, 0.14, DRAWER_FLOOR - 0.006), (0.132, 0.13, 0.006), "plank", 'mass="0.2"')
        + _box((0, 0.27, 0.335), (0.132, 0.006, 0.040), "front", 'mass="0.1"')
        + "".join(_box((x, 0.14, 0.327), (0.006, 0.13, 0.032), "front", 'mass="0.1"') for x in (-0.13, 0.13))
        + _box((0, DRAWER_BAR[0] + 0.20, DRAWER_BAR[1]), (0.095, 0.010, 0.012), "handle", 'mass="0.05"')
        + "".join(
            _box((x, DRAWER_BAR[0] + 0.244, DRAWER_BAR[1]), (0.008, 0.044, 0.010), "handle", 'mass="0.02"')
            for x in (-0.087, 0.087)
        )
        + "</body>"
    )
    button = (
        f'<body name="button" pos="{_v((spec.button_x, BUTTON_Y, top))}">'
        f'<joint name="button" type="slide" axis="0 0 -1" range="0 {BUTTON_RANGE}" stiffness="150" damping="3" '
        'armature="0.05"/>'
        '<geom type="cylinder" pos="0 0 0.014" size="0.036 0.014" mass="0.05" material="button"/></body>'
    )
    switch = (
        f'<body name="switch" pos="{_v((spec.switch_x, SWITCH_Y, top))}">'
        f'<joint name="switch" type="slide" axis="0 1 0" range="0 {SWITCH_RANGE}" frictionloss="1.0" damping="4" '
        'armature="0.2"/>' + _box((0, 0, 0.030), (0.030, 0.009, 0.026), "switch", 'mass="0.1"') + "</body>"
    )
    return f'<body name="table">{"".join(desk)}</body>{slide}{drawer}{button}{switch}'


def _blocks(spec: Layout) -> str:
    return "".join(
        f'<body name="block_{colour}" pos="{0.3 * i - 0.3} 0 1"><freejoint name="block_{colour}"/>'
        f'<geom class="block" type="box" size="{_v((spec.block_length[i] / 2, BLOCK_WIDTH / 2, BLOCK_HEIGHT / 2))}" '
        f'material="{colour}"/></body>'
        for i, colour in enumerate(BLOCKS)
    )


def mjcf(scene: str) -> str:
    """The whole scene; `textures.textures(scene)` are its files. Contact bits: 1 furniture, 2 robot, 4 blocks."""
    spec = layout(scene)
    flat = {
        "floor": spec.floor, "tile_joint": tuple(0.85 * c for c in spec.floor), "shell": (0.93, 0.93, 0.92),
        "joint": (0.32, 0.34, 0.38), "accent": (0.10, 0.55, 0.62), "finger": (0.12, 0.12, 0.13),
        "handle": spec.handle, "metal": (0.55, 0.56, 0.58), "plank": tuple(0.5 * c for c in spec.desk[1]),
        "button": (0.85, 0.42, 0.10), "switch": (0.48, 0.20, 0.62),
        "red": (0.85, 0.08, 0.08), "blue": (0.08, 0.20, 0.85), "pink": (0.96, 0.45, 0.68),
    }  # fmt: skip
    materials = "".join(f'<material name="{name}" rgba="{_v(rgb)} 1"/>' for name, rgb in flat.items())
    actuators = "".join(
        f'<position name="arm{i + 1}" joint="arm{i + 1}" kp="{900 if i < 4 else 400}" kv="{36 if i < 4 else 16}" '
        f'forcerange="-{87 if i < 4 else 30} {87 if i < 4 else 30}"/>'
        for i in range(7)
    ) + "".join(
        f'<position name="{side}" joint="finger_{side}" kp="500" kv="20" forcerange="-15 15"/>'
        for side in ("left", "right")
    )
    return f"""<mujoco model="playtable_{scene}">
<compiler angle="radian" eulerseq="xyz"/>
<option timestep="{1 / 240:.12f}" integrator="implicitfast" cone="elliptic" impratio="2" iterations="100"
 ls_iterations="50"><flag autoreset="disable"/></option>
<visual><global offwidth="{STATIC_SIZE}" offheight="{STATIC_SIZE}"/><quality offsamples="0" numslices="16" numstacks="8"
 numquads="1"/>
<headlight ambient="0.38 0.38 0.38" diffuse="0.25 0.25 0.25" specular="0 0 0"/><map znear="0.01" zfar="20"/></visual>
<default><geom contype="1" conaffinity="0" friction="0.6 0.01 0.001"/>
<default class="robot"><geom contype="2" conaffinity="1" friction="0.8 0.02 0.001"/>
<default class="pad"><geom friction="1.5 0.02 0.001" condim="4"/></default></default>
<default class="block"><geom contype="4" conaffinity="7" mass="0.1" friction="0.5 0.01 0.001" margin="0.002"
 gap="0.002"/></default>
<default class="picture"><geom contype="0" conaffinity="0"/></default></default>
<asset>
<texture name="desk" type="cube" file="desk.png"/><texture name="front" type="cube" file="front.png"/>
<material name="desk" texture="desk"/><material name="front" texture="front"/>
<material name="light_off" rgba="0.82 0.82 0.80 1"/>
<material name="lightbulb_on" rgba="1 0.92 0.05 1" emission="0.9"/>
<material name="led_on" rgba="0.05 1 0.15 1" emission="0.9"/>
{materials}</asset>
<worldbody>
<light pos="{_v(spec.light_from)}" dir="{_v(-np.array(spec.light_from) + (0, 0, 0.4))}" diffuse="{_v(spec.light)}"
 specular="0.1 0.1 0.1" directional="true"/>
<camera name="static" {_STATIC_CAMERA}/>
{_floor()}{_robot()}{_furniture(spec)}{_blocks(spec)}
</worldbody>
<equality><joint joint1="finger_left" joint2="finger_right" polycoef="0 1 0 0 0"/></equality>
<actuator>{actuators}</actuator>
</mujoco>"""


def _look(eye: tuple[float, float, float], at: tuple[float, float, float], fovy: float) -> str:
    back = np.subtract(eye, at) / np.linalg.norm(np.subtract(eye, at))
    right = np.cross((0, 0, 1), back)
    right /= np.linalg.norm(right)
    return f'pos="{_v(eye)}" xyaxes="{_v(right)} {_v(np.cross(back, right))}" fovy="{fovy}"'


_STATIC_CAMERA = _look((1.55, -2.35, 2.25), (0.01, -0.12, 0.47), 14.8)
