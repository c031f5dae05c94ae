"""A policy that robots call: WebSocket sessions and single HTTP requests on one port, one model in one process.

    GET  /health    is a model loaded? (the only door without a token)
    GET  /metrics   Prometheus text: latency histograms, outcomes, sessions, reloads
    GET  /v1/model  what is served: the greeting below
    WS   /v1/act    greeting (JSON text), then one binary reply a binary request, both in `upvla.rollout.wire`'s format
    POST /v1/act    one observation without a session: the same bytes, or JSON with base64 arrays

A request bears `id`, `begin` (a new subtask: what the policy remembers is forgotten), `instruction`, `deadline_ms` and
the arrays `image_<camera>` u8[H,W,3] and `state` f32[S]. A reply bears `id`, `model_id`, `queue_ms`, `predict_ms` and
`actions` f32[C,A], or `error` {code, message}. A subtask is finished by the model that it was begun with; a model that
is loaded meanwhile answers from the next `begin` on.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import uvicorn
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from upvla.errors import Mismatch, NoAnswer, UpvlaError
from upvla.rollout import wire
from upvla.rollout.play import Ask, BatchPolicy
from upvla.rollout.predictor import Asked, Load, Predictor, Served, Session
from upvla.types import Observation, Prediction

log = logging.getLogger(__name__)

_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_GRACE_S = 5  # for requests in flight when the server is told to stop
_STATUS = {"mismatch": 400, "busy": 503, "deadline": 504}


class ServerConfig(BaseModel):
    """Limits of a policy server. It listens on loopback unless told otherwise, and wants its token even there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8600, ge=0, le=65535, description="0: any free one")
    max_bytes: int = Field(default=wire.MAX_BYTES, gt=0, description="of one request")
    max_side: int = Field(default=2048, gt=0, description="pixels of a camera picture's longer side")
    max_state: int = Field(default=256, gt=0, description="dimensions of the state")
    max_instruction: int = Field(default=500, gt=0, description="characters")
    max_sessions: int = Field(default=16, gt=0)
    deadline_ms: float = Field(
        default=2000.0, gt=0, description="where a request names none; also the longest it may name"
    )
    reload_every_s: float = Field(default=5.0, gt=0, description="how often the registry is asked for another model")


