"""The programs of generation as shapes: those that the pipeline runs, and what they need."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformer_files
import unclip_files
from jax.sharding import Mesh

import jaxdiff
from jaxdiff.checkpoints import components
from jaxdiff.checkpoints.loading import lazy_tensors
from jaxdiff.checkpoints.pipelines import write_pipeline
from jaxdiff.checkpoints.safetensors import write_tensors
from jaxdiff.checkpoints.schedulers import SchedulerOptions
from jaxdiff.core.errors import InputError
from jaxdiff.core.trees import parameter_count
from jaxdiff.diffusion.schedules import FlowSchedule, VPSchedule
from jaxdiff.families.stable_diffusion import SD
from jaxdiff.models.build import abstract, param_dict
from jaxdiff.models.presets import preset
from jaxdiff.models.unet.adapter import UNetAdapter
from jaxdiff.models.unet.config import UNet2DConditionConfig
from jaxdiff.models.unet.module import UNet2DConditionModel
from jaxdiff.models.vae import AutoencoderKL, AutoencoderKLConfig
from jaxdiff.parallel.chips import CHIPS
from jaxdiff.parallel.mesh import sampling_mesh
from jaxdiff.parallel.sharding import infer_shardings
from jaxdiff.pipeline.compiled_model import decode_images, denoise_steps
from jaxdiff.pipeline.conditioning import encode_prompts
from jaxdiff.pipeline.defaults import Defaults
from jaxdiff.pipeline.on_mesh import OnMesh
from jaxdiff.planning import published_models, sampling
from jaxdiff.planning.compiling import CompiledProgram
from jaxdiff.planning.published_models import PUBLISHED_MODELS, published_component
from jaxdiff.planning.sampled_model import SampledModel, SamplingOptions, sampled_model
from jaxdiff.planning.sampling_programs import (
    loop_flops,
    place_shapes,
    sampling_programs,
    trace_loop,
)
from jaxdiff.planning.topology import Topology

OPTIONS = SamplingOptions(plan=(), model="nowhere")
CONFIG = UNet2DConditionConfig(
    sample_size=8,
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=16,
    attention_head_dim=2,
)


def model_of(network):
    """The model of a network, with a VAE and without text encoders."""
    codec = abstract(AutoencoderKL, AutoencoderKLConfig())
    return SampledModel(
        family=dataclasses.replace(SD, text_encoders=()),
        network=network,
        codec=codec,
        text_encoders={},
        components={"unet": network.module, "vae": codec},
        schedule=VPSchedule(),
        scheduler_options=SchedulerOptions(),
        prediction_type="epsilon",
        defaults=Defaults(sampler="dpmpp-2m", height=8, width=8),
        num_tokens=77,
    )


def traced_on(network, sizes, devices):
    """The loop for two images on a mesh of these sizes."""
    mesh = sampling_mesh(sizes, devices)
    params = place_shapes(param_dict(network.module), lambda shapes: infer_shardings(shapes, mesh))
    return trace_loop(OPTIONS, model_of(network), params, 2, OnMesh(mesh))


def test_a_mesh_divides_the_weights_and_the_work():
    network = UNetAdapter(
        abstract(UNet2DConditionModel, CONFIG, dtype=jnp.float32, param_dtype=jnp.float32),
        "epsilon",
    )
    one, eight = (
        traced_on(network, sizes, jax.devices()[:n]).lower().compile()
        for sizes, n in (({}, 1), ({"fsdp": 2, "guidance": 2, "tensor": 2}, 8))
    )
    sizes = [p.memory_analysis().argument_size_in_bytes for p in (one, eight)]
    assert sizes[1] < 0.4 * sizes[0]
    assert eight.cost_analysis()["flops"] < 0.3 * one.cost_analysis()["flops"]


@pytest.mark.parametrize("added", [False, True])
def test_the_loop_traces_with_and_without_sizes(added):
    more = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
    }
    config = dataclasses.replace(CONFIG, **(more if added else {}))
    unet = abstract(UNet2DConditionModel, config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    network = UNetAdapter(unet, "epsilon")
    traced = traced_on(network, {}, jax.devices()[:1])
    assert jax.tree.leaves(traced.out_info)[0].shape == (2, 8, 8, 4)


def test_guidance_doubles_the_work_and_scale_one_does_not():
    network = UNetAdapter(abstract(UNet2DConditionModel, CONFIG, dtype=jnp.bfloat16), "epsilon")
    model, plain = model_of(network), dataclasses.replace(OPTIONS, guidance_scale=1.0)
    assert loop_flops(OPTIONS, model) == 2 * loop_flops(plain, model)


def test_published_networks_need_no_file():
    unet = published_component("stabilityai/stable-diffusion-2-1/unet", dtype=jnp.bfloat16)
    assert isinstance(unet, UNet2DConditionModel)
    assert unet.config.attention_head_dim == (5, 10, 20, 20)
    with pytest.raises(InputError, match=r"got some/model/unet without a config.json"):
        published_component("some/model/unet", dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    blocks = {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
    }
    return tiny.write_xl(tmp_path_factory.mktemp("model") / "xl", **blocks)


PROGRAMS = {"text_encoders": encode_prompts, "loop": denoise_steps, "decoder": decode_images}


def shapes(leaves):
    return [(np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def test_the_programs_are_those_that_the_pipeline_runs(xl):
    """With arguments of the same shapes, dtypes and order, for the model's own defaults."""
    pipe = jaxdiff.load(xl, mesh=Mesh(np.array(jax.devices()[:1]), ("data",)))
    pipe(["a ring", "a star"], seed=[1, 2])
    ran = {
        function: list(program._executables)
        for (function, _), program in pipe.stages._programs.items()
    }
    options = SamplingOptions(plan=(), model=str(xl), dtype="float32")
    model = sampled_model(options)
    found = sampling_programs(model.with_defaults(options), model, OnMesh(pipe.mesh))
    for name, function in PROGRAMS.items():
        ((_, arguments),) = ran[function]
        assert shapes(found[name].trace(2).in_avals[0]) == list(arguments)


