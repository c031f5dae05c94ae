"""docker-compose.yml as data: variables filled in as Compose does it, merge keys resolved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docker-compose.yml"
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^{}]*))?\}")  # an inner one before the one that it is a default of


def variables(text: str) -> set[str]:
    return set(re.findall(r"\$\{(\w+)", text))


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """`${NAME}`, `${NAME:-default}`, `${NAME:?why}`: the last raises `KeyError` where there is no value."""

    def fill(found: re.Match[str]) -> str:
        name, how, more = found.groups()
        if values.get(name):
            return values[name]
        if how == ":?":
            raise KeyError(f"{name}: {more}")
        return more or "" if how == ":-" else ""

    while _VARIABLE.search(text):
        text = _VARIABLE.sub(fill, text)
    return text


def load(values: Mapping[str, str]) -> dict[str, Any]:
    return dict(yaml.safe_load(interpolated(FILE.read_text(), values)))


def example() -> dict[str, str]:
    """infra/env.example: every variable, most without a value."""
    lines = (ROOT / "infra/env.example").read_text().splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}
