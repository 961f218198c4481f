"""Whole trainings of FLUX.1 from captions, and of Stable Diffusion 3.5 from a cache."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from captioned_images import write_folder

import jaxdiff
from jaxdiff.checkpoints.jsonfiles import read_object
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import FlowSchedule
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.training_methods import make_partition
from jaxdiff.models.build import param_dict
from jaxdiff.models.clip import CLIPTextModel
from jaxdiff.models.flux.adapter import FluxAdapter
from jaxdiff.models.flux.config import FluxTransformer2DConfig
from jaxdiff.models.flux.module import FluxTransformer2DModel
from jaxdiff.models.sd3.config import SD3Transformer2DConfig
from jaxdiff.models.sd3.module import SD3Transformer2DModel
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.training.config import DataConfig, DiffusionObjective, OptimiserConfig, TrainConfig
from jaxdiff.training.objectives.diffusion import Frozen, diffusion_task

WIDTH = 24  # of T5
SD3 = SD3Transformer2DConfig(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=4,
    num_attention_heads=2,
    joint_attention_dim=WIDTH,
    caption_projection_dim=8,
    pooled_projection_dim=16,
    pos_embed_max_size=6,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
FLUX = FluxTransformer2DConfig(
    in_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=6,
    num_attention_heads=2,
    joint_attention_dim=WIDTH,
    pooled_projection_dim=8,
    axes_dims_rope=(2, 2, 2),
    guidance_embeds=True,
)
MODELS = {
    "sd35": ("StableDiffusion3Pipeline", SD3Transformer2DModel, SD3, {"shift": 3.0}),
    "flux": (
        "FluxPipeline",
        FluxTransformer2DModel,
        FLUX,
        {"shift": 3.0, "use_dynamic_shifting": True},
    ),
}
FAMILIES = {"sd35": "Stable Diffusion 3.5", "flux": "FLUX.1"}


def write(folder, name):
    """A pipeline folder of random weights; the tokenizer of CLIP does for T5 too."""
    class_name, network_class, config, scheduler = MODELS[name]
    plain = read_pipeline(tiny.write_tiny(folder / "sd"))
    files, clip = plain.tokenizers["tokenizer"], plain.components["text_encoder"].module.config
    t5 = T5Config(vocab_size=clip.vocab_size, d_model=WIDTH, d_ff=16, num_layers=1, num_heads=2)
    projects = name == "sd35"
    encoders = [
        tiny.random_component(CLIPTextModel, clip, with_projection=projects, seed=seed)
        for seed in ((1, 2) if projects else (1,))
    ]
    encoders.append(tiny.random_component(T5EncoderModel, t5, seed=3))
    numbers = ("", "_2", "_3")
    texts = {f"text_encoder{n}": part for n, part in zip(numbers, encoders, strict=False)}
    parts = dataclasses.replace(
        plain,
        class_name=class_name,
        components={
            "transformer": tiny.random_component(network_class, config, seed=4),
            "vae": plain.components["vae"],
            **texts,
        },
        tokenizers={component.replace("text_encoder", "tokenizer"): files for component in texts},
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler},
        absent=(),
        defaults={},
    )
    write_pipeline(folder / "model", parts)
    return folder / "model"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images") / "in", 20, sizes=((16, 16),))


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return write(tmp_path_factory.mktemp("flux"), "flux")


@pytest.fixture(scope="module")
def sd35(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sd35"), "sd35")


def training(folder, data, **fields):
    fields |= {"timestep_sampling": "logit_normal", "sample_steps": 2}
    objective = DiffusionObjective(pipeline=str(folder), **fields)
    return TrainConfig(
        objective=objective,
        data=DataConfig(validation_size=2, **data),
        steps=2,
        batch_size=8,
        log_every=1,
        sample_every=0,
        checkpoint_every=2,
        tensorboard=False,
        optimiser=OptimiserConfig(warmup_steps=1),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_all_weights_are_trained_from_captions(flux, images, tmp_path):
    """With a sample grid, whose network takes the guidance scale of it."""
    data = {"kind": "folder", "path": str(images), "resolution": 16, "bucket_multiple": 8}
    data["cache_dir"] = str(tmp_path / "cache")
    config = training(flux, data, timestep_shift_by_resolution=True)
    result = jaxdiff.train(dataclasses.replace(config, sample_every=2), tmp_path / "run")
    assert result.step == 2
    assert (tmp_path / "run" / "samples").is_dir()
    check_export("flux", flux, result.export)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_all_weights_are_trained_on_cached_states(sd35, images, tmp_path):
    """Two steps, the second by a run that resumes; the export generates."""
    command = [str(sd35), str(tmp_path / "latents"), "--kind", "folder", "--path", str(images)]
    command += ["--resolution", "16", "--bucket-multiple", "8", "--texts", "embeddings"]
    assert main.run("cache-latents", command) == 0
    config = training(sd35, {"kind": "latents", "path": str(tmp_path / "latents")})
    first = jaxdiff.train(dataclasses.replace(config, steps=1), tmp_path / "run")
    assert first.step == 1
    result = jaxdiff.train(config, tmp_path / "run")
    assert result.step == 2
    assert not (tmp_path / "run" / "samples").exists()
    pipe = check_export("sd35", sd35, result.export)
    out = pipe("a star", steps=1, height=16, width=16, output="numpy", guidance_scale=1.0)
    assert out.images.shape == (1, 16, 16, 3)
    assert np.isfinite(out.images).all()


def check_export(name, folder, export):
    """The pipeline in `export`, all of whose transformer has moved from `folder`, and no more."""
    pipe, before = (tiny.first_devices(jaxdiff.load(each), 1) for each in (export, folder))
    assert pipe.family.name == FAMILIES[name]
    assert isinstance(pipe.schedule, FlowSchedule)
    scheduler = read_object(export / "scheduler" / "scheduler_config.json")
    assert scheduler.items() >= MODELS[name][-1].items()
    own, others = param_dict(pipe.transformer), param_dict(before.transformer)
    unmoved = {path for path in own if np.array_equal(own[path], others[path])}
    # Stored positions, and queries of the text in the last block, whose results nothing reads.
    unread = re.compile(r"pos_embed\.|transformer_blocks\.1\.attn\.(add_q_proj|norm_added_q)\.")
    assert [path for path in unmoved if not unread.match(path)] == []
    encoders = [param_dict(each.parts.components["text_encoder"].module) for each in (pipe, before)]
    for path, array in encoders[0].items():
        np.testing.assert_array_equal(array, encoders[1][path])
    return pipe


def test_the_guidance_scale_of_a_training(sd35, flux):
    """A network without one refuses it; FLUX.1 dev takes that of the objective."""
    objective = DiffusionObjective(pipeline=str(sd35), distilled_guidance_scale=3.5)
    with pytest.raises(InputError, match=r"distilled_guidance_scale: got 3\.5 for Stable Diff"):
        load_base_model(objective)
    taken = []

    class Spy(FluxAdapter):
        """The adapter, which notes the scales instead of calling the network."""

        def __call__(self, params, x, t, cond):
            taken.append(cond["guidance"])
            return jnp.zeros_like(x)

    base = load_base_model(dataclasses.replace(objective, pipeline=str(flux)))
    partition = make_partition(base, jnp.float32)
    family = dataclasses.replace(base.family, adapter=Spy)
    task = diffusion_task(base.objective, partition._replace(family=family))
    texts = {"states_2": jnp.ones((512, WIDTH)), "pooled": jnp.ones(8)}
    batch = {name: jnp.stack([array] * 2) for name, array in texts.items()}
    batch |= {name: jnp.zeros((2, 8, 8, 4)) for name in ("mean", "logvar")}
    params = jax.tree.map(jnp.asarray, base.host_weights("transformer"))
    task.loss(params, Frozen({}, texts), batch, jax.random.key(0))
    np.testing.assert_array_equal(taken[0], [3.5, 3.5])
