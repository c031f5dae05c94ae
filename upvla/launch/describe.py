"""Descriptions of a dataset by a trained model, as Ray tasks, one a shard: text of the MMU-conditioned prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import ray
import torch

from upvla.checkpoint import load_bundle, read_marker
from upvla.data.descriptions import write_descriptions
from upvla.data.table import Dataset, load_manifest
from upvla.errors import ConfigError
from upvla.launch.cluster import connected, result_of
from upvla.rollout.policy import describe_frames
from upvla.store import Store, content_hash, open_store


def description_id(model_id: str, question: str, every_steps: int) -> str:
    """Equal for equal weights, question and buckets."""
    return content_hash({"model": model_id, "question": question, "every_steps": every_steps})


def describe_dataset(
    store: Store, dataset: str, version: int, checkpoint_url: str, progress: Callable[[int, int], None] | None = None
) -> str:
    """Write the sidecars that are missing; returns the id of the descriptions."""
    shards = [shard.key for shard in load_manifest(store, dataset, version).shards]
    with connected():
        describe = ray.remote(num_cpus=1, max_retries=3)(describe_shard)
        waiting = [describe.remote(store, dataset, version, checkpoint_url, shard) for shard in shards]
        found = ""
        while waiting:
            (ready, *_), waiting = ray.wait(waiting)
            found = result_of(ready)
            if progress:
                progress(len(shards) - len(waiting), len(shards))
    return found


def describe_shard(store: Store, name: str, version: int, checkpoint_url: str, shard: str) -> str:
    torch.set_num_threads(1)
    bundle, model_id = load_bundle(checkpoint_url), read_marker(open_store(checkpoint_url)).model_id
    config = bundle.config.description
    if config is None:
        raise ConfigError(f"{checkpoint_url}: its model has no `description`: there is nothing to describe for")

    def describer(frames: np.ndarray) -> Sequence[str]:
        return describe_frames(bundle, torch.from_numpy(frames))

    key = description_id(model_id, config.question, config.every_steps)
    dataset = Dataset(store, load_manifest(store, name, version))
    write_descriptions(
        dataset,
        describer,
        cameras=bundle.config.vision_cameras,
        resize_to=bundle.config.vision_resize,
        every_steps=config.every_steps,
        description_id=key,
        shards=[shard],
    )
    return key
