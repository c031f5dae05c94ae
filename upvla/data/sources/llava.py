"""Pictures and conversations about them, as LLaVA's instruction sets have them: one JSON list, one picture a row.

    [{"id": "...", "image": "coco/train2017/000000033471.jpg",
      "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}, ...]}, ...]

A row becomes a recording of one step without actions, so it is stored, versioned, quarantined and mixed like any other.
The list is walked in pieces and only places are remembered: a file of a gigabyte costs its index, not itself.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from upvla.data.actions import NO_ACTIONS
from upvla.errors import BadEpisode, ConfigError, Corrupt, NotFound, UpvlaError
from upvla.images import MAX_PIXELS, decode_image, encode_jpeg
from upvla.store import Store, content_hash, open_store
from upvla.types import Episode, Talk

_PIECE_BYTES = 4 << 20
_PLACEHOLDER = "<image>"


class LlavaSource:
    """The rows of one JSON file. url: the file, or its folder if that holds one JSON file only (else `file` names it).

    images: folder or URL that picture paths are relative to; the file's own by default. camera: the pictures' name.
    """

    format = "llava"

    def __init__(self, url: str, *, file: str = "", images: str = "", camera: str = "image"):
        store, name = _json_file(open_store(url), file)
        self.store, self.file, self.camera = store, name, camera
        self.pictures = open_store(images) if images else store
        self.notes: Mapping[str, int] = {}
        self._decoder = json.JSONDecoder()

    @staticmethod
    def recognises(store: Store) -> bool:
        try:
            found, name = _json_file(store, "")
            head = found.read_ranges(name, [(0, min(4096, found.size(name)))])[0].lstrip()
        except UpvlaError:
            return False
        return head[:1] == b"[" and b'"conversations"' in head

    def keys(self) -> Sequence[str]:
        return list(self._places)

    def num_steps(self, key: str) -> int:
        return 1

    def token(self, key: str) -> str:
        _, _, digest, picture = self._places[key]
        return content_hash([digest, self._picture_tokens.get(picture, ""), self.camera])

    def read(self, key: str) -> Episode:
        start, end, _, _ = self._places[key]
        row = json.loads(self.store.read_ranges(self.file, [(start, end)])[0])
        turns = _turns(row, key)
        return Episode(
            id=key,
            source=self.format,
            embodiment="none",
            scene="picture",
            action_space=NO_ACTIONS,
            rate_hz=1.0,
            timestamps=np.zeros(1),
            images={self.camera: [self._picture(row.get("image"), key)]},
            state=np.zeros((1, 0), np.float32),
            actions=np.zeros((1, 0), np.float32),
            spans=(),
            talks=(Talk(0, "llava", turns),),
        )

    def _picture(self, path: Any, key: str) -> bytes:
        if path is None:
            raise BadEpisode("no_image", f"{key}: a conversation without a picture")
        if not isinstance(path, str) or path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise BadEpisode("bad_id", f"{key}: {path!r} is no relative path")
        try:
            data = self.pictures.read(path)
        except (NotFound, ConfigError) as error:
            raise BadEpisode("missing_frame", f"{key}: {error}") from error
        try:
            decode_image(data)
            return data
        except BadEpisode:
            return _converted(data, f"{key}: {path}")

    @cached_property
    def _picture_tokens(self) -> dict[str, str]:
        return self.pictures.tokens()

    @cached_property
    def _places(self) -> dict[str, tuple[int, int, str, str]]:
        """Key -> (first byte, end, digest of the row, its picture)."""
        size, text, base = self.store.size(self.file), "", 0
        places: dict[str, tuple[int, int, str, str]] = {}
        position, began = 0, False
        while True:
            position = _past(text, position, " \t\r\n," if began else " \t\r\n")
            if began and text[position : position + 1] == "]":
                return places
            try:
                if not began:
                    if text[position : position + 1] not in ("[", ""):
                        raise Corrupt(f"{self.store.url}/{self.file} is no JSON list")
                    if text[position : position + 1] == "[":
                        began, position = True, position + 1
                        continue
                    raise ValueError("nothing read yet")
                row, end = self._decoder.raw_decode(text, position)
            except RecursionError as error:
                where = f"{self.store.url}/{self.file}: byte {base + position}"
                raise Corrupt(f"{where}: a row of more lists in lists than can be read; take it out") from error
            except ValueError as error:
                loaded = base + len(text)
                if loaded >= size or len(text) - position > 16 * _PIECE_BYTES:
                    raise Corrupt(f"{self.store.url}/{self.file}: byte {base + position}: {error}") from error
                piece = self.store.read_ranges(self.file, [(loaded, min(size, loaded + _PIECE_BYTES))])[0]
                text, base, position = text[position:] + piece.decode("latin-1"), base + position, 0
                continue
            raw = text[position:end].encode("latin-1")
            digest = hashlib.blake2b(raw, digest_size=8).hexdigest()
            picture = row.get("image") if isinstance(row, dict) else None
            places[f"{len(places):08d}"] = (base + position, base + end, digest, str(picture or ""))
            position = end


def _json_file(store: Store, file: str) -> tuple[Store, str]:
    """The folder and the name of the one file that is meant."""
    if file:
        return store, file
    names = [key for key in store.list() if key.endswith((".json", ".JSON")) and "/" not in key]
    if len(names) == 1:
        return store, names[0]
    folder, _, name = store.url.rpartition("/")
    parent = open_store(folder or "/")
    if not names and name and parent.exists(name):
        return parent, name
    raise NotFound(f"{store.url} holds {len(names)} JSON files; name one with the option file")


def _turns(row: Any, key: str) -> tuple[tuple[str, str], ...]:
    try:
        said = [
            (str(part["from"]), str(part["value"]).replace(_PLACEHOLDER, "").strip()) for part in row["conversations"]
        ]
    except (KeyError, TypeError) as error:
        raise BadEpisode("schema", f"{key}: no conversations of from and value: {error!r}") from error
    asked, answered = said[0::2], said[1::2]
    if (
        not said
        or len(asked) != len(answered)
        or {who for who, _ in asked} != {"human"}
        or {who for who, _ in answered} != {"gpt"}
    ):
        raise BadEpisode("schema", f"{key}: speakers are {[who for who, _ in said]}, must be human and gpt in turn")
    if not all(text for _, text in said):
        raise BadEpisode("empty_language", f"{key}: somebody says nothing")
    return tuple((question, answer) for (_, question), (_, answer) in zip(asked, answered, strict=True))


def _converted(data: bytes, name: str) -> bytes:
    """Other formats (GIFs named .jpg are a known erratum of OCR-VQA) as JPEG: the first picture, in RGB."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise BadEpisode("zip_bomb", f"{name} claims {picture.width}x{picture.height} pixels")
            return encode_jpeg(np.asarray(picture.convert("RGB")))
    except Image.DecompressionBombError as error:  # Pillow's own limit, twice as high
        raise BadEpisode("zip_bomb", f"{name}: {error}") from error
    except (OSError, ValueError, SyntaxError, MemoryError) as error:
        raise BadEpisode("unreadable_image", f"{name}: {error}") from error


def _past(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position
