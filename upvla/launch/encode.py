"""What frozen networks say of every frame, computed once, as Ray tasks, one a shard: image codes and patch features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray
import torch

from upvla.data.derived import encode_codes
from upvla.data.features import encode_features
from upvla.data.table import Dataset, load_manifest
from upvla.launch.cluster import connected, result_of
from upvla.launch.tokenizers import load_tower, load_vq
from upvla.model.config import ModelConfig
from upvla.store import Store


def encoding_key(versions: Mapping[str, int], vq_id: str, model: ModelConfig, tower_id: str = "") -> dict[str, Any]:
    """All that the sidecars of these versions are a function of."""
    codes = {"cameras": model.code_cameras, "resize": model.vq_resize.model_dump(mode="json")}
    key = {"versions": dict(versions), "vq": vq_id, "codes": codes}
    if tower_id:
        features = {"cameras": model.vision_cameras, "resize": model.vision_resize.model_dump(mode="json")}
        key |= {"tower": tower_id, "features": features}
    return key


def encode_dataset(
    store: Store,
    dataset: str,
    version: int,
    vq_id: str,
    model: ModelConfig,
    progress: Callable[[int, int], None] | None = None,
    tower_id: str = "",
) -> dict[str, int]:
    """Write the sidecars that are missing (features only of a tower that is named); the others are only counted."""
    shards = [shard.key for shard in load_manifest(store, dataset, version).shards]
    with connected():
        # A shard's codes depend on nothing else. Any: Ray's own types end at six arguments.
        encode: Any = ray.remote(num_cpus=1, max_retries=3)(encode_shard)
        waiting = [encode.remote(store, dataset, version, vq_id, model, shard, tower_id) for shard in shards]
        written = 0
        while waiting:
            (ready, *_), waiting = ray.wait(waiting)
            written += result_of(ready)
            if progress:
                progress(len(shards) - len(waiting), len(shards))
    return {"shards": len(shards), "encoded": written}


def encode_shard(
    store: Store, name: str, version: int, vq_id: str, model: ModelConfig, shard: str, tower_id: str = ""
) -> int:
    """How many sidecars were written."""
    torch.set_num_threads(1)
    vq = load_vq(store, vq_id)
    dataset = Dataset(store, load_manifest(store, name, version))

    @torch.inference_mode()
    def encoder(frames):  # type: ignore[no-untyped-def]  # u8[B,H,W,3] -> i64[B,N]
        return vq.encode_frames(torch.from_numpy(frames)).numpy()

    cameras, size = model.code_cameras, model.vq_resize
    written = encode_codes(dataset, encoder, cameras=cameras, resize_to=size, tokenizer_id=vq_id, shards=[shard])
    if tower_id:
        tower = load_tower(store, tower_id)

        @torch.inference_mode()
        def features(frames: np.ndarray) -> np.ndarray:
            """u8[B,H,W,3] -> f16[B,P,D]."""
            return tower.camera_features(torch.from_numpy(frames)).half().numpy()

        cameras, size = model.vision_cameras, model.vision_resize
        written += encode_features(
            dataset, features, cameras=cameras, resize_to=size, tower_id=tower_id, shards=[shard]
        )
    return len(written)
