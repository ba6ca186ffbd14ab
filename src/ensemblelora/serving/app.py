"""What a server answers: routes, their forms, and every error as one JSON line, ``{"error": "..."}``."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ensemblelora import __version__
from ensemblelora.answers import Prediction, Question
from ensemblelora.api import Run
from ensemblelora.data.rendering import find_input_columns
from ensemblelora.errors import EnsembleLoraError, UsageError
from ensemblelora.serving.batching import Batcher
from ensemblelora.serving.limits import Limits, Refusal
from ensemblelora.serving.metrics import Metrics, make_metrics, render_metrics

__all__ = ["answer_each", "make_app"]

logger = logging.getLogger(__name__)

_FORM = 'expected JSON, {"task": NAME or null, "rows": [TEXT or {COLUMN: VALUE}, ...]}, as application/json'


class Asked(BaseModel):
    """Rows to answer."""

    model_config = ConfigDict(extra="forbid")

    task: str | None = Field(None, description="A task's name; null or left out: each row is routed.")
    rows: list[str | dict[str, Any]] = Field(
        min_length=1, description="Column values as the task's card reads them; a text stands for its one column."
    )

    @field_validator("rows")
    @classmethod
    def _check_text(cls, rows: list[Any]) -> list[Any]:
        try:
            json.dumps(rows, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair is no character; send whole ones") from None
        return rows


class Answered(BaseModel):
    """An answer a row, in order; a row that the card explodes has several."""

    predictions: list[Prediction]


class TaskEntry(BaseModel):
    """A task that can be asked."""

    task: str
    kind: str = Field(description="verbalizer, options, sequence (free text) or classification")
    columns: list[str] = Field(description="What a row brings; with one column, a plain text will do.")
    choices: list[str] | None = Field(description="null: free text, or choices that the row brings")


class Health(BaseModel):
    """The server is up and has its model."""

    status: str
    version: str
    run: str
    n_tasks: int
    is_routing: bool = Field(description="whether rows without a task's name are answered")
    waiting_rows: int


class Fault(BaseModel):
    """Why there is no answer, in one line."""

    error: str


_FAULTS: dict[int | str, dict[str, Any]] = {
    400: {"model": Fault, "description": "The body can't be read as text."},
    403: {"model": Fault, "description": "Asked by a name that is not this machine's."},
    408: {"model": Fault, "description": "The request took too long to arrive."},
    413: {"model": Fault, "description": "Too many rows or bytes."},
    415: {"model": Fault, "description": "The request does not say that it is JSON."},
    422: {"model": Fault, "description": "The request can't be answered as asked."},
    500: {"model": Fault, "description": "A fault of the server."},
    503: {"model": Fault, "description": "Overloaded, or stopping; try again later."},
    504: {"model": Fault, "description": "Not answered in time."},
}


def make_app(run: Run, limits: Limits, *, is_routing: bool = True, hosts: Collection[str] | None = None) -> FastAPI:
    """Put a run behind HTTP; ``state.hurry()`` of the application says that it is to stop soon.

    Args:
        run: An opened run.
        limits: What is accepted.
        is_routing: Whether rows without a task's name are answered.
        hosts: Names that requests may call this server by; none: any. Keeps pages of other sites, whose name was made
            to point here, from asking through their visitor's browser.
    """

    def observe(n_rows: int, seconds: float) -> None:
        metrics.batch_rows.observe(n_rows)
        metrics.batch_seconds.observe(seconds)

    batcher = Batcher(partial(answer_each, run), limits, observe=observe)
    metrics = make_metrics(lambda: batcher.n_waiting_rows)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with batcher.running():
            yield

    # The pages that show OpenAPI load scripts from elsewhere; the description itself is served.
    app = FastAPI(title="ensemblelora", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.hurry = batcher.hurry
    app.add_middleware(_Gate, limits=limits, metrics=metrics, hosts=hosts)
    _add_faults(app, metrics)
    _add_predict(app, batcher, limits, metrics, is_routing=is_routing)
    _add_inspection(app, run, batcher, metrics, is_routing=is_routing)
    return app


def answer_each(run: Run, questions: Sequence[Question]) -> list[list[Prediction] | Exception]:
    """Answer questions together; where one is at fault, each alone, so that no other one is refused for it."""
    try:
        return [*run.predict_all(questions)]
    except Exception as error:
        if len(questions) == 1:
            return [error]
    return [answer_each(run, [question])[0] for question in questions]


def _add_predict(app: FastAPI, batcher: Batcher, limits: Limits, metrics: Metrics, *, is_routing: bool) -> None:
    @app.post("/predict", responses=_FAULTS)
    async def predict(asked: Asked) -> Answered:
        """Answer rows of a task, or of the tasks they are likeliest of."""
        if len(asked.rows) > limits.max_rows:
            told = f"{len(asked.rows)} rows in one request, at most {limits.max_rows} may be; send them in several"
            raise Refusal("too large", told, status=413)
        if asked.task is None and not is_routing:
            raise UsageError('this server answers no rows without a task\'s name; give one: "task": NAME')
        predictions = await batcher.submit(Question(asked.task, asked.rows))
        for one in predictions:
            metrics.answers.labels(task=one.task, routed=str(one.routing is not None).lower()).inc()
        return Answered(predictions=predictions)


def _add_inspection(app: FastAPI, run: Run, batcher: Batcher, metrics: Metrics, *, is_routing: bool) -> None:
    @app.get("/tasks")
    async def tasks() -> list[TaskEntry]:
        """List what can be asked."""
        return [_describe_task(run, name) for name in run.cards]

    @app.get("/health")
    async def health() -> Health:
        """Say that the server is up; it isn't before its model is loaded."""
        return Health(
            status="ok",
            version=__version__,
            run=run.path.name,
            n_tasks=len(run.cards),
            is_routing=is_routing,
            waiting_rows=batcher.n_waiting_rows,
        )

    @app.get("/metrics", response_class=Response)
    async def show_metrics() -> Response:
        """Counters in Prometheus' format."""
        return Response(render_metrics(metrics), media_type="text/plain; version=0.0.4; charset=utf-8")


