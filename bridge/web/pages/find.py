"""/find: from an id, or the beginning of one, to the page of the device."""

from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import BeforeValidator

from bridge.config import Config
from bridge.web.parameters import Asked, DeviceId
from bridge.web.questions import Questions
from bridge.web.site import Site

MOST = 50


class Wanted(Asked):
    """What is looked for."""

    # As it was pasted.
    id: Annotated[DeviceId, BeforeValidator(lambda text: text.strip() if isinstance(text, str) else text)]


def routes(site: Site, questions: Questions, _: Config) -> APIRouter:
    """The route, answered by `questions`."""
    router = APIRouter()

    @router.get("/find")
    async def find(request: Request, wanted: Annotated[Wanted, Query()]) -> Response:
        found = await questions.ask("find", id=wanted.id, rows=MOST + 1)
        exact = [device for device in found if device["deviceId"] == wanted.id]
        # One device of this name; where a vehicle and a meter share it, the person decides.
        if len(exact) == 1 or len(found) == 1:
            (device, *_) = exact or found
            pages = "vehicles" if device["kind"] == "vehicle" else "chargers"
            return RedirectResponse(f"/{pages}/{quote(device['deviceId'], safe='')}", 303)
        return site.page(request, "find.html", {"wanted": wanted.id, "found": found[:MOST], "more": len(found) > MOST})

    return router
