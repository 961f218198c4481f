"""The three stages of a picture as compiled programs: encode the text, denoise, decode."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Float, Int, Key, NDArray, PyTree, UInt8
from jaxdiff.diffusion.timesteps import Grid
from jaxdiff.guidance.denoiser import guided
from jaxdiff.guidance.rules import Guidance
from jaxdiff.models.build import abstract, assemble, weights
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.pipeline.programs import Program, join, split
from jaxdiff.samplers.loop import advance, begin
from jaxdiff.samplers.noise import initial_noise
from jaxdiff.samplers.registry import SAMPLERS
from jaxdiff.samplers.rule import Carry

CHUNK_S = 0.5  # how long the loop runs between two looks at the clock and at Ctrl-C
Report = Callable[[int, int], None]  # (steps done, steps in all)


class Stages:
    """Compiled programs over the local devices; weights are passed in, never compiled in.

    Every method takes and gives host arrays of a whole batch, which must divide by the devices.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        *,
        kind: str,
        devices: Sequence[jax.Device],
    ) -> None:
        self._text, self._unet, self._vae = (nnx.split(m) for m in (text_encoder, unet, _safe(vae)))
        # float32 means all of its bits: TPUs and recent GPUs multiply in fewer by default.
        exact = all(w.dtype == jnp.float32 for w in weights(unet).values())
        self._precision = "highest" if exact else None
        self._kind = kind
        self._devices = list(devices)
        self._programs: dict[Any, Program] = {}

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

    def encode(self, ids: Int[NDArray, "b k n"]) -> PyTree:
        """Contexts (b, k, n, d) of token ids, left on the devices for `denoise`."""
        graph, params = self._text
        return self._program(_encode, ".d", graph=graph)(params, split(ids, len(self._devices)))

    def noise(
        self, keys: Key[Array, "b"], shape: tuple[int, int, int]
    ) -> Float[NDArray, "b h w c"]:
        """The unit-variance noise that each image starts from."""
        program = self._program(initial_noise, "d", shape=shape)
        return join(program(split(keys, len(self._devices))))

    def denoise(
        self,
        latents: Float[NDArray, "b h w c"],
        context: PyTree,
        scales: Float[NDArray, "b"],
        grid: Grid,
        keys: Key[Array, "b"],
        *,
        sampler: str,
        rule: Guidance,
        report: Report | None = None,
    ) -> Float[NDArray, "b h w c"]:
        """Latents after all steps of `grid`, in chunks of about CHUNK_S seconds."""
        graph, params = self._unet
        noise, w, k = split((latents, scales, keys), len(self._devices))
        carry = self._program(_begin, "d.", sampler=sampler, rule=rule)(noise, grid)
        program = self._program(
            _advance, ".ddd.d..", graph=graph, kind=self._kind, sampler=sampler, rule=rule
        )
        steps, done, chunk = int(grid.steps), 0, 1
        while done < steps:
            started = time.perf_counter()
            stop = min(done + chunk, steps)
            bounds = np.int32(done), np.int32(stop)
            compiled = program.compile_s
            carry = jax.block_until_ready(program(params, carry, context, w, grid, k, *bounds))
            ran = time.perf_counter() - started - (program.compile_s - compiled)
            chunk = max(1, int(CHUNK_S * (stop - done) / max(ran, 1e-6)))
            done = stop
            if report:
                report(done, steps)
        return join(carry.x)

    def decode(self, latents: Float[NDArray, "b h w c"]) -> UInt8[NDArray, "b h2 w2 3"]:
        """Pictures of scaled latents."""
        graph, params = self._vae
        program = self._program(_decode, ".d", graph=graph)
        return join(program(params, split(latents, len(self._devices))))


def _safe(vae: AutoencoderKL) -> AutoencoderKL:
    """`vae`, computing in float32 where its config says that float16 overflows in it."""
    stored = weights(vae)
    if not vae.config.force_upcast or jnp.float16 not in {w.dtype for w in stored.values()}:
        return vae
    wide = abstract(AutoencoderKL, vae.config, dtype=jnp.float32, param_dtype=jnp.float16)
    return assemble(wide, stored)


def _encode(params: PyTree, ids: Int[Array, "b k n"], *, graph: Any) -> Array:
    flat = nnx.merge(graph, params)(ids.reshape(-1, ids.shape[-1]))
    return flat.reshape(*ids.shape, flat.shape[-1])


def _begin(latents: Array, grid: Grid, *, sampler: str, rule: Guidance) -> Carry:
    return begin(latents, grid, sampler=SAMPLERS[sampler], memory=rule.init(latents))


def _advance(
    params: PyTree,
    carry: Carry,
    context: Array,
    scales: Array,
    grid: Grid,
    keys: Array,
    start: Array,
    stop: Array,
    *,
    graph: Any,
    kind: str,
    sampler: str,
    rule: Guidance,
) -> Carry:
    def network(params: PyTree, x: Array, t: Array, context: Array) -> Array:
        return nnx.merge(graph, params)(x, t, context)

    denoise = guided(network, params, context, scales, rule=rule, kind=kind)
    return advance(denoise, carry, grid, keys, start, stop, sampler=SAMPLERS[sampler])


def _decode(params: PyTree, latents: Array, *, graph: Any) -> Array:
    vae = nnx.merge(graph, params)
    images = vae.decode(vae.unscale(latents))
    return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
