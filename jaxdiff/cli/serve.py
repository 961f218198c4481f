"""`jaxdiff serve`: images over HTTP, by OpenAI's API, by A1111's, and as jobs."""

import dataclasses
import importlib.util
import logging
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from jaxdiff.checkpoints import model_options
from jaxdiff.checkpoints.model_options import ModelOptions
from jaxdiff.cli.arguments import parse
from jaxdiff.core.configs import check_needs
from jaxdiff.core.errors import InputError
from jaxdiff.core.validate import in_range, non_negative, positive

LOG = logging.getLogger("jaxdiff.serve")
API_KEY = "JAXDIFF_API_KEY"  # the environment variable with keys, separated by commas
PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Generate images for HTTP clients: OpenAI's images API, A1111's API, and jobs.

    docs/serving.md describes the APIs. The server takes requests while the model loads, and answers
    them with 503 until it has generated a first image.
    """

    dtype: str | None = None
    """float32, bfloat16 or float16. Default: float32 on CPU, bfloat16 elsewhere."""
    mesh: str | None = None
    """Share weights and work between devices, such as fsdp=4,tensor=2 or guidance=2."""
    offload: str | None = None
    """What leaves the devices while it is not needed: text, the text encoders."""
    vae_tile: int | None = None
    """Tile size of the VAE in pixels. Tiles save memory."""
    host: str = "127.0.0.1"
    """The address to listen on. 0.0.0.0 is every address of this machine."""
    port: int = 8000
    """The port to listen on. 0 is any free port."""
    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A key that requests must have. Repeat the option for several. Other users of this machine can
    see options; the environment variable JAXDIFF_API_KEY has keys that they cannot see."""
    cors_origin: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """The origin of web pages that may use the server, such as https://example.com. Repeat the
    option for several."""
    served_model_name: str | None = None
    """What clients call the model. Default: the name of its folder or file."""
    slots: int = 8
    """Images of one kind that share a step."""
    max_waiting: int = 64
    """Images that wait at most; more are refused with 429."""
    shutdown_timeout: float = 30.0
    """Seconds that images in progress have after SIGTERM."""
    sizes: tuple[str, ...] = ()
    """The sizes that are served, such as 512x512 1024x1024, each of which compiles programs of its
    own. Default: all."""
    max_pixels: int = 2**21
    """Pixels of a generated image at most."""
    max_steps: int = 150
    """Denoising steps of an image at most."""
    max_images: int = 10
    """Images of a request at most."""
    max_prompt_length: int = 4000
    """Characters of a prompt at most."""
    max_upload_bytes: int = 2**24
    """Bytes of the images in a request at most."""
    max_json_bytes: int = 2**20
    """Bytes of a request without images at most."""
    max_image_pixels: int = 2**24
    """Pixels of an image in a request at most."""
    lora_folder: pathlib.Path | None = None
    """The folder with the LoRAs that clients see."""
    max_jobs: int = 1000
    """Jobs that are kept at most; then the oldest ended ones are dropped."""
    job_ttl: float = 600.0
    """Seconds for which a job is kept after it is done."""
    max_job_bytes: int = 2**30
    """Bytes of the images of jobs that are kept at most."""
    log_requests: bool = False
    """Print a line on stderr for each request: path, status, seconds, and OpenAI's `user`."""


NEEDS = model_options.NEEDS


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments`, load the model, serve until a signal. Raises InputError on bad input."""
    options = parse(Options, arguments, prog="jaxdiff serve")
    check_needs(options, NEEDS)
    in_range("port", options.port, 0, 65535)
    non_negative("shutdown_timeout", options.shutdown_timeout)
    positive("slots", options.slots)
    positive("max_waiting", options.max_waiting)
    if options.lora_folder is not None and not options.lora_folder.is_dir():
        raise InputError(f"lora_folder: got {options.lora_folder}, expected a folder")
    keys = _keys(options)
    for origin in options.cors_origin:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise InputError(
                f"cors_origin: got {origin!r:.60}, expected an origin such as https://example.com"
            )
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(
            f"got an installation without {', '.join(missing)}, expected one with what the "
            "server needs: pip install 'jaxdiff[serve]'"
        )
    import jaxdiff  # only now: bad arguments and --help need not wait for jax
    from jaxdiff.generation.models import stored_bytes
    from jaxdiff.parallel.cores import one_device_per_core
    from jaxdiff.pipeline.load import one_model
    from jaxdiff.serve.access import Access
    from jaxdiff.serve.job_store import Jobs
    from jaxdiff.serve.limits import Limits
    from jaxdiff.serve.server import ServerOptions, serve
    from jaxdiff.serve.service import Service

    if options.mesh is None:
        one_device_per_core(stored_bytes(options.model), options.slots)
    names = [field.name for field in dataclasses.fields(Limits)]
    service = Service(
        lambda: one_model(
            jaxdiff.load(
                options.model,
                options.dtype,
                mesh=options.mesh,
                offload=options.offload,
                **options.components(),
            )
        ),
        slots=options.slots,
        max_waiting=options.max_waiting,
        limits=Limits(**{name: getattr(options, name) for name in names}),
        lora_folder=options.lora_folder,
        name=options.served_model_name,
        vae_tile=options.vae_tile,
        jobs=Jobs(max_jobs=options.max_jobs, ttl=options.job_ttl, max_bytes=options.max_job_bytes),
    )
    if options.log_requests:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
    has_ended = serve(
        service,
        ServerOptions(
            port=options.port,
            shutdown_timeout=options.shutdown_timeout,
            access=Access(keys=keys, origins=options.cors_origin, host=options.host),
        ),
        lambda address: print(
            f"serve: {service.model_name} is ready at {address} ({service.pipe.device_name}, "
            f"{options.slots} slots)",
            flush=True,
        ),
    )
    if not has_ended:  # Python would abort where it meets a thread that compiles
        sys.stderr.flush()
        os._exit(0)


def _keys(options: Options) -> tuple[str, ...]:
    """The API keys; InputError for one that no client could send."""
    named = [key.strip() for key in os.environ.get(API_KEY, "").split(",")]
    keys = (*options.api_key, *(key for key in named if key))
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError("api_key: got one with spaces or none at all, expected ASCII letters")
    return keys