@functools.cache
def arguments_on_cpu(traced):
    """Bytes of a fake device's arguments of the compiled program."""
    return traced.lower().compile().memory_analysis().argument_size_in_bytes


def on_cpu(traced, topology, *, transformer):
    """A program of which a chip has to hold the arguments, and nothing else."""
    size = arguments_on_cpu(traced)
    return CompiledProgram(size, fits=size <= topology.chip.hbm, arguments=size, compiler="XLA")


@pytest.fixture(scope="module")
def traced_once():
    """The programs of a model, each traced once for a mesh and a number of images."""
    found, trace = {}, sampling_programs

    def programs(options, model, layout):
        if str(layout) not in found:
            found[str(layout)] = {
                name: program._replace(trace=functools.cache(program.trace))
                for name, program in trace(options, model, layout).items()
            }
        return found[str(layout)]

    return programs


@pytest.fixture
def planned(xl, traced_once, monkeypatch):
    """Plans of the tiny model for eight chips of so much memory, compiled for the CPU."""
    monkeypatch.setattr(sampling, "topology_devices", lambda topology: jax.devices())
    monkeypatch.setattr(sampling, "compile_traced", on_cpu)
    monkeypatch.setattr(sampling, "sampling_programs", traced_once)

    def plan(memory=1e9, **options):
        chosen = {"plan": (), "model": str(xl), "dtype": "float32", "find_max_batch": False}
        planner = sampling.sampling_planner(SamplingOptions(**chosen | options))
        chip = dataclasses.replace(CHIPS["v5e"], memory=memory)
        return planner(Topology(name="v5e", chip=chip, shape=(2, 4)))

    return plan


def test_every_program_has_room_for_the_weights_of_all(planned, xl):
    made, pipe = planned(), jaxdiff.load(xl)
    nbytes = {
        name: sum(leaf.nbytes for leaf in param_dict(part.module).values())
        for name, part in pipe.parts.components.items()
    }
    assert made.weights == nbytes
    for plan in made.programs.values():
        assert plan.total >= sum(nbytes.values())
    decoder = sum(
        leaf.nbytes
        for path, leaf in param_dict(pipe.vae).items()
        if path.startswith(("decoder", "post_quant_conv"))
    )
    assert made.programs["decoder"].resident_bytes == sum(nbytes.values()) - decoder
    assert made.programs["loop"].resident_bytes == sum(nbytes.values()) - nbytes["unet"]
    assert made.fits
    assert made.fitting_mesh is None


def test_offloaded_text_encoders_are_counted_where_they_run(planned):
    plain, offloaded = planned(), planned(offload="text")
    texts = sum(plain.weights[name] for name in ("text_encoder", "text_encoder_2"))
    for name, less in (("text_encoders", 0), ("loop", texts), ("decoder", texts)):
        assert offloaded.programs[name].total == plain.programs[name].total - less
    assert offloaded.to_json()["offload"] == "text"
    with pytest.raises(InputError, match="offload: got 'unet'"):
        planned(offload="unet")


