"""The nouns, in the order in which data becomes them.

    EpisodeSource -> Episode -> Manifest -> MixturePlan -> Sample -> Batch -> Losses
                  -> Checkpoint -> ModelVersion -> Policy (Observation -> Prediction) -> Env -> EvalReport

Axes in shape comments: T steps of a recording, A action dims, S state dims, Q scene-state dims, C action chunk,
V camera views that are tokenised, N image codes a view, R robot rows, M question-answer rows, L tokens of a row.
Only numpy at run time: every room may import this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from upvla.errors import BadEpisode, Mismatch

# --------------------------------------------------------------------------------------------- what an action means


@dataclass(frozen=True)
class ActionDim:
    """One dimension of an action: its SI `unit`, and how many of those a value of 1.0 stands for (`scale`)."""

    name: str
    unit: Literal["m", "rad", "gripper", "one"]
    frame: Literal["world", "tcp", "joint", "none"]
    mode: Literal["relative", "absolute"]
    scale: float = 1.0
    low: float = -1.0
    high: float = 1.0
    convention: str = ""  # rotation: "euler_xyz"; gripper: "+1=open,-1=close", with ",continuous" if it may be between


@dataclass(frozen=True)
class ActionSpace:
    """What every dimension of an action means, and for how long it holds (`dt_s` seconds)."""

    name: str
    dims: tuple[ActionDim, ...]
    dt_s: float

    def __len__(self) -> int:
        return len(self.dims)

    def require_equal(self, other: ActionSpace, *, ours: str, theirs: str) -> None:
        """Raise `Mismatch`, naming the first dimension and field that differ."""
        if self is other or (self.dims, self.dt_s) == (other.dims, other.dt_s):
            return
        if len(self) != len(other):
            raise Mismatch(f"action space: {ours} has {len(self)} dimensions, {theirs} has {len(other)}")
        for i, (a, b) in enumerate(zip(self.dims, other.dims, strict=True)):
            for key, value in asdict(a).items():
                if value != getattr(b, key):
                    raise Mismatch(
                        f"action space: dimension {i} ({a.name}) differs in {key!r}: "
                        f"{ours} has {value!r}, {theirs} has {getattr(b, key)!r}"
                    )
        if self.dt_s != other.dt_s:
            raise Mismatch(f"action space: dt_s differs: {ours} has {self.dt_s}, {theirs} has {other.dt_s}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> ActionSpace:
        return ActionSpace(value["name"], tuple(ActionDim(**d) for d in value["dims"]), value["dt_s"])


CALVIN_RELATIVE = ActionSpace(
    "calvin_relative",
    (
        *(ActionDim(n, "m", "world", "relative", scale=0.02) for n in ("dx", "dy", "dz")),
        *(ActionDim(n, "rad", "world", "relative", scale=0.05, convention="euler_xyz") for n in ("da", "db", "dc")),
        ActionDim("gripper", "gripper", "none", "absolute", convention="+1=open,-1=close"),
    ),
    dt_s=1 / 30,
)
"""CALVIN's `rel_actions`: 0.02 m and 0.05 rad a unit, clipped to +-1, gripper +1 open / -1 close, 30 Hz."""


# ------------------------------------------------------------------------------------------------- one recording


@dataclass(frozen=True)
class Span:
    """A language annotation over the steps `[start, end)` of a recording; spans may overlap."""

    start: int
    end: int
    text: str
    task: str


@dataclass(frozen=True)
class Talk:
    """A conversation about one step of a recording, as rounds of (question, answer)."""

    step: int
    topic: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Episode:
    """One recording. Incoherent lengths raise `BadEpisode` at construction; `data.quality` judges the content.

    images: camera -> u8[T,H,W,3], or T encoded frames (JPEG or PNG bytes) kept as the source wrote them.
    scene_state follows CALVIN's 24 dims (slider, drawer, button, switch, bulb, LED, then three blocks, in the scene's
    own order, as position in m and euler xyz in rad) where the source has it.
    """

    id: str
    source: str
    embodiment: str
    scene: str
    action_space: ActionSpace
    rate_hz: float
    timestamps: np.ndarray  # f64[T] seconds
    images: Mapping[str, np.ndarray | Sequence[bytes]]
    state: np.ndarray  # f32[T,S]
    actions: np.ndarray  # f32[T,A]
    spans: tuple[Span, ...]
    absolute_actions: np.ndarray | None = None  # f32[T,A]
    scene_state: np.ndarray | None = None  # f32[T,Q]
    talks: tuple[Talk, ...] = ()  # conversations that the source brings along

    def __post_init__(self) -> None:
        steps = len(self.timestamps)
        lengths = {"state": len(self.state), "actions": len(self.actions)}
        lengths |= {f"images.{camera}": len(frames) for camera, frames in self.images.items()}
        for name in ("absolute_actions", "scene_state"):
            if getattr(self, name) is not None:
                lengths[name] = len(getattr(self, name))
        for name, length in lengths.items():
            if length != steps:
                raise BadEpisode("frame_count", f"{self.id}: {name} has {length} rows, timestamps has {steps}")

    def __len__(self) -> int:
        return len(self.timestamps)


