"""Long runs as Ray Jobs: they outlive whoever started them, and starting one again finds the one that runs.

A job's id is its key and an attempt number. Ray never lets an id be used twice, not even after success, so attempts
are asked about in order: one that runs is attached to, and only when every known attempt has ended a new one starts.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Mapping

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from upvla.errors import JobFailed, StackError

JOB_ID = "UPVLA_JOB_ID"
"""Environment variable of a job: its id, which Ray tells nobody inside it."""
_OVERRIDE = "RAY_API_SERVER_ADDRESS"
_POLL_S = 0.25
_TAIL_LINES = 30
_PREFIX = re.compile(r"\x1b\[[0-9;]*m|^\((?:RayTrainWorker|TrainController|pid=)[^)]*\) ?")


class Jobs:
    """The job server of a Ray cluster (`http://host:8265`). Raises `StackError` if nobody answers there."""

    def __init__(self, url: str) -> None:
        before = os.environ.get(_OVERRIDE)
        os.environ[_OVERRIDE] = url  # else RAY_ADDRESS, where it is set, wins over the argument
        try:
            self._client = JobSubmissionClient(url)
        except AuthenticationError as error:
            raise StackError(
                f"the Ray job server at {url} refuses our token: check RAY_AUTH_TOKEN_PATH (`upvla env`)"
            ) from error
        except (ConnectionError, RuntimeError) as error:
            raise StackError(f"no Ray job server at {url}: {error}; `upvla up` starts one") from error
        finally:
            del os.environ[_OVERRIDE]
            if before is not None:
                os.environ[_OVERRIDE] = before

    def run(self, key: str, entrypoint: str, *, env: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        """Run `entrypoint` to success, attaching to the attempt that runs already; every line of its log is handed on.

        Raises `JobFailed` with the end of the log. Ctrl-C, and a flow run that is told to stop, stop the job too. A
        caller that is killed leaves it running, and the next call attaches; so does one that is cancelled because its
        orchestrator lost sight of it.
        """
        job_id = self._attach_or_submit(key, entrypoint, env)
        tail: list[str] = []

        def keep(line: str) -> None:
            tail.append(line)
            del tail[:-_TAIL_LINES]
            on_line(line)

        try:
            status = self._follow(job_id, keep)
        except (Exception, asyncio.CancelledError):
            raise
        except BaseException:  # an interrupt, not an error: whoever waits for this job wants it to end
            self._client.stop_job(job_id)
            raise
        if status != JobStatus.SUCCEEDED:
            end = "\n  ".join(line for line in tail if line.strip())
            raise JobFailed(f"Ray job {job_id} ended as {status}; its log ends:\n  {end}")

    def cancel(self, key: str) -> bool:
        """Stop the attempt of `key` that runs; False when none does."""
        running = [_job_id(key, number) for number, job in self._attempts(key) if not job.status.is_terminal()]
        for job_id in running:
            self._client.stop_job(job_id)
        return bool(running)

    def running(self) -> list[str]:
        """Ids of the jobs that have not ended."""
        listed = self._client.list_jobs()
        return sorted(job.submission_id for job in listed if job.submission_id and not job.status.is_terminal())

    def _attempts(self, key: str) -> list[tuple[int, JobDetails]]:
        """Known attempts in order. Ids are asked for one by one: a listing of a long-lived cluster has thousands."""
        found: list[tuple[int, JobDetails]] = []
        while (job := self._job(_job_id(key, len(found) + 1))) is not None:
            found.append((len(found) + 1, job))
        return found

    def _job(self, job_id: str) -> JobDetails | None:
        try:
            return self._client.get_job_info(job_id)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise StackError(f"Ray does not say how job {job_id} is: {error}") from error
        except OSError as error:  # requests' connection errors are OSErrors
            raise StackError(f"the Ray job server went away: {error}; `upvla status` shows its log") from error

    def _attach_or_submit(self, key: str, entrypoint: str, env: Mapping[str, str]) -> str:
        while True:
            attempts = self._attempts(key)
            if attempts and not attempts[-1][1].status.is_terminal():
                return _job_id(key, attempts[-1][0])
            job_id = _job_id(key, len(attempts) + 1)
            try:
                return self._client.submit_job(
                    entrypoint=entrypoint, submission_id=job_id, runtime_env={"env_vars": {**env, JOB_ID: job_id}}
                )
            except (RuntimeError, ValueError) as error:
                if self._job(job_id) is None:
                    raise JobFailed(f"Ray refused job {job_id}: {error}") from error
                # somebody else was a moment faster: look again

    def _follow(self, job_id: str, on_line: Callable[[str], None]) -> JobStatus:
        """Hand on the log until the job has ended. A connection that breaks is made again after the last line."""
        seen = 0

        async def tail() -> None:
            nonlocal seen
            skip, rest = seen, ""
            async for text in self._client.tail_job_logs(job_id):
                *lines, rest = (rest + text).split("\n")
                for line in lines:
                    if skip > 0:
                        skip -= 1
                        continue
                    seen += 1
                    on_line(_PREFIX.sub("", _PREFIX.sub("", line)))

        while True:
            try:
                asyncio.run(tail())
            except (OSError, RuntimeError):  # the stream broke; the job's status says whether that matters
                time.sleep(_POLL_S)
            job = self._job(job_id)
            if job is None:
                raise JobFailed(f"Ray has forgotten job {job_id} (its head was restarted): run it again")
            if job.status.is_terminal():
                return job.status
            time.sleep(_POLL_S)


def _job_id(key: str, attempt: int) -> str:
    return f"{key}-{attempt}"
