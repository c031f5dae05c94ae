"""Frames as bytes: what `docs/data-format.md` says of the pictures in a table, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from upvla.errors import BadEpisode
from upvla.images import JPEG_QUALITY, Jpeg, decode_image, encode_jpeg, verify_image

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


ROWS, COLUMNS = np.mgrid[:40, :56]
PICTURE = np.stack([120 + 60 * np.sin(ROWS / 5), 100 + 40 * np.cos(COLUMNS / 7), ROWS + COLUMNS], -1).astype(np.uint8)


def _saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "png" if kind == "png" else "jpeg", progressive=kind == "progressive")
    return file.getvalue()


def _decodes(data: bytes) -> bool:
    try:
        decode_image(data)
    except BadEpisode:
        return False
    return True


@pytest.mark.parametrize("kind", ["baseline", "progressive", "png"])
def test_what_is_verified_decodes_and_what_does_not_decode_is_refused(kind: str) -> None:
    whole, rng = _saved(kind), np.random.Generator(np.random.Philox(3))
    assert verify_image(whole) == decode_image(whole).shape[:2] == (40, 56)
    verdicts = set()
    for number in range(300):
        data, place = bytearray(whole), int(rng.integers(len(whole)))
        if number % 3 == 0:
            del data[place:]
        elif number % 3 == 1:
            data[place] ^= 1 << int(rng.integers(8))
        else:
            data[place : place + 20] = bytes(len(data[place : place + 20]))
        verdicts.add(expected := _decodes(bytes(data)))
        if expected:
            verify_image(bytes(data))
        else:
            with pytest.raises(BadEpisode, match="unreadable_image"):
                verify_image(bytes(data))
    assert False in verdicts


def test_a_picture_of_our_own_is_not_decoded_again_but_a_part_of_it_is() -> None:
    own = encode_jpeg(PICTURE)
    assert verify_image(own) == verify_image(Jpeg(own[:-9])) == (40, 56)
    with pytest.raises(BadEpisode, match="unreadable_image"):
        verify_image(own[:-1])
    with pytest.raises(BadEpisode, match="unreadable_image"):
        verify_image(bytes(own)[:-1] + b"\0")


def _claiming(kind: str, rows: int, columns: int) -> bytes:
    """A whole picture whose header says that it is larger."""
    data = bytearray(_saved(kind))
    if kind == "png":
        data[16:24] = struct.pack(">II", columns, rows)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        frame = data.index(b"\xff\xc0") + 5
        data[frame : frame + 4] = struct.pack(">HH", rows, columns)
    return bytes(data)


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "reason"),
    [
        ("baseline", 65000, 65000, "zip_bomb"),
        ("png", 2**31 - 1, 2**31 - 1, "zip_bomb"),
        ("png", 1, 2**22, "unreadable_image"),  # few pixels, but more columns than OpenCV takes
    ],
)
def test_a_header_that_claims_too_much_is_believed_and_refused(kind: str, rows: int, columns: int, reason: str) -> None:
    for judge in (decode_image, verify_image):
        with pytest.raises(BadEpisode) as caught:
            judge(_claiming(kind, rows, columns))
        assert caught.value.reason == reason