class EpisodeSource(Protocol):
    """A place that recordings come from. Listing is cheap; reading one may raise `BadEpisode`.

    `notes` counts what the source itself found odd and passed over, such as a known erratum of a public set.
    """

    format: str
    notes: Mapping[str, int]

    def keys(self) -> Sequence[str]:
        """Stable identities of the recordings, in order."""
        ...

    def token(self, key: str) -> str:
        """A cheap string that changes whenever the recording's bytes may have changed."""
        ...

    def read(self, key: str) -> Episode: ...


@runtime_checkable
class KnowsLengths(Protocol):
    """What an `EpisodeSource` may know besides: how long a recording is, without reading it."""

    def num_steps(self, key: str) -> int: ...


# --------------------------------------------------------------------------------------------- a version of a table


@dataclass(frozen=True)
class ShardRef:
    """An immutable Parquet object under the dataset's root, named by its content."""

    key: str
    rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One version of a dataset; creating it is the commit. Everything it names is immutable."""

    dataset: str
    version: int
    parent: int | None
    shards: tuple[ShardRef, ...]
    index: tuple[ShardRef, ...]  # episode rows of each shard, same order
    qa: tuple[ShardRef, ...]  # question-answer rows; they reference (episode, step) and hold no pixels
    stats_id: str
    action_space: ActionSpace
    cameras: tuple[str, ...]
    num_episodes: int
    num_steps: int
    num_spans: int
    quarantined: Mapping[str, int] = field(default_factory=dict)  # reason -> count
    quarantine: ShardRef | None = None  # one row a rejected recording: key, reason, detail
    options: Mapping[str, Any] = field(default_factory=dict)  # how it was imported
    content_id: str = ""  # hash over the content above, free of URLs and clocks
    operation: Mapping[str, Any] = field(default_factory=dict)  # how it came from its parent
    format: int = 1  # of this description; readers refuse newer ones


# ------------------------------------------------------------------------------------------------------ a mixture


@dataclass(frozen=True)
class MixtureSource:
    """`weight` is this source's share of all draws after normalisation. `only`: which one of a robot row's objectives
    it is for; "" is both."""

    dataset: str
    version: int
    content_id: str
    kind: Literal["robot", "qa"]
    weight: float
    split: Literal["train", "validation"] = "train"
    where: Mapping[str, Any] = field(default_factory=dict)  # an `EpisodeFilter` as JSON
    cameras: Mapping[str, str] = field(default_factory=dict)  # the model's name -> this dataset's; "": no such view
    paraphrases: Mapping[str, Sequence[str]] = field(default_factory=dict)  # task -> wordings of one request
    only: Literal["", "prediction", "action"] = ""

    @property
    def name(self) -> str:
        """For people, as dataset/what its rows are for."""
        return f"{self.dataset}/{self.only or self.kind}"


@dataclass(frozen=True)
class MixturePlan:
    """Pure data that fixes the order of all samples: `sample_at(position)` is a function of it and the manifests."""

    sources: tuple[MixtureSource, ...]
    seed: int
    global_batch: int
    lanes: int = 1  # parallel streams that the order is dealt to; every world size divides them
    spread: float = 32.0  # row groups of one lane that are open at a time
    action_space: Mapping[str, Any] | None = None  # what all sources' actions are converted to, as JSON
    plan_id: str = ""  # content hash of the fields above


class SampleRef(NamedTuple):
    """Where a mixture position points: a window at `step` of a span, or a question about `step` of an episode."""

    source: int  # index into MixturePlan.sources
    kind: str  # "robot" or "qa"
    episode: int  # row of the dataset's episode index
    step: int
    span: int  # robot: which span of the episode; qa: -1
    qa: int  # qa: row of the question table; robot: -1


class Sample(NamedTuple):
    """One decoded row before batching. Robot rows carry actions; question-answer rows carry turns."""

    position: int
    kind: str
    images: Mapping[str, np.ndarray]  # camera -> u8[H,W,3] at the model's understanding size, or f32[P,D] features
    codes: np.ndarray | None  # i64[V,N] of the current frame
    future_codes: np.ndarray | None  # i64[V,N]
    actions: np.ndarray | None  # f32[C,A], padded by standing still with the last gripper value
    action_is_pad: np.ndarray | None  # bool[C]
    text: str  # robot: the instruction
    turns: tuple[tuple[str, str], ...]  # qa: (question, answer) rounds
    description: str = ""  # robot: what the model itself said of the scene before
    only: str = ""  # robot: the one objective that it is for, "prediction" or "action"


class Batch(NamedTuple):
    """What the model reads, rows of both kinds; numpy arrays or torch tensors. R or M may be 0.

    Ids are of the text tokenizer without task tokens: the row layout (special tokens, padding side, masks) is the
    model's (`model/sequence.py`). Padding value of `text_ids` and `qa_ids` is the pad id, of `qa_labels` -100.
    """

    text_ids: Any  # i64[R,L]  instruction ids, right-padded
    text_len: Any  # i64[R]
    images: (
        Any  # u8[R,K,H,W,3] frames for the understanding encoder's K cameras, or f32[R,K,P,D] features of a frozen one
    )
    codes: Any  # i64[R,V,N] current frame
    future_codes: Any  # i64[R,V,N]
    actions: Any  # f32[R,C,A]
    action_is_pad: Any  # bool[R,C]
    pre_mask: Any  # bool[R] whether the row's future frame counts
    act_mask: Any  # bool[R] whether the row's actions count
    qa_images: Any  # u8[M,K,H,W,3]
    qa_ids: Any  # i64[M,L]
    qa_labels: Any  # i64[M,L] same positions as qa_ids, -100 where not supervised
    positions: Any  # i64[R+M] mixture positions, robot rows first


# ---------------------------------------------------------------------------------------------------- learning


class Term(NamedTuple):
    """A sum over supervised elements and how many there were: means are taken over the *global* batch only."""

    total: Any  # f32[]
    count: Any  # f32[]


class Losses(NamedTuple):
    """Objectives by name (`pre`, `act`, `mmu`, `vq`) and what is only watched (e.g. `act_gripper`, `pre_accuracy`)."""

    objectives: dict[str, Term]
    watched: dict[str, Term]


@dataclass(frozen=True)
class Checkpoint:
    """A reference to an exported model folder, never tensors. `model_id` is the hash of its contents."""

    url: str
    model_id: str
    step: int
    run: str


# ------------------------------------------------------------------------------------------------ acting, judging


class Observation(NamedTuple):
    """What a robot sees and feels at one step."""

    images: Mapping[str, np.ndarray]  # camera -> u8[H,W,3]
    state: np.ndarray  # f32[S]
    scene_state: np.ndarray | None = None  # f32[Q], simulators only; a policy never reads it


class Prediction(NamedTuple):
    """A policy's answer: the next C actions, and the future frame it expects, as image codes."""

    actions: np.ndarray  # f32[C,A]
    future_codes: np.ndarray | None = None  # i64[V,N]


