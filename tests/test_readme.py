"""The README's code runs, in its order, as a reader would type it; the demo at its CI size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = ("make test",)  # this very command runs the tests


def blocks() -> list[tuple[str, str]]:
    return re.findall(r"^```(bash|python)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A shell in the checkout. A stack that stands at UPVLA_HOME is used and left; one started here is stopped."""
    home = os.environ.get("UPVLA_HOME")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    yield {**os.environ, "DEMO": "ci", "PATH": path, "UPVLA_HOME": home or str(tmp_path / "home")}
    if home is None:
        left = {**os.environ, "UPVLA_HOME": str(tmp_path / "home")}
        subprocess.run([sys.executable, "-m", "upvla.cli", "down"], env=left, cwd=ROOT, check=True, timeout=120)


@pytest.mark.e2e
@pytest.mark.timeout(1600)
def test_every_code_block_of_the_readme_executes(reader: dict[str, str]) -> None:
    listed = blocks()
    assert {language for language, _ in listed} == {"bash", "python"}
    script = ["set -euo pipefail"]
    for language, code in listed:
        if language == "python":
            script += ["python - <<'END'", code.rstrip(), "END"]
        else:
            script += [line for line in code.splitlines() if not line.startswith(HERE)]
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        env=reader, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "(1, 10, 7)" in done.stdout
