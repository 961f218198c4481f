"""The stages of a picture as compiled programs: read words and pictures, denoise, decode."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Float, Int, Key, NDArray, PyTree, UInt8
from jaxdiff.diffusion.losses import diffuse
from jaxdiff.diffusion.timesteps import Grid
from jaxdiff.guidance.denoiser import guided
from jaxdiff.guidance.rule import Dials, Guidance
from jaxdiff.models.build import abstract, assemble, weights
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.pipeline.conditioning import Conditioning, Words, encode
from jaxdiff.pipeline.programs import Program, join, split
from jaxdiff.samplers.loop import Known, advance, begin
from jaxdiff.samplers.noise import initial_noise
from jaxdiff.samplers.rule import Carry, Sampler

CHUNK_S = 0.5  # how long the loop runs between two looks at the clock and at Ctrl-C
Report = Callable[[int, int], None]  # (steps done, steps in all)


class Stages:
    """Compiled programs over the local devices; weights are passed in, never compiled in.

    Every method takes and gives host arrays of a whole batch, which must divide by the devices.
    """

    def __init__(
        self,
        text_encoders: Sequence[CLIPTextModel],
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        *,
        kind: str,
        pooled: bool,
        devices: Sequence[jax.Device],
    ) -> None:
        self.take(text_encoders, unet)
        self._vae = nnx.split(_safe(vae))
        # float32 means all of its bits: TPUs and recent GPUs multiply in fewer by default.
        exact = all(w.dtype == jnp.float32 for w in weights(unet).values())
        self._precision = "highest" if exact else None
        self._kind = kind
        self._pooled = pooled
        self._devices = list(devices)
        self._programs: dict[Any, Program] = {}

    def take(self, text_encoders: Sequence[CLIPTextModel], unet: UNet2DConditionModel) -> None:
        """Use the weights that these modules have now; programs are kept."""
        self._texts = [nnx.split(encoder) for encoder in text_encoders]
        self._unet = nnx.split(unet)

    @property
    def compile_s(self) -> float:
        """Seconds that compiling has taken so far."""
        return sum(program.compile_s for program in self._programs.values())

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return sum(program.compilations for program in self._programs.values())

    def _program(self, function: Callable[..., Any], per_device: str, **static: Any) -> Program:
        """The program of `function` with `static` choices; "d" per device, "." on all the same."""
        key = (function, tuple(static.items()))
        if key not in self._programs:
            chosen = functools.partial(function, **static)
            own = [letter == "d" for letter in per_device]
            self._programs[key] = Program(chosen, own, self._devices, precision=self._precision)
        return self._programs[key]

    def _split(self, tree: PyTree) -> PyTree:
        return split(tree, len(self._devices))

    def encode(
        self,
        words: Words,
        *,
        skip: int,
        time_ids: Float[NDArray, "b k i"] | None = None,
        channels: Float[NDArray, "b k h w c"] | None = None,
    ) -> Conditioning:
        """What the network is told, the words' part left on the devices for `denoise`."""
        graphs, params = zip(*self._texts, strict=True)
        program = self._program(encode, ".d", graphs=graphs, pooled=self._pooled, skip=skip)
        told = program(params, self._split(words))
        return told._replace(time_ids=self._split(time_ids), channels=self._split(channels))

    def latents(self, pictures: Float[NDArray, "b h2 w2 3"]) -> Float[NDArray, "b h w c"]:
        """Scaled latents, the most likely ones, of pictures in [-1, 1]."""
        graph, params = self._vae
        return join(self._program(_latents, ".d", graph=graph)(params, self._split(pictures)))

    def noise(
        self, keys: Key[Array, "b"], shape: tuple[int, int, int]
    ) -> Float[NDArray, "b h w c"]:
        """The unit-variance noise that each image starts from."""
        return join(self._program(initial_noise, "d", shape=shape)(self._split(keys)))

    def denoise(
        self,
        noise: Float[NDArray, "b h w c"],
        conditioning: Conditioning,
        scales: Float[NDArray, "b"],
        grid: Grid,
        keys: Key[Array, "b"],
        *,
        sampler: Sampler,
        rule: Guidance,
        span: tuple[int, int],
        start: str = "noise",
        given: Float[NDArray, "b h w c"] | None = None,
        mask: Float[NDArray, "b h w 1"] | None = None,
        report: Report | None = None,
    ) -> Float[NDArray, "b h w c"]:
        """Latents after the steps of `span`, in chunks of about CHUNK_S seconds.

        `start` says what the first step begins from: "noise"; the latents `given`, with noise
        ("image") or as noisy as they are ("latents"). With a `mask` they stay where it is 0.
        """
        graph, params = self._unet
        eps, w, k, x0, m = self._split((noise, scales, keys, given, mask))
        known = None if m is None else Known(x0, eps, m)
        first, last = span
        program = self._program(_begin, "dd..", sampler=sampler, rule=rule, start=start)
        carry = program(eps, x0, grid, np.int32(first))
        program = self._program(
            _advance, ".ddd.dd..", graph=graph, kind=self._kind, sampler=sampler, rule=rule
        )
        done, chunk = first, 1
        while done < last:
            started = time.perf_counter()
            stop = min(done + chunk, last)
            bounds = np.int32(done), np.int32(stop)
            compiled = program.compile_s
            carry = program(params, carry, conditioning, w, grid, k, known, *bounds)
            jax.block_until_ready(carry)
            ran = time.perf_counter() - started - (program.compile_s - compiled)
            chunk = max(1, int(CHUNK_S * (stop - done) / max(ran, 1e-6)))
            done = stop
            if report:
                report(done - first, last - first)
        return join(carry.x)

    def decode(self, latents: Float[NDArray, "b h w c"]) -> UInt8[NDArray, "b h2 w2 3"]:
        """Pictures of scaled latents."""
        graph, params = self._vae
        return join(self._program(_decode, ".d", graph=graph)(params, self._split(latents)))


