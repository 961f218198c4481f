"""Single files of whole families with their networks: written, described, read, generated from."""

import dataclasses
import json
import warnings

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import originals
import pytest
import safetensors.numpy
import tiny
import transformer_files as models

import jaxdiff
from jaxdiff.checkpoints.loading import lazy_tensors
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.checkpoints.single_file import write_single_file
from jaxdiff.checkpoints.single_file_layouts import UNET
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.families.detection import family_of
from jaxdiff.models.build import param_dict

# What a file that `convert` writes is called, and what loading it needs beside it.
FAMILIES = {
    "flux": ("FLUX.1 dev", ["tokenizer_2"]),
    "fill": ("FLUX.1 Fill", ["tokenizer_2"]),
    "control": ("FLUX.1 Canny or Depth", ["tokenizer_2"]),
    "chroma": ("Chroma", ["tokenizer"]),
    "sd3": ("Stable Diffusion 3.5", ["tokenizer_3"]),
    "dit": ("DiT", ["vae"]),
    "ldm": ("LDM text to image", ["tokenizer"]),
    "classes": ("class-conditional LDM", []),
}
PROMPTS = {"dit": "square", "classes": "square"}
PIXELS = np.random.default_rng(4).integers(0, 256, (16, 16, 3), np.uint8)
# What the wider models of FLUX.1 begin with.
INPUTS = {"control": {"image": PIXELS}, "fill": {"image": PIXELS, "mask": PIXELS[..., 0]}}
IMAGE = {"height": 16, "width": 16, "steps": 1, "output": "numpy", "seed": 3}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder and the file of a family, each written once."""
    made = {}

    def write(name):
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            write_pipeline(place / "folder", models.components(name, place))
            file = place / "file.safetensors"
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", ".* got vae: a single file of DiT does not hold it"
                )
                assert main.run("convert", [str(place / "folder"), str(file)]) == 0
            made[name] = place / "folder", file
        return made[name]

    return write


def assert_same(got, wanted):
    """The same weights and configs, component by component, and the same of all else."""
    assert got.class_name == wanted.class_name
    assert got.components.keys() == wanted.components.keys()
    for name, component in wanted.components.items():
        own = got.components[name].module
        assert type(own) is type(component.module)
        assert own.config == component.module.config, name
        stored = {key: tensor.fetch() for key, tensor in lazy_tensors(own).items()}
        tensors = lazy_tensors(component.module)
        assert stored.keys() == tensors.keys()
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(stored[key], tensor.fetch(), err_msg=f"{name}: {key}")
    for key, value in wanted.scheduler.items():
        assert got.scheduler.get(key) == value, key
    assert got.tokenizers.keys() == wanted.tokenizers.keys()
    assert dict(got.options) == dict(wanted.options)


def generate(name, source, **options):
    pipe = tiny.first_devices(jaxdiff.load(source, dtype="float32", **options), 1)
    return pipe(PROMPTS.get(name, "a small red circle"), **IMAGE, **INPUTS.get(name, {})).images


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_the_folder_that_it_was_written_from(written, tmp_path, name):
    folder, file = written(name)
    assert main.run("convert", [str(file), str(tmp_path / "again"), "--base", str(folder)]) == 0
    assert_same(read_pipeline(tmp_path / "again"), read_pipeline(folder))
    images = generate(name, file, base=folder)
    np.testing.assert_array_equal(images, generate(name, folder))
    assert np.ptp(images) > 10


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect(written, capsys, name):
    folder, file = written(name)
    assert main.run("inspect", [str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    family, missing = FAMILIES[name]
    assert (found["family"], found["layout"]) == (family, "single file")
    assert found["missing"] == missing
    assert (found["optional"], found["unknown"], found["left_over"]) == ([], [], {})
    wanted = read_pipeline(folder, only=())
    sizes = {
        part: sum(leaf.size for leaf in param_dict(component.module).values())
        for part, component in wanted.components.items()
        if part not in missing
    }
    got = {part["name"]: part["parameters"] for part in found["parts"]}
    assert got.keys() == sizes.keys()
    assert main.run("inspect", [str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"{file}: {family} (single file)" in shown
    for each in missing:
        assert f"no {each}: loading needs " in shown


def transformer_of(file):
    """The arrays of the network in a file that `convert` wrote, without its prefix."""
    return {n.removeprefix(UNET): a for n, a in models.arrays(file).items() if n.startswith(UNET)}


@pytest.mark.parametrize("name", ["flux", "chroma", "sd3"])
def test_names_of_a_transformer_alone(written, tmp_path, name):
    """Those of its own code and of diffusers, without a prefix."""
    folder, file = written(name)
    original = transformer_of(file)
    diffusers = models.arrays(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert original.keys() != diffusers.keys()
    wanted = read_pipeline(folder)
    for names in (original, diffusers):
        path = originals.write_safetensors(tmp_path / "x.safetensors", names)
        assert_same(read_model(path, base=folder), wanted)
        with pytest.raises(InputError, match=r"x\.safetensors: got no vae, text_encoder"):
            read_model(path)


def test_dit_in_the_names_of_diffusers(written, tmp_path):
    folder, _ = written("dit")
    names = models.arrays(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    path = originals.write_safetensors(tmp_path / "x.safetensors", names)
    got, wanted = read_model(path, base=folder), read_pipeline(folder)
    for key, values in param_dict(wanted.components["transformer"].module).items():
        np.testing.assert_array_equal(param_dict(got.components["transformer"].module)[key], values)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_8_bit_floats_with_scales(written, tmp_path, name):
    """As ComfyUI writes them: one scale a layer, which its parts in diffusers share."""
    folder, file = written(name)
    eight, scale = {}, np.array(0.03, np.float32)
    plain = models.arrays(file)
    for key, values in plain.items():
        if key.startswith(UNET) and key.endswith(".weight") and values.ndim == 2:
            eight[key] = (values / scale).astype(ml_dtypes.float8_e4m3fn)
            eight[f"{key.removesuffix('.weight')}.scale_weight"] = scale
            plain[key] = eight[key].astype(np.float32) * scale
        else:
            eight[key] = values
    eight[f"{UNET}scaled_fp8"] = np.zeros(0, ml_dtypes.float8_e4m3fn)
    safetensors.numpy.save_file(eight, tmp_path / "fp8.safetensors")
    wanted = originals.write_safetensors(tmp_path / "plain.safetensors", plain)
    got = read_model(tmp_path / "fp8.safetensors", jnp.float32, base=folder)
    assert_same(got, read_model(wanted, jnp.float32, base=folder))


def without(file, path, *prefixes):
    """A file without the tensors below these prefixes."""
    left = {n: a for n, a in models.arrays(file).items() if not n.startswith(prefixes)}
    return originals.write_safetensors(path, left)


def test_sd3_without_text_encoders(written, tmp_path, capsys):
    folder, file = written("sd3")
    path = without(file, tmp_path / "x.safetensors", "text_encoders.")
    assert_same(read_model(path, base=folder), read_pipeline(folder))
    assert main.run("generate", ["a star", "--model", str(path)]) == 2
    error = capsys.readouterr().err
    assert "got no text_encoder, text_encoder_2, expected a complete checkpoint, or" in error
    assert main.run("inspect", [str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["text_encoder", "text_encoder_2"]
    assert found["optional"] == ["text_encoder_3"]


def test_sd3_without_t5(written, tmp_path, capsys):
    """Its tokens are zeros; nothing else is needed, as a file has CLIP's tokenizer."""
    folder, file = written("sd3")
    path = without(file, tmp_path / "x.safetensors", "text_encoders.t5xxl.")
    whole = read_pipeline(folder)
    less = tmp_path / "less"
    parts = {n: c for n, c in whole.components.items() if n != "text_encoder_3"}
    tokenizers = {n: t for n, t in whole.tokenizers.items() if n != "tokenizer_3"}
    absent = ("text_encoder_3", "tokenizer_3")
    write_pipeline(
        less,
        dataclasses.replace(whole, components=parts, tokenizers=tokenizers, absent=absent),
    )
    with pytest.warns(UserWarning, match="got no text_encoder_3: images are generated without"):
        images = generate("sd3", path)
    np.testing.assert_array_equal(images, generate("sd3", less))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the base has it
        assert_same(read_model(path, base=folder), whole)
    again = tmp_path / "again.safetensors"
    assert main.run("convert", [str(less), str(again)]) == 0
    assert models.arrays(again).keys() == models.arrays(path).keys()
    capsys.readouterr()
    assert main.run("inspect", [str(path)]) == 0
    assert (
        "no text_encoder_3: images are generated without; a model with" in capsys.readouterr().out
    )


