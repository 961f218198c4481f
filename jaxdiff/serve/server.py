"""The process: the model loads while the server answers, and signals let it drain."""

import asyncio
import dataclasses
import logging
import signal
import threading
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from jaxdiff.core.errors import InputError, os_error_message
from jaxdiff.core.validate import in_range, non_negative
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

    def __post_init__(self) -> None:
        in_range("port", self.port, 0, 65535)
        non_negative("shutdown_timeout", self.shutdown_timeout)


class Server(uvicorn.Server):
    """A server that ends what is begun before it stops: new requests get 503 meanwhile."""

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
                host=options.access.host,
                port=options.port,
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

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and begin to load the model."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        threading.Thread(target=self._load, name="serve-load", daemon=True).start()

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
        """Take no more requests, and stop when those that are begun are answered."""
        self._stopping = self._service.draining = True
        threading.Thread(target=self._drain, name="serve-drain", daemon=True).start()

    def _drain(self) -> None:
        self._service.drain(self._options.shutdown_timeout)
        done = threading.Event()
        for _ in range(int(LAST_ANSWERS_S / 0.05)):
            if not self._gate.active:
                break
            done.wait(0.05)
        self.should_exit = True


def serve(
    service: Service, options: ServerOptions, on_ready: Callable[[str], None] = lambda _: None
) -> None:
    """Serve until a signal; raises what ended the loading of the model, and InputError."""
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
    except SystemExit:  # uvicorn has logged why it cannot listen
        raise _unusable(options) from None
    except OSError as error:
        raise _unusable(options, error) from None
    finally:
        service.close()
    if server.load_error is not None:
        raise server.load_error


def _unusable(options: ServerOptions, error: OSError | None = None) -> InputError:
    why = "an address that cannot be used" if error is None else os_error_message(error)
    place = f"{options.access.host}:{options.port}"
    return InputError(f"port: got {place} ({why}), expected a free port")
