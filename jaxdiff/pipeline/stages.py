"""The stages of a picture as compiled programs: read words and pictures, denoise, decode."""

import functools
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxdiff.core.types import Array, Float, Int, Key, NDArray, PyTree, UInt8
from jaxdiff.diffusion.losses import add_noise
from jaxdiff.diffusion.timesteps import TimestepGrid
from jaxdiff.guidance.base import Guidance, GuidanceScales
from jaxdiff.guidance.denoiser import ConditionedNetwork, Network, guided_denoiser
from jaxdiff.models.build import abstract, param_dict, with_params
from jaxdiff.models.classifier import LatentClassifier
from jaxdiff.models.clip import CLIPModel, CLIPTextModel
from jaxdiff.models.image_processor import CLIPImageProcessor
from jaxdiff.models.unet import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL
from jaxdiff.nn.embeddings import guidance_embedding
from jaxdiff.pipeline.conditioning import Conditioning, Words, encode
from jaxdiff.pipeline.programs import Program, join, split
from jaxdiff.pipeline.steering import Steering, towards_attributes, towards_likeness
from jaxdiff.samplers.base import Sampler, SamplingState
from jaxdiff.samplers.loop import InpaintingMask, init_state, run_steps
from jaxdiff.samplers.noise import initial_noise


class Told(NamedTuple):
    """What the networks are told beside the latents and the time."""

    main: Conditioning
    guide: Conditioning | None = None  # of a weaker network


class Networks(NamedTuple):
    """What the loop runs, as modules, as their graphs or as their weights."""

    unet: Any
    guide: Any = None  # a weaker UNet
    classifier: Any = None
    clip: Any = None
    vae: Any = None  # where CLIP looks at pictures


class Denoised(NamedTuple):
    """Where the loop ended, and what it saw in the watched steps, in their order."""

    latents: Float[NDArray, "b h w c"]
    # Of each watched step: the noisy latents from which it started, and its D.
    watched: list[tuple[Float[NDArray, "b h w c"], Float[NDArray, "b h w c"]]]


NO_STEERING = Steering()
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
        self._beside = Networks(None)
        self._guide_kind, self._lens = kind, None
        self.take(text_encoders, unet)
        self._vae = nnx.split(_safe(vae))
        # float32 means all of its bits: TPUs and recent GPUs multiply in fewer by default.
        exact = all(w.dtype == jnp.float32 for w in param_dict(unet).values())
        self._precision = "highest" if exact else None
        self._kind = kind
        self._pooled = pooled
        self._devices = list(devices)
        self._programs: dict[Any, Program] = {}

    def take(self, text_encoders: Sequence[CLIPTextModel], unet: UNet2DConditionModel) -> None:
        """Use the weights that these modules have now; programs are kept."""
        self._texts = [nnx.split(encoder) for encoder in text_encoders]
        self._unet = nnx.split(unet)
        self._unet_config = unet.config

    def accompany(
        self,
        *,
        guide: "Stages | None" = None,
        classifier: LatentClassifier | None = None,
        clip: CLIPModel | None = None,
        lens: CLIPImageProcessor | None = None,
    ) -> None:
        """Let these networks take part in the loop from now on, in the place of earlier ones."""
        self._beside = Networks(
            unet=None,
            guide=None if guide is None else guide._unet,
            classifier=None if classifier is None else nnx.split(classifier),
            clip=None if clip is None else nnx.split(clip),
            vae=None if clip is None else self._vae,
        )
        self._guide_kind = self._kind if guide is None else guide._kind
        self._lens = lens

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
        scales: Float[NDArray, "b"] | None = None,
    ) -> Conditioning:
        """What the network is told, the words' part left on the devices for `denoise`."""
        graphs, params = zip(*self._texts, strict=True)
        program = self._program(encode, ".d", graphs=graphs, pooled=self._pooled, skip=skip)
        told = program(params, self._split(words))
        width, cond = self._unet_config.time_cond_proj_dim, None
        if scales is not None and width is not None:
            each = np.asarray(guidance_embedding(jnp.asarray(scales), width))
            cond = np.repeat(each[:, None], words.blank.shape[1], axis=1)
        rest = self._split((time_ids, channels, cond))
        return told._replace(time_ids=rest[0], channels=rest[1], timestep_cond=rest[2])

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
        told: Told,
        dials: GuidanceScales,
        grid: TimestepGrid,
        keys: Key[Array, "b"],
        *,
        sampler: Sampler,
        rule: Guidance,
        span: tuple[int, int],
        steering: Steering = NO_STEERING,
        start: str = "noise",
        given: Float[NDArray, "b h w c"] | None = None,
        mask: Float[NDArray, "b h w 1"] | None = None,
        report: Report | None = None,
        watch: Collection[int] = (),
    ) -> Denoised:
        """Latents after the steps of `span`, in chunks of about CHUNK_S seconds.

        `start` says what the first step begins from: "noise"; the latents `given`, with noise
        ("image") or as noisy as they are ("latents"). With a `mask` they stay where it is 0.
        The steps to `watch` are chunks of their own, which changes no bit and compiles nothing.
        """
        graphs, params = self._networks(rule, steering)
        eps, w, k, x0, m, s = self._split((noise, dials, keys, given, mask, steering))
        known = None if m is None else InpaintingMask(x0, eps, m)
        first, last = span
        rule = jax.tree.map(np.float32, rule)
        program = self._program(begin_images, "dd...", sampler=sampler, start=start)
        carry = program(eps, x0, grid, np.int32(first), rule)
        program = self._program(
            advance_images,
            "..ddd.ddd..",
            graphs=graphs,
            kinds=(self._kind, self._guide_kind),
            lens=self._lens,
            sampler=sampler,
        )
        done, chunk, watched = first, 1, []
        ends = {last, *watch, *(i + 1 for i in watch)}
        while done < last:
            began = join(carry.x) if done in watch else None
            started = time.perf_counter()
            stop = min(done + chunk, *(end for end in ends if end > done))
            bounds = np.int32(done), np.int32(stop)
            compiled = program.compile_s
            carry = program(params, rule, carry, told, w, grid, k, known, s, *bounds)
            jax.block_until_ready(carry)
            ran = time.perf_counter() - started - (program.compile_s - compiled)
            chunk = max(1, int(CHUNK_S * (stop - done) / max(ran, 1e-6)))
            done = stop
            if began is not None:
                watched.append((began, join(carry.x0)))
            if report:
                report(done - first, last - first)
        return Denoised(join(carry.x), watched)

    def _networks(self, rule: Guidance, steering: Steering) -> tuple[Networks, Networks]:
        """Graphs and weights of the networks that are needed."""
        needed = {
            "unet": self._unet,
            "guide": self._beside.guide
            if any(s.network == "guide" for s in rule.streams)
            else None,
            "classifier": self._beside.classifier if steering.attributes else None,
            "clip": self._beside.clip if steering.likeness else None,
            "vae": self._beside.vae if steering.likeness else None,
        }
        halves = {name: (None, None) if pair is None else pair for name, pair in needed.items()}
        graphs, params = ({n: pair[i] for n, pair in halves.items()} for i in (0, 1))
        return Networks(**graphs), Networks(**params)

    def decode(self, latents: Float[NDArray, "b h w c"]) -> UInt8[NDArray, "b h2 w2 3"]:
        """Pictures of scaled latents."""
        graph, params = self._vae
        return join(self._program(_decode, ".d", graph=graph)(params, self._split(latents)))