def test_what_does_not_fit_fits_on_a_mesh(planned):
    """The smallest that does, and no other."""
    whole = planned()
    halves, quarters = planned(mesh="fsdp=2"), planned(mesh="fsdp=4")
    assert quarters.total < halves.total < whole.total
    found = planned((halves.total + whole.total) / 2)
    assert not found.fits
    assert found.fitting_mesh.fsdp == 2
    assert found.fitting_mesh.total == halves.total
    assert "DOES NOT FIT" in found.to_text()
    assert "--mesh fsdp=2 fits" in found.to_text()
    assert planned((quarters.total + halves.total) / 2).fitting_mesh.fsdp == 4
    nowhere = planned(1000.0)
    assert nowhere.fitting_mesh.fsdp is None
    assert "none that fits, of 8" in nowhere.to_text()
    assert nowhere.to_json()["fitting_mesh"]["fsdp"] is None


def test_the_largest_batch_is_that_of_the_largest_program(planned):
    """Arguments grow with the batch by latents, conditioning and keys alone."""
    small, larger = (planned(batch_size=n).total for n in (8, 16))
    found = planned(small + 2.5 * (larger - small), find_max_batch=True)
    assert found.max_batch_size == 24


def test_the_schedule_is_that_of_the_model(tmp_path):
    folder = tiny.write_tiny(tmp_path / "flow")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = {"num_train_timesteps": 1000, "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "jaxdiff.json").unlink()
    options = SamplingOptions(plan=(), model=str(folder), steps=5)
    model = sampled_model(options)
    assert model.schedule == FlowSchedule(time_scale=1000.0, shift=3.0)
    assert model.prediction_type == "flow_prediction"
    assert model.defaults.sampler == "euler"
    program = sampling_programs(
        model.with_defaults(options), model, OnMesh(sampling_mesh({}, jax.devices()[:1]))
    )["loop"]
    assert program.runs == 5
    grid = model.grid(options)
    s = np.linspace(1, 3 / 1000 / (1 + 2 / 1000), 5)  # of the first and last level, shifted twice
    np.testing.assert_allclose(grid.sigma[0, :5], 3 * s / (1 + 2 * s), rtol=1e-5)
    assert program.trace(1).out_info.x.shape == (1, 8, 8, 4)


def param_shapes(model):
    return {
        component: {path: (leaf.shape, leaf.dtype) for path, leaf in param_dict(module).items()}
        for component, module in model.components.items()
    }


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_file_with_a_base_has_the_plan_of_its_folder(tmp_path, monkeypatch, name):
    """A file with the network alone, of which no weights are read, nor of the base."""
    folder, file = tmp_path / "folder", tmp_path / "x.safetensors"
    parts = transformer_files.components(name, tmp_path)
    write_pipeline(folder, parts)
    tensors = lazy_tensors(parts.components["transformer"].module)
    write_tensors(file, tensors)
    monkeypatch.setattr(components, "load_into", lambda *_, **__: pytest.fail("weights are read"))
    options = sampling.SamplingOptions(plan=(), model=str(folder), height=32, width=32)
    wanted = sampling.sampled_model(options)
    alone = dataclasses.replace(options, model=str(file), base=str(folder))
    for chosen in (alone, dataclasses.replace(alone, vae=str(folder / "vae"))):
        model = sampling.sampled_model(chosen)
        assert param_shapes(model) == param_shapes(wanted)
        for field in ("family", "schedule", "defaults", "num_tokens", "prediction_type"):
            assert getattr(model, field) == getattr(wanted, field), field
        traced = sampling.sampling_programs(
            model.with_defaults(chosen), model, OnMesh(sampling_mesh({}, jax.devices()[:1]))
        )
        assert traced["loop"].trace(1).out_info.x.shape == (1, 16, 16, 16)
    for changes, message in (
        ({"base": "some/model"}, "plan: base: got some/model, expected a folder or file that is"),
        ({"vae": "nowhere"}, "plan: vae: got nowhere, expected"),
        ({"model": "some/model", "base": None}, "plan: model: got some/model, .*FLUX.1-dev"),
        ({"sampler": "dpmp"}, "sampler: got 'dpmp'"),
        ({"guidance": "cgf"}, "guidance: got 'cgf'"),
    ):
        with pytest.raises(InputError, match=message):
            sampling.sampling_planner(dataclasses.replace(alone, **changes))


FLOW = FlowSchedule(time_scale=1000.0, shift=3.0)
VP = VPSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
LINEAR = VPSchedule(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
KANDINSKY = VPSchedule(beta_start=0.00085, beta_end=0.012)
KANDINSKY_DDPM = KANDINSKY, "epsilon", "ddpm:variance=learned_range", 512, 0
# Family, schedule, prediction type, sampler, side in pixels, tokens of a prompt.
COSINE = VPSchedule(beta_schedule="squaredcos_cap_v2")
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        *("Stable Diffusion 1 or 2", VP, "epsilon", "pndm", 512, 77),
    ),
    "stabilityai/stable-diffusion-2-1": (
        *("Stable Diffusion 1 or 2", VP, "v_prediction", "ddim", 768, 77),
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        *("Stable Diffusion XL", VP, "epsilon", "euler", 1024, 77),
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        *("Stable Diffusion 3", FLOW, "flow_prediction", "euler", 1024, 77 + 256),
    ),
    "stabilityai/stable-diffusion-3.5-medium": (
        *("Stable Diffusion 3.5", FLOW, "flow_prediction", "euler", 1024, 77 + 256),
    ),
    "stabilityai/stable-diffusion-3.5-large": (
        *("Stable Diffusion 3.5", FLOW, "flow_prediction", "euler", 1024, 77 + 256),
    ),
    "black-forest-labs/FLUX.1-schnell": (
        *("FLUX.1 schnell", FlowSchedule(time_scale=1000.0)),
        *("flow_prediction", "euler", 1024, 256),
    ),
    "black-forest-labs/FLUX.1-dev": ("FLUX.1", FLOW, "flow_prediction", "euler", 1024, 512),
    "lodestones/Chroma1-HD": ("Chroma", FLOW, "flow_prediction", "euler", 1024, 512),
    "DeepFloyd/IF-I-XL-v1.0": (
        *("DeepFloyd IF", VPSchedule(beta_schedule="squaredcos_cap_v2"), "epsilon"),
        *("ddpm:variance=learned_range", 64, 77),
    ),
    "stabilityai/stable-diffusion-x4-upscaler": (
        "Stable Diffusion upscaler",
        VPSchedule(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02),
        *("v_prediction", "ddim", 512, 77),
    ),
    "openai/glide-text2im/base": (
        "GLIDE",
        VPSchedule(beta_schedule="squaredcos_cap_v2"),
        *("epsilon", "ddpm:variance=learned_range", 64, 128),
    ),
    "openai/glide-text2im/upsample": ("GLIDE upsampler", LINEAR, "epsilon", "ddim", 256, 128),
    "kandinsky-community/kandinsky-2-1-prior": (
        *("Kandinsky 2.1 prior", VPSchedule(beta_schedule="squaredcos_cap_v2"), "sample"),
        *("ddpm", 1, 77),
    ),
    "kandinsky-community/kandinsky-2-1": ("Kandinsky 2.1", KANDINSKY, "epsilon", "ddim", 512, 77),
    "kandinsky-community/kandinsky-2-1-inpaint": (
        *("Kandinsky 2.1", KANDINSKY, "epsilon", "ddim", 512, 77),
    ),
    "kandinsky-community/kandinsky-2-2-prior": (
        *("Kandinsky 2.2 prior", VPSchedule(beta_schedule="squaredcos_cap_v2"), "sample"),
        *("ddpm", 1, 77),
    ),
    "kandinsky-community/kandinsky-2-2-decoder": ("Kandinsky 2.2", *KANDINSKY_DDPM),
    "kandinsky-community/kandinsky-2-2-decoder-inpaint": ("Kandinsky 2.2", *KANDINSKY_DDPM),
    "kandinsky-community/kandinsky-2-2-controlnet-depth": (
        *("Kandinsky 2.2 ControlNet", *KANDINSKY_DDPM),
    ),
    "stabilityai/stable-diffusion-2-1-unclip": (
        *("Stable unCLIP", VP, "v_prediction", "ddim", 768, 77),
    ),
    "kakaobrain/karlo-v1-alpha/prior": ("Karlo prior", COSINE, "sample", "ddpm", 1, 77),
    "kakaobrain/karlo-v1-alpha/decoder": (
        *("Karlo", COSINE, "epsilon", "ddpm:variance=learned_range", 64, 77),
    ),
    "kakaobrain/karlo-v1-alpha/super_res": (
        *("Karlo super-resolution", COSINE, "epsilon", "ddpm", 256, 0),
    ),
    "facebook/DiT-XL-2-256": ("DiT", LINEAR, "epsilon", "ddim", 256, 0),
    "facebook/DiT-XL-2-512": ("DiT", LINEAR, "epsilon", "ddim", 512, 0),
}


