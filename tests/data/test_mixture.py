from __future__ import annotations

import json
import random
import resource
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.parquet import FileMetaData, ParquetFile
from pydantic import ValidationError

from tests.data.test_table import OPTIONS, make_episode, put, staged_of
from upvla.data import rowgroups
from upvla.data.commit import commit
from upvla.data.mixture import Mixture, MixtureConfig, make_plan, plan_from_json
from upvla.data.objects import put_table
from upvla.data.order import permutation
from upvla.data.samples import Collator, SampleReader
from upvla.data.shards import Layout, stage
from upvla.data.shares import chairman
from upvla.data.table import Dataset, load_manifest
from upvla.data.versions import dataset_root
from upvla.errors import ConfigError, Mismatch, NotFound
from upvla.images import Resize
from upvla.store import LocalStore, open_store
from upvla.types import CALVIN_RELATIVE, ActionSpace, MixturePlan, MixtureSource


def config(*weights: float, global_batch: int = 16, seed: int = 0, **more: int) -> MixtureConfig:
    kinds = ("robot", "qa")
    sources = [{"dataset": "table", "kind": kind, "weight": w} for kind, w in zip(kinds, weights, strict=False)]
    return MixtureConfig.model_validate({"sources": sources, "global_batch": global_batch, "seed": seed} | more)


def mixture(dataset: Dataset, *weights: float, split: str = "train", **options: int) -> Mixture:
    return Mixture(config(*weights, **options).plan(dataset.store, split), {"table": dataset})  # type: ignore[arg-type]


