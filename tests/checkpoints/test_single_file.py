"""Files of the original layout: family, configs and every weight, bit for bit."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import originals
import pytest
import tiny

from jaxdiff.checkpoints.description import describe
from jaxdiff.checkpoints.file_kinds import OTHER_FAMILIES
from jaxdiff.checkpoints.models import read_model
from jaxdiff.checkpoints.safetensors import read_table, read_tensor
from jaxdiff.checkpoints.single_file import read_single_file, write_single_file
from jaxdiff.checkpoints.single_file_layouts import UNET
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError
from jaxdiff.diffusion.schedules import FlowSchedule
from jaxdiff.experiments.base_model import load_base_model
from jaxdiff.models.build import param_dict
from jaxdiff.training.config import DiffusionObjective

PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
}
PREDICTS = {"sd1": None, "sd2": "v_prediction", "sdxl": "epsilon", "refiner": "epsilon"}
PADS = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"], "refiner": ["!"]}


@pytest.fixture(scope="module", params=PIPELINES)
def written(request, tmp_path_factory):
    """(family, its components, a file with them)"""
    parts = originals.components(request.param)
    tensors = originals.original_tensors(request.param, parts)
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, parts, originals.write_safetensors(folder / "x.safetensors", tensors)


@pytest.fixture(scope="module")
def found(written):
    """What is read of the file."""
    return read_model(written[2])


def test_everything_is_read(written, found):
    (family, expected, _), parts = written, found
    assert parts.class_name == PIPELINES[family]
    assert parts.scheduler.get("prediction_type") == PREDICTS[family]
    assert parts.components.keys() == expected.keys()
    for name, component in parts.components.items():
        ours, theirs = param_dict(component.module), param_dict(expected[name].module)
        assert ours.keys() == theirs.keys()
        for key, values in theirs.items():
            np.testing.assert_array_equal(ours[key], values, err_msg=key)
    pads = [json.loads(t.files["special_tokens_map.json"]) for t in parts.tokenizers.values()]
    assert [pad["pad_token"] for pad in pads] == PADS[family]


def test_configs_are_told_by_the_shapes(written, found):
    _, expected, _ = written
    for name, component in found.components.items():
        got, wanted = component.module.config, expected[name].module.config
        differ = {f for f in vars(wanted) if getattr(got, f) != getattr(wanted, f)}
        # One head in every stage may be said once or for each.
        assert differ <= {"sample_size", "attention_head_dim", "scaling_factor"}


def test_what_it_is_shows_without_reading_it(written):
    family, expected, path = written
    found = describe(path)
    assert found.layout == "single file"
    assert found.prediction_type == (PREDICTS[family] or "epsilon")
    counts = {part.name: part.parameters for part in found.parts}
    for name, component in expected.items():
        assert counts[name] == sum(a.size for a in param_dict(component.module).values())
    unused = {"a text encoder's last layer and projection": 13} if family == "sd2" else {}
    assert (found.left_over, found.unknown, found.missing) == (unused, (), ())
    assert {dtype for part in found.parts for dtype in part.dtypes} == {"F32"}


def values_of(path):
    return {name: read_tensor(entry) for name, entry in read_table(path).items()}


def test_written_again_it_is_the_same_file(written, found, tmp_path):
    family, _, path = written
    write_single_file(tmp_path / "again.safetensors", found)
    before, after = values_of(path), values_of(tmp_path / "again.safetensors")
    if family == "sd2":  # the layer that nobody uses, and the projection, are gone
        before = {k: v for k, v in before.items() if ".resblocks.23." not in k}
        before.pop("cond_stage_model.model.text_projection")
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values, err_msg=name)


def test_what_a_written_file_predicts_comes_back(tmp_path):
    parts = read_model(
        originals.write_safetensors(
            tmp_path / "x.safetensors",
            originals.original_tensors("sd2", originals.components("sd2")),
        )
    )
    for predicts in ("epsilon", "v_prediction"):
        scheduler = {**parts.scheduler, "prediction_type": predicts}
        path = tmp_path / f"{predicts}.safetensors"
        write_single_file(path, dataclasses.replace(parts, scheduler=scheduler))
        assert read_model(path).scheduler["prediction_type"] == predicts


def test_convert_there_and_back(tmp_path, capsys):
    expected = originals.components("sd1")
    path = tmp_path / "x.safetensors"
    originals.write_safetensors(path, originals.original_tensors("sd1", expected))
    folder, file = tmp_path / "folder", tmp_path / "again.safetensors"
    assert main.run("convert", [str(path), str(folder)]) == 0
    assert main.run("convert", [str(folder), str(file), "--dtype", "float16"]) == 0
    assert "StableDiffusionPipeline, " in capsys.readouterr().out
    got = read_model(file)
    for name, component in got.components.items():
        ours = param_dict(component.module)
        for key, values in param_dict(expected[name].module).items():
            half = np.asarray(values).astype(np.float16)
            np.testing.assert_array_equal(ours[key], half, err_msg=key)


def test_convert_to_a_pickle_is_refused(tmp_path, capsys):
    assert main.run("convert", ["x", str(tmp_path / "x.ckpt")]) == 2
    assert "expected a folder or FILE.safetensors" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sd1():
    return originals.original_tensors("sd1", originals.components("sd1"))


def read(tmp_path, tensors, **options):
    return read_single_file(
        originals.write_safetensors(tmp_path / "y.safetensors", tensors), **options
    )


def test_tables_and_buffers_are_passed_over(tmp_path, sd1):
    text = "cond_stage_model.transformer."
    more = {
        "betas": np.zeros(3, np.float32),
        "cond_stage_model.logit_scale": np.zeros((), np.float32),
        f"{text}text_model.embeddings.position_ids": np.zeros((1, 77), np.int64),
    }
    assert read(tmp_path, sd1 | more).class_name == "StableDiffusionPipeline"


LEFT_OVER = (
    "cond_stage_model.transformer.text_projection.weight",
    "cond_stage_model.transformer.vision_model.post_layernorm.bias",
    "first_stage_model.loss.logvar",
    "first_stage_model.loss.discriminator.main.0.weight",
    "first_stage_model.model_ema.decay",
    "model_ema.decay",
    "model_ema.diffusion_modelinput_blocks00weight",
    "control_model.time_embed.0.weight",
    "embedding_manager.string_to_param_dict.*",
    "global_step",
)
KINDS = (
    "1 of CLIP's image encoder, 1 of ControlNet, 3 of averaged weights (EMA), 2 of losses, "
    "1 of text projections, 1 of textual inversions in training, 1 of training counters"
)


def test_one_warning_counts_what_is_left_over(tmp_path, sd1):
    more = dict.fromkeys(LEFT_OVER, np.zeros((64, 64), np.float32))
    with pytest.warns(UserWarning, match="not read") as said:
        read(tmp_path, sd1 | more)
    (message,) = map(str, (each.message for each in said))
    tests = pathlib.Path(__file__).parents[1]  # where the caller is
    assert tests in pathlib.Path(said[0].filename).parents
    assert message.endswith(f"y.safetensors: got tensors that are not read: {KINDS}")


def test_names_without_the_prefix_of_the_text_model(tmp_path, sd1):
    bare = {k.replace("transformer.text_model.", "transformer."): v for k, v in sd1.items()}
    assert bare.keys() != sd1.keys()
    read(tmp_path, bare)


def test_hints_at_the_prediction(tmp_path, sd1):
    none = np.zeros(0, np.float32)
    scheduler = read(tmp_path, sd1 | {"v_pred": none, "ztsnr": none}).scheduler
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True
    assert read(tmp_path, sd1, prediction_type="sample").scheduler["prediction_type"] == "sample"
    with pytest.raises(InputError, match="prediction_type: got 'noise'"):
        read(tmp_path, sd1, prediction_type="noise")


def test_nine_channels_are_for_inpainting(tmp_path):
    parts = originals.components("sd1", channels=9)
    found = read(tmp_path, originals.original_tensors("sd1", parts))
    assert found.class_name == "StableDiffusionInpaintPipeline"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), r"missing tensors: got 1 \(conv_out"),
        (
            lambda t: t.update({"model.diffusion_model.x": np.zeros(1, np.float32)}),
            "unknown tensors",
        ),
        (lambda t: t.update({"lora.x": np.zeros(1, np.float32)}), r"got 1 \(lora\.x\)"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("first_stage_model.")],
            r"got no tensors first_stage_model\.\*",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith("cond_stage_model.")],
            "got no text_encoder, expected",
        ),
        (
            lambda t: t.update({"model.diffusion_model.out.2.bias": np.zeros(5, np.float32)}),
            "unfit tensors",
        ),
        (lambda t: t.pop("model.diffusion_model.input_blocks.0.0.weight"), "expected a Stable Dif"),
    ],
)
def test_incomplete_files_are_refused(tmp_path, sd1, change, message):
    tensors = dict(sd1)
    change(tensors)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, tensors)
    assert "y.safetensors" in str(error.value)


@pytest.mark.parametrize("beginning", OTHER_FAMILIES)
@pytest.mark.parametrize("prefix", ["", UNET])
def test_other_families_are_refused_by_name(tmp_path, prefix, beginning):
    tensors = {f"{prefix}{beginning}weight": np.zeros(2, np.float32)}
    with pytest.raises(InputError, match=f"got {OTHER_FAMILIES[beginning]}, which is not supp"):
        read(tmp_path, tensors)


def test_stable_unclip_is_refused_by_name(tmp_path, sd1):
    name = "embedder.model.visual.class_embedding"
    with pytest.raises(InputError, match="got Stable unCLIP, which is not supported"):
        read(tmp_path, sd1 | {name: np.zeros(2, np.float32)})


def test_inspect_prints_what_it_is(written, capsys):
    _, _, path = written
    assert main.run("inspect", [str(path)]) == 0
    assert "single file" in capsys.readouterr().out
    assert main.run("inspect", [str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layout"] == "single file"
    assert main.run("inspect", [str(path.parent / "none")]) == 2


def test_inspect_counts_what_is_loaded(tmp_path, sd1, capsys):
    whole = originals.write_safetensors(tmp_path / "x.safetensors", sd1)
    tensors = {name: v for name, v in sd1.items() if not name.startswith("first_stage_model.")}
    names = (*LEFT_OVER, "lora.x", "betas", "first_stage_model.logvar")
    more = dict.fromkeys(names, np.zeros((64, 64), np.float32))
    path = originals.write_safetensors(tmp_path / "y.safetensors", tensors | more)
    unet, _, text = describe(whole).parts
    assert describe(path).parts == (unet, text)
    assert main.run("inspect", [str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"  left over, not read: {KINDS}",
        "  unknown tensors: 1 (lora.x): the file cannot be loaded with them",
        "  no vae: loading needs a VAE of its own (--vae FILE, vae=...)",
    ]


def test_inspect_does_not_wait_for_jax():
    code = "import sys, jaxdiff.cli.inspect; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_schedule_of_a_flow_is_nowhere_taken_for_another(tmp_path):
    folder = tiny.write_tiny(tmp_path / "model")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}  # which predicts velocities
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert describe(folder).prediction_type == "flow_prediction"
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")  # the index names the class
    assert describe(folder).prediction_type == "flow_prediction"
    with pytest.raises(InputError, match="got the schedule of a flow"):
        write_single_file(tmp_path / "model.safetensors", read_model(folder))
    assert not (tmp_path / "model.safetensors").exists()
    objective = load_base_model(DiffusionObjective(pipeline=str(folder))).objective
    assert objective.schedule == FlowSchedule()
    assert objective.prediction_type == "flow_prediction"
