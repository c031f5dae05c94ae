"""Weights and a seed -> the order of all samples. A position is one integer; everything else follows from it.

Every step is pure and none draws from a generator with a state:
1. Position p belongs to lane p % lanes, and is that lane's draw p // lanes. A world's ranks take whole lanes.
2. A lane's draw has a source: a repeating sequence in which each source keeps within one draw of its share, always
   (Tijdeman's chairman assignment); lanes begin at different places of it, so that every batch has its shares too.
3. What the lane takes from the source is the source's own order (`upvla/data/order.py`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from upvla.data.actions import ActionMap, declared_space
from upvla.data.order import Groups, Order
from upvla.data.shares import chairman
from upvla.data.stats import Statistics, Summary
from upvla.data.table import Dataset, EpisodeFilter, load_manifest
from upvla.errors import ConfigError, Mismatch
from upvla.store import Store, content_hash
from upvla.types import ActionSpace, MixturePlan, MixtureSource, SampleRef

_MAX_LANES = 64
_GAP = 12  # times the mean distance of a row group's samples in the order: one in 160,000 is further from the next
_SLACK = 4  # row groups, for a rank with few lanes that has larger ones than the mean


class SourceConfig(BaseModel):
    """One source of a mixture: robot windows or questions of a dataset, by default of its newest version.

    kind: what its rows are for: `robot` (the future frame and the actions, in one pass of the model), only one of these
    (`prediction`: its actions are never read, so it may have another action space; `action`), or `understanding` (its
    questions; `qa` is the same).
    weight: share of all draws after normalisation; left out, the source's own size decides (see `temperature`).
    version: a number or a tag; `dataset: name@version` is the same. where: which of its recordings. cameras: the
    model's camera -> this dataset's, where they are called differently; "" for a view that it lacks (shown black).
    paraphrases: task -> sentences that ask for the same, or the name of a world's own (`playtable`): an instruction
    that is one of its task's is told by any of them, drawn by position; every other one, and by default all, stay in
    the words that they were recorded with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    kind: Literal["robot", "prediction", "action", "qa"]
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    version: int | str | None = None
    where: EpisodeFilter = EpisodeFilter()
    cameras: dict[str, str] = {}
    paraphrases: str | dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = {}

    @model_validator(mode="before")
    @classmethod
    def _apart(cls, values: Any) -> Any:
        """`name@version` is taken apart, so that either way of writing it is the same configuration."""
        if isinstance(values, dict) and values.get("kind") == "understanding":
            values = values | {"kind": "qa"}
        if not isinstance(values, dict) or "@" not in str(values.get("dataset")):
            return values
        name, _, version = str(values["dataset"]).partition("@")
        given = values.get("version")
        if given is not None and str(given) != version:
            raise ValueError(f"dataset {values['dataset']} and version {given} are not the same: leave one of them out")
        return values | {"dataset": name, "version": int(version) if version.isdigit() else version}


