"""Exit with 1 when an installed package is not at its locked version: `check_lock.py constraints.txt`."""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

UNLOCKED = {"pip", "setuptools", "wheel", "upvla"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(lock: str) -> int:
    lines = [re.split("[#;]", line)[0].strip() for line in Path(lock).read_text().splitlines()]
    locked = {normal(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    wrong = []
    for distribution in distributions():
        name, version = normal(distribution.metadata["Name"]), distribution.version.split("+")[0]  # +cpu, +cu130
        if name not in UNLOCKED and locked.get(name) != version:
            wrong.append(f"{name} {distribution.version} (locked: {locked.get(name, 'not at all')})")
    for line in sorted(wrong):
        print(f"check_lock: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