def test_every_window_is_seen_once_an_epoch_in_another_order_each_time(dataset: Dataset) -> None:
    found = mixture(dataset, 1.0, global_batch=8)
    (size,) = found.sizes
    expected = {
        (row, i, step)
        for row, episode in enumerate(dataset.episodes)
        if episode.split == "train"
        for i, span in enumerate(episode.spans)
        for step in range(span.start, span.end)
    }
    assert len(expected) == size
    lanes = found.plan.lanes
    assert lanes == 8
    for epoch in (0, 1, 5):  # every lane's part of an epoch, put together, is each window once
        refs = []
        for lane in range(lanes):
            part = (lane + 1) * size // lanes - lane * size // lanes
            refs += [found.sample_at(lane + lanes * n) for n in range(epoch * part, (epoch + 1) * part)]
        assert Counter((r.episode, r.span, r.step) for r in refs) == Counter(dict.fromkeys(expected, 1))
    first, second = ([found.sample_at(p) for p in range(start, start + 40)] for start in (0, lanes * -(-size // lanes)))
    assert first != second


def test_shares_are_exact_in_every_batch_that_allows_it(dataset: Dataset) -> None:
    found = mixture(dataset, 3, 1)
    for batch in range(50):
        kinds = Counter(found.sample_at(p).kind for p in range(16 * batch, 16 * batch + 16))
        assert kinds == {"robot": 12, "qa": 4}
    assert found.share(0, 160) == {"table/robot": 0.75, "table/qa": 0.25}


def test_every_ranks_stride_gets_every_source(dataset: Dataset) -> None:
    found = mixture(dataset, 3, 1)
    for rank in range(4):
        kinds = Counter(found.sample_at(p).kind for p in range(rank, 1600, 4))
        assert kinds["qa"] == pytest.approx(100, abs=25)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_no_source_is_ever_a_draw_away_from_its_share(weights: list[int]) -> None:
    turns, ranks, counts = chairman(tuple(map(float, weights)))
    shares = np.array(weights) / sum(weights)
    drawn = np.zeros(len(weights), int)
    for n, (turn, rank) in enumerate(zip(turns, ranks, strict=True), start=1):
        assert rank == drawn[turn]
        drawn[turn] += 1
        assert np.abs(drawn - shares * n).max() < 1
    assert tuple(drawn) == counts


def test_awkward_weights_still_come_true() -> None:
    for weights in ((0.1, 0.2, 0.7), (1e-4, 1.0), (np.pi, np.e), (1 / 3, 2 / 3)):
        _, _, counts = chairman(weights)
        assert np.allclose(np.array(counts) / sum(counts), np.array(weights) / sum(weights), atol=2e-4)
        assert min(counts) >= 1 and sum(counts) <= 20_000


def test_the_order_is_pure_and_no_global_generator_matters(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a global random generator was used")

    positions = [*range(60), 10_000, 10**9, 5]
    expected = [mixture(dataset, 2, 1).sample_at(p) for p in positions]
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    for name in ("seed", "random", "rand", "randint", "permutation", "shuffle", "choice", "default_rng"):
        monkeypatch.setattr(np.random, name, refuse)
    for name in ("random", "randint", "shuffle", "choice", "sample", "getrandbits"):
        monkeypatch.setattr(random, name, refuse)
    other = mixture(dataset, 2, 1)
    assert [other.sample_at(p) for p in reversed(positions)][::-1] == expected


def test_the_order_itself_is_pinned() -> None:
    """Runs resume across releases: a change here is a change of every plan that was ever written down."""
    assert permutation(10, 3, "a", 1).tolist() == [6, 8, 7, 0, 1, 4, 9, 5, 2, 3]
    assert chairman((3.0, 2.0, 1.0))[0].tolist() == [0, 1, 0, 2, 1, 0]


def test_seeds_batches_and_sources_make_other_plans(dataset: Dataset) -> None:
    plans = [
        config(1, 1).plan(dataset.store),
        config(1, 1, seed=1).plan(dataset.store),
        config(1, 2).plan(dataset.store),
        config(1, 1, global_batch=8).plan(dataset.store),
        config(1, 1).plan(dataset.store, "validation"),
    ]
    assert len({plan.plan_id for plan in plans}) == len(plans)
    assert plan_from_json(json.loads(json.dumps(asdict(plans[0])))) == plans[0]
    with pytest.raises(Mismatch, match="changed after"):
        plan_from_json(asdict(plans[0]) | {"seed": 9})


def test_paraphrases_are_a_part_of_the_plan_and_none_leaves_its_id_as_it_was(dataset: Dataset) -> None:
    def plan(**more: object) -> MixturePlan:
        settings = {"sources": [{"dataset": "table", "kind": "robot", "weight": 1} | more], "global_batch": 16}
        return MixtureConfig.model_validate(settings).plan(dataset.store, "train", {"toy": words})

    words = {"open_drawer": ["pull the handle to open the drawer", "open it"]}
    plain, told, other = plan(), plan(paraphrases=words), plan(paraphrases={"open_drawer": words["open_drawer"][:1]})
    assert len({plain.plan_id, told.plan_id, other.plan_id}) == 3
    assert plan(paraphrases="toy") == told == plan_from_json(json.loads(json.dumps(asdict(told))))
    sources = [MixtureSource("table", 1, "c0ffee", "robot", 3.0), MixtureSource("table", 1, "c0ffee", "qa", 1.0)]
    assert make_plan(sources, 0, 16, lanes=16).plan_id == "ab8008af48df9376"  # of a release without paraphrases
    with pytest.raises(ConfigError, match="no paraphrases are called 'playtable'; known: toy, or list them"):
        plan(paraphrases="playtable")
    for wrong in ({"paraphrases": {"open_drawer": ["open it"]}}, {"paraphrases": words, "kind": "qa"}):
        with pytest.raises(ConfigError, match=r"table/(robot|qa) has no instruction that is one of its paraphrases"):
            plan(**wrong)
    with pytest.raises(ValidationError, match="at least 1 item"):
        plan(paraphrases={"open_drawer": []})


def test_a_lane_keeps_few_row_groups_open_and_reads_each_once(tmp_path: Path) -> None:
    layout = Layout(row_group_bytes=1, max_row_group_bytes=1_000_000, shard_bytes=30_000)  # one recording a group
    store = open_store(str(tmp_path))
    manifest = put(store, range(60), layout=layout, fraction=0.0)
    source = MixtureSource("d", 1, manifest.content_id, "robot", 1.0)
    found = Mixture(make_plan([source], 0, 4, lanes=4, spread=3.0), {"d": Dataset(store, manifest)})
    (size,) = found.sizes
    for epoch in range(2):
        batches = [
            [found.sample_at(p).episode for p in range(4 * b, 4 * b + 4)]
            for b in range(epoch * size // 4, (epoch + 1) * size // 4)
        ]
        first, last = {}, {}
        for number, batch in enumerate(batches):
            for group in batch:
                first.setdefault(group, number)
                last[group] = number
        open_at = [sum(first[g] <= n <= last[g] for g in first) for n in range(len(batches))]
        assert len(first) == 60 and max(open_at) <= 4 * (3 + 2)
        assert np.mean([len(set(batch)) for batch in batches]) > 3.5  # of 4


@pytest.fixture(scope="module")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Forty shards of one recording, half of which span two row groups."""
    store = open_store(str(tmp_path_factory.mktemp("scattered")))
    layout = Layout(row_group_bytes=1, max_row_group_bytes=6_000, shard_bytes=1)
    staged = staged_of(store, [make_episode(number, 4 + 8 * (number % 2)) for number in range(40)], layout)
    return Dataset(store, commit(store, "d", [staged], validation_fraction=0.0, options=OPTIONS))


def test_a_mixture_of_many_shards_opens_none_and_keeps_few_open(
    scattered: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(store: LocalStore, key: str, metadata: FileMetaData | None = None) -> ParquetFile:
        opened.append(key)
        return original(store, key, metadata)

    original = LocalStore.parquet
    monkeypatch.setattr(LocalStore, "parquet", counted)
    monkeypatch.setattr(rowgroups, "_OPEN_FILES", 8)
    dataset = Dataset(scattered.store, scattered.manifest)
    found = Mixture(make_plan([MixtureSource("d", 1, dataset.manifest.content_id, "robot", 1.0)], 0, 4), {"d": dataset})
    assert len(dataset.manifest.shards) == 40 and not opened
    reader = SampleReader(found, chunk=2, cameras=["static"], resize=Resize(size=16))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len([*Path("/proc/self/fd").iterdir()]) + 16, hard))
    try:
        for position in range(len(found)):
            reader.read(found.sample_at(position), position)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert {key for key in opened if key.startswith("data/")} == {shard.key for shard in dataset.manifest.shards}


def test_indexes_without_row_groups_give_the_same_order(scattered: Dataset) -> None:
    """As an older upvla wrote them: footers say where row groups begin."""
    root = scattered.root
    older = [
        put_table(root, "index", root.parquet(ref.key).read().drop_columns("row_groups"))
        for ref in scattered.manifest.index
    ]
    before = Dataset(scattered.store, replace(scattered.manifest, index=tuple(older)))
    plan = make_plan([MixtureSource("d", 1, before.manifest.content_id, "robot", 1.0)], 0, 4, lanes=4, spread=2.0)
    one, other = (Mixture(plan, {"d": dataset}) for dataset in (before, scattered))
    assert before.row_group_bytes == scattered.row_group_bytes
    assert one._samples[0].groups.num_groups > len(older)
    assert [one.sample_at(p) for p in range(500)] == [other.sample_at(p) for p in range(500)]


def test_ranks_of_any_world_take_whole_lanes(dataset: Dataset) -> None:
    found = mixture(dataset, 2, 1, lanes=8)
    everything = [found.sample_at(p) for p in range(160)]
    for world in (1, 2, 4, 8):
        dealt = {p: found.sample_at(p) for rank in range(world) for p in range(rank, 160, world)}
        assert [dealt[p] for p in range(160)] == everything
        assert all(p % 8 % world == rank for rank in range(world) for p in range(rank, 160, world))
    with pytest.raises(ConfigError, match="lanes=3 do not divide a global batch of 16"):
        mixture(dataset, 1, lanes=3)


def test_sources_without_weights_go_by_size_and_temperature(dataset: Dataset) -> None:
    def weights(temperature: float) -> list[float]:
        settings = {"sources": [{"dataset": "table", "kind": kind} for kind in ("robot", "qa")]}
        plan = MixtureConfig.model_validate(settings | {"global_batch": 4, "temperature": temperature}).plan(
            dataset.store
        )
        return [source.weight for source in plan.sources]

    robot, asked = mixture(dataset, 1, 1).sizes
    assert weights(1.0) == [robot, asked]
    assert weights(2.0) == pytest.approx([robot**0.5, asked**0.5])
    low, high = weights(1000.0)
    assert low == pytest.approx(high, rel=0.01)


def test_filters_choose_recordings_and_spans(dataset: Dataset) -> None:
    def only(**where: object) -> Mixture:
        settings = {"sources": [{"dataset": "table", "kind": "robot", "weight": 1, "where": where}], "global_batch": 4}
        return Mixture(MixtureConfig.model_validate(settings).plan(dataset.store), {"table": dataset})

    found = only(tasks=["open_drawer"])
    refs = [found.sample_at(p) for p in range(2 * found.sizes[0])]
    assert {dataset.episodes[r.episode].spans[r.span].task for r in refs} == {"open_drawer"}
    found = only(scenes=["calvin_scene_B"], min_steps=20)
    assert {dataset.episodes[found.sample_at(p).episode].scene for p in range(100)} == {"calvin_scene_B"}
    assert plan_from_json(json.loads(json.dumps(asdict(found.plan)))).plan_id == found.plan.plan_id
    with pytest.raises(ConfigError, match=r"no robot samples.*that fit \{'scenes': \['Z'\]\}"):
        only(scenes=["Z"])
    assert found.stats.features["action"].count == sum(
        e.length for e in dataset.episodes if e.split == "train" and e.scene == "calvin_scene_B" and e.length >= 20
    )
    assert mixture(dataset, 1).stats == dataset.stats


def test_other_action_spaces_are_converted_or_named(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    put(store, range(4), fraction=0.0)
    turned = replace(
        CALVIN_RELATIVE,
        name="turned",
        dims=(
            *(replace(dim, scale=dim.scale * 2) for dim in CALVIN_RELATIVE.dims[:6]),
            replace(CALVIN_RELATIVE.dims[6], convention="-1=open,+1=close"),
        ),
    )
    episodes = [replace(make_episode(n), id=f"turned-{n}", action_space=turned) for n in range(4, 8)]
    staged = stage(dataset_root(store, "other"), [(episode, "token") for episode in episodes])
    commit(store, "other", [staged], validation_fraction=0.0, options=OPTIONS)
    settings: dict[str, object] = {
        "global_batch": 4,
        "sources": [{"dataset": name, "kind": "robot", "weight": 1} for name in ("d", "other")],
    }
    datasets = {name: Dataset(store, load_manifest(store, name)) for name in ("d", "other")}
    plain = Mixture(MixtureConfig.model_validate(settings).plan(store), datasets)
    with pytest.raises(Mismatch, match=r"dimension 0 \(dx\) differs in 'scale'.*declare the mixture's action_space"):
        SampleReader(plain, chunk=2, cameras=["static"], resize=Resize(size=16))
    plan = MixtureConfig.model_validate(settings | {"action_space": "calvin_relative"}).plan(store)
    found = Mixture(plan_from_json(json.loads(json.dumps(asdict(plan)))), datasets)
    reader = SampleReader(found, chunk=1, cameras=["static"], resize=Resize(size=16))
    kinds = set()
    for position in range(40):
        ref = found.sample_at(position)
        row = datasets[plan.sources[ref.source].dataset].episodes[ref.episode]
        meant = make_episode(int(row.source_key.rpartition("-")[2])).actions[ref.step]
        if ref.source == 1:
            meant = np.r_[np.clip(meant[:6] * 2, -1, 1), -meant[6]]
        (move,) = reader.read(ref, position).actions  # type: ignore[misc]
        assert np.allclose(move, meant, atol=1e-5)
        kinds.add(ref.source)
    assert kinds == {0, 1}
    assert found.stats.features["action"].count == 8 * 12
    assert found.stats.stats_id not in {dataset.manifest.stats_id for dataset in datasets.values()}


def test_recordings_of_another_action_space_may_be_for_prediction_alone(tmp_path: Path) -> None:
    """Their actions are not read, change neither space nor statistics, and count for nothing."""
    store = open_store(str(tmp_path))
    put(store, range(4), fraction=0.0)
    hand = ActionSpace("hand", CALVIN_RELATIVE.dims[:3], 30.0)
    episodes = [make_episode(n) for n in range(4, 8)]
    episodes = [replace(e, id=f"hand-{e.id}", action_space=hand, actions=e.actions[:, :3]) for e in episodes]
    staged = stage(dataset_root(store, "hands"), [(episode, "token") for episode in episodes])
    commit(store, "hands", [staged], validation_fraction=0.0, options=OPTIONS)
    datasets = {name: Dataset(store, load_manifest(store, name)) for name in ("d", "hands")}

    def of(**kinds: str) -> Mixture:
        sources = [{"dataset": name, "kind": kind, "weight": 1} for name, kind in kinds.items()]
        plan = MixtureConfig.model_validate({"global_batch": 4, "sources": sources}).plan(store)
        return Mixture(plan_from_json(json.loads(json.dumps(asdict(plan)))), datasets)

    with pytest.raises(Mismatch, match="hand"):
        _ = of(d="robot", hands="robot").action_space
    found = of(d="action", hands="prediction")
    assert found.has_actions and found.action_space == CALVIN_RELATIVE
    assert found.stats.stats_id == datasets["d"].manifest.stats_id
    assert found.share(0, 8) == {"d/action": 0.5, "hands/prediction": 0.5}
    reader = SampleReader(found, chunk=2, cameras=["static"], resize=Resize(size=16))
    samples = [reader.read(found.sample_at(position), position) for position in range(8)]
    batch = Collator(reader.shape, lambda text: [1], lambda turns: ([], []), 0)(samples)
    assert batch.pre_mask.tolist() == [sample.only == "prediction" for sample in samples]
    assert batch.act_mask.tolist() == (~batch.pre_mask).tolist() and 0 < batch.act_mask.sum() < 8
    assert batch.actions.shape == (8, 2, 7) and not batch.actions[batch.pre_mask].any()
    assert not of(hands="prediction").has_actions


def test_a_source_for_both_objectives_and_one_for_one_of_them_have_their_own_plans(dataset: Dataset) -> None:
    def plan_id(kind: str) -> str:
        source = {"dataset": "table", "kind": kind, "weight": 1}
        return MixtureConfig.model_validate({"global_batch": 4, "sources": [source]}).plan(dataset.store).plan_id

    assert len({plan_id(kind) for kind in ("robot", "prediction", "action", "understanding")}) == 4
    assert plan_id("understanding") == plan_id("qa")


def test_an_empty_source_has_no_plan_and_a_small_one_is_repeated_in_its_share(dataset: Dataset) -> None:
    def plan(**of_second: object) -> MixturePlan:
        robot = {"dataset": "table", "kind": "robot"}
        settings = {"sources": [robot | {"weight": 1}, robot | of_second], "global_batch": 8}
        return MixtureConfig.model_validate(settings).plan(dataset.store)

    for weight in (1, None):
        with pytest.raises(ConfigError, match=r"table v1 has no robot samples in its train split that fit .*drop"):
            plan(where={"tasks": ["fly"]}, weight=weight)
    found = Mixture(plan(where={"tasks": ["open_drawer"]}, weight=1), {"table": dataset})
    whole, small = found.sizes
    assert small < whole
    refs = [found.sample_at(position) for position in range(8 * -(-whole // 4))]
    seen = Counter(ref[1:] for ref in refs if ref.source == 1)
    assert len(seen) == small and sum(seen.values()) == len(refs) / 2 > small


def test_splits_and_wordings_do_not_mix(dataset: Dataset) -> None:
    for split, wording in (("train", "train"), ("validation", "held_out")):
        found = mixture(dataset, 1, 1, split=split)
        refs = [found.sample_at(p) for p in range(2000)]
        assert {dataset.episodes[ref.episode].split for ref in refs} == {split}
        questions = [dataset.qa[ref.qa] for ref in refs if ref.kind == "qa"]
        assert questions and {row.template_split for row in questions} == {wording}
        assert all(
            (q.episode, q.step) == (r.episode, r.step)
            for q, r in zip(questions, (r for r in refs if r.qa >= 0), strict=True)
        )


def test_a_source_may_name_its_version_in_one_word() -> None:
    def source(**fields: object) -> MixtureConfig:
        return MixtureConfig.model_validate({"sources": [{"kind": "robot"} | fields], "global_batch": 8})

    for word, version in (("table@1", 1), ("table@golden", "golden")):
        apart = source(dataset="table", version=version)
        assert source(dataset=word) == source(dataset=word, version=version) == apart
        assert source(dataset=word).model_dump(mode="json") == apart.model_dump(mode="json")
    with pytest.raises(ValidationError, match="dataset table@1 and version 2 are not the same: leave one of them out"):
        source(dataset="table@1", version=2)


def test_two_versions_of_a_dataset_are_refused_where_they_are_planned(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for numbers in ((1, 2, 3), (4, 5)):
        put(store, numbers)
    for versions in (("d@1", "d"), ("d", "d@1")):
        sources = [{"dataset": word, "kind": "robot"} for word in versions]
        mixed = MixtureConfig.model_validate({"sources": sources, "global_batch": 8})
        with pytest.raises(ConfigError, match=r"asks for v\d and v\d of dataset d: one plan reads one version"):
            mixed.plan(store)
    sources = [{"dataset": word, "kind": "robot"} for word in ("d@2", "d")]
    assert len(MixtureConfig.model_validate({"sources": sources, "global_batch": 8}).plan(store).sources) == 2


@pytest.mark.parametrize("field", [{"weight": float("inf")}, {"temperature": 1e-3}, {"temperature": float("inf")}])
def test_what_no_share_follows_from_is_refused_in_the_configuration(field: dict[str, float]) -> None:
    source = {"dataset": "table", "kind": "robot"} | ({} if "temperature" in field else field)
    with pytest.raises(ValidationError, match=next(iter(field))):
        MixtureConfig.model_validate(
            {"sources": [source], "global_batch": 8} | (field if "temperature" in field else {})
        )
    with pytest.raises(ConfigError, match="not positive and finite"):
        make_plan([MixtureSource("table", 1, "x", "robot", float("inf"))], 0, 4)


def test_what_cannot_be_drawn_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValidationError):
        config(0.0)
    with pytest.raises(NotFound, match="no dataset"):
        MixtureConfig.model_validate(
            {"sources": [{"dataset": "none", "kind": "robot", "weight": 1}], "global_batch": 2}
        ).plan(dataset.store)
    plan = config(1).plan(dataset.store)
    with pytest.raises(ConfigError, match="given: \\[\\]"):
        Mixture(plan, {})
    stale = replace(plan, sources=(replace(plan.sources[0], content_id="other"),))
    with pytest.raises(Mismatch, match="made for content other"):
        Mixture(stale, {"table": dataset})
    mute = Dataset(dataset.store, replace(dataset.manifest, qa=()))
    with pytest.raises(ConfigError, match="no qa samples"):
        Mixture(config(1, 1).plan(dataset.store), {"table": mute})
    source = MixtureSource("table", 1, "x", "robot", -1.0)
    with pytest.raises(ConfigError, match="not positive"):
        make_plan([source], 0, 4)
    with pytest.raises(ConfigError, match="global batch"):
        make_plan([], 0, 4)


def test_a_hundred_thousand_draws_keep_their_shares_across_a_resume(dataset: Dataset) -> None:
    """T31: within 3 sigma of a fair coin's spread (in fact within one draw), whoever goes on in the middle."""
    found, draws, share = mixture(dataset, 7, 3), 100_000, 0.3
    asked = np.array([found.sample_at(p).source for p in range(draws)])
    assert abs(asked.sum() - share * draws) < min(3 * np.sqrt(draws * share * (1 - share)), found.plan.lanes)
    resumed = mixture(dataset, 7, 3)
    assert [resumed.sample_at(p) for p in range(50_000, 50_400)] == [found.sample_at(p) for p in range(50_000, 50_400)]


def test_a_position_is_named_by_what_a_person_can_look_up(dataset: Dataset) -> None:
    found = mixture(dataset, 0.5, 0.5)
    for position in range(32):
        ref, named = found.sample_at(position), found.origin(position)
        assert (named["position"], named["dataset"], named["step"]) == (position, "table@1", ref.step)
        assert named["recording"] == dataset.episodes[ref.episode].id
