from __future__ import annotations

import pytest

from tests.factories import write_calvin
from upvla.data.ingest import IngestConfig, ingest
from upvla.data.table import Dataset, load_manifest
from upvla.store import open_store


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A version made from small synthetic recordings, in a folder; read only."""
    raw = write_calvin(tmp_path_factory.mktemp("raw"), (20, 24, 18, 30, 22), static=(48, 48, 3), gripper=(32, 32, 3))
    store = open_store(str(tmp_path_factory.mktemp("store")))
    config = IngestConfig(format="calvin", dataset="table", validation_fraction=0.3)
    ingest(store, config, str(raw))
    return Dataset(store, load_manifest(store, "table"))