def _safe(vae: AutoencoderKL) -> AutoencoderKL:
    """`vae`, computing in float32 where its config says that float16 overflows in it."""
    stored = param_dict(vae)
    if not vae.config.force_upcast or jnp.float16 not in {w.dtype for w in stored.values()}:
        return vae
    wide = abstract(AutoencoderKL, vae.config, dtype=jnp.float32, param_dtype=jnp.float16)
    return with_params(wide, stored)


def _latents(params: PyTree, pictures: Array, *, graph: Any) -> Array:
    vae = nnx.merge(graph, params)
    return vae.scale(vae.encode(pictures)[0])


def begin_images(
    noise: Array,
    given: Array | None,
    grid: TimestepGrid,
    first: Int[Array, ""],
    rule: Guidance,
    *,
    sampler: Sampler,
    start: str,
) -> SamplingState:
    """The state before the first step, from noise or from the latents `given`."""
    if given is None or start == "noise":
        x = grid.init_noise_sigma * noise
    elif start == "image":
        level = grid.level(first)
        x = add_noise(given, noise, level.alpha, level.sigma)
    else:
        x = given
    return init_state(x, sampler=sampler, guidance_state=rule.init_state(x))


def advance_images(
    params: Networks,
    rule: Guidance,
    carry: SamplingState,
    told: Told,
    dials: GuidanceScales,
    grid: TimestepGrid,
    keys: Array,
    known: InpaintingMask | None,
    steering: Steering,
    start: Array,
    stop: Array,
    *,
    graphs: Networks,
    kinds: tuple[str, str],
    lens: CLIPImageProcessor | None,
    sampler: Sampler,
) -> SamplingState:
    """The state after the steps from `start` to `stop`."""
    guide = None
    if graphs.guide is not None:
        guide = ConditionedNetwork(_network(graphs.guide), params.guide, told.guide, kinds[1])
    denoise = guided_denoiser(
        _network(graphs.unet),
        params.unet,
        told.main,
        dials,
        rule=rule,
        prediction_type=kinds[0],
        guidance_model=guide,
    )
    if steering.likeness is not None and lens is not None:
        clip, vae = nnx.merge(graphs.clip, params.clip), nnx.merge(graphs.vae, params.vae)
        denoise = towards_likeness(denoise, steering.likeness, clip, lens, vae)
    if steering.attributes is not None:
        classifier = nnx.merge(graphs.classifier, params.classifier)
        denoise, sampler = towards_attributes(denoise, sampler, steering.attributes, classifier)
    return run_steps(
        denoise,
        carry,
        grid,
        keys,
        start,
        stop,
        sampler=sampler,
        guidance_phase=rule.schedule_phase,
        inpainting_mask=known,
    )


def _network(graph: Any) -> Network:
    """A UNet as guidance calls it."""

    def network(params: PyTree, x: Array, t: Array, told: Conditioning, **more: Array) -> Array:
        if told.channels is not None:
            x = jnp.concatenate([x, told.channels], axis=-1)
        added = {name: getattr(told, name) for name in ("text_embeds", "time_ids", "timestep_cond")}
        return nnx.merge(graph, params)(x, t, told.context, **added, **more)

    return network


def _decode(params: PyTree, latents: Array, *, graph: Any) -> Array:
    vae = nnx.merge(graph, params)
    images = vae.decode(vae.unscale(latents))
    return jnp.round(jnp.clip(images / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)
