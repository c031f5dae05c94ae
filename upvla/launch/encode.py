"""Image codes of a dataset as Ray tasks, one a shard: what the tokenizer says about every frame, computed once."""

from __future__ import annotations

from collections.abc import Callable

import ray
import torch

from upvla.data.derived import encode_codes
from upvla.data.table import Dataset, load_manifest
from upvla.launch.cluster import connected
from upvla.launch.tokenizers import load_vq
from upvla.model.config import ModelConfig
from upvla.store import Store


def encode_dataset(
    store: Store,
    dataset: str,
    version: int,
    vq_id: str,
    model: ModelConfig,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write the code sidecars that are missing; shards that are encoded already are only counted."""
    shards = [shard.key for shard in load_manifest(store, dataset, version).shards]
    with connected():
        encode = ray.remote(num_cpus=1, max_retries=3)(encode_shard)  # a shard's codes depend on nothing else
        waiting = [encode.remote(store, dataset, version, vq_id, model, shard) for shard in shards]
        written = 0
        while waiting:
            (ready, *_), waiting = ray.wait(waiting)
            written += ray.get(ready)
            if progress:
                progress(len(shards) - len(waiting), len(shards))
    return {"shards": len(shards), "encoded": written}


def encode_shard(store: Store, name: str, version: int, vq_id: str, model: ModelConfig, shard: str) -> int:
    torch.set_num_threads(1)
    vq = load_vq(store, vq_id)
    dataset = Dataset(store, load_manifest(store, name, version))

    @torch.inference_mode()
    def encoder(frames):  # type: ignore[no-untyped-def]  # u8[B,H,W,3] -> i64[B,N]
        return vq.encode_frames(torch.from_numpy(frames)).numpy()

    cameras, size = model.code_cameras, model.vq_resize
    return len(encode_codes(dataset, encoder, cameras=cameras, resize_to=size, tokenizer_id=vq_id, shards=[shard]))