class Policy(Protocol):
    """`reset` once an instruction; `act` whenever the last chunk is spent."""

    @property
    def name(self) -> str: ...

    @property
    def action_space(self) -> ActionSpace: ...

    def reset(self, instruction: str) -> None: ...

    def act(self, observation: Observation) -> Prediction: ...


class Env(Protocol):
    """CALVIN's contract. Stepping is cheap; `observe` renders the cameras and is asked once a chunk."""

    name: str
    action_space: ActionSpace

    def reset(self, robot_state: np.ndarray, scene_state: np.ndarray) -> None: ...

    def step(self, action: np.ndarray) -> None: ...

    def observe(self) -> Observation: ...

    def info(self) -> Mapping[str, Any]:
        """What the task oracle compares between the start of a subtask and now."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """Package versions and renderer: two scores compare only if these are equal."""
        ...

    def close(self) -> None: ...


class Chain(NamedTuple):
    """Up to five tasks in a row from one initial state (CALVIN's long-horizon protocol)."""

    scene: str
    robot_state: np.ndarray  # f64[15]
    scene_state: np.ndarray  # f64[24]
    tasks: tuple[str, ...]
    seed: int


class ChainRecord(NamedTuple):
    """How far one chain got; `steps` are env steps a subtask, `error` why it could not be judged, else empty.

    `failure` is the kind of the failure that ended it (`upvla.rollout.failures.REASONS`), empty when none did.
    """

    number: int
    scene: str
    tasks: tuple[str, ...]
    succeeded: int
    steps: tuple[int, ...]
    error: str = ""
    failure: str = ""


class Estimate(NamedTuple):
    """A value with the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class EvalReport:
    """Scores of one policy under one protocol; reports with other fingerprints are not comparable.

    `protocol` is what must be equal (world, chains, words, limits, execution), `identity` who was judged (weights,
    statistics, cameras, resize): two models differ in it and compare all the same.
    """

    policy: str
    suite: str
    fingerprint: str  # of `protocol`
    records: tuple[ChainRecord, ...]
    success: tuple[Estimate, ...]  # at least 1..5 tasks of a chain done
    average_length: Estimate
    per_task: Mapping[str, Estimate]
    protocol: Mapping[str, Any]
    identity: Mapping[str, Any]


@dataclass(frozen=True)
class ModelVersion:
    """What registry and nightly flow compare."""

    name: str
    version: str
    alias: str
    checkpoint: Checkpoint
    tags: Mapping[str, str]
