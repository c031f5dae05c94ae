"""Show the log of a flow run here until it ends: `python -m flows.follow NAME`.

Also prints what the flow runs that it triggers say. Ctrl-C cancels the run: its finished stages are kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import cast
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, LogFilter, LogFilterTimestamp
from prefect.client.schemas.sorting import LogSort
from prefect.states import Cancelling

_POLL_S = 2.0
_PAGE = 200


def main(arguments: Sequence[str]) -> int:
    """0 when the run completed; its final state's message goes to stderr otherwise."""
    (name,) = arguments
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
        try:
            return _follow(client, run.id, cast(datetime, run.created))
        except KeyboardInterrupt:
            client.set_flow_run_state(run.id, Cancelling())
            print(f"cancelled {name}; finished stages are kept", file=sys.stderr)
            return 130


def _follow(client: SyncPrefectClient, run_id: UUID, since: datetime) -> int:
    shown: set[UUID] = set()
    while True:
        state = client.read_flow_run(run_id).state
        after = LogFilter(timestamp=LogFilterTimestamp.model_validate({"after_": since}))
        for entry in client.read_logs(after, limit=_PAGE, sort=LogSort.TIMESTAMP_ASC):
            if entry.id not in shown:
                shown.add(entry.id)
                since = max(since, entry.timestamp)
                print(f"{entry.timestamp:%H:%M:%S} {entry.message}", flush=True)
        if state is not None and state.is_final():
            if not state.is_completed():
                print(f"{state.name}: {state.message}", file=sys.stderr)
            return 0 if state.is_completed() else 1
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
