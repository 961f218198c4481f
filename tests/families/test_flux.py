"""FLUX.1 and Chroma: what fits together, training, plans, and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import lora_training
import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.cli.main import main
from jaxdiff.core.errors import InputError
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.experiments.training_methods import make_training_method
from jaxdiff.families import detection, flux
from jaxdiff.families.extras import ExtraInputs
from jaxdiff.models.build import abstract, initialise, param_dict
from jaxdiff.models.chroma.adapter import ChromaAdapter
from jaxdiff.models.chroma.config import ChromaTransformer2DConfig
from jaxdiff.models.chroma.module import ChromaTransformer2DModel
from jaxdiff.models.flux.adapter import FluxAdapter
from jaxdiff.models.flux.blocks import pack, unpack
from jaxdiff.models.flux.config import FluxTransformer2DConfig
from jaxdiff.models.flux.module import FluxTransformer2DModel
from jaxdiff.models.t5.config import T5Config
from jaxdiff.models.t5.module import T5EncoderModel
from jaxdiff.parallel.mesh import sampling_mesh
from jaxdiff.parallel.sharding import infer_shardings
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.planning.sampled_model import SamplingOptions, sampled_model
from jaxdiff.planning.sampling_programs import place_shapes, trace_loop
from jaxdiff.training.config import DiffusionObjective, LoRA
from jaxdiff.training.objectives.diffusion import Frozen, diffusion_task
from jaxdiff.training.objectives.trainable import train_lora

TOKENS = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 6,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "axes_dims_rope": (2, 2, 2),
}
FLUX = FluxTransformer2DConfig(**TOKENS, pooled_projection_dim=8, guidance_embeds=True)
CHROMA = ChromaTransformer2DConfig(
    **TOKENS, approximator_num_channels=8, approximator_hidden_dim=12, approximator_layers=1
)
FILL = dataclasses.replace(FLUX, in_channels=16 + 16 + 16, out_channels=16)
CONTROL = dataclasses.replace(FLUX, in_channels=16 + 16, out_channels=16)
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
PROMPT = "a small red circle"


def write(folder, class_name, network):
    """A pipeline folder of the class with this transformer, random weights and 4 channels."""
    plain = read_pipeline(tiny.write_tiny(folder / "sd"))
    clip, files = plain.components["text_encoder"], plain.tokenizers["tokenizer"]
    words = clip.module.config.vocab_size
    config = T5Config(vocab_size=words, d_model=10, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    t5 = tiny.random_component(T5EncoderModel, config, seed=8)
    texts = {"text_encoder": clip, "text_encoder_2": t5}
    tokenizers = {"tokenizer": files, "tokenizer_2": files}
    if class_name.startswith("Chroma"):
        texts, tokenizers = {"text_encoder": t5}, {"tokenizer": files}
    parts = dataclasses.replace(
        plain,
        class_name=class_name,
        components={"transformer": network, "vae": plain.components["vae"], **texts},
        tokenizers=tokenizers,
        scheduler=SCHEDULER,
        absent=(),
    )
    write_pipeline(folder / class_name, parts)
    return folder / class_name


CLASSES = {
    "FluxPipeline": (FluxTransformer2DModel, FLUX),
    "FluxKontextPipeline": (FluxTransformer2DModel, FLUX),
    "FluxFillPipeline": (FluxTransformer2DModel, FILL),
    "FluxControlPipeline": (FluxTransformer2DModel, CONTROL),
    "ChromaPipeline": (ChromaTransformer2DModel, CHROMA),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        name: write(tmp_path_factory.mktemp(name), name, tiny.random_component(*made, seed=7))
        for name, made in CLASSES.items()
    }


def test_families(folders):
    names = {name: detection.family_of_folder(folder).name for name, folder in folders.items()}
    assert names == {
        "FluxPipeline": "FLUX.1",
        "FluxKontextPipeline": "FLUX.1 Kontext",
        "FluxFillPipeline": "FLUX.1 Fill",
        "FluxControlPipeline": "FLUX.1 Canny or Depth",
        "ChromaPipeline": "Chroma",
    }


def test_a_model_without_a_guidance_embedding_is_schnell(folders, tmp_path):
    config = dataclasses.replace(FLUX, guidance_embeds=False)
    folder = write(tmp_path, "FluxPipeline", tiny.random_component(FluxTransformer2DModel, config))
    family = detection.family_of_folder(folder)
    assert (family.name, family.extras) == ("FLUX.1 schnell", ())
    assert family.request_defaults["guidance"] == "none"
    assert [encoder.length for encoder in family.text_encoders] == [None, 256]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled_projection_dim": 6}, "text_encoder: got a pooled embedding of width 8, expected"),
        ({"joint_attention_dim": 6}, "text_encoder_2: got hidden states of width 10, expected 6"),
        ({"in_channels": 36, "out_channels": 16}, "transformer: got 36 channels in and 16 out, "),
    ],
)
def test_parts_that_do_not_fit(folders, changes, message):
    _, modules, options = jaxdiff.checkpoints.pipelines.abstract_pipeline(folders["FluxPipeline"])
    config = dataclasses.replace(FLUX, **changes)
    modules["transformer"] = abstract(FluxTransformer2DModel, config)
    with pytest.raises(InputError, match=f"^here: {message}"):
        flux.detect(modules, options, source="here")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 2}, "patch_size: got 2, expected one of 1"),
        ({"in_channels": 6}, "in_channels: got 6, expected a multiple of 4"),
        ({"axes_dims_rope": (2, 2, 4)}, "axes_dims_rope: got .*, expected 3 even numbers whose"),
    ],
)
def test_configs_that_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(FLUX, **fields)


def test_tokens_have_their_channels_by_channel_row_and_column():
    latents = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    tokens = pack(latents)
    # row 1, column 2 of the grid, channel 1, second row, first column
    assert tokens[0, 1 * 3 + 2, 1 * 4 + 1 * 2 + 0] == latents[0, 3, 4, 1]
    np.testing.assert_array_equal(unpack(tokens, (4, 6)), latents)


def inputs(batch=1):
    rng = np.random.default_rng(0)
    shapes = {"x": (batch, 4, 6, 4), "context": (batch, 5, 10), "pooled": (batch, 8)}
    made = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    return *made.values(), jnp.full((batch,), 300.0)


def test_output_is_zero_at_the_start():
    x, context, pooled, t = inputs()
    network = initialise(FluxTransformer2DModel, FLUX, seed=0)
    out = network(x, t, context, pooled_projections=pooled, guidance=jnp.ones(1))
    assert not np.any(out)
    chroma = initialise(ChromaTransformer2DModel, CHROMA, seed=0)
    assert not np.any(chroma(x, t, context, context_mask=jnp.ones((1, 5), bool)))


def test_inputs_that_are_refused():
    x, context, pooled, t = inputs()
    network = initialise(FluxTransformer2DModel, FLUX, seed=0)
    with pytest.raises(InputError, match="guidance: got none, expected a scale for this model"):
        network(x, t, context, pooled_projections=pooled)
    with pytest.raises(InputError, match="sample: got 4 x 5 latents, expected multiples of 2"):
        network(x[:, :, :5], t, context, pooled_projections=pooled, guidance=jnp.ones(1))
    with pytest.raises(InputError, match="guidance: got perturbed attention for a transformer"):
        FluxAdapter(network, "flow_prediction")(
            param_dict(network), x, t, {}, perturbed=jnp.ones(1, bool)
        )


def test_hidden_tokens_have_no_influence():
    """Padding behind the first token of it, whatever its states."""
    x, context, _, t = inputs()
    made = tiny.random_component(ChromaTransformer2DModel, CHROMA).module
    mask = jnp.array([[True, True, False, False, False]])
    out = made(x, t, context, context_mask=mask)
    others = context.at[:, 3:].set(100.0)
    np.testing.assert_allclose(made(x, t, others, context_mask=mask), out, atol=1e-5)
    seen = context.at[:, 2].set(100.0)
    assert np.abs(np.asarray(made(x, t, seen, context_mask=mask) - out)).max() > 1e-3


def test_channels_of_the_mask_are_its_pixels():
    """Those under a latent, row by row, behind the latents of what is around it."""
    mask = np.random.default_rng(0).integers(0, 2, (1, 8, 12, 1)).astype(np.float32)
    picture = np.random.default_rng(1).uniform(-1, 1, (1, 8, 12, 3)).astype(np.float32)
    made = flux.FillChannels().of_request(
        ExtraInputs(
            size=(8, 12),
            options=({},),
            prompted=(True,),
            texts=((PROMPT,),),
            guidance_scales=np.ones(1, np.float32),
            image=picture,
            mask=mask,
            latent_size=(4, 6),
            noise=np.zeros,
            encode=lambda images: images[:, ::2, ::2],
            downsample=lambda mask: mask,
        )
    )
    assert made.shape == (1, 1, 4, 6, 3 + 4)
    np.testing.assert_array_equal(made[0, 0, ..., :3], (picture * (1 - mask))[0, ::2, ::2])
    np.testing.assert_array_equal(made[0, 0, 2, 3, 3:], mask[0, 4:6, 6:8, 0].ravel())


def test_a_control_image_is_alone(folders):
    pipe = tiny.first_devices(jaxdiff.load(folders["FluxControlPipeline"], dtype="float32"), 1)
    image = np.zeros((16, 24, 3), np.uint8)
    assert pipe.resolve(PROMPT, image=image).strength == 1.0
    for options, message in (
        ({"image": image, "mask": image[..., 0]}, "image: got a mask with a control image"),
        ({"image": image, "strength": 0.5}, "image: got strength 0.5 with a control image"),
        ({"image": image, "denoising_start": 0.5}, "image: got denoising_start 0.5 with a control"),
        ({"control_image": image}, "control_image: got .*, expected image=..., which FLUX.1 Canny"),
    ):
        with pytest.raises(InputError, match=message):
            pipe.resolve(PROMPT, **options)
    with pytest.raises(InputError, match="image: got none, expected the control image"):
        pipe(PROMPT, height=16, width=16, steps=1)


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxKontextPipeline", "ChromaPipeline"])
def test_one_step_of_training_moves_all_weights(folders, name):
    base = load_base_model(DiffusionObjective(pipeline=str(folders[name])))
    method = make_training_method(base, jnp.float32, None)
    task = diffusion_task(base.objective, method.partition)
    tokenizer = method.caption_tokenizer
    frozen = Frozen(
        {each: base.host_weights(each) for each in method.partition.frozen},
        base.null_ids(tokenizer),
    )
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    batch = {"image": images} | tokenizer([PROMPT] * 2)
    params = base.host_weights("transformer")
    params, frozen, batch = jax.tree.map(jnp.asarray, (params, frozen, batch))
    (loss, _), slopes = jax.jit(jax.value_and_grad(task.loss, has_aux=True))(
        params, frozen, batch, jax.random.key(0)
    )
    assert np.isfinite(loss)
    moved = {path for path, slope in slopes.items() if np.any(slope)}
    assert moved == set(param_dict(abstract(*CLASSES[name])))


@pytest.mark.parametrize("name", CLASSES)
def test_plans(folders, name):
    options = SamplingOptions(
        plan=(), model=str(folders[name]), dtype="float32", height=16, width=24
    )
    model = sampled_model(options)
    layout = OnMesh(sampling_mesh({}, jax.devices()[:1]))
    params = place_shapes(
        param_dict(model.network.module), lambda tree: infer_shardings(tree, layout.mesh)
    )
    traced = trace_loop(options, model, params, 2, layout)
    assert jax.tree.leaves(traced.out_info)[0].shape == (2, 8, 12, 4)


def test_shapes_of_the_conditioning():
    made = FluxAdapter(abstract(FluxTransformer2DModel, FILL), "flow_prediction")
    shapes = made.conditioning_shapes((4, 6), 5)
    assert {name: each.shape for name, each in shapes.items()} == {
        "context": (5, 10),
        "pooled_projections": (8,),
        "guidance": (),
        "channels": (4, 6, 8),
    }
    chroma = ChromaAdapter(abstract(ChromaTransformer2DModel, CHROMA), "flow_prediction")
    shapes = chroma.conditioning_shapes((4, 6), 5)
    assert {name: each.shape for name, each in shapes.items()} == {
        "context": (5, 10),
        "context_mask": (5,),
    }


@pytest.mark.parametrize("name", CLASSES)
def test_inspect(folders, name, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["jaxdiff", "inspect", str(folders[name])])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    shown = capsys.readouterr().out
    assert name in shown
    assert CLASSES[name][0].__name__ in shown


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_lora_of_the_attention_is_trained(folders, tmp_path):
    """Of both streams and of single blocks, on cached text states with their mask."""
    file = lora_training.train(folders["ChromaPipeline"], tmp_path)
    assert lora_training.modules(file) == lora_training.attention(1, 1)
    lora_training.check_effect(folders["ChromaPipeline"], file)


def lora_partition(folder, **options):
    parts = read_pipeline(folder)
    networks = {name: each.module for name, each in parts.components.items()}
    return train_lora(detection.family_of(parts, "x"), networks, LoRA(rank=2, **options))


@pytest.mark.parametrize("name", ["FluxPipeline", "ChromaPipeline"])
def test_layers_of_a_lora(folders, name):
    found = {path.rpartition(".lora_")[0] for path in lora_partition(folders[name]).shapes}
    assert found == {f"transformer.{layer}" for layer in lora_training.attention(1, 1)}


def test_a_lora_trains_the_text_encoders_that_have_its_targets(folders):
    """CLIP and T5 call their layers differently."""
    folder = folders["FluxPipeline"]
    for target, component in (("q_proj", "text_encoder"), ("SelfAttention.q", "text_encoder_2")):
        found = lora_partition(folder, target_modules=(), text_target_modules=(target,))
        assert {path.partition(".")[0] for path in found.shapes} == {component}
    with pytest.raises(InputError, match=r"text_target_modules: got 'query', expected.*T5Encoder"):
        lora_partition(folder, text_target_modules=("query",))
