"""Rows across row groups, from a pool that holds less than they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upvla.data.rowgroups import RowGroupPool
from upvla.store import open_store


def test_rows_of_several_groups_read_each_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, numbers = [f"row {i}".encode() for i in range(10)], np.arange(10, dtype=np.int64)
    pq.write_table(pa.table({"name": names, "number": numbers}), tmp_path / "rows.parquet", row_group_size=3)
    pool = RowGroupPool(open_store(str(tmp_path)), pool_mb=0)
    reads: list[int] = []
    original = RowGroupPool._read

    def counted(pool: RowGroupPool, file: Any, key: str, group: int, columns: tuple[str, ...]) -> pa.Table:
        reads.append(group)
        return original(pool, file, key, group, columns)

    monkeypatch.setattr(RowGroupPool, "_read", counted)
    found = pool.take("rows.parquet", {"name": (7, 1, 2), "number": range(8)}, first=1)
    assert found["name"] == [names[8], names[2], names[3]]
    assert found["number"].tolist() == [*range(1, 9)]
    assert sorted(reads) == [0, 1, 2]
