"""TFRecord files and the `tf.train.Example` messages in them, read without TensorFlow.

A record is: length u64, masked CRC-32C of the length u32, the data, masked CRC-32C of the data u32; little-endian.
https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import numpy as np

from upvla.errors import BadEpisode, Corrupt
from upvla.store import Store

HEADER_BYTES = 12
_MAX_RECORD_BYTES = 1 << 30  # of one episode, which is parsed in memory
_LANES = 1024
_HOP_BYTES = 1 << 16  # fetched with a header: little records then come along
_AHEAD_BYTES = 8 << 20  # fetched with a record: what follows is likely asked for next


class RecordFile:
    """One object of records, each read by its number; offsets are found by hopping from header to header."""

    def __init__(self, store: Store, key: str):
        self._store, self.key, self._size = store, key, store.size(key)
        self._starts = [0]
        self._fetched: tuple[int, bytes] = (0, b"")  # where it begins, and what was fetched last

    def count(self) -> int:
        """Records that the file has, a damaged last one included: reading that will say what is wrong. A request a
        record, or a few where they are small."""
        while self._starts[-1] < self._size:
            try:
                self._hop()
            except BadEpisode:
                return len(self._starts)
        return len(self._starts) - 1

    def read(self, number: int) -> bytes:
        """Raises `BadEpisode`: "unreadable_frame" where lengths or checksums do not fit, "zip_bomb" where the record is
        too large to be parsed.
        """
        while len(self._starts) <= number + 1:
            self._hop()
        start, end = self._starts[number] + HEADER_BYTES, self._starts[number + 1]
        if end - start > _MAX_RECORD_BYTES:
            where = f"{self._store.url}/{self.key}, record {number}"
            raise BadEpisode("zip_bomb", f"{where} has {end - start} bytes, the most is {_MAX_RECORD_BYTES}")
        data = self._bytes(start, end, _AHEAD_BYTES)
        if masked_crc32c(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
            raise self._damaged(number, "its checksum does not fit")
        return data[:-4]

    def _hop(self) -> None:
        start, number = self._starts[-1], len(self._starts) - 1
        header = self._bytes(start, start + HEADER_BYTES, _HOP_BYTES)
        length, checksum = struct.unpack("<QI", header)
        if masked_crc32c(header[:8]) != checksum:
            raise self._damaged(number, "its length is damaged")
        end = start + HEADER_BYTES + length + 4
        if end > self._size:
            raise self._damaged(number, f"the file ends {end - self._size} bytes too early")
        self._starts.append(end)

    def ends_with(self, number: int) -> bool:
        """Whether record `number`, which was read, is the last one."""
        return self._starts[number + 1] >= self._size

    def _bytes(self, start: int, end: int, ahead: int) -> bytes:
        """Of what was fetched last, else fetched now, with what follows up to `ahead` bytes in all."""
        begin, data = self._fetched
        if not begin <= start <= end <= begin + len(data):
            try:
                (data,) = self._store.read_ranges(self.key, [(start, max(end, min(start + ahead, self._size)))])
            except Corrupt as error:
                raise self._damaged(len(self._starts) - 1, str(error)) from error
            begin, self._fetched = start, (start, data)
        return data[start - begin : end - begin]

    def _damaged(self, number: int, why: str) -> BadEpisode:
        return BadEpisode("unreadable_frame", f"{self._store.url}/{self.key}, record {number}: {why}")


def parse_example(data: bytes, name: str) -> dict[str, Any]:
    """A `tf.train.Example` -> {key: list of bytes, or f32 or i64 array}."""
    from google.protobuf.message import DecodeError

    try:
        features = _example_class().FromString(data).features.feature
    except DecodeError as error:
        raise BadEpisode("unreadable_frame", f"{name}: {error}") from error
    found: dict[str, Any] = {}
    for key, feature in features.items():
        kind = feature.WhichOneof("kind")
        if kind == "bytes_list":
            found[key] = list(feature.bytes_list.value)
        elif kind == "float_list":
            found[key] = np.array(feature.float_list.value, np.float32)
        elif kind == "int64_list":
            found[key] = np.array(feature.int64_list.value, np.int64)
    return found


@functools.cache
def _example_class() -> Any:
    """The message class, from its schema (tensorflow/core/example/{example,feature}.proto)."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="upvla/example.proto", package="upvla", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str) -> Any:
        return file.message_type.add(name=name)

    def field(owner: Any, name: str, number: int, kind: int, *, many: bool = False, **more: Any) -> None:
        label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
        owner.field.add(name=name, number=number, type=kind, label=label, **more)

    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    values = (("bytes_list", "BytesList", kinds.TYPE_BYTES), ("float_list", "FloatList", kinds.TYPE_FLOAT))
    for number, (name, kind, value) in enumerate((*values, ("int64_list", "Int64List", kinds.TYPE_INT64)), start=1):
        field(message(kind), "value", 1, value, many=True)
        field(feature, name, number, kinds.TYPE_MESSAGE, type_name=f".upvla.{kind}", oneof_index=0)
    features = message("Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    field(entry, "key", 1, kinds.TYPE_STRING)
    field(entry, "value", 2, kinds.TYPE_MESSAGE, type_name=".upvla.Feature")
    field(features, "feature", 1, kinds.TYPE_MESSAGE, many=True, type_name=".upvla.Features.FeatureEntry")
    field(message("Example"), "features", 1, kinds.TYPE_MESSAGE, type_name=".upvla.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("upvla.Example"))


# ------------------------------------------------------------------------------------------------------- CRC-32C


def masked_crc32c(data: bytes) -> int:
    """TFRecord's mask of a CRC: rotated right by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC. Long data are cut into lanes whose CRCs numpy computes side by side; a CRC being linear, two
    neighbours join by shifting the first over the length of the second."""
    table = _table()
    lane = len(data) // _LANES
    if lane < 16:
        return _crc_bytes(0xFFFFFFFF, data) ^ 0xFFFFFFFF
    body = np.frombuffer(data, np.uint8, lane * _LANES).reshape(_LANES, lane).T.copy()
    states = np.zeros(_LANES, np.uint32)
    states[0] = 0xFFFFFFFF
    for column in body:
        states = table[(states ^ column) & 0xFF] ^ (states >> 8)
    shift = _zeros_operator(lane)
    while len(states) > 1:
        states = _apply(shift, states[0::2]) ^ states[1::2]
        shift = np.array([_apply(shift, column[None])[0] for column in shift], np.uint32)
    return _crc_bytes(int(states[0]), data[lane * _LANES :]) ^ 0xFFFFFFFF


def _crc_bytes(state: int, data: bytes) -> int:
    table = _table_list()
    for byte in data:
        state = table[(state ^ byte) & 0xFF] ^ (state >> 8)
    return state


@functools.cache
def _table() -> np.ndarray:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(0x82F63B78), values >> 1)
    return values


@functools.cache
def _table_list() -> list[int]:
    found: list[int] = _table().tolist()
    return found


@functools.lru_cache(maxsize=4096)
def _zeros_operator(count: int) -> np.ndarray:
    """u32[32]: where each bit of a state goes over `count` zero bytes."""
    if count == 1:
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        return np.asarray(_table()[bits & 0xFF] ^ (bits >> np.uint32(8)), np.uint32)
    half = _zeros_operator(count // 2)
    doubled = _apply(half, half)
    return doubled if count % 2 == 0 else _apply(_zeros_operator(1), doubled)


def _apply(operator: np.ndarray, states: np.ndarray) -> np.ndarray:
    """u32[n] states, each moved by the operator (its bits choose the operator's columns)."""
    moved = np.zeros_like(states)
    for bit in range(32):
        moved ^= np.where(states >> np.uint32(bit) & np.uint32(1), operator[bit], np.uint32(0))
    return moved
