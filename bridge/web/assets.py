"""Style, scripts and the icon: files of the package, which browsers keep until they are others."""

from functools import cached_property
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from bridge.web.problems import ProblemError
from bridge.web.representation import ASK_AGAIN

MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FOR_EVER = "private, max-age=31536000, immutable"


class Assets:
    """The files of `static/`, without its licences."""

    def address(self, name: str) -> str:
        """Where a page finds the file of this name. Raises KeyError where there is none."""
        _, tag = self._files[name]
        return f"/static/{name}?{tag}"

    def routes(self) -> APIRouter:
        """The route that answers with them."""
        router = APIRouter(include_in_schema=False)

        @router.get("/static/{name:path}")
        async def asset(request: Request, name: Annotated[str, Path()]) -> Response:
            if name not in self._files:
                raise ProblemError(HTTPStatus.NOT_FOUND, "there is no such file")
            body, tag = self._files[name]
            cache = FOR_EVER if request.url.query == tag else ASK_AGAIN
            suffix = name[name.rindex(".") :]
            return Response(body, headers={"Cache-Control": cache}, media_type=MEDIA_TYPES[suffix])

        return router

    @cached_property
    def _files(self) -> dict[str, tuple[bytes, str]]:
        """The content of each, and what it is known by."""
        root = files("bridge.web").joinpath("static")
        found = {}
        folders = [("", root)]
        while folders:
            prefix, folder = folders.pop()
            for entry in folder.iterdir():
                if entry.is_dir():
                    folders.append((f"{prefix}{entry.name}/", entry))
                elif entry.name[entry.name.rfind(".") :] in MEDIA_TYPES:
                    body = entry.read_bytes()
                    found[prefix + entry.name] = (body, sha256(body).hexdigest()[:16])
        return found
