"""The application: routes, and what is around each of them. Run by `bridge.web.server`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hmac import compare_digest
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import bridge
from bridge.config import Config
from bridge.web import analytics, problems, status
from bridge.web.examples import EXAMPLES
from bridge.web.problems import Problem, ProblemError
from bridge.web.questions import Questions

log = structlog.get_logger()

DESCRIPTION = """\
Read-only. Lists come in pages: follow `next`, or the header `Link`, until it is null. Every answer is there as CSV, too
(`Accept: text/csv`), and has an ETag. Every error is a problem (application/problem+json).
"""
# Whoever looks after us has no token.
FOR_ANYBODY = frozenset({"/livez", "/readyz"})
HEADERS = [
    (b"vary", b"Accept, Authorization"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
# Any of these may come instead of an answer.
USUAL_PROBLEMS = {
    HTTPStatus.UNAUTHORIZED: "The token is missing or another one.",
    HTTPStatus.NOT_ACCEPTABLE: "There is neither JSON nor CSV among what is accepted.",
    HTTPStatus.UNPROCESSABLE_ENTITY: "A parameter is not what is allowed.",
    HTTPStatus.SERVICE_UNAVAILABLE: "The database is away or busy, or the question takes too long.",
}


def create_app(config: Config) -> FastAPI:
    """The application. It connects to the database when it is started, and does not wait for it."""
    questions = Questions(config)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await questions.open()
        yield
        await questions.close()

    # No pages for documents: those of the framework come from elsewhere, and must work without a network.
    app = FastAPI(
        title="Wattbridge",
        description=DESCRIPTION,
        version=bridge.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={int(code): {"model": Problem, "description": text} for code, text in USUAL_PROBLEMS.items()},
    )
    token = config.web.token.get_secret_value()
    app.add_middleware(Gate, token=token.encode())
    app.add_exception_handler(ProblemError, _said)
    app.add_exception_handler(HTTPException, _said_by_framework)
    app.add_exception_handler(RequestValidationError, _said_of_parameters)
    app.include_router(analytics.routes(questions))
    app.include_router(status.routes(questions))

    @app.get("/livez", include_in_schema=False)
    async def livez() -> Response:
        return _plain("alive")

    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        await questions.ask("closed")
        return _plain("ready")

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = _document(app, secret=bool(token))
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign] # as the framework has it done
    return app


class Gate:
    """Around every request: who may ask, what each answer carries, and what is said where something fails in here."""

    def __init__(self, app: ASGIApp, token: bytes) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        if scope["method"] == "HEAD":
            # The server leaves the body out.
            scope = {**scope, "method": "GET"}
        if not self._welcome(scope):
            headers = {"WWW-Authenticate": "Bearer"}
            said = "a token is needed: Authorization: Bearer …"
            await problems.respond(scope["path"], HTTPStatus.UNAUTHORIZED, said, headers)(scope, receive, sending)
            return
        try:
            await self._app(scope, receive, sending)
        except Exception:
            log.exception("web.failed", path=scope["path"])
            if begun:
                raise
            said = "something failed in here; the log says what"
            await problems.respond(scope["path"], HTTPStatus.INTERNAL_SERVER_ERROR, said)(scope, receive, sending)

    def _welcome(self, scope: Scope) -> bool:
        if not self._token or scope["path"] in FOR_ANYBODY:
            return True
        given: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        return scheme.lower() == b"bearer" and compare_digest(token.strip(), self._token)


async def _said(request: Request, error: Exception) -> Response:
    if not isinstance(error, ProblemError):
        raise TypeError
    return problems.respond(request.scope["path"], error.status, error.message, error.headers)


async def _said_by_framework(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise TypeError
    path = request.scope["path"]
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return problems.respond(path, HTTPStatus.NOT_FOUND, "there is no such path; /openapi.json lists all")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            headers = {"Allow": "GET, HEAD"}
            return problems.respond(
                path, HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD: nothing is written", headers
            )
        case code:
            return problems.respond(path, code, str(error.detail), error.headers)


async def _said_of_parameters(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise TypeError
    path = request.scope["path"]
    operation = request.app.openapi()["paths"].get(request.scope["route"].path, {}).get("get", {})
    known = [parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "query"]
    return problems.respond(path, HTTPStatus.UNPROCESSABLE_ENTITY, problems.explained(error.errors(), known))


def _plain(text: str) -> Response:
    return Response(f"{text}\n", headers={"Cache-Control": "no-store"}, media_type="text/plain")


def _document(app: FastAPI, *, secret: bool) -> dict[str, Any]:
    """The OpenAPI document: as the framework makes it, with problems as what they are, CSV, and the token."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for name, path in document["paths"].items():
        for code, response in path["get"]["responses"].items():
            _complete(int(code), response)
        if name in EXAMPLES:
            # Not given to the framework: it takes every null out of them.
            path["get"]["responses"]["200"]["content"]["application/json"]["example"] = EXAMPLES[name]
    schemas: dict[str, Any] = document["components"]["schemas"]
    # How the framework itself would answer.
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    if secret:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _complete(code: int, response: dict[str, Any]) -> None:
    if code == HTTPStatus.OK:
        response["headers"] = {"ETag": {"schema": {"type": "string"}}, "Cache-Control": {"schema": {"type": "string"}}}
        response["content"]["text/csv"] = {"schema": {"type": "string"}}
    else:
        response["content"] = {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
