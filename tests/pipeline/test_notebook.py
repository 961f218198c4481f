"""In a notebook a call shows its progress and an output its images; elsewhere nothing is shown."""

import base64
import io
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from jaxdiff.pipeline import notebook


class Screen:
    """A stand-in for IPython in a kernel, which keeps what was shown."""

    def __init__(self):
        self.shown = []
        self.display = types.SimpleNamespace(display=self._display, HTML=lambda markup: markup)
        self.kernel = object()

    def get_ipython(self):
        return self

    def _display(self, markup, display_id):
        assert display_id is True
        self.shown.append(markup)
        return types.SimpleNamespace(update=self.shown.append)


@pytest.fixture
def screen(monkeypatch):
    screen = Screen()
    monkeypatch.setitem(sys.modules, "IPython", screen)
    monkeypatch.setattr(notebook, "PATIENCE_S", 0.0)
    return screen


def test_a_call_shows_its_steps_and_takes_the_bar_away(single, screen):
    single("a red circle", steps=3, output="latent")
    *steps, last = screen.shown
    assert [re.sub("<.*?>", "", text).strip() for text in steps][-1] == "3/3 steps"
    assert last == ""


def test_the_bar_goes_away_when_the_call_fails(screen):
    def fail():
        with notebook.notebook_progress() as report:
            report(1, 4)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert screen.shown[0].endswith(" 1/4 steps")
    assert screen.shown[-1] == ""


def test_short_calls_and_own_callbacks_show_nothing(single, screen, monkeypatch):
    single("a red circle", steps=1, output="latent", callback=lambda done, steps: None)
    monkeypatch.setattr(notebook, "PATIENCE_S", 60.0)
    with notebook.notebook_progress() as report:
        report(1, 4)
    assert screen.shown == []


@pytest.mark.parametrize("kernel", [None, "no IPython"])
def test_terminals_are_no_notebooks(kernel, monkeypatch):
    if kernel == "no IPython":
        monkeypatch.delitem(sys.modules, "IPython", raising=False)
    else:
        shell = types.SimpleNamespace(kernel=None)
        monkeypatch.setitem(
            sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell)
        )
    assert not notebook.in_notebook()


def test_an_output_shows_its_images(single):
    out = single(['a "red" <circle>', "a star"], steps=1, output="numpy")
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', out._repr_html_())
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]
    np.testing.assert_array_equal(images, out.images)
    assert "a &quot;red&quot; &lt;circle&gt;" in out._repr_html_()
    assert single("a star", steps=1, output="pil")._repr_html_().count("<img") == 1
    assert single("a star", steps=1, output="latent")._repr_html_() is None


def test_objects_describe_themselves(one_device):
    text = repr(one_device)
    assert "float32, 1 x cpu" in text
    assert re.search(r"unet: UNet2DConditionModel \(\d+\.\d M\)", text)
    height, width = one_device.defaults.height, one_device.defaults.width
    out = one_device(["a star", "a ring"], steps=1, output="latent")
    assert re.fullmatch(rf"Output\(2 images of {height}x{width} in \d+\.\d s\)", repr(out))
