"""`jaxdiff serve`: its options, before a model is loaded."""

import importlib.util

import pytest

from jaxdiff.cli import main, serve


def failed(capsys, *arguments):
    assert main.run("serve", arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--port", "70000"), "port: got 70000, expected a number from 0 to 65535"),
        (("--port", "x"), "--port: got 'x', expected an integer"),
        (("--slots", "0"), "slots: got 0"),
        (("--max-waiting", "5"), "max_waiting: got 5, expected at least the 10 images"),
        (("--max-images", "11"), "max_images: got 11"),
        (("--shutdown-timeout", "-1"), "shutdown_timeout: got -1.0"),
        (("--job-ttl", "-1"), "job_ttl: got -1.0"),
        (("--max-jobs", "0"), "max_jobs: got 0"),
        (("--sizes", "big"), "sizes: got 'big'"),
        (("--lora-folder", "/nowhere"), "lora_folder: got /nowhere, expected a folder"),
        (("--api-key", "two words"), "api_key: got one with spaces"),
        (("--api-key", ""), "api_key: got one with spaces or none"),
        (("--cors-origin", "page.example"), "cors_origin: got 'page.example'"),
        (("--prediction-type", "epsilon"), "prediction_type: got epsilon without model"),
        (("--prot", "1"), "--prot: got an unknown option"),
    ],
)
def test_bad_options_are_sentences(capsys, arguments, message):
    assert message in failed(capsys, *arguments)


def test_a_model_that_is_not_there(capsys):
    line = failed(capsys, "--model", "/nowhere/model", "--port", "0")
    assert line.startswith("serve: ")
    assert "/nowhere/model" in line


def test_an_installation_without_the_extra(capsys, monkeypatch):
    find = importlib.util.find_spec

    def without(name, *rest):
        return None if name in ("fastapi", "uvicorn") else find(name, *rest)

    monkeypatch.setattr(serve.importlib.util, "find_spec", without)
    assert failed(capsys) == (
        "serve: got an installation without fastapi, uvicorn, expected one with what the "
        "server needs: pip install 'jaxdiff[serve]'"
    )


def test_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv(serve.API_KEY, "one, two,")
    assert serve._keys(serve.Options(api_key=("three",))) == ("three", "one", "two")
    monkeypatch.delenv(serve.API_KEY)
    assert serve._keys(serve.Options()) == ()