def _describe_task(run: Run, name: str) -> TaskEntry:
    card = run.cards[name]
    spec = card.doc_to_choice
    names = None if spec is None or isinstance(spec, str) else spec.values() if isinstance(spec, dict) else spec
    choices = None if names is None else [choice.strip() for choice in names]
    return TaskEntry(task=name, kind=run.kinds[name], columns=list(find_input_columns(card)), choices=choices)


def _add_faults(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error with one line, and count it."""

    def say(reason: str, status: int, message: str) -> JSONResponse:
        metrics.refusals.labels(reason=reason).inc()
        headers = {"Retry-After": "1"} if status == 503 else {}
        return JSONResponse({"error": " ".join(message.split())}, status_code=status, headers=headers)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, error: Refusal) -> JSONResponse:
        return say(error.reason, error.status, str(error))

    @app.exception_handler(RequestValidationError)
    async def refuse_form(request: Request, error: RequestValidationError) -> JSONResponse:
        if not _is_json(kind := request.headers.get("content-type", "")):
            came = f"came as {kind.partition(';')[0].strip()}" if kind else "does not say what it is"
            return say("invalid", 415, f"the request {came}, expected JSON; send Content-Type: application/json")
        return say("invalid", 422, f"{_describe_form(error.errors())}; {_FORM}")

    @app.exception_handler(UsageError)
    async def refuse_request(_: Request, error: UsageError) -> JSONResponse:
        return say("invalid", 422, str(error))

    @app.exception_handler(AnyHTTPException)
    async def refuse_http(_: Request, error: AnyHTTPException) -> JSONResponse:
        return say("too large" if error.status_code == 413 else "http", error.status_code, str(error.detail))

    @app.exception_handler(EnsembleLoraError)
    async def fail(_: Request, error: EnsembleLoraError) -> JSONResponse:
        logger.error("%s", error)
        return say("failure", 500, str(error))

    @app.exception_handler(Exception)
    async def fail_unexpected(_: Request, error: Exception) -> JSONResponse:
        return say("failure", 500, f"unexpected {type(error).__name__}; the server's own log has more")


def _describe_form(faults: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a request: keys that it knows nothing of, which may be others misspelt, or its first fault."""
    unknown = [repr(fault["loc"][-1]) for fault in faults if fault["type"] == "extra_forbidden"]
    if unknown:
        return f"unknown key{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}"
    first = faults[0]
    if first["type"] == "json_invalid":
        return f"the body is no JSON ({first['ctx']['error']}, at character {first['loc'][-1]})"
    where = [str(part) for part in first["loc"][1:]]
    if where[:1] == ["rows"] and len(where) > 1:
        where = [f"row {int(where[1]) + 1}"]
    return f"{'.'.join(where) or 'body'}: {first['msg'].removeprefix('Value error, ')}"


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind.startswith("application/") and (kind == "application/json" or kind.endswith("+json"))


class _Gate:
    """Counts requests; keeps out bodies that are too large or too slow, and names this server is not known by."""

    def __init__(self, app: ASGIApp, *, limits: Limits, metrics: Metrics, hosts: Collection[str] | None) -> None:
        self._app, self._limits, self._metrics, self._hosts = app, limits, metrics, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        app: ASGIApp = self._app
        if not self._is_known(scope):
            self._metrics.refusals.labels(reason="host").inc()
            app = _refuse_host
        try:
            await app(scope, _limit_body(receive, self._limits), watched)
        finally:
            known = scope["path"] in ("/predict", "/tasks", "/health", "/metrics", "/openapi.json")
            route = scope["path"] if known else "other"
            self._metrics.requests.labels(route=route, status=str(status)).inc()
            self._metrics.request_seconds.labels(route=route).observe(time.perf_counter() - started)

    def _is_known(self, scope: Scope) -> bool:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        return self._hosts is None or name in self._hosts


async def _refuse_host(scope: Scope, receive: Receive, send: Send) -> None:
    told = "this server is known by names of this machine only; ask it as http://127.0.0.1, or name another --host"
    await JSONResponse({"error": told}, status_code=403)(scope, receive, send)


def _limit_body(receive: Receive, limits: Limits) -> Callable[[], Any]:
    """Pass a request's body on, as long as it is neither too large nor too slow."""
    deadline, n_bytes, is_whole = time.monotonic() + limits.timeout_seconds, 0, False

    async def limited() -> Message:
        nonlocal n_bytes, is_whole
        if is_whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.0))
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the request was not whole within {limits.timeout_seconds:g} s") from None
        n_bytes += len(message.get("body", b""))
        is_whole = not message.get("more_body", False)
        if n_bytes > limits.max_body_bytes:
            raise HTTPException(413, f"the request has more than {limits.max_body_bytes} bytes; send it in several")
        return message

    return limited