class MixtureConfig(BaseModel):
    """What training draws from. `global_batch` counts rows over all ranks and accumulation steps.

    temperature: sources without a weight get size ** (1 / temperature): 1 draws every sample equally often, larger ones
    favour small sources. lanes: a divisor of the global batch that world sizes must divide; the largest up to 64 by
    default. pool_mb: memory for open row groups that the order is made for, see `open_mixture`. action_space: a known
    name or a whole declaration that the actions of all sources are converted to; without it they must agree.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    seed: int = 0
    global_batch: int = Field(gt=0)
    temperature: float = Field(default=1.0, ge=0.1, allow_inf_nan=False)
    lanes: int | None = Field(default=None, gt=0)
    pool_mb: int = Field(default=256, gt=0)
    action_space: str | dict[str, Any] | None = None

    def plan(
        self,
        store: Store,
        split: Literal["train", "validation"] = "train",
        worlds: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    ) -> MixturePlan:
        """Pin every source to a version of its dataset. `NotFound` where there is none, `ConfigError` where nothing of
        it can be drawn.

        worlds: paraphrases by the name under which a source may ask for them.
        """
        pinned = []
        datasets: dict[str, Dataset] = {}
        for source in self.sources:
            manifest = load_manifest(store, source.dataset, source.version)
            dataset = datasets.setdefault(source.dataset, Dataset(store, manifest))
            if dataset.manifest.version != manifest.version:
                raise ConfigError(
                    f"the mixture asks for v{dataset.manifest.version} and v{manifest.version} of dataset "
                    f"{source.dataset}: one plan reads one version of a dataset, so give all its sources the same"
                )
            draft = MixtureSource(
                dataset=source.dataset,
                version=manifest.version,
                content_id=manifest.content_id,
                kind="qa" if source.kind == "qa" else "robot",
                only=source.kind if source.kind in ("prediction", "action") else "",
                weight=source.weight or 1.0,
                split=split,
                where=source.where.model_dump(mode="json", exclude_defaults=True),
                cameras=source.cameras,
                paraphrases=_paraphrases(source, dataset, worlds or {}),
            )
            size = len(_Samples(dataset, draft))
            if source.weight is None:
                draft = replace(draft, weight=size ** (1 / self.temperature))
            pinned.append(draft)
        lanes = self.lanes or max(n for n in range(1, _MAX_LANES + 1) if self.global_batch % n == 0)
        groups = [dataset.row_group_bytes for dataset in datasets.values()]
        spread = max(1.0, self.pool_mb * 2**20 / (lanes * len(groups) * max(1, *groups)))
        space = declared_space(self.action_space, "the mixture").to_json() if self.action_space else None
        return make_plan(
            pinned, self.seed, self.global_batch, lanes=lanes, spread=float(f"{spread:.2g}"), action_space=space
        )


def make_plan(
    sources: Sequence[MixtureSource],
    seed: int,
    global_batch: int,
    *,
    lanes: int = 1,
    spread: float = 32.0,
    action_space: Mapping[str, Any] | None = None,
) -> MixturePlan:
    """Raises `ConfigError` where the order would not be defined."""
    if not sources or global_batch < 1:
        raise ConfigError(f"a mixture needs a source and a global batch of at least 1, not {global_batch}")
    if lanes < 1 or global_batch % lanes:
        raise ConfigError(f"lanes={lanes} do not divide a global batch of {global_batch}; choose a divisor of it")
    for source in sources:
        if not 0 < source.weight < math.inf:
            raise ConfigError(f"mixture source {source.name}: weight {source.weight} is not positive and finite")
    plan = MixturePlan(tuple(sources), seed, global_batch, lanes, spread, action_space)
    return replace(plan, plan_id=content_hash(_identity(plan)))


def plan_from_json(value: Mapping[str, Any]) -> MixturePlan:
    """The inverse of `dataclasses.asdict`; refuses a plan whose content does not match its id."""
    sources = tuple(MixtureSource(**source) for source in value["sources"])
    options = {name: value[name] for name in ("lanes", "spread", "action_space") if name in value}
    plan = make_plan(sources, value["seed"], value["global_batch"], **options)
    if plan.plan_id != value["plan_id"]:
        raise Mismatch(f"mixture plan {value['plan_id']} was changed after it was made; make it again")
    return plan


def _identity(plan: MixturePlan) -> dict[str, Any]:
    """What the id is a hash of. Plans that do not use what came later have the ids that they had before."""
    value = asdict(plan)
    for source in value["sources"]:
        for since in ("paraphrases", "only"):
            if not source[since]:
                del source[since]
    return value


def _paraphrases(
    source: SourceConfig, dataset: Dataset, worlds: Mapping[str, Mapping[str, Sequence[str]]]
) -> dict[str, list[str]]:
    """task -> sentences; `ConfigError` where they would change no instruction of the dataset."""
    found: str | Mapping[str, Sequence[str]] = source.paraphrases
    if isinstance(found, str):
        if found not in worlds:
            raise ConfigError(
                f"mixture source {source.dataset}/{source.kind}: no paraphrases are called {found!r}; known: "
                f"{', '.join(sorted(worlds)) or 'none'}, or list them: task -> sentences"
            )
        found = worlds[found]
    spans = (span for episode in dataset.episodes for span in episode.spans)
    if found and (source.kind == "qa" or not any(span.text in found.get(span.task, ()) for span in spans)):
        raise ConfigError(
            f"mixture source {source.dataset}/{source.kind} has no instruction that is one of its paraphrases: list a "
            "task's recorded sentence among them, or leave `paraphrases` out to train on the recordings' own words"
        )
    return {task: list(sentences) for task, sentences in found.items()}


def open_mixture(store: Store, plan: MixturePlan, world_size: int = 1) -> Mixture:
    """With its datasets, each of which keeps in memory the row groups that one of `world_size` ranks has open, so that
    they are read once an epoch. All ranks together keep 1.3 to 1.8 times the `pool_mb` that the plan was made for, if
    that has room for a row group a lane; more where few samples of a row group are drawn."""
    pinned = {source.dataset: source.version for source in plan.sources}
    mixture = Mixture(
        plan, {name: Dataset(store, load_manifest(store, name, version)) for name, version in pinned.items()}
    )
    for name, dataset in mixture.datasets.items():
        dataset.keep(mixture.row_groups_open(name) / world_size + _SLACK)
    return mixture


class Mixture:
    """A plan over open datasets. `sample_at` is a pure function of the position; threads may share it."""

    def __init__(self, plan: MixturePlan, datasets: Mapping[str, Dataset]):
        self.plan, self.datasets = plan, dict(datasets)
        self._samples: list[_Samples] = []
        for source in plan.sources:
            dataset = self.datasets.get(source.dataset)
            if dataset is None:
                raise ConfigError(f"the mixture needs dataset {source.dataset!r}; given: {sorted(self.datasets)}")
            if dataset.manifest.content_id != source.content_id:
                raise Mismatch(
                    f"mixture {plan.plan_id} was made for content {source.content_id} of {source.dataset} v"
                    f"{source.version}, opened is {dataset.manifest.content_id} v{dataset.manifest.version}"
                )
            self._samples.append(_Samples(dataset, source))
        self._turns, self._ranks, self._shares = chairman(tuple(source.weight for source in plan.sources))
        period = len(self._turns)
        self._begins = [lane * period // plan.lanes for lane in range(plan.lanes)]
        self._before = np.stack([np.cumsum(self._turns == s) - (self._turns == s) for s in range(len(plan.sources))])
        self._orders = [
            Order(
                samples.groups,
                seed=plan.seed,
                name=f"{number}/{source.dataset}/{source.kind}/{source.split}",
                lanes=plan.lanes,
                spread=plan.spread,
            )
            for number, (source, samples) in enumerate(zip(plan.sources, self._samples, strict=True))
        ]

    def __len__(self) -> int:
        """Positions until every source has been seen at least once."""
        return max(-(-len(s) * len(self._turns) // share) for s, share in zip(self._samples, self._shares, strict=True))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each source, in the plan's order."""
        return tuple(map(len, self._samples))

    def row_groups_open(self, dataset: str) -> float:
        """How many row groups of a dataset all lanes together go back to, at any place of the order: by lane `spread`,
        those that are passed until the next sample of one comes, and half of one, as lanes that leave row groups at the
        same time hold two."""
        total = 0.0
        for source, samples in zip(self.plan.sources, self._samples, strict=True):
            if source.dataset == dataset:
                per_group = len(samples) / samples.groups.num_groups
                total += self.plan.lanes * (self.plan.spread * (1 + _GAP / per_group) + 0.5)
        return total

    @property
    def action_space(self) -> ActionSpace:
        """Of every robot sample: the plan's, or what all sources share."""
        if self.plan.action_space is not None:
            return ActionSpace.from_json(self.plan.action_space)
        first, *others = [self.datasets[self.plan.sources[i].dataset].manifest for i in self._acting or (0,)]
        for other in others:
            first.action_space.require_equal(
                other.action_space,
                ours=f"dataset {first.dataset}",
                theirs=f"dataset {other.dataset} (declare the mixture's action_space to convert them)",
            )
        return first.action_space

    @property
    def has_actions(self) -> bool:
        """Whether there is a source whose actions count."""
        return bool(self._acting)

    def action_map(self, source: int) -> ActionMap | None:
        """What turns this source's actions into the mixture's; None where they are the same."""
        dataset, target = self.datasets[self.plan.sources[source].dataset], self.action_space
        if dataset.manifest.action_space == target or source not in self._acting:
            return None
        found = ActionMap(dataset.manifest.action_space, target)
        if found.needs_pose:
            raise Mismatch(
                f"dataset {dataset.manifest.dataset} has {dataset.manifest.action_space.name} actions, {target.name} "
                "needs the tool's pose at every step: convert them when they are ingested"
            )
        return found

    @functools.cached_property
    def stats(self) -> Statistics:
        """Over the training recordings of all sources whose actions count, converted; one dataset's are its own."""
        names = {self.plan.sources[i].dataset for i in self._acting or (0,)}
        plain = all(not self.plan.sources[i].where and self.action_map(i) is None for i in self._acting)
        if plain and len(names) == 1:
            return self.datasets[names.pop()].stats
        return Statistics.merged(summary for i in self._acting for summary in self._summaries(i))

    @functools.cached_property
    def _acting(self) -> list[int]:
        """The sources whose actions count. Where none has any, the first source says what they would be."""
        return [i for i, s in enumerate(self.plan.sources) if s.kind == "robot" and s.only != "prediction"]

    def share(self, start: int, end: int) -> dict[str, float]:
        """What fraction of the positions `[start, end)` each source, by name, really has."""
        counts = Counter(self.plan.sources[self.sample_at(p).source].name for p in range(start, end))
        return {source.name: counts[source.name] / (end - start) for source in self.plan.sources}

    def sample_at(self, position: int) -> SampleRef:
        draw, lane = divmod(position, self.plan.lanes)
        begin = self._begins[lane]
        period, turn = divmod(draw + begin, len(self._turns))
        source = int(self._turns[turn])
        nth = period * self._shares[source] + int(self._ranks[turn]) - int(self._before[source, begin])
        return self._samples[source].at(source, self._orders[source].number(lane, nth))

    def origin(self, position: int) -> dict[str, Any]:
        """What a person looks a sample up by, as JSON: dataset and version, recording, step."""
        ref = self.sample_at(position)
        source = self.plan.sources[ref.source]
        recording = self.datasets[source.dataset].episodes[ref.episode].id
        dataset = f"{source.dataset}@{source.version}"
        return {"position": position, "dataset": dataset, "recording": recording, "step": ref.step}

    def _summaries(self, number: int) -> Sequence[Mapping[str, Summary]]:
        source, convert = self.plan.sources[number], self.action_map(number)
        dataset, where = self.datasets[source.dataset], EpisodeFilter.model_validate(source.where)
        found = []
        for i, (row, summary) in enumerate(zip(dataset.episodes, dataset.summaries(), strict=True)):
            if row.split == "train" and where.fits(row):
                if convert:
                    actions = dataset.read(i, range(row.length), ["action"])["action"]
                    summary = summary | {"action": Summary.of(convert(actions))}
                found.append(summary)
        return found


