"""Who may ask, and how much: keys, origins, hosts, and sizes of bodies, before any API."""

import asyncio
import base64
import binascii
import dataclasses
import hashlib
import hmac
import ipaddress
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from starlette.routing import Match

from jaxdiff.serve.errors import GONE, RequestError, error_of, error_response
from jaxdiff.serve.limits import Limits
from jaxdiff.serve.metrics import OTHER
from jaxdiff.serve.service import Service

LOG = logging.getLogger("jaxdiff.serve")
BODY_TIMEOUT_S = 120.0  # for a whole body
SPARE_REQUESTS = 64  # beyond those that the queue and the slots hold: status, results, refusals
HEALTH = "/health/"
UPLOADS = ("/v1/images/edits", "/sdapi/v1/img2img", "/sdapi/v1/png-info", "/jobs")

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Access:
    """Who may use the server. Without keys, everybody who reaches it."""

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()  # of web pages that may ask; "*": all
    host: str = "127.0.0.1"

    def owner(self, headers: Mapping[str, str]) -> str:
        """A hash of the key in the headers, "" without keys; RequestError with 401 for no key.

        The key is a bearer token, the password of basic authentication, or X-API-Key.
        """
        if not self.keys:
            return ""
        given = _given_key(headers).encode()
        found = [hmac.compare_digest(given, key.encode()) for key in self.keys]
        if not any(found):
            message = "API key: got none or a wrong one, expected Authorization: Bearer KEY"
            raise RequestError(401, message, code="invalid_api_key")
        return hashlib.sha256(given).hexdigest()

    def check_page(self, headers: Mapping[str, str]) -> None:
        """RequestError with 403 for a request that a web page from elsewhere makes.

        Without keys a local server must not answer to other names of this machine either: by such
        a name, of their own, pages from elsewhere would reach it (DNS rebinding).
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.keys and is_loopback(self.host) and not is_loopback(_without_port(host)):
            message = f"Host: got {host!a:.60}, expected localhost, as this server has no API key"
            raise RequestError(403, message, code="host_not_allowed")
        own = origin is None or origin.partition("://")[2] == host
        if not own and origin not in self.origins and "*" not in self.origins:
            message = f"Origin: got {origin!a:.60}, expected one of --cors-origin"
            raise RequestError(403, message, code="origin_not_allowed")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def _given_key(headers: Mapping[str, str]) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return headers.get("x-api-key", "")


class Gate:
    """What every request passes first: an ASGI application around another.

    It also counts answers, and turns errors that nobody expected into a number that the log has.
    """

    def __init__(self, app: App, service: Service, access: Access, routes: Sequence[Any]) -> None:
        self._app, self._service, self._access = app, service, access
        self._routes = routes
        self.active = 0  # requests that are being answered, but for those of health
        self._most = service.max_waiting + 2 * service.slots + SPARE_REQUESTS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer, began = _Answer(send), time.monotonic()
        counted = not scope["path"].startswith(HEALTH)
        self.active += counted
        try:
            try:
                if counted:
                    self._check(scope)
                limit = body_limit(scope, self._service.limits)
                await self._app(scope, _bounded(scope, receive, limit), answer)
            except RequestError as error:
                await answer.fail(error, scope, receive)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if answer.status == GONE:
                    await answer.fail(error_of(error), scope, receive)
                elif answer.status != 500:  # the connection is cut; of a 500 the log has it
                    LOG.exception("an answer broke off")
        finally:
            self.active -= counted
            self._service.metrics.answer(self._route(scope), answer.status)
            if counted:
                seconds = time.monotonic() - began
                method, path = scope["method"], scope["path"]
                LOG.info("%a %a %d %.3f s", method, path, answer.status, seconds)

    def _check(self, scope: Scope) -> None:
        headers = {
            name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]
        }
        self._access.check_page(headers)
        scope.setdefault("state", {})["owner"] = self._access.owner(headers)
        if self.active > self._most:
            raise self._service.too_busy()

    def _route(self, scope: Scope) -> str:
        """The path in the schema that a request is for, so that there are few of them."""
        for route in self._routes:
            if route.matches(scope)[0] != Match.NONE:
                return route.path
        return OTHER


class _Answer:
    """What is sent to the client, and with which status it began."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, GONE

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def fail(self, error: RequestError, scope: Scope, receive: Receive) -> None:
        """Send an error; if another answer has started, raise it, which cuts the connection."""
        if self.status != GONE:
            raise error
        response = error_response(error, scope["path"])
        if error.status_code in (408, 413):
            response.headers["connection"] = "close"  # a body that nobody reads is on its way
        await response(scope, receive, self)


def body_limit(scope: Scope, limits: Limits) -> int:
    """How many bytes the body of a request may have."""
    if scope["path"] not in UPLOADS:
        return limits.max_json_bytes
    whole = limits.max_upload_bytes + limits.max_json_bytes
    headers = dict(scope["headers"])
    is_json = not headers.get(b"content-type", b"").startswith(b"multipart/")
    return whole + limits.max_upload_bytes // 3 + 4 if is_json else whole  # of base64


def _bounded(scope: Scope, receive: Receive, limit: int) -> Receive:
    """`receive` for a body of at most `limit` bytes; RequestError for more, or a slow one."""
    length = dict(scope["headers"]).get(b"content-length", b"")
    if length.isdigit() and int(length[:20]) > limit:
        raise _too_large(limit)
    received, complete = 0, False
    end = time.monotonic() + BODY_TIMEOUT_S

    async def bounded() -> Message:
        nonlocal received, complete
        if complete:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0.001))
        except TimeoutError:
            raise RequestError(408, "body: got no end of it in time") from None
        if message["type"] == "http.request":
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > limit:
                raise _too_large(limit)
        return message

    return bounded


def _too_large(limit: int) -> RequestError:
    return RequestError(413, f"body: got more than {limit} bytes, expected at most {limit}")
