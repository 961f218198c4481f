"""Textual inversion files of diffusers, of one vector and of several."""

import numpy as np
import pytest
import torch
from copier import image, nchw
from families import pipeline
from safetensors.torch import save_file
from tiny import first_devices

import jaxdiff
from jaxdiff.checkpoints.textual_inversion import read_inversion
from jaxdiff.cli import main
from jaxdiff.core.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("count", [1, 2])
def test_the_same_latents(tmp_path, count):
    vectors = torch.randn((count, 12), generator=torch.Generator().manual_seed(0))
    save_file({"<x>": vectors}, tmp_path / "learned_embeds.safetensors")
    theirs = pipeline("sd1")
    theirs.save_pretrained(tmp_path / "model")
    theirs.load_textual_inversion(tmp_path / "learned_embeds.safetensors", token="<x>")
    theirs.set_progress_bar_config(disable=True)
    ours = first_devices(jaxdiff.load(tmp_path / "model", dtype="float32"), 1)
    ours.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    noise = image((1, 8, 8, 4))
    way = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
    want = theirs("ab <x> c", latents=nchw(noise), **way).images.numpy().transpose(0, 2, 3, 1)
    way = {"steps": 3, "guidance_scale": 2.0, "output": "latent"}
    got = ours("ab <x> c", latents=noise, **way).images
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    other = ours("ab c", latents=noise, **way).images
    assert np.abs(got - other).max() > 1e-3 * np.abs(want).max()


def test_a_word_of_several_vectors_in_another_case(tmp_path):
    """Tokenizers of CLIP do not tell cases apart; diffusers then takes the first vector alone."""
    vectors = torch.randn((3, 12), generator=torch.Generator().manual_seed(0))
    save_file({"<x>": vectors}, tmp_path / "several.safetensors")
    save_file({"<x>": vectors[:1]}, tmp_path / "one.safetensors")
    theirs = {name: pipeline("sd1") for name in ("several", "one")}
    for name, pipe in theirs.items():
        pipe.load_textual_inversion(tmp_path / f"{name}.safetensors", token="<x>")

    def hidden(pipe, text):
        return pipe.encode_prompt(text, "cpu", 1, False)[0].detach().numpy()

    small, large = (hidden(theirs["several"], f"ab {word} c") for word in ("<x>", "<X>"))
    assert np.abs(small - large).max() > 1e-2
    np.testing.assert_array_equal(large, hidden(theirs["one"], "ab <x> c"))
    pipeline("sd1").save_pretrained(tmp_path / "model")
    ours = first_devices(jaxdiff.load(tmp_path / "model", dtype="float32"), 1)
    ours.load_textual_inversion(tmp_path / "several.safetensors")
    way = {"steps": 2, "guidance_scale": 1.0, "output": "latent"}
    same = [ours(f"ab {word} c", **way).images for word in ("<x>", "<X>")]
    np.testing.assert_array_equal(*same)


def parameters(vectors):
    return torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})


@pytest.mark.parametrize(
    "written",
    [
        lambda v: {"string_to_token": {"*": 265}, "string_to_param": {"*": v}},
        lambda v: {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters(v)},
        lambda v: {"emb_params": v},
        lambda v: v,
        torch.nn.Parameter,
    ],
    ids=["web UI", "the paper's", "kohya", "a tensor", "a parameter"],
)
def test_a_file_of_pytorch(tmp_path, capsys, written):
    """The web UI's .pt: as its vectors in safetensors, and told from its table."""
    vectors = torch.randn((2, 12), generator=torch.Generator().manual_seed(0))
    save_file({"emb_params": vectors}, tmp_path / "cat.safetensors")
    stored = written(vectors)
    more = {"name": "cat", "step": 7, "sd_checkpoint": None}
    torch.save(stored | more if isinstance(stored, dict) else stored, tmp_path / "cat.pt")
    read = [
        read_inversion(tmp_path / f"cat{e}", {"text_encoder": 12}) for e in (".pt", ".safetensors")
    ]
    assert read[0].token == read[1].token == "cat"
    for inversion in read:
        np.testing.assert_array_equal(inversion.vectors["text_encoder"], vectors.numpy())
    assert main.run("inspect", [str(tmp_path / "cat.pt")]) == 0
    said = capsys.readouterr().out
    assert "(textual inversion)" in said
    assert "token 'cat', vectors 2, widths text_encoder 12" in said


@pytest.mark.parametrize("count", [1, 2])
def test_a_pickle_of_diffusers(tmp_path, count):
    """learned_embeds.bin of 2022: a word and its vectors."""
    vectors = torch.randn((count, 12), generator=torch.Generator().manual_seed(0))
    torch.save({"<cat>": vectors[0] if count == 1 else vectors}, tmp_path / "learned_embeds.bin")
    found = read_inversion(tmp_path / "learned_embeds.bin", {"text_encoder": 12})
    assert found.token == "<cat>"
    np.testing.assert_array_equal(found.vectors["text_encoder"], vectors.numpy())


def test_files_that_are_refused(tmp_path):
    vectors = torch.randn((2, 12), generator=torch.Generator().manual_seed(0))
    torch.save({"<a>": vectors, "<b>": vectors.clone()}, tmp_path / "two.bin")
    torch.save([vectors], tmp_path / "list.pt")
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"<a>": vectors}, tmp_path / "old.pt", **old)
    for name, message in (
        ("two.bin", r"got 2 tensors \(<a>, <b>\), expected one embedding of one word"),
        ("list.pt", "got 0 tensors"),
        ("old.pt", r"older than PyTorch 1\.6 \(which can load and save it again\)"),
    ):
        with pytest.raises(InputError, match=message):
            read_inversion(tmp_path / name, {"text_encoder": 12})