class _Samples:
    """What one source offers, numbered so that the samples of a row group are neighbours.

    Robot: every (span, step) of the split. Questions: rows whose wording is for the split. `ConfigError` where there is
    none: a source is endless, each of its epochs in another order, and an empty one has nothing to repeat.
    """

    def __init__(self, dataset: Dataset, source: MixtureSource):
        self._kind, where = source.kind, EpisodeFilter.model_validate(source.where)
        chosen = [row.split == source.split and where.fits(row) for row in dataset.episodes]
        ranges: Iterator[tuple[int, int, int, int]]  # recording, span or question, first step, end
        if source.kind == "robot":
            ranges = (
                (row, i, span.start, span.end)
                for row, episode in enumerate(dataset.episodes)
                if chosen[row]
                for i, span in enumerate(episode.spans)
                if where.takes(span)
            )
        else:
            wording = "train" if source.split == "train" else "held_out"
            ranges = (
                (row.episode, i, row.step, row.step + 1)
                for i, row in enumerate(dataset.qa)
                if row.template_split in (wording, "both") and chosen[row.episode]
            )
        flat = np.fromiter(itertools.chain.from_iterable(ranges), np.int64)
        if not len(flat):
            fits = f" that fit {dict(source.where)}" if source.where else ""
            raise ConfigError(
                f"{source.dataset} v{source.version} has no {source.kind} samples in its {source.split} split{fits}; "
                "ingest more recordings or drop the source"
            )
        rows, which, starts, ends = flat.reshape(-1, 4).T
        of, groups, first_steps, end_steps = dataset.row_groups_of(rows, starts, ends)
        order = np.lexsort((which[of], rows[of], groups))
        self._pieces = np.stack([groups, rows[of], which[of], first_steps, end_steps], axis=1)[order]
        lengths = self._pieces[:, 4] - self._pieces[:, 3]
        self._ends = np.cumsum(lengths)
        first = np.flatnonzero(np.diff(self._pieces[:, 0], prepend=-1))
        edges = np.append((self._ends - lengths)[first], len(self))
        self.groups = Groups(len(first), edges.__getitem__)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def at(self, source: int, number: int) -> SampleRef:
        where = int(self._ends.searchsorted(number, side="right"))
        _, row, which, _, end = self._pieces[where].tolist()
        step = end - int(self._ends[where]) + number
        robot = self._kind == "robot"
        return SampleRef(source, self._kind, row, step, which if robot else -1, -1 if robot else which)
