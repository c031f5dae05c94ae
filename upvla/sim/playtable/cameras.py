"""MuJoCo without a display, and the two cameras of a scene through one GL context."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from upvla.errors import ConfigError
from upvla.sim.playtable import scene as s

log = logging.getLogger(__name__)


def load_mujoco() -> ModuleType:
    """Import MuJoCo with a renderer that needs no display (OSMesa unless MUJOCO_GL says otherwise)."""
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # one core a process: recordings run one process a core
    try:
        import mujoco
    except Exception as error:  # a missing GL library surfaces as several kinds
        raise ConfigError(
            f"MuJoCo cannot load its {os.environ['MUJOCO_GL']!r} renderer ({error}); "
            "install it with: apt-get install -y --no-install-recommends libosmesa6"
        ) from error
    mujoco.set_mju_user_warning(log.warning)  # else it appends to a file in the working directory
    return mujoco


class Cameras:
    """Renders without shadows, reflections or multisampling, which cost more than all the rest.

    A GL context and what is uploaded into it take 0.2 s, mostly shaders that the renderer compiles, so the worlds of a
    scene share one in each thread (a context belongs to a thread): `share`, and `close` once for every `share`.
    """

    _threads = threading.local()  # .scenes: {scene: cameras} of a thread

    @classmethod
    def share(cls, mj: ModuleType, model: Any, scene: str) -> Cameras:
        """This thread's cameras of the scene, whose models are all alike. Raises `ConfigError` without a renderer."""
        scenes: dict[str, Cameras] = cls._threads.__dict__.setdefault("scenes", {})
        if scene not in scenes:
            scenes[scene] = cls(mj, model)
            scenes[scene]._forget = lambda: scenes.pop(scene)
        scenes[scene]._holders += 1
        return scenes[scene]

    def __init__(self, mj: ModuleType, model: Any) -> None:
        self._mj, self._holders = mj, 0
        self._forget: Callable[[], object] = lambda: None
        try:
            self._gl = mj.GLContext(s.STATIC_SIZE, s.STATIC_SIZE)
            self._gl.make_current()
            self._context = mj.MjrContext(model, mj.mjtFontScale.mjFONTSCALE_50.value)
        except Exception as error:
            raise ConfigError(
                f"MuJoCo cannot render ({error}): it was imported before MUJOCO_GL was set; "
                "set MUJOCO_GL=osmesa in the environment"
            ) from error
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene, self._option = mj.MjvScene(model, maxgeom=200), mj.MjvOption()
        self._scene.flags[mj.mjtRndFlag.mjRND_SHADOW] = self._scene.flags[mj.mjtRndFlag.mjRND_REFLECTION] = 0
        self._cameras = {}
        for name, size in (("static", s.STATIC_SIZE), ("gripper", s.GRIPPER_SIZE)):
            camera = mj.MjvCamera()
            camera.type, camera.fixedcamid = mj.mjtCamera.mjCAMERA_FIXED, model.camera(name).id
            self._cameras[name] = (camera, mj.MjrRect(0, 0, size, size))

    def frames(self, model: Any, data: Any) -> dict[str, np.ndarray]:
        mj, frames = self._mj, {}
        self._gl.make_current()
        for name, (camera, rect) in self._cameras.items():
            mj.mjv_updateScene(model, data, self._option, None, camera, mj.mjtCatBit.mjCAT_ALL.value, self._scene)
            mj.mjr_render(rect, self._scene, self._context)
            frame = np.empty((rect.height, rect.width, 3), np.uint8)
            mj.mjr_readPixels(frame, None, rect, self._context)
            frames[name] = np.ascontiguousarray(frame[::-1])
        return frames

    def geoms(self, model: Any, data: Any) -> np.ndarray:
        """i64[200,200]: which geom (MuJoCo id, -1 for none) every pixel of the static camera shows."""
        mj, flags = self._mj, (self._mj.mjtRndFlag.mjRND_SEGMENT, self._mj.mjtRndFlag.mjRND_IDCOLOR)
        self._gl.make_current()
        camera, rect = self._cameras["static"]
        mj.mjv_updateScene(model, data, self._option, None, camera, mj.mjtCatBit.mjCAT_ALL.value, self._scene)
        for flag in flags:
            self._scene.flags[flag] = 1
        mj.mjr_render(rect, self._scene, self._context)
        for flag in flags:
            self._scene.flags[flag] = 0
        frame = np.empty((rect.height, rect.width, 3), np.uint8)
        mj.mjr_readPixels(frame, None, rect, self._context)
        codes = (frame[::-1].astype(np.int64) * (1, 256, 65536)).sum(-1)
        ids = np.full(self._scene.ngeom + 1, -1)
        for shown in self._scene.geoms[: self._scene.ngeom]:
            if shown.segid >= 0 and shown.objtype == mj.mjtObj.mjOBJ_GEOM:
                ids[shown.segid + 1] = shown.objid
        return np.asarray(ids[codes])

    def description(self) -> str:
        from OpenGL import GL

        self._gl.make_current()
        return " ".join(GL.glGetString(part).decode() for part in (GL.GL_RENDERER, GL.GL_VERSION))

    def close(self) -> None:
        """A world lets go of them; the last one frees them."""
        self._holders -= 1
        if self._holders:
            return
        self._forget()
        self._gl.make_current()  # else what is freed belongs to whichever world was looked at last
        self._context.free()
        self._gl.free()
