"""The playtable's suites: chains are drawn once and kept, and drawn anew where what is kept is not what was drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from upvla.errors import ConfigError
from upvla.sim.playtable import chains as sampler
from upvla.sim.playtable.suite import SUITES, playtable
from upvla.sim.suite import chains_id, code_id


@pytest.mark.parametrize("name", ["playtable-d", "playtable-d-tasks"])
def test_chains_are_drawn_once_and_kept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = playtable(name, tmp_path)
    drawn = suite.chains(4)
    assert chains_id(drawn) == chains_id(playtable(name).chains(4))
    for draw in ("sample_chains", "sample_starts"):
        monkeypatch.setattr(sampler, draw, lambda **options: pytest.fail("drawn again"))
    kept = suite.chains(3 if name == "playtable-d" else 4)
    for one, same in zip(kept, drawn, strict=False):
        assert one.tasks == same.tasks
        np.testing.assert_array_equal(one.robot_state, same.robot_state)
        np.testing.assert_array_equal(one.scene_state, same.scene_state)


def test_a_list_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    suite = playtable("playtable-d", tmp_path)
    right = chains_id(suite.chains(3))
    (file,) = tmp_path.glob("playtable-chains-*.json")
    kept = json.loads(file.read_text())
    kept["chains"][1][3][0] = "open_drawer" if kept["chains"][1][3][0] != "open_drawer" else "close_drawer"
    for damage in (json.dumps(kept), file.read_text()[:99], "[]"):
        file.write_text(damage)
        assert chains_id(suite.chains(3)) == right
        assert chains_id(playtable("playtable-d", tmp_path).chains(3)) == right


def test_suites_name_their_scenes_and_refuse_more_than_there_is() -> None:
    assert {chain.scene for chain in playtable("playtable-abc").chains(1)} == {"A", "B", "C"}
    assert len(playtable("playtable-a-tasks").chains(1)) == 34
    assert all(playtable(name).kind == kind for name, (kind, _) in SUITES.items())
    with pytest.raises(ConfigError, match="playtable-d has 1000 chains a scene: ask for 1 to 1000, not 1001"):
        playtable("playtable-d").chains(1001)


def test_code_is_known_by_what_it_does_and_not_by_how_it_is_written_down(tmp_path: Path) -> None:
    file, marks = tmp_path / "a.py", []
    plain = "def f(x):\n    return x + 1\n"
    documented = '"""Doc."""\ndef f(x):  # why\n    """Said."""\n    return (x +\n       1)\n'
    for text in (plain, documented, plain.replace("1", "2")):
        file.write_text(text)
        marks.append(code_id(file))
    assert marks[0] == marks[1] != marks[2]
