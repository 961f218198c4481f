"""The process: the model loads while the server answers, and signals let it drain."""

import asyncio
import dataclasses
import logging
import signal
import socket
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from jaxdiff.core.errors import InputError, os_error_message
from jaxdiff.serve.access import Access, Gate, is_loopback
from jaxdiff.serve.app import make_app
from jaxdiff.serve.service import Service

LOG = logging.getLogger("jaxdiff.serve")
LAST_ANSWERS_S = 5.0  # for answers to be sent, after their images are done


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where the server listens, and how it stops."""

    port: int = 8000  # 0: any free one
    shutdown_timeout: float = 30.0  # seconds
    access: Access = dataclasses.field(default_factory=Access)


class Server(uvicorn.Server):
    """A server that finishes its requests before it stops; new ones get 503 meanwhile."""

    def __init__(
        self,
        service: Service,
        options: ServerOptions,
        on_ready: Callable[[str], None] = lambda address: None,
    ) -> None:
        app, self._gate = make_app(service, options.access)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_keep_alive=15,
                timeout_graceful_shutdown=int(LAST_ANSWERS_S),
            )
        )
        self._service, self._options, self._on_ready = service, options, on_ready
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loader: threading.Thread | None = None
        self.load_error: BaseException | None = None

    @property
    def gate(self) -> Gate:
        """What requests pass first."""
        return self._gate

    @property
    def address(self) -> str:
        """Where the server listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal; raises InputError."""
        super().run(sockets or [_listen(self._options.access.host, self._options.port)])

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and begin to load the model."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._loader = threading.Thread(target=self._load, name="serve-load", daemon=True)
        self._loader.start()

    @property
    def is_loading(self) -> bool:
        """Whether the model is being loaded."""
        return self._loader is not None and self._loader.is_alive()

    def _load(self) -> None:
        try:
            self._service.load()
        except BaseException as error:
            self.load_error = error
            self.should_exit = True
            return
        self._on_ready(self.address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first SIGTERM or SIGINT, stop at the second."""
        del frame
        if self._stopping:
            self.force_exit = self.should_exit = True
            return
        LOG.info("%s: draining", signal.Signals(sig).name)
        self.stop()

    def stop(self) -> None:
        """Take no more requests, and stop when those in progress are answered."""
        self._stopping = self._service.draining = True
        threading.Thread(target=self._drain, name="serve-drain", daemon=True).start()

    def _drain(self) -> None:
        timeout, done = self._options.shutdown_timeout, threading.Event()
        drain = threading.Thread(target=self._service.drain, args=(timeout,), daemon=True)
        drain.start()
        drain.join(timeout + LAST_ANSWERS_S)
        for _ in range(int(LAST_ANSWERS_S / 0.05)):
            if not self._gate.active:
                break
            done.wait(0.05)
        self.should_exit = True


def serve(
    service: Service, options: ServerOptions, on_ready: Callable[[str], None] = lambda _: None
) -> bool:
    """Serve until a signal; returns whether all threads have ended.

    Raises what ended the loading of the model, and InputError.
    """
    access = options.access
    if not access.keys and not is_loopback(access.host):
        warnings.warn(
            f"host: got {access.host} without an API key: everybody who reaches this port can "
            "generate images; --api-key asks for a key",
            stacklevel=2,
        )
    server = Server(service, options, on_ready)
    try:
        server.run()
    finally:
        has_ended = service.close()
    if server.load_error is not None:
        raise server.load_error
    return has_ended and not server.is_loading


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; InputError for an address that cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=1024)
    except OSError as error:
        why = os_error_message(error)
        place = f"port: got {host}:{port} ({why})"
        raise InputError(f"{place}, expected an address of this machine and a free port") from None
