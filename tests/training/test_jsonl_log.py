"""The log has each step once, whatever was written before a kill."""

from jaxdiff.training.jsonl_log import JsonlLog, read_lines


def test_lines_beyond_the_restored_step_go(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonlLog(path, step=0)
    for step in (1, 2, 3):
        log(step, {"loss": 1.0 / step})
    JsonlLog(path, step=2)(3, {"loss": 5.0})
    assert read_lines(path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 5.0},
    ]


def test_a_line_cut_short_goes(tmp_path):
    path = tmp_path / "log.jsonl"
    JsonlLog(path, step=0)(1, {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    JsonlLog(path, step=2)(2, {"loss": 2.0})
    assert [line["step"] for line in read_lines(path)] == [1, 2]
