"""What can go wrong, by what the caller should do next.

Every message says what happened, where, and the next move.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import unquote

if TYPE_CHECKING:
    from pydantic import ValidationError

_LOGIN = re.compile(r'(?<=://)[^/?#\s"]*@')


def shown(text: str) -> str:
    """A URL, or a text with URLs in it, without the user and password that they may hold: for whatever is kept."""
    return _LOGIN.sub("", text)


def login_of(url: str) -> tuple[str, str]:
    """The user and the password that a URL holds, empty where it holds none."""
    found = _LOGIN.search(url)
    user, _, password = found[0][:-1].partition(":") if found else ("", "", "")
    return unquote(user), unquote(password)


def require_no_login(what: str, *urls: str) -> None:
    """Refuse a login in URLs that are written down: on the store, in MLflow, in Prefect's results."""
    for url in urls:
        if shown(url) != url:
            raise ConfigError(
                f"{what} {url} holds a login, and would be kept with it where others read: take it out, and give it to "
                "every machine that opens the URL in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or in fsspec's own "
                "configuration (FSSPEC_HTTPS)"
            )


def cause(error: Exception, url: str) -> Exception | None:
    """What to raise from: `error`, unless `url`, which it is about, holds a password: a traceback would show it."""
    return error if shown(url) == url else None


class UpvlaError(Exception):
    """Base of every error that upvla raises on purpose; `code` is stable and machine-readable.

    Messages end up in logs, flow runs and on the store, so no URL in one keeps its password.
    """

    code = "error"

    def __init__(self, *said: object) -> None:
        super().__init__(*(shown(each) if isinstance(each, str) else each for each in said))


class ConfigError(UpvlaError):
    """A configuration is wrong: fix the named key; nothing was started."""

    code = "config"


class BadEpisode(UpvlaError):
    """One recording is unusable: it goes to quarantine with `reason` and `detail`, the rest goes on."""

    code = "bad_episode"

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, shown(detail)

    def __reduce__(self) -> tuple[type[BadEpisode], tuple[str, str]]:
        return (BadEpisode, (self.reason, self.detail))


class NotFound(UpvlaError):
    """The named object does not exist: check the name; listing its parent shows what does."""

    code = "not_found"


class AlreadyExists(UpvlaError):
    """A conditional create lost: somebody else's object is there; read it and decide."""

    code = "already_exists"


class StoreError(UpvlaError):
    """The object store refused or could not be reached; nothing was changed."""

    code = "store"


class OutcomeUnknown(UpvlaError):
    """A write may or may not have happened (the reply was lost): read back before trying again."""

    code = "outcome_unknown"


class Mismatch(UpvlaError):
    """Two things that must agree do not (action space, statistics, shapes); the message names the dimension."""

    code = "mismatch"


class Corrupt(UpvlaError):
    """Stored bytes do not match their recorded hash or format: use the previous good version."""

    code = "corrupt"


class StackError(UpvlaError):
    """A local server could not be started or is not healthy; the message names it and its log."""

    code = "stack"


class NoSpace(UpvlaError):
    """A disk is too full for what comes next; the message names the folder and what is needed there."""

    code = "no_space"


class AlreadyOwned(UpvlaError):
    """Somebody else runs this already: follow theirs; the message says who it is and since when it was seen alive."""

    code = "already_owned"


class BadStep(UpvlaError):
    """A training step gave numbers that no optimiser should see; the weights were not moved.

    `step` and the mixture `positions` say which samples to look at.
    """

    code = "bad_step"

    def __init__(self, message: str, step: int = 0, positions: tuple[int, ...] = ()):
        super().__init__(message)
        self.step, self.positions = step, positions

    def __reduce__(self) -> tuple[type[BadStep], tuple[str, int, tuple[int, ...]]]:
        return (BadStep, (str(self), self.step, self.positions))


class JobFailed(UpvlaError):
    """A long job ended without its result: the message says why; run it again to go on from where it was."""

    code = "job_failed"


class SimulatorError(UpvlaError):
    """A simulator refused, died or hung: its chain is not judged; the message holds what it said last."""

    code = "simulator"


class NoAnswer(UpvlaError):
    """A policy server is busy, late or gone (`reason`, one word): hold the robot still."""

    code = "no_answer"

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[NoAnswer], tuple[str, str]]:
        return (NoAnswer, (self.reason, self.detail))


def problems_of(error: ValidationError, whole: str = "it") -> str:
    """What a schema found, by place and without its own decoration; `whole`: what a problem of no part is of."""
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or whole}: {each['msg']}" for each in error.errors())
