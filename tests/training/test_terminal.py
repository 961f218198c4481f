"""What a training shows: a bar in a terminal, plain lines elsewhere."""

import io

from rich.console import Console

from jaxdiff.experiments.terminal import Terminal

VALUES = {"loss": 0.25, "step_ms": 12.0, "images_per_s": 640.4, "data_wait": 0.07, "l1": 0.1}


def shown(*, terminal: bool, **values: float) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    with Terminal(start=3, steps=10, console=console) as screen:
        screen.step(4)
        screen.values(4, values)
        screen.message("going on")
    return text.getvalue()


def test_plain_lines_without_a_terminal():
    line = "step 4/10  loss 0.2500  12 ms/step  640 images/s  waiting 7%"
    assert shown(terminal=False, **VALUES).splitlines() == [line, "going on"]


def test_measures_alone_are_a_line_too():
    assert "step 4/10  validation_psnr 31.5" in shown(terminal=False, validation_psnr=31.5)


def test_a_bar_with_the_same_numbers_in_a_terminal():
    text = shown(terminal=True, **VALUES)
    assert "4/10" in text
    assert "640 images/s" in text
    assert "left" in text
    assert "going on" in text
