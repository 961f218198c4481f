"""A family of another network, text joining and extra is data and one network: nothing else."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import jaxdiff
from jaxdiff.checkpoints import model_registry
from jaxdiff.checkpoints.configs import from_diffusers
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.train import wire
from jaxdiff.experiments.training_methods import make_training_method
from jaxdiff.families import registry
from jaxdiff.families.base import Extra, Family, Option, TextEncoder
from jaxdiff.families.registry import accepted_options
from jaxdiff.families.stable_diffusion import SD
from jaxdiff.models.build import param_dict, with_params
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.nn.layers import LayerFactory
from jaxdiff.parallel.mesh import sampling_mesh
from jaxdiff.parallel.sharding import ANY, infer_shardings
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.planning import published_models, sampling
from jaxdiff.training.config import DataConfig, DiffusionObjective, TrainConfig
from jaxdiff.training.objectives.diffusion import Frozen, diffusion_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """The fields of the toy network's config.json."""

    sample_size: int = 8
    in_channels: int = 4
    out_channels: int = 4
    width: int = 8


class ToyTransformer(nnx.Module):
    """Noisy latents, the mean of text tokens and an embedded style, mixed pixel by pixel."""

    def __init__(
        self,
        config,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        attention="auto",
        remat="none",
        rngs,
    ):
        layers = LayerFactory(
            rngs=rngs, dtype=dtype, param_dtype=param_dtype, attention=attention, remat=remat
        )
        self.config, self.dtype = config, dtype
        self.proj_in = layers.linear(config.in_channels, config.width)
        self.text_proj = layers.linear(config.width, config.width)
        self.style_proj = layers.linear(1, config.width)
        self.proj_out = layers.linear(config.width, config.out_channels)

    def __call__(self, x, t, tokens, style):
        """The output for latents x (b, h, w, c), tokens (b, n, d) and styles (b, 1)."""
        told = self.text_proj(tokens).mean(axis=1) + self.style_proj(style)
        hidden = self.proj_in(x) + told[:, None, None] + jnp.sin(t)[:, None, None, None]
        return self.proj_out(jnp.tanh(hidden))


class ToyAdapter:
    """How the toy network is called."""

    sharding_rules = ANY
    output_layer = "proj_out.kernel"

    def __init__(self, module, prediction_type):
        self.module, self.prediction_type = module, prediction_type

    def __call__(self, params, x, t, cond):
        """The output with weights by dotted path."""
        return with_params(self.module, params)(x, t, cond["tokens"], cond["style"])

    def conditioning_shapes(self, size, tokens):
        """The conditioning of one stream of one image."""
        del size
        shapes = {"tokens": (tokens, self.module.config.width), "style": (1,)}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


@dataclasses.dataclass(frozen=True)
class Style(Extra):
    """The number of a style, for the streams of the prompt."""

    argument = "style"
    options = {"style": Option(int | None, 0, 0, 9)}  # noqa: RUF012

    def of_request(self, inputs):
        """The style where there is a prompt, else 0."""
        styles = np.array([options.get("style", 0) for options in inputs.options], np.float32)
        return inputs.for_streams(styles[:, None]) * np.array(inputs.prompted)[:, None]

    def of_batch(self, batch, dropped):
        """No data have styles: 0."""
        return jnp.zeros((len(batch["image"]), 1))


TOY = Family(
    name="Toy",
    network="transformer",
    network_class=ToyTransformer,
    adapter=ToyAdapter,
    text_encoders=(
        TextEncoder(),
        TextEncoder(component="text_encoder_2", tokenizer="tokenizer_2", layer="penultimate"),
    ),
    joined_as="tokens",
    states_argument="tokens",
    extras=(Style(),),
)
PROMPT = "a small red circle"


