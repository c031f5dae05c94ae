"""Everything that Prefect must know of this project, from code: `python -m flows.deploy`, again and again.

The deployments of prefect.yaml, the one slot that trainers share, and the automation that declares a flow run Crashed
when its process has gone without saying so. Without the last one a lost run stays Running, and a deployment that takes
one run at a time waits for it for ever.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import cast

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_URL

TRAINER = "trainer"
"""Name of the limit that every training task of a cluster takes its one slot from; the others wait."""

ZOMBIES = "upvla: a flow run whose process is gone"
SILENCE_S = 300.0  # five heartbeats of `PREFECT_FLOWS_HEARTBEAT_FREQUENCY`
_ENDED = ("Completed", "Failed", "Crashed", "Cancelled", "Paused", "Suspended")


def main() -> int:
    if not PREFECT_API_URL.value():  # Prefect would start a server of its own for this, and forget it afterwards
        print("PREFECT_API_URL names no Prefect server: set it, or `upvla up` starts one", file=sys.stderr)
        return 1
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        return done.returncode
    ensure_trainer_slot()
    ensure_zombie_automation()
    print("deployed: prefect.yaml, the trainer's slot, the automation for lost flow runs")
    return 0


def ensure_trainer_slot() -> None:
    """One, unless an administrator has already chosen another number."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(TRAINER)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=TRAINER, limit=1))


def ensure_zombie_automation(silence_s: float = SILENCE_S) -> Automation:
    """No heartbeat and no end for `silence_s` seconds after a heartbeat: Crashed, so that its slots are free again."""
    wanted = Automation(
        name=ZOMBIES,
        description="Ships with upvla (flows/deploy.py); a later deploy writes it anew.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in _ENDED)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence_s),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                name=None,
                force=False,
                message="no sign of life: its process is gone. Run it again, finished stages are kept.",
            )
        ],
    )
    try:
        wanted.id = cast(Automation, Automation.read(name=ZOMBIES)).id  # typed as a coroutine; here it is none
    except ValueError:
        wanted.create()
    else:
        wanted.update()
    return wanted


if __name__ == "__main__":
    sys.exit(main())
