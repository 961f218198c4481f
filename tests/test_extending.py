"""A new rule and a new sampler need a registry line alone; docs/extending.md works as it is."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import tiny

import jaxdiff
from jaxdiff.cli import main
from jaxdiff.guidance.base import RULES, extrapolate
from jaxdiff.guidance.classifier_free import CondUncond
from jaxdiff.guidance.rule import rule
from jaxdiff.samplers.base import SAMPLERS, Sampler

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(
    part.split("\n", 1) for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if "```" in part
)


@rule
class Toy(CondUncond):
    """Classifier-free guidance by twice the scale."""

    factor: float = 2.0

    def combine(self, outputs, inputs, scales, state):
        uncond, cond = self.uncond_and_cond(outputs, scales)
        return inputs.predict(extrapolate(uncond, cond, self.factor * scales.scale)), state


class ToySampler(Sampler):
    """DDIM."""

    order = 1

    def step(self, denoise, state, here, there, noise_fn):
        (D, eps), guidance_state = denoise(state.x, here, state.guidance_state)
        x = there.alpha * D + there.sigma * eps
        return state._replace(x=x, x0=D, guidance_state=guidance_state)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A tiny model, with the rule and the sampler registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RULES, "toy", Toy())
        patch.setitem(SAMPLERS, "toy", ToySampler())
        plain = jaxdiff.load(tiny.write_tiny(tmp_path_factory.mktemp("model") / "tiny"))
        model = tiny.with_linear_unet(tiny.first_devices(plain, 1))
        patch.setattr(jaxdiff, "load", lambda *_, **__: model)
        yield model


def test_calls_know_a_registered_rule_and_sampler(pipe):
    options = {"seed": 1, "output": "latent", "steps": 2}
    plain = pipe("a ring", guidance_scale=6.0, sampler="ddim", **options)
    out = pipe("a ring", guidance_scale=3.0, guidance="toy", sampler="toy", **options)
    np.testing.assert_allclose(out.images, plain.images, rtol=1e-5, atol=1e-5)
    out = pipe("a ring", guidance_scale=4.0, guidance="toy:factor=1.5+interval", **options)
    np.testing.assert_allclose(out.images, plain.images, rtol=1e-5, atol=1e-5)


def test_commands_know_them(pipe, tmp_path):
    names = ("--guidance", "toy", "--sampler", "toy")
    assert main.run("generate", ["a ring", *names, "--output", str(tmp_path / "a.png")]) == 0
    arguments = ("a ring", "--scales", "1", "3", "--guidance", "cfg", "toy")
    assert main.run("sweep", [*arguments, "--output", str(tmp_path / "sweep.png")]) == 0
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    found = {(cell["guidance"], cell["scale"]): cell["evaluations"] for cell in cells}
    assert found == {("cfg", 1): 4, ("cfg", 3): 8, ("toy", 1): 8, ("toy", 3): 8}


def test_errors_list_them(pipe, capsys):
    assert main.run("generate", ["a ring", "--sampler", "toi"]) == 2
    assert "toy" in capsys.readouterr().err
    assert main.run("generate", ["a ring", "--guidance", "toi"]) == 2
    assert "toy" in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The checkout in which the page's files are saved."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("jaxdiff", "tests", "train.py", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_works_as_it_is(section, checkout):
    """Its files are saved under the names in their first lines, and its commands run in order."""
    text = SECTIONS[section]
    for name, code in re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```", text, re.M | re.S):
        (checkout / name).write_text(code)
    words = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    commands = re.findall(r"^    python (.+)$", words, re.M)
    assert commands
    environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"}
    for command in commands:
        arguments = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)]
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_page_has_the_five():
    assert list(SECTIONS) == [
        "A guidance rule",
        "A wrapper of rules",
        "A sampler",
        "A backbone",
        "A data source",
    ]