@functools.cache
def published(name):
    options = SamplingOptions(plan=(), model=name, guidance_scale=1.0)
    return options, sampled_model(options)


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_published_models_have_a_family_and_a_schedule(name):
    _, model = published(name)
    family, defaults = model.family, model.defaults
    assert defaults.height == defaults.width
    found = (family.name, model.schedule, model.prediction_type, defaults.sampler)
    assert (*found, defaults.height, model.num_tokens) == PUBLISHED[name]


# One of each kind: channels of the latents, tokens of a prompt.
TRACED = {
    "stabilityai/stable-diffusion-3.5-medium": (16, 333),
    "black-forest-labs/FLUX.1-dev": (16, 512),
    "lodestones/Chroma1-HD": (16, 512),
    "facebook/DiT-XL-2-256": (4, None),
}


def shallow(*chosen):
    """A preset with two blocks of each kind: all others trace as these do."""
    found = preset(*chosen)
    blocks = dict.fromkeys(("num_layers", "num_single_layers", "num_hidden_layers"), 2)
    blocks |= {"dual_attention_layers": (0,)}
    known = {field.name for field in dataclasses.fields(found.config)}
    config = dataclasses.replace(found.config, **{n: blocks[n] for n in known & blocks.keys()})
    return dataclasses.replace(found, config=config)