def test_the_projection_of_clip_l_does_not_count_in_sd3(written, tmp_path, capsys):
    """As in ComfyUI, which writes CLIP's into files; a folder with one has no single file."""
    folder, file = written("sd3")
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    tensors = models.arrays(file)
    assert name not in tensors
    random = np.random.default_rng(0).normal(size=(models.HEAD, models.HEAD)).astype(np.float32)
    path = originals.write_safetensors(tmp_path / "x.safetensors", tensors | {name: random})
    assert_same(read_model(path, base=folder), read_pipeline(folder))
    assert main.run("inspect", [str(path)]) == 0
    assert "left over, not read: 1 of text projections" in capsys.readouterr().out
    parts = read_pipeline(folder)
    second = parts.components["text_encoder_2"]  # projects by a matrix of its own
    parts = dataclasses.replace(parts, components={**parts.components, "text_encoder": second})
    write_pipeline(tmp_path / "other", parts)
    output = tmp_path / "other.safetensors"
    assert main.run("convert", [str(tmp_path / "other"), str(output)]) == 2
    assert "got another matrix, expected the identity" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("name", ["fill", "control"])
def test_wider_models_of_flux_from_comfyui(written, tmp_path, name):
    """The network alone under bare names, as ComfyUI has it, with all else of FLUX.1 dev."""
    folder, file = written(name)
    tensors = models.arrays(file)
    bare = {n.removeprefix(UNET): a for n, a in tensors.items() if n.startswith(UNET)}
    path = originals.write_safetensors(tmp_path / "x.safetensors", bare)
    dev = tmp_path / "dev"
    plain = models.components("flux", tmp_path)
    others = {n: c for n, c in read_pipeline(folder).components.items() if n != "transformer"}
    own = {**others, "transformer": plain.components["transformer"]}
    write_pipeline(dev, dataclasses.replace(plain, components=own))
    for base in (folder, dev):
        parts = read_model(path, base=base, only=())
        assert parts.class_name == models.WIDER[name][0]
    np.testing.assert_array_equal(generate(name, path, base=dev), generate(name, folder))


