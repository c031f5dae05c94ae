"""How a benchmark gives its figures: a table for a person, JSON in a file, or JSON alone for a program."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ALONE = Path("-")


def parse(parser: argparse.ArgumentParser, *, has_table: bool = True) -> argparse.Namespace:
    """The arguments, with `--json FILE`. `--json` alone prints the JSON and nothing else: whatever this process and its
    children print meanwhile goes to stderr. A benchmark that has no table prints JSON in any case."""
    about = "write the figures there; without FILE print them as JSON, and nothing else"
    parser.add_argument("--json", type=Path, nargs="?", const=_ALONE, metavar="FILE", help=about)
    options = parser.parse_args()
    options.output = None if has_table else sys.stdout
    if options.json == _ALONE:
        options.json, options.output = None, os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    return options


def give(options: argparse.Namespace, figures: Mapping[str, Any]) -> None:
    text = json.dumps(figures, indent=2)
    if options.output:
        print(text, file=options.output, flush=True)
    if options.json:
        options.json.write_text(text)
