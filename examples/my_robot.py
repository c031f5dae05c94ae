"""A source for a robot of your own: copy it into your folder, change what differs, and say there:

    upvla ingest --format my_robot:MyRobot --source RECORDINGS --dataset mine --root STORE

A recording here is a folder: `log.csv` (x, y, z, gripper commands, then the tool's x, y, z; a row a step), `task.txt`,
and the pictures `front/000000.jpg` and so on. Whatever is wrong with one becomes a `BadEpisode` with a reason.
"""

import io

import numpy as np

from upvla.errors import BadEpisode, UpvlaError
from upvla.store import content_hash, open_store
from upvla.types import ActionDim, ActionSpace, Episode, Span

RATE_HZ = 10.0
MOVES = [ActionDim(name, "m", "world", "relative", scale=0.05) for name in ("dx", "dy", "dz")]  # 1.0 is 5 cm
GRIPPER = ActionDim("gripper", "gripper", "none", "absolute", low=0, high=1, convention="1=open,0=close")
SPACE = ActionSpace("my_robot", (*MOVES, GRIPPER), dt_s=1 / RATE_HZ)


class MyRobot:
    format, notes = "my_robot", dict[str, int]()  # nothing odd is passed over

    def __init__(self, url: str):
        self.store = open_store(url)  # a folder, s3://, any fsspec URL

    def keys(self) -> list[str]:
        return [key.removesuffix("/log.csv") for key in self.store.list() if key.endswith("/log.csv")]

    def token(self, key: str) -> str:
        return content_hash(self.store.tokens(f"{key}/"))  # changes when any file of the recording does

    def read(self, key: str) -> Episode:
        try:
            rows = np.loadtxt(io.BytesIO(self.store.read(f"{key}/log.csv")), np.float32, delimiter=",", ndmin=2)
            text = self.store.read(f"{key}/task.txt").decode().strip()
            frames = [self.store.read(f"{key}/front/{step:06d}.jpg") for step in range(len(rows))]
        except (UpvlaError, ValueError) as error:
            raise BadEpisode("unreadable_frame", f"{key}: {error}") from error
        times, images, spans = np.arange(len(rows)) / RATE_HZ, {"front": frames}, (Span(0, len(rows), text, text),)
        state, actions = rows[:, 4:], rows[:, :4]
        return Episode(key, self.format, "my_arm", "lab", SPACE, RATE_HZ, times, images, state, actions, spans)