@pytest.fixture(scope="module", autouse=True)
def registered():
    """The family and its network, as a package of a user would register them."""
    with pytest.MonkeyPatch.context() as patch:
        configs = partial(model_registry.single_config, from_diffusers, ToyConfig)
        toy = model_registry.ModelClass(
            name="ToyTransformer2DModel", module=ToyTransformer, configs=configs
        )
        patch.setitem(model_registry.MODEL_CLASSES, toy.name, toy)
        patch.setitem(registry.DETECT, "ToyPipeline", lambda modules, options, *, source: TOY)
        patch.setattr(registry, "FAMILIES", [*registry.FAMILIES, TOY])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder of the family."""
    folder = tmp_path_factory.mktemp("toy")
    plain = read_pipeline(tiny.write_tiny(folder / "sd"))
    text = plain.components["text_encoder"].module.config
    components = {
        "transformer": tiny.random_component(ToyTransformer, ToyConfig(), seed=7),
        "vae": plain.components["vae"],
        "text_encoder": plain.components["text_encoder"],
        "text_encoder_2": tiny.random_component(CLIPTextModel, text, seed=8),
    }
    files = plain.tokenizers["tokenizer"]
    parts = dataclasses.replace(
        plain,
        class_name="ToyPipeline",
        components=components,
        tokenizers={"tokenizer": files, "tokenizer_2": files},
        absent=(),
    )
    write_pipeline(folder / "toy", parts)
    return folder / "toy"


@pytest.fixture(scope="module")
def pipe(folder):
    return tiny.first_devices(jaxdiff.load(folder, dtype="float32"), 1)


def test_it_generates(pipe):
    """One step from pure noise, by hand: x0 = alpha x - sigma v."""
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    options = {"latents": noise, "steps": 1, "timestep_spacing": "trailing", "output": "latent"}
    out = pipe(PROMPT, prompt_2="a blue star", guidance="none", style=3, **options)
    states = []
    for i, text in enumerate((PROMPT, "a blue star")):
        ids = pipe.tokenizer(text, padding="max_length", truncation=True)["input_ids"]
        features = jax.jit(pipe.text_encoders[i].features)(jnp.asarray([ids]))
        states.append((features.last, features.penultimate)[i])
    tokens = jnp.concatenate(states, axis=1)
    v = pipe.transformer(jnp.asarray(noise), jnp.array([999.0]), tokens, jnp.array([[3.0]]))
    alpha, sigma = (float(x[0]) for x in pipe.schedule.alpha_sigma(jnp.array([999])))
    np.testing.assert_allclose(out.images, alpha * noise - sigma * np.asarray(v), atol=1e-5)
    assert out.request.to_metadata(0)["style"] == 3
    assert "Transformer" in repr(pipe)


def test_its_option_is_checked_and_other_families_refuse_it(pipe):
    with pytest.raises(InputError, match="style: got 12, expected a number from 0 to 9"):
        pipe(PROMPT, style=12)
    with pytest.raises(InputError, match="style: got 3, expected none for Stable Diffusion 1"):
        accepted_options(SD, {"style": 3})
    with pytest.raises(InputError, match=r"target_size: got \(1, 2\), expected none for Toy"):
        pipe(PROMPT, target_size=(1, 2))


def objective(folder):
    return DiffusionObjective(pipeline=str(folder))


def test_it_is_trained(folder):
    base = load_base_model(objective(folder))
    method = make_training_method(base, jnp.float32, None)
    assert set(method.partition.shapes) == set(
        param_dict(base.abstract_networks("float32")["transformer"])
    )
    task = diffusion_task(base.objective, method.partition)
    frozen = Frozen(
        {name: base.host_weights(name) for name in method.partition.frozen},
        base.null_ids(method.caption_tokenizer),
    )
    images = np.random.default_rng(1).uniform(-1, 1, (4, 16, 16, 3)).astype(np.float32)
    batch = {"image": images} | method.caption_tokenizer([PROMPT] * 4)
    params, frozen, batch = jax.tree.map(jnp.asarray, (dict(task.init(0)), frozen, batch))
    (loss, _), slopes = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        params, frozen, batch, jax.random.key(0)
    )
    assert np.isfinite(loss)
    moved = {path for path, slope in slopes.items() if np.any(slope)}
    assert moved == set(params) - {"style_proj.kernel"}  # whose input is 0


def test_it_is_planned(folder):
    options = sampling.SamplingOptions(plan=(), model=str(folder))
    model = sampling.sampled_model(options)
    layout = OnMesh(sampling_mesh({}, jax.devices()[:1]))
    params = sampling.place_shapes(
        param_dict(model.network.module), lambda tree: infer_shardings(tree, layout.mesh)
    )
    traced = sampling.trace_loop(options, model, params, 2, layout)
    assert jax.tree.leaves(traced.out_info)[0].shape == (2, 8, 8, 4)
    data = DataConfig(kind="folder", path=str(folder), resolution=16, bucket_multiple=16)
    config = TrainConfig(objective=objective(folder), data=data, batch_size=8, steps=1)
    planned = wire(config, published_models.PUBLISHED)
    key = jax.eval_shape(lambda: jax.random.key(0))
    loss, _ = jax.eval_shape(
        planned.task.loss, planned.task.shapes, planned.frozen, planned.batch(8), key
    )
    assert loss.shape == ()
