"""Hub repositories: which files are fetched, and what is said when they cannot be."""

import pathlib
import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from jaxdiff.checkpoints import hub
from jaxdiff.checkpoints.models import read_model
from jaxdiff.core.errors import InputError

NAMES = [
    "model_index.json",
    "README.md",
    "v1-5-pruned.ckpt",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_flax_model.msgpack",
    "vae/config.json",
    "vae/diffusion_pytorch_model.bin",
    "text_encoder/config.json",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "onnx/unet/model.onnx",
]
SETTINGS = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
}
OTHERS = {"vae/diffusion_pytorch_model.bin", "text_encoder/model.safetensors.index.json"}


@pytest.mark.parametrize(
    ("variant", "unet"),
    [
        (None, "unet/diffusion_pytorch_model.safetensors"),
        ("fp16", "unet/diffusion_pytorch_model.fp16.safetensors"),
        ("bf16", "unet/diffusion_pytorch_model.safetensors"),
    ],
)
def test_one_format_of_each_weights_is_needed(variant, unet):
    assert set(hub.needed(NAMES, variant)) == SETTINGS | OTHERS | {unet}


def test_a_repository_without_a_pipeline_is_refused():
    with pytest.raises(InputError, match=r"without model_index\.json"):
        hub.needed(["config.json", "model.safetensors"], None)


class Hub:
    """A hub with one repository, which is a folder here."""

    def __init__(self, source: pathlib.Path, cache: pathlib.Path, monkeypatch):
        self.source, self.cache, self.fetched = source, cache, []
        monkeypatch.setattr(huggingface_hub, "list_repo_files", self.list)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def list(self, repository):
        files = (p for p in self.source.rglob("*") if p.is_file())
        return [str(p.relative_to(self.source)) for p in files]

    def snapshot(self, repository, allow_patterns=None, local_files_only=False):
        if local_files_only and not self.cache.exists():
            raise LocalEntryNotFoundError("not cached")
        for name in allow_patterns or []:
            target = self.cache / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.source / name, target)
            self.fetched.append(name)
        return str(self.cache)


def test_a_model_by_its_name(folder, tmp_path, monkeypatch):
    (folder / "unet" / "notes.md").write_text("not needed")
    fake = Hub(folder, tmp_path / "cache", monkeypatch)
    parts = read_model("owner/name")
    assert parts.components.keys() == {"unet", "vae", "text_encoder"}
    assert "unet/notes.md" not in fake.fetched


def test_without_a_connection_the_cache_serves(folder, tmp_path, monkeypatch):
    fake = Hub(folder, tmp_path / "cache", monkeypatch)

    def offline(repository):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    with pytest.raises(InputError, match="no connection to the Hub, not in its cache"):
        read_model("owner/name")
    shutil.copytree(folder, fake.cache)
    assert read_model("owner/name").class_name == "StableDiffusionPipeline"


@pytest.mark.parametrize("kind", [RepositoryNotFoundError, HFValidationError])
def test_an_unknown_repository_is_a_sentence(monkeypatch, kind):
    def missing(repository):
        error = kind.__new__(kind)  # the library makes one from a response of the server
        error.args = ("Repository Not Found\nand more",)
        raise error

    monkeypatch.setattr(huggingface_hub, "list_repo_files", missing)
    with pytest.raises(InputError, match=r"got owner/name \(Repository Not Found\), expected"):
        read_model("owner/name")


@pytest.mark.parametrize(
    "source",
    [
        *("/no/such/model", "nowhere", "a/b/c", "./x/y", "models/flux.safetensors"),
        *("./nowhere", "../nowhere", "models/nowhere-", "a..b/c"),
    ],
)
def test_what_is_neither_here_nor_a_name_is_refused(source):
    with pytest.raises(
        InputError, match=r"no such file or folder\), expected a diffusers folder, "
    ):
        read_model(source)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x.gguf", "a file that ends in .gguf"), ("x", "no extension"), ("x.json", "a file that")],
)
def test_a_file_of_another_kind_says_what_is_accepted(tmp_path, name, reason):
    file = tmp_path / name
    file.write_bytes(b"GGUF")
    message = (
        rf"model: got .*{name} \({reason}.*\), expected a diffusers folder, a checkpoint file "
    )
    with pytest.raises(InputError, match=message + r"\(\.safetensors, .*\) or a Hub repository"):
        read_model(file)


def test_options_that_do_not_apply_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="prediction_type: got 'epsilon' for"):
        read_model(folder, prediction_type="epsilon")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="variant: got 'fp16' for the file"):
        read_model(tmp_path / "x.safetensors", variant="fp16")
