"""Frames as bytes and as arrays, and the one named resize that training, caches, rollout and serving share."""

from __future__ import annotations

import struct
from typing import Literal

import cv2
import numpy as np
import simplejpeg
from pydantic import BaseModel, ConfigDict, Field

from upvla.errors import BadEpisode

MAX_PIXELS = 64 << 20  # of one picture; a 4K frame has 8 million, so more is a bomb or a mistake
JPEG_QUALITY = 92  # with 4:4:4 chroma: smaller than q95 4:2:0 and sharper on small saturated objects
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


class Resize(BaseModel):
    """Scale with the named filter until `size` rows and `width` columns (default: a square) are covered, then crop the
    centre. The arithmetic of odd sizes is torchvision's, which the published transform uses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(gt=0)
    width: int | None = Field(default=None, gt=0)
    filter: Literal["area", "linear", "cubic", "pil_bicubic"] = "area"


def resize(frame: np.ndarray, spec: Resize, out: np.ndarray | None = None) -> np.ndarray:
    """u8[H,W,3] -> u8[size,width,3], into `out` (contiguous) where it is given. `pil_bicubic` (antialiased) is the
    published transform, 7x slower than cv2's.
    """
    rows, columns = spec.size, spec.width or spec.size
    height, width = frame.shape[:2]
    if rows * width < columns * height:  # columns are what has to be covered
        target = (columns, max(rows, columns * height // width))
    else:
        target = (max(columns, rows * width // height), rows)
    if (width, height) != target:
        frame = _scale(frame, target, spec.filter, out if target == (columns, rows) else None)
    top, left = round((target[1] - rows) / 2), round((target[0] - columns) / 2)
    frame = frame[top : top + rows, left : left + columns]
    if out is None:
        return np.ascontiguousarray(frame)
    if not np.may_share_memory(frame, out):
        out[:] = frame
    return out


def use_one_thread() -> None:
    """Keep cv2 from starting threads of its own, for a process that already decodes on all its cores."""
    cv2.setNumThreads(1)


def _scale(frame: np.ndarray, target: tuple[int, int], name: str, out: np.ndarray | None) -> np.ndarray:
    if name == "pil_bicubic":
        from PIL import Image

        return np.asarray(Image.fromarray(frame).resize(target, Image.Resampling.BICUBIC))
    enlarging = target[0] > frame.shape[1]
    flags = {
        "area": cv2.INTER_LINEAR if enlarging else cv2.INTER_AREA,
        "linear": cv2.INTER_LINEAR,
        "cubic": cv2.INTER_CUBIC,
    }
    return np.asarray(cv2.resize(frame, target, dst=out, interpolation=flags[name]))


class Jpeg(bytes):
    """Bytes that `encode_jpeg` made of a whole picture: nothing in them needs decoding to be trusted."""

    __slots__ = ()


def encode_jpeg(frame: np.ndarray) -> Jpeg:
    """u8[H,W,3] RGB -> JPEG, 4:4:4."""
    frame = np.ascontiguousarray(frame)
    return Jpeg(simplejpeg.encode_jpeg(frame, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444"))


def image_size(data: bytes) -> tuple[int, int]:
    """(rows, columns) as the header of a JPEG or PNG says. Raises `BadEpisode`: "unreadable_image" for anything else,
    "zip_bomb" above `MAX_PIXELS`.
    """
    if data[:3] == _JPEG:
        try:
            rows, columns, *_ = simplejpeg.decode_jpeg_header(data)
        except ValueError as error:
            raise BadEpisode("unreadable_image", str(error)) from error
    elif data[:8] == _PNG and len(data) >= 24:
        columns, rows = struct.unpack(">II", data[16:24])
    else:
        raise BadEpisode("unreadable_image", f"{len(data)} bytes are neither a JPEG nor a PNG")
    if rows * columns > MAX_PIXELS:
        raise BadEpisode("zip_bomb", f"{len(data)} bytes claim {rows}x{columns} pixels, the most is {MAX_PIXELS}")
    return rows, columns


def decode_image(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes, told apart by their magic -> u8[H,W,3] RGB. Raises `BadEpisode` as `image_size` does."""
    image_size(data)
    try:
        if data[:3] == _JPEG:
            return np.asarray(simplejpeg.decode_jpeg(data, colorspace="RGB"))
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        if decoded is not None:
            return np.asarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB))
    except (ValueError, MemoryError, cv2.error) as error:
        raise BadEpisode("unreadable_image", str(error)) from error
    raise BadEpisode("unreadable_image", f"{len(data)} bytes begin as a PNG and do not decode")


def verify_image(data: bytes) -> tuple[int, int]:
    """(rows, columns) of an image that `decode_image` will decode; `BadEpisode` as there. A JPEG is decoded at an
    eighth of its size: that reads every one of its bits, so it refuses what a full decode refuses, in half the time.
    """
    size = image_size(data)
    if data[:3] != _JPEG:
        decode_image(data)
    elif not isinstance(data, Jpeg):
        try:
            simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=1, min_width=1, min_factor=8)
        except (ValueError, MemoryError) as error:
            raise BadEpisode("unreadable_image", str(error)) from error
    return size