def test_schnell(written, tmp_path):
    """A file without the embedding of a guidance scale, whose schedule is that of schnell."""
    folder, file = written("flux")
    path = without(file, tmp_path / "x.safetensors", f"{UNET}guidance_in.")
    parts = read_model(path, base=folder, only=())
    assert family_of(parts, "x").name == "FLUX.1 schnell"
    assert parts.scheduler["use_dynamic_shifting"] is False


def test_the_names_of_a_base_decide_between_models_of_the_same_tensors(written, tmp_path):
    folder, file = written("flux")
    kontext = tmp_path / "kontext"
    write_pipeline(
        kontext, dataclasses.replace(read_pipeline(folder), class_name="FluxKontextPipeline")
    )
    for base, family in ((folder, "FLUX.1"), (kontext, "FLUX.1 Kontext")):
        assert family_of(read_model(file, base=base, only=()), "x").name == family
    assert main.run("convert", [str(kontext), str(tmp_path / "x.safetensors")]) == 0
    again = read_model(tmp_path / "x.safetensors", base=kontext, only=())
    assert again.class_name == "FluxKontextPipeline"


def refused(capsys, file, message, *arguments):
    """The one sentence with which generation from a file ends."""
    assert main.run("generate", ["a star", "--model", str(file), *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_what_does_not_fit(written, tmp_path, capsys):
    flux, file = written("flux")
    sd3, sd3_file = written("sd3")
    path = tmp_path / "x.safetensors"
    refused(capsys, file, "got no tokenizer_2, which no single file has, expected a model with")
    alone = without(file, tmp_path / "alone.safetensors", "text_encoders.")
    refused(capsys, alone, "without a CLIPTextModel, expected one for text_encoder", "--base", sd3)
    refused(
        capsys,
        without(file, path, f"{UNET}img_in.bias"),
        "missing tensors: got 1 (x_",
        "--base",
        flux,
    )
    tensors = models.arrays(file)
    wide = tensors | {f"{UNET}img_in.weight": np.zeros((128, 196), np.float32)}
    originals.write_safetensors(path, wide)
    refused(capsys, path, "got Flex.2, which is not supported", "--base", flux)
    states = tensors | {f"{UNET}txt_in.weight": np.zeros((128, 16), np.float32)}
    originals.write_safetensors(path, states)
    refused(
        capsys, path, "text_encoder_2: got hidden states of width 192, expected 16", "--base", flux
    )
    originals.write_safetensors(path, tensors | {f"{UNET}more": np.zeros(1, np.float32)})
    refused(capsys, path, "more", "--base", flux)
    more = models.arrays(sd3_file) | {f"{UNET}context_processor.x": np.zeros(1, np.float32)}
    originals.write_safetensors(path, more)
    refused(capsys, path, "got Stable Diffusion 3.5 with a context_processor", "--base", sd3)


@pytest.mark.parametrize(
    ("prefix", "kept", "kind"),
    [
        ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.", "T5EncoderModel"),
        ("text_encoders.t5xxl.transformer.", "", "T5EncoderModel"),
        ("text_encoders.clip_l.transformer.", "", "CLIPTextModel"),
    ],
)
def test_a_text_encoder_alone(written, tmp_path, capsys, prefix, kept, kind):
    """As ComfyUI has them in files of their own, bare or below their prefix."""
    _, file = written("flux")
    path = tmp_path / "x.safetensors"
    own = {n: a for n, a in models.arrays(file).items() if n.startswith(prefix)}
    cut = "" if kept else prefix
    originals.write_safetensors(path, {n.removeprefix(cut): a for n, a in own.items()})
    assert main.run("inspect", [str(path)]) == 0
    assert f"{path}: {kind} (text encoder file)" in capsys.readouterr().out
    refused(capsys, path, f"got a text encoder ({kind}), expected a file with a network")


@pytest.mark.parametrize("number", ["00001-of-00003", "00002-of-00010"])
def test_one_of_several_files(written, tmp_path, capsys, number):
    """Also where it has the tensors that a whole file is recognised by."""
    _, file = written("flux")
    path = tmp_path / f"diffusion_pytorch_model-{number}.safetensors"
    path.write_bytes(file.read_bytes())
    assert main.run("inspect", [str(path)]) == 0
    assert "one of several files of a component (shard)" in capsys.readouterr().out
    refused(capsys, path, "got one of several files of a component, expected the folder of the wh")
    whole = tmp_path / "diffusion_pytorch_model-00001-of-00001.safetensors"
    path.rename(whole)
    assert main.run("inspect", [str(whole)]) == 0
    assert "FLUX.1 dev (single file)" in capsys.readouterr().out


def test_a_shift_that_does_not_count_is_no_warning(written, tmp_path):
    """diffusers writes the keys of shifts by resolution also where there are none."""
    parts = read_pipeline(written("sd3")[0])
    own = {"base_shift": 0.5, "max_shift": 1.15}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unused = dataclasses.replace(parts, scheduler={**parts.scheduler, **own})
        write_single_file(tmp_path / "a.safetensors", unused)
    used = {**parts.scheduler, **own, "use_dynamic_shifting": True}
    with pytest.warns(UserWarning, match="a single file does not say so") as caught:
        write_single_file(tmp_path / "b.safetensors", dataclasses.replace(parts, scheduler=used))
    said = [str(each.message).partition(":")[0] for each in caught]
    assert said == ["use_dynamic_shifting", "base_shift", "max_shift"]


def test_a_flow_of_dit_has_no_single_file(written, tmp_path, capsys):
    folder, file = written("dit")
    refused(capsys, file, "got no tensors first_stage_model.*, expected a complete checkpoint")
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
    parts = dataclasses.replace(read_pipeline(folder), scheduler=flow)
    write_pipeline(tmp_path / "sit", parts)
    output = tmp_path / "x.safetensors"
    assert main.run("convert", [str(tmp_path / "sit"), str(output)]) == 2
    assert (
        "got the schedule of a flow for a transformer whose reverses_time is not true"
        in capsys.readouterr().err
    )
    assert not output.exists()


def test_a_model_is_no_lora(written, capsys):
    folder, file = written("flux")
    refused(capsys, folder, "got a whole model, expected a LoRA", "--lora", file)


def test_scale_factor_of_latent_diffusion(written, tmp_path):
    """The number that the training measured is the VAE's, whose name is vqvae."""
    folder, file = written("ldm")
    tensors = models.arrays(file) | {"scale_factor": np.float32(0.25)}
    path = originals.write_safetensors(tmp_path / "x.safetensors", tensors)
    assert read_model(path, base=folder).components["vqvae"].module.config.scaling_factor == 0.25


def test_another_vae_takes_the_place_of_vqvae(written, tmp_path):
    folder, file = written("ldm")
    bare = without(file, tmp_path / "x.safetensors", "first_stage_model.")
    tokenizer = {"base": folder, "vae": folder / "vqvae"}
    assert_same(read_model(bare, **tokenizer), read_pipeline(folder))