def _safe(vae: AutoencoderKL) -> AutoencoderKL:
    """`vae`, computing in float32 where its config says that float16 overflows in it."""
    stored = weights(vae)
    if not vae.config.force_upcast or jnp.float16 not in {w.dtype for w in stored.values()}:
        return vae
    wide = abstract(AutoencoderKL, vae.config, dtype=jnp.float32, param_dtype=jnp.float16)
    return assemble(wide, stored)


def _latents(params: PyTree, pictures: Array, *, graph: Any) -> Array:
    vae = nnx.merge(graph, params)
    return vae.scale(vae.encode(pictures)[0])


def _begin(
    noise: Array,
    given: Array | None,
    grid: Grid,
    first: Int[Array, ""],
    *,
    sampler: Sampler,
    rule: Guidance,
    start: str,
) -> Carry:
    if given is None or start == "noise":
        x = grid.start * noise
    elif start == "image":
        level = grid.level(first)
        x = diffuse(given, noise, level.alpha, level.sigma)
    else:
        x = given
    return begin(x, sampler=sampler, memory=rule.init(x))


def _advance(
    params: PyTree,
    carry: Carry,
    conditioning: Conditioning,
    scales: Array,
    grid: Grid,
    keys: Array,
    known: Known | None,
    start: Array,
    stop: Array,
    *,
    graph: Any,
    kind: str,
    sampler: Sampler,
    rule: Guidance,
) -> Carry:
    def network(params: PyTree, x: Array, t: Array, told: Conditioning) -> Array:
        if told.channels is not None:
            x = jnp.concatenate([x, told.channels], axis=-1)
        unet = nnx.merge(graph, params)
        return unet(x, t, told.context, text_embeds=told.text_embeds, time_ids=told.time_ids)

    denoise = guided(network, params, conditioning, Dials(scales), rule=rule, kind=kind)
    return advance(denoise, carry, grid, keys, start, stop, sampler=sampler, known=known)


def _decode(params: PyTree, latents: Array, *, graph: Any) -> Array:
    vae = nnx.merge(graph, params)
    images = vae.decode(vae.unscale(latents))
    return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
