"""Pipeline folders: round trips, what model_index.json may say, and replacing folders."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.checkpoints.pipelines import read_pipeline, write_pipeline
from jaxdiff.core.errors import InputError
from jaxdiff.models.build import param_dict


def edit(path, drop=(), **changes):
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in table.items() if k not in drop}))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_round_trip_is_bit_exact(folder, tmp_path):
    parts = read_pipeline(folder)
    write_pipeline(tmp_path / "again", parts)
    assert contents(tmp_path / "again") == contents(folder)


def test_parts_are_what_was_written(folder, parts):
    got = read_pipeline(str(folder), jnp.bfloat16)
    assert got.components.keys() == parts.components.keys()
    assert got.scheduler == parts.scheduler
    assert got.defaults == parts.defaults
    assert got.class_name == "StableDiffusionPipeline"
    assert got.options == {"requires_safety_checker": False}
    assert got.tokenizers["tokenizer"].files == parts.tokenizers["tokenizer"].files
    for component in got.components.values():
        assert {a.dtype for a in param_dict(component.module).values()} == {jnp.dtype("bfloat16")}


def test_a_replaced_folder_keeps_no_defaults_of_the_old_model(folder, parts):
    assert (folder / "jaxdiff.json").exists()
    (folder / "notes.txt").write_text("mine")
    write_pipeline(folder, dataclasses.replace(parts, defaults={}))
    assert read_pipeline(folder).defaults == {}
    assert (folder / "notes.txt").read_text() == "mine"


def test_index_of_a_stable_diffusion_folder(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["safety_checker"] == [None, None]


def test_defaults_are_optional(folder):
    (folder / "jaxdiff.json").unlink()
    assert read_pipeline(folder).defaults == {}


def test_what_the_index_does_not_name_is_not_read(folder):
    shutil.copytree(folder / "vae", folder / "vae_1_0")
    (folder / "vae_1_0" / "config.json").write_text("broken")
    (folder / "config.json").write_text("broken")
    (folder / ".ipynb_checkpoints").mkdir()
    assert read_pipeline(folder).components.keys() == {"unet", "vae", "text_encoder"}


def test_index_entries_of_real_repositories(folder):
    edit(
        folder / "model_index.json",
        _class_name="FlaxStableDiffusionPipeline",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        image_encoder=[None, None],
        unet=["diffusers", "FlaxUNet2DConditionModel"],
        scheduler=["diffusers", "FlaxDDIMScheduler"],
        add_watermarker=None,
        force_zeros_for_empty_prompt=True,
    )
    edit(folder / "unet" / "config.json", _class_name="FlaxUNet2DConditionModel")
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="FlaxDDIMScheduler")
    parts = read_pipeline(folder)
    assert parts.class_name == "StableDiffusionPipeline"
    assert parts.scheduler["_class_name"] == "DDIMScheduler"
    assert set(parts.absent) == {"safety_checker", "feature_extractor", "image_encoder"}
    assert parts.options == {
        "requires_safety_checker": False,
        "add_watermarker": None,
        "force_zeros_for_empty_prompt": True,
    }


def test_variants_by_component(folder):
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet.rename(unet.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    assert read_pipeline(folder, variant="non_ema").components.keys() >= {"unet", "vae"}
    with pytest.raises(InputError, match="variant: got 'fp16', expected one of non_ema"):
        read_pipeline(folder, variant="fp16")


INDEX, UNET = "model_index.json", "unet/diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n"


def unlink(name):
    return lambda folder: (folder / name).unlink()


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def index(**changes):
    return lambda folder: edit(folder / INDEX, **changes)


def truncate(name, left):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:left])


BROKEN = {
    "no index": (unlink(INDEX), "model: got no model_index.json"),
    "index is no JSON": (write(INDEX, b"{"), r"model_index\.json: got invalid JSON"),
    "no class": (index(drop=["_class_name"]), r"model_index\.json: _class_name: got None"),
    "no scheduler": (index(drop=["scheduler"]), "got no scheduler"),
    "absent scheduler": (index(scheduler=[None, None]), "got no scheduler"),
    "unknown class": (
        index(unet=["diffusers", "UNet3DConditionModel"]),
        r"unet: class: got 'UNet3DConditionModel'.*did you mean 'UNet2DConditionModel'",
    ),
    "unknown tokenizer": (
        index(tokenizer=["transformers", "XLMTokenizer"]),
        "tokenizer: class: got 'XLMTokenizer'",
    ),
    "odd entry": (index(unet=["diffusers"]), "expected \\[library, class\\]"),
    "odd class": (index(unet=["diffusers", 3]), "expected \\[library, class\\]"),
    "odd library": (index(unet=[None, "UNet2DConditionModel"]), "expected \\[library, class\\]"),
    "way out": (index(**{"../unet": ["diffusers", "AutoencoderKL"]}), "expected \\[library"),
    "missing folder": (
        lambda folder: shutil.rmtree(folder / "text_encoder"),
        r"text_encoder/config\.json: got no such file",
    ),
    "missing VAE": (
        lambda folder: shutil.rmtree(folder / "vae"),
        r"model: got no vae/, expected it, or a VAE of its own \(--vae FILE",
    ),
    "missing scheduler": (unlink("scheduler/scheduler_config.json"), "scheduler_config.json"),
    "missing weights": (unlink(UNET), "unet: got config.json, expected"),
    "truncated": (truncate(UNET, 5000), r"unet/diffusion.*truncated"),
    "truncated by one": (truncate(UNET, -1), r"unet/diffusion.*truncated"),
    "pointer": (write(UNET, POINTER), r"unet/diffusion.*Git LFS pointer"),
    "page": (write(UNET, b"<!DOCTYPE html>\n<html></html>"), r"unet/diffusion.*HTML page"),
    "defaults": (write("jaxdiff.json", b"[1]"), r"jaxdiff\.json: got a JSON list"),
    "no vocabulary": (unlink("tokenizer/vocab.json"), r"tokenizer: got merges\.txt.*vocab\.json"),
    "vocabulary pointer": (write("tokenizer/vocab.json", POINTER), r"vocab\.json.*Git LFS"),
    "vocabulary": (write("tokenizer/vocab.json", b"{]"), r"tokenizer/vocab\.json: got invalid"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folder_is_one_error(folder, case):
    change, message = BROKEN[case]
    change(folder)
    with pytest.raises(InputError, match=message) as error:
        read_pipeline(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_replacing_a_folder(folder, parts):
    (folder / "README.md").write_text("mine")
    stale = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    stale.write_bytes(b"old")
    write_pipeline(folder, parts, dtype=jnp.float16)
    assert (folder / "README.md").read_text() == "mine"
    assert not stale.exists()
    dtypes = {a.dtype for a in param_dict(read_pipeline(folder).components["unet"].module).values()}
    assert dtypes == {np.dtype("float16")}
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_saving_over_the_folder_that_was_loaded(folder):
    before = contents(folder)
    write_pipeline(folder, read_pipeline(folder))
    assert contents(folder) == before


def test_interrupted_write_leaves_the_old_folder(folder, parts, monkeypatch):
    before = contents(folder)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxdiff.checkpoints.components.write_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pipeline(folder, parts)
    assert contents(folder) == before
    with pytest.raises(KeyboardInterrupt):
        write_pipeline(folder.parent / "new", parts)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_writing_through_a_link(folder, parts, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    write_pipeline(link, parts)
    assert link.is_symlink()
    assert read_pipeline(link).components.keys() == parts.components.keys()


def test_scheduler_without_class(parts, tmp_path):
    scheduler = {k: v for k, v in parts.scheduler.items() if k != "_class_name"}
    broken = type(parts)(components=parts.components, scheduler=scheduler)
    with pytest.raises(InputError, match="scheduler: got _class_name None"):
        write_pipeline(tmp_path / "x", broken)
    assert list(tmp_path.iterdir()) == []


def test_each_of_several_models_needs_a_scheduler(tmp_path):
    index = {"_class_name": "StableUnCLIPPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"got no prior_scheduler, expected one"):
        read_pipeline(tmp_path)