@pytest.mark.parametrize("name", TRACED)
def test_programs_of_published_models_are_traced(name, monkeypatch):
    """For an image of each of eight chips, at the model's size; the chips share the weights."""
    monkeypatch.setattr(published_models, "preset", shallow)
    options = sampling.SamplingOptions(plan=(), model=name, guidance_scale=1.0)
    model = sampling.sampled_model(options)
    options = model.with_defaults(options)
    layout = OnMesh(sampling_mesh({"fsdp": 8}, jax.devices()))
    programs = sampling_programs(options, model, layout)
    channels, tokens = TRACED[name]
    wanted = {"loop": (8, options.height // 8, options.width // 8, channels)}
    if tokens is not None:
        wanted["text_encoders"] = (8, 1, tokens, 4096)
    for program, shape in wanted.items():
        assert jax.tree.leaves(programs[program].trace(8).out_info)[0].shape == shape


# Of unCLIP's designs: what the loop gives for each image.
UNCLIP = {
    "stabilityai/stable-diffusion-2-1-unclip": (96, 96, 4),
    "kakaobrain/karlo-v1-alpha/decoder": (64, 64, 3),
    "kakaobrain/karlo-v1-alpha/super_res": (256, 256, 3),
}


@pytest.mark.parametrize("name", UNCLIP)
def test_the_loops_of_unclip_are_traced(name):
    options, model = published(name)
    layout = OnMesh(sampling_mesh({"fsdp": 8}, jax.devices()))
    programs = sampling_programs(model.with_defaults(options), model, layout)
    assert jax.tree.leaves(programs["loop"].trace(8).out_info)[0].shape == (8, *UNCLIP[name])
    weights = sum(parameter_count(param_dict(each)) for each in model.components.values())
    stored = PUBLISHED_MODELS[name].components.items()
    counts = {each: preset(*chosen).parameters for each, chosen in stored}
    counts.pop("image_normalizer", None)  # its two vectors are read on the host
    assert weights == sum(counts.values())


def test_one_of_several_models_in_a_folder_is_planned(tmp_path):
    folder = tmp_path / "karlo"
    write_pipeline(folder, unclip_files.karlo(tmp_path / "parts"))
    for name, family, size in (
        *(("prior", "Karlo prior", 1), ("decoder", "Karlo", 8)),
        ("super_res", "Karlo super-resolution", 16),
    ):
        model = sampled_model(SamplingOptions(plan=(), model=str(folder / name), dtype="float32"))
        assert (model.family.name, model.defaults.height, model.defaults.steps) == (family, size, 2)
    with pytest.raises(InputError, match=r"which is several models, expected .*karlo/prior or"):
        sampled_model(SamplingOptions(plan=(), model=str(folder)))
    with pytest.raises(InputError, match="expected a folder or file that is there"):
        sampled_model(SamplingOptions(plan=(), model=str(folder / "nothing")))


def test_a_prior_is_traced_for_embeddings(monkeypatch):
    monkeypatch.setattr(published_models, "preset", shallow)
    name = "kandinsky-community/kandinsky-2-2-prior"
    options = sampling.SamplingOptions(plan=(), model=name)
    model = sampling.sampled_model(options)
    layout = OnMesh(sampling_mesh({"fsdp": 8}, jax.devices()))
    programs = sampling_programs(model.with_defaults(options), model, layout)
    for program in ("loop", "decoder"):
        assert jax.tree.leaves(programs[program].trace(8).out_info)[0].shape == (8, 1280)
    assert programs["loop"].flops(1) > 0
