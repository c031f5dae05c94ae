"""Records survive being written down and read again: what was judged is never judged twice."""

from __future__ import annotations

import json
from dataclasses import asdict

from upvla.launch.scores import _record, _report
from upvla.rollout.evaluate import summarise
from upvla.types import ChainRecord

RECORDS = (
    ChainRecord(0, "D", ("open_drawer", "turn_on_led"), 1, (31, 360), "", "close_to_goal"),
    ChainRecord(1, "D", ("turn_on_led",), 0, (0,), "Mismatch: chunk has shape (4, 7)", "error"),
    ChainRecord(2, "D", ("turn_on_led",), 1, (44,)),
)


def test_records_and_reports_come_back_from_json_as_they_were() -> None:
    assert tuple(_record(row) for row in json.loads(json.dumps(RECORDS))) == RECORDS
    report = summarise("policy", "chains_d", "fingerprint", RECORDS)
    assert _report(json.loads(json.dumps(asdict(report)))) == report
