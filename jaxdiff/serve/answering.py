"""What all endpoints have in common: bodies that are read with care, and clients that go."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.responses import Response

from jaxdiff.serve.errors import GONE, RequestError, from_validation
from jaxdiff.serve.limits import parse_json
from jaxdiff.serve.service import Generation, Service

T = TypeVar("T", bound=BaseModel)
PRIORITY = "x-priority"


class Body(BaseModel):
    """A JSON body: no field is unknown, and none is read as what it is not."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CarefulRequest(Request):
    """A request whose JSON is bounded in depth, finite, and parsed beside the event loop."""

    async def json(self) -> Any:
        """The parsed body; RequestError for what is no JSON."""
        if not hasattr(self, "_json"):
            self._json = await asyncio.to_thread(parse_json, await self.body())
        return self._json


class CarefulRoute(APIRoute):
    """A route that reads bodies as CarefulRequest does."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        """The function that answers a request."""
        original = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await original(CarefulRequest(request.scope, request.receive))

        return handler


def parse_fields(model: type[T], fields: dict[str, Any], path: str) -> T:
    """The model of the text fields of a form; raises RequestError."""
    try:
        return model.model_validate(fields, strict=False)
    except ValidationError as error:
        raise from_validation(error.errors(), path) from None


def service_of(request: Request) -> Service:
    """The service that the application was made for."""
    return request.app.state.service


def owner_of(request: Request) -> str:
    """Whose request it is: a hash of the API key."""
    return request.state.owner


def priority_of(request: Request, field: int) -> int:
    """The priority by the header, or else the field; RequestError for what is no number."""
    text = request.headers.get(PRIORITY)
    if text is None:
        return field
    try:
        value = int(text[:10])
    except ValueError:
        message = f"X-Priority: got {text!a:.40}, expected an integer"
        raise RequestError(400, message, param="X-Priority") from None
    if not -10 <= value <= 10:
        message = f"X-Priority: got {value}, expected a number from -10 to 10"
        raise RequestError(400, message, param="X-Priority")
    return value


async def finished(request: Request, generation: Generation) -> None:
    """Return when the images are there; cancel them if the client goes before."""
    done = asyncio.ensure_future(generation.wait())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            generation.cancel("disconnected")
            raise RequestError(GONE, "the client has closed the connection")
    finally:
        generation.cancel("disconnected")  # nothing, where all is done
        done.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
