"""The application: routes, and what is around each of them. Run by `bridge.web.server`."""

import re
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping
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
from bridge.config import Config, Web
from bridge.web import analytics, problems, status
from bridge.web.assets import Assets
from bridge.web.examples import EXAMPLES
from bridge.web.pages import charger, find, fleet, ingest, vehicle
from bridge.web.problems import Problem, ProblemError
from bridge.web.questions import Questions
from bridge.web.site import Site

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
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]
# What a browser may do with an answer: with a page, run our own files and nothing else; with data, nothing.
OF_DATA = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
OF_PAGES = (
    b"content-security-policy",
    (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
)
# A program sends the token as it is, a browser asks for it as a password (of any user). Two headers: Chromium does not
# ask where they are one.
CHALLENGES = ("Bearer", 'Basic realm="Wattbridge: the token is the password", charset="UTF-8"')
# What a browser on this machine calls it.
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
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
    assets = Assets()
    site = app.state.site = Site(config, assets)
    app.add_middleware(Gate, web=config.web, site=site)
    app.add_exception_handler(ProblemError, _said)
    app.add_exception_handler(HTTPException, _said_by_framework)
    app.add_exception_handler(RequestValidationError, _said_of_parameters)
    app.include_router(analytics.routes(questions))
    app.include_router(status.routes(questions))
    app.include_router(assets.routes())
    for page in (fleet, vehicle, charger, ingest, find):
        app.include_router(page.routes(site, questions, config), include_in_schema=False)

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

    def __init__(self, app: ASGIApp, web: Web, site: Site) -> None:
        self._app = app
        self._token = web.token.get_secret_value().encode()
        self._open = web.open
        host, _ = web.address()
        self._names = LOCAL_NAMES | {f"[{host}]" if ":" in host else host}
        self._site = site

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
                page = (b"content-type", b"text/html; charset=utf-8") in message["headers"]
                message["headers"] = [*message["headers"], *HEADERS, OF_PAGES if page else OF_DATA]
            await send(message)

        if scope["method"] == "HEAD":
            # The server leaves the body out.
            scope = {**scope, "method": "GET", "head": True}
        if not self._welcome(scope):
            said = "a token is needed: Authorization: Bearer …, or in a browser as the password of any user name"
            refusal = self._site.refuse(Request(scope), HTTPStatus.UNAUTHORIZED, said)
            for challenge in CHALLENGES:
                refusal.headers.append("WWW-Authenticate", challenge)
            await refusal(scope, receive, sending)
            return
        if not self._ours(scope):
            # A site that lets its name lead here, once a browser has its page, could read everything (DNS rebinding).
            said = f"without web.token this is for {', '.join(sorted(self._names))} alone, by these names"
            refusal = self._site.refuse(Request(scope), HTTPStatus.MISDIRECTED_REQUEST, said)
            await refusal(scope, receive, sending)
            return
        try:
            await self._app(scope, receive, sending)
        except Exception:
            log.exception("web.failed", path=scope["path"])
            if begun:
                raise
            said = "something failed in here; the log says what"
            refusal = self._site.refuse(Request(scope), HTTPStatus.INTERNAL_SERVER_ERROR, said)
            await refusal(scope, receive, sending)

    def _welcome(self, scope: Scope) -> bool:
        if not self._token or scope["path"] in FOR_ANYBODY:
            return True
        given: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return compare_digest(_token(given), self._token)

    def _ours(self, scope: Scope) -> bool:
        """Whether it is asked by a name of its own; with a token, or open to other machines, it may have any."""
        if self._token or self._open or scope["path"] in FOR_ANYBODY:
            return True
        host: bytes = next((value for name, value in scope["headers"] if name == b"host"), b"localhost")
        name = host.decode("latin-1").lower()
        return re.sub(r":[0-9]+$", "", name) in self._names


def _token(authorization: bytes) -> bytes:
    """What a header has as the token: of Bearer all of it, of Basic the password."""
    scheme, _, given = authorization.partition(b" ")
    match scheme.lower():
        case b"bearer":
            return given.strip()
        case b"basic":
            try:
                return b64decode(given.strip(), validate=True).partition(b":")[2]
            except ValueError:
                return b""
        case _:
            return b""


async def _said(request: Request, error: Exception) -> Response:
    if not isinstance(error, ProblemError):
        raise TypeError
    return _refuse(request, error.status, error.message, error.headers)


async def _said_by_framework(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise TypeError
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            return _refuse(request, HTTPStatus.NOT_FOUND, "there is no such path; /openapi.json lists all")
        case HTTPStatus.METHOD_NOT_ALLOWED:
            said = "only GET and HEAD: nothing is written"
            return _refuse(request, HTTPStatus.METHOD_NOT_ALLOWED, said, {"Allow": "GET, HEAD"})
        case code:
            return _refuse(request, code, str(error.detail), error.headers)


async def _said_of_parameters(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise TypeError
    # Each route has them in one model.
    models = (field.field_info.annotation for field in request.scope["route"].dependant.query_params)
    known = [field.alias or name for model in models for name, field in model.model_fields.items()]
    return _refuse(request, HTTPStatus.UNPROCESSABLE_ENTITY, problems.explained(error.errors(), known))


def _refuse(request: Request, status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    site: Site = request.app.state.site
    return site.refuse(request, status, message, headers)


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
