"""A flow run of one training stage, as the line's own: `python -m tests.faults.one_stage SPEC_URL JOBS_URL`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from prefect import flow

from flows.steps import RESULTS, train_stage1
from upvla.launch.jobs import Jobs
from upvla.launch.train import TrainSpec, run_training, share_done
from upvla.store import open_store


class OneStage:
    """What `flows.steps` asks of a line that has one stage."""

    def __init__(self, spec_url: str, jobs_url: str) -> None:
        folder, _, name = spec_url.rpartition("/")
        self._spec = TrainSpec.model_validate(open_store(folder).read_json(name))
        self._jobs_url = jobs_url
        self.progress: Callable[[float, str], None] = lambda share, text: None

    def train_stage(self, *_: Any) -> dict[str, Any]:
        def on_line(line: str) -> None:
            share = share_done(line)
            self.progress(-1.0 if share is None else share, line)

        store = open_store(self._spec.store_url)
        return run_training(store, self._spec, Jobs(self._jobs_url), on_line=on_line, python=sys.executable)


@flow(name="one-stage", **RESULTS)
def one_stage(spec_url: str, jobs_url: str) -> dict[str, Any]:
    return train_stage1(OneStage(spec_url, jobs_url), {}, {}, {}, {})  # type: ignore[arg-type]


if __name__ == "__main__":
    one_stage(*sys.argv[1:])