class PolicyServer:
    """`app` is an ASGI application. `load("")` gives the first model, and is asked again for a newer one."""

    def __init__(self, load: Load, token: str, config: ServerConfig) -> None:
        first = load("")
        if first is None or not token:
            raise Mismatch("serve: a policy server needs a model and a token")
        self.config, self.served = config, first
        self._load, self._predictor, self._metrics = load, Predictor(), _Metrics(first)
        self._holder: Session | None = None  # of a policy that remembers its subtask: it serves one session at a time
        self._sessions = 0
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._publish),
            Route("/v1/model", self._model),
            Route("/v1/act", self._act, methods=["POST"]),
            WebSocketRoute("/v1/act", self._converse),
        ]
        self.app: ASGIApp = _Guarded(Starlette(routes=routes, lifespan=self._lifespan), token, open_paths=("/health",))

    # -------------------------------------------------------------------------------------------------- the doors

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model_id": self.served.model_id})

    async def _publish(self, request: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type="text/plain; version=0.0.4")

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self._greeting())

    async def _act(self, request: Request) -> Response:
        body = await _body(request, self.config.max_bytes)
        if body is None:
            self._metrics.outcome.labels("too_large").inc()
            return JSONResponse({"error": {"code": "too_large", "message": f"over {self.config.max_bytes} bytes"}}, 413)
        session = Session(self.served)
        as_json = request.headers.get("content-type", "").startswith("application/json")
        try:
            header, arrays = _from_json(body) if as_json else wire.unpack(body, self.config.max_bytes)
            about, prediction = await self._predict(session, {**header, "begin": True}, arrays)
            if as_json:
                return JSONResponse({**about, "actions": prediction.actions.tolist()})
            return Response(wire.pack(about, {"actions": prediction.actions}), media_type="application/octet-stream")
        except Exception as error:
            said = self._refusal(error)
            return JSONResponse({"error": said}, _STATUS.get(said["code"], 500))
        finally:
            self._release(session)

    async def _converse(self, socket: WebSocket) -> None:
        if self._sessions >= self.config.max_sessions:
            await socket.send_denial_response(JSONResponse({"error": "every session is taken: try again"}, 503))
            return
        await socket.accept()
        session = Session(self.served)
        self._sessions += 1
        self._metrics.sessions.set(self._sessions)
        try:
            await socket.send_text(json.dumps(self._greeting()))
            while True:
                await socket.send_bytes(await self._reply(session, await socket.receive_bytes()))
        except (WebSocketDisconnect, KeyError):  # KeyError: text where bytes belong; whoever sends that is not ours
            pass
        finally:
            self._release(session)
            self._sessions -= 1
            self._metrics.sessions.set(self._sessions)

    async def _reply(self, session: Session, message: bytes) -> bytes:
        number: Any = None
        try:
            header, arrays = wire.unpack(message, self.config.max_bytes)
            number = _id_of(header)
            about, prediction = await self._predict(session, header, arrays)
        except Exception as error:
            return wire.pack({"id": number, "error": self._refusal(error)}, {})
        return wire.pack(about, {"actions": prediction.actions})

    def _greeting(self) -> dict[str, Any]:
        return {**self.served.greeting(), "deadline_ms": self.config.deadline_ms}

    # ------------------------------------------------------------------------------------------------ predictions

    async def _predict(
        self, session: Session, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, Any], Prediction]:
        """(what the reply says, the chunk). Raises `Mismatch` for what cannot be answered, `NoAnswer` for too late."""
        number = _id_of(header)
        if header.get("begin") is True:
            session.served, session.memory, session.begun = self.served, {}, True
        elif not session.begun:
            raise Mismatch("act: the first request of a session begins a subtask: send `begin: true`")
        observation, instruction = _checked(session.served, header, arrays, self.config)
        self._hold(session)
        budget = header.get("deadline_ms", self.config.deadline_ms)
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= self.config.deadline_ms:
            raise Mismatch(f"act: deadline_ms {budget!r} is not in 0..{self.config.deadline_ms:g}")
        request = Asked(session, Ask(observation, instruction, session.memory), budget / 1000)
        self._predictor.submit(request)
        prediction = await asyncio.wrap_future(request.done)
        ended = time.monotonic()
        self._metrics.seen(request.taken - request.came, ended - request.taken)
        if ended > request.expires:
            raise NoAnswer("deadline", f"it took {1000 * (ended - request.came):.0f} ms, {budget:g} were allowed")
        self._metrics.outcome.labels("ok").inc()
        return {
            "id": number,
            "model_id": session.served.model_id,
            "queue_ms": round(1000 * (request.taken - request.came), 3),
            "predict_ms": round(1000 * (ended - request.taken), 3),
        }, prediction

    def _hold(self, session: Session) -> None:
        if isinstance(session.served.policy, BatchPolicy):
            return
        if self._holder not in (None, session):
            raise NoAnswer("busy", "this policy remembers its subtask, and another session is in the middle of one")
        self._holder = session

    def _release(self, session: Session) -> None:
        if self._holder is session:
            self._holder = None

    def _refusal(self, error: Exception) -> dict[str, str]:
        """What a caller is told: our own errors in their words, anything else without its inside."""
        if isinstance(error, NoAnswer):
            said = {"code": error.reason, "message": error.detail}
        elif isinstance(error, UpvlaError):
            said = {"code": error.code, "message": str(error)}
        else:
            log.error("act failed", exc_info=error)
            said = {"code": "internal", "message": "the policy failed; the server's log says how"}
        self._metrics.outcome.labels(said["code"]).inc()
        return said

    # ----------------------------------------------------------------------------------------------------- reload

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            self._predictor.close()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.config.reload_every_s)
            try:
                newer = await asyncio.to_thread(self._load, self.served.model_id)
            except Exception as error:  # a registry that is away, a checkpoint that is damaged: keep what works
                log.warning("the model stays %s: %s", self.served.model_id, error)
                self._metrics.reloads.labels("failed").inc()
                continue
            if newer is not None:
                log.warning("serving %s (version %s) from now on", newer.model_id, newer.version or "none")
                self.served = newer
                self._metrics.reloads.labels("ok").inc()
                self._metrics.model(newer)


