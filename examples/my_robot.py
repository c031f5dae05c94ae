"""A source for a robot of your own: copy, change what differs, and name it where a format's name is asked for.

    upvla ingest --format examples.my_robot:MyRobot --source RECORDINGS --dataset mine --root STORE

A recording here is a folder: `log.csv` (x, y, z, gripper commands, then the tool's x, y, z; a row a step), `task.txt`,
and the pictures `front/000000.jpg` and so on. Whatever is wrong with one becomes a `BadEpisode` with a reason.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from upvla.errors import BadEpisode, UpvlaError
from upvla.store import content_hash, open_store
from upvla.types import ActionDim, ActionSpace, Episode, Span

RATE_HZ = 10.0
SPACE = ActionSpace(
    "my_robot",  # 1.0 is 5 cm in the base frame; the gripper opens at 1 and closes at 0
    (
        *(ActionDim(name, "m", "world", "relative", scale=0.05) for name in ("dx", "dy", "dz")),
        ActionDim("gripper", "gripper", "none", "absolute", low=0, high=1, convention="1=open,0=close"),
    ),
    dt_s=1 / RATE_HZ,
)


class MyRobot:
    format, notes = "my_robot", {}  # nothing odd is passed over

    def __init__(self, url: str):
        self.store = open_store(url)  # a folder, s3://, any fsspec URL

    def keys(self) -> Sequence[str]:
        return [key.removesuffix("/log.csv") for key in self.store.list() if key.endswith("/log.csv")]

    def token(self, key: str) -> str:
        return content_hash(self.store.tokens(f"{key}/"))  # changes when any file of the recording does

    def read(self, key: str) -> Episode:
        try:
            rows = np.loadtxt(io.BytesIO(self.store.read(f"{key}/log.csv")), delimiter=",", dtype=np.float32, ndmin=2)
            text = self.store.read(f"{key}/task.txt").decode().strip()
            frames = [self.store.read(f"{key}/front/{step:06d}.jpg") for step in range(len(rows))]
        except (UpvlaError, ValueError) as error:
            raise BadEpisode("unreadable_frame", f"{key}: {error}") from error
        spans = (Span(0, len(rows), text, text),)
        times = np.arange(len(rows)) / RATE_HZ
        images, actions, state = {"front": frames}, rows[:, :4], rows[:, 4:]
        return Episode(key, self.format, "my_arm", "lab", SPACE, RATE_HZ, times, images, state, actions, spans)
