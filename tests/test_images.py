"""Frames as bytes: what `docs/data-format.md` says of the pictures in a table."""

from __future__ import annotations

import numpy as np

from upvla.images import JPEG_QUALITY, encode_jpeg

ANNEX_K = {0: (16, 11, 12, 14, 12, 10, 16, 14), 1: (17, 18, 18, 24, 21, 24, 47, 26)}
"""ITU-T T.81, tables K.1 and K.2 (luminance, chrominance): their first steps, in zigzag order."""


def segments(jpeg: bytes) -> dict[int, list[bytes]]:
    """Marker -> what its segments hold, up to the scan."""
    found: dict[int, list[bytes]] = {}
    place = 2
    while (marker := jpeg[place + 1]) != 0xDA:
        size = int.from_bytes(jpeg[place + 2 : place + 4], "big")
        found.setdefault(marker, []).append(jpeg[place + 4 : place + 2 + size])
        place += 2 + size
    return found


def test_frames_are_stored_with_whole_chroma_at_the_stated_quality() -> None:
    assert JPEG_QUALITY == 92
    held = segments(encode_jpeg(np.zeros((24, 32, 3), np.uint8)))
    (frame,) = held[0xC0]  # baseline: precision, height, width, then three bytes a component, sampling in the second
    assert (int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), frame[5]) == (24, 32, 3)
    assert [frame[7 + 3 * component] for component in range(3)] == [0x11] * 3
    tables = b"".join(held[0xDB])  # an id and 64 steps each
    scale = 200 - 2 * 92  # the reference coder's, of qualities from 50
    for table, base in ANNEX_K.items():
        assert tables[65 * table] == table
        assert [*tables[65 * table + 1 :][:8]] == [(step * scale + 50) // 100 for step in base]