def as_uvicorn(server: PolicyServer) -> uvicorn.Server:
    """The server that listens: no compression (pictures do not get smaller), sizes refused before they are read."""
    return uvicorn.Server(
        uvicorn.Config(
            server.app,
            ws="websockets-sansio",
            ws_max_size=server.config.max_bytes,
            ws_per_message_deflate=False,
            ws_ping_interval=10.0,
            ws_ping_timeout=10.0,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
    )


class _Metrics:
    def __init__(self, served: Served) -> None:
        self.registry = CollectorRegistry()
        about: dict[str, Any] = {"registry": self.registry}
        self._latency = Histogram("upvla_act_seconds", "one prediction", ["part"], buckets=_BUCKETS_S, **about)
        self.outcome = Counter("upvla_act", "requests by outcome", ["outcome"], **about)
        self.sessions = Gauge("upvla_sessions", "open WebSocket sessions", **about)
        self.reloads = Counter("upvla_reloads", "models taken over", ["outcome"], **about)
        self._model = Gauge("upvla_model", "1 for the model that new subtasks get", ["model_id", "version"], **about)
        self.model(served)

    def seen(self, queued_s: float, predicted_s: float) -> None:
        for part, seconds in (("queue", queued_s), ("predict", predicted_s), ("total", queued_s + predicted_s)):
            self._latency.labels(part).observe(seconds)

    def model(self, served: Served) -> None:
        self._model.clear()
        self._model.labels(served.model_id, served.version).set(1)


class _Guarded:
    """401 for whoever does not bear the token, before anything of the request's body is read."""

    def __init__(self, app: ASGIApp, token: str, open_paths: tuple[str, ...]) -> None:
        self._app, self._expected, self._open = app, f"Bearer {token}".encode(), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and scope["path"] not in self._open:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                refusal = JSONResponse(
                    {"error": {"code": "token", "message": "send `Authorization: Bearer TOKEN`"}}, 401
                )
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _body(request: Request, limit: int) -> bytes | None:
    """None for more than `limit` bytes, whatever the request says of its length."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
    return b"".join(parts)


def _from_json(body: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """`{"instruction": ..., "arrays": {name: {"dtype", "shape", "data": base64}}}`, read by the rules of the wire."""
    try:
        value = json.loads(body)
        arrays = value.pop("arrays", {})
        listed = [[name, about["dtype"], about["shape"]] for name, about in arrays.items()]
        raw = b"".join(base64.b64decode(about["data"], validate=True) for about in arrays.values())
        header = json.dumps({**value, "arrays": listed}).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Mismatch(
            f"act: the body is not the JSON of docs/operations.md: {type(error).__name__}: {error}"
        ) from error
    return wire.unpack(len(header).to_bytes(4, "little") + header + raw)


def _id_of(header: Mapping[str, Any]) -> str | float | None:
    """What the reply repeats, so it must be JSON: NaN, which Python reads, is not."""
    number = header.get("id")
    if isinstance(number, str) or number is None or (isinstance(number, int | float) and math.isfinite(number)):
        return number
    raise Mismatch("act: `id` is a text, a finite number or null")


def _checked(
    served: Served, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], config: ServerConfig
) -> tuple[Observation, str]:
    instruction = header.get("instruction")
    if not isinstance(instruction, str) or not 0 < len(instruction.strip()) <= config.max_instruction:
        raise Mismatch(f"act: `instruction` is a text of 1 to {config.max_instruction} characters")
    wanted = {f"image_{camera}" for camera in served.cameras}
    if arrays.keys() != wanted | {"state"}:
        raise Mismatch(f"act: arrays {sorted(arrays)}; this model takes {sorted(wanted | {'state'})}")
    for name in sorted(wanted):
        frame = arrays[name]
        sides = frame.shape[:2] if frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8 else (0,)
        if not 0 < min(sides) <= max(sides) <= config.max_side:
            raise Mismatch(
                f"act: {name} is {frame.dtype}{list(frame.shape)}, expected uint8[H,W,3] of 1 to {config.max_side} px"
            )
    state = arrays["state"]
    if state.ndim != 1 or state.dtype != np.float32 or len(state) > config.max_state or not np.isfinite(state).all():
        raise Mismatch(f"act: state is {state.dtype}{list(state.shape)}, expected finite float32[S]")
    return Observation({camera: arrays[f"image_{camera}"] for camera in served.cameras}, state), instruction
