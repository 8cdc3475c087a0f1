"""What a run is given by name: missing things are named within three seconds of CPU, the hub is asked once."""

import huggingface_hub.constants
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from core import hub
from core.errors import UserError
from models.load import load_tokenizer
from planner.shapes import load_shape
from preflight.inputs import check_hub, check_inputs
from runs.run_folder import open_run_folder
from schemas.compose import compose_run_config
from schemas.model import ModelArgs
from schemas.run import load_run_config
from tests.helpers.command import run_train
from tests.helpers.tiny_run import write_random_model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dataset_id_or_path=./nothing.jsonl"], "there is no dataset `./nothing.jsonl`"),
        (["eval_dataset_id_or_path=nothing.parquet"], "there is no dataset `nothing.parquet`"),
        (["model_name_or_path=./nowhere"], "model path './nowhere' holds no model"),
        (["student_model=a/b/c"], "model path 'a/b/c' holds no model"),
        (["output_dir=/proc/results"], "`output_dir` '/proc/results': No such file"),
        (["resume=results/run/checkpoint-9"], "results/run/checkpoint-9' holds no checkpoint"),
        (["--config-name=llada_tiny", "dataset_id_or_path=./nothing.jsonl"], "there is no dataset"),
        (["--config-name=llada_tiny", "tokenizer_name_or_path=/no/where"], "model path '/no/where' holds no model"),
    ],
)
def test_what_is_missing_is_named_in_three_seconds_of_cpu_and_nothing_is_left(words, message, tmp_path):
    done = run_train("--config-name=teacher_rlt_tiny", *words, cwd=tmp_path)
    assert done.status == 2 and message in done.text, done.text
    assert done.cpu_s < 3
    assert "hf download" not in done.text and not list(tmp_path.iterdir())


def test_an_output_folder_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = compose_run_config("teacher_rlt_tiny", ["output_dir=results/run"])
    check_inputs(values)
    assert not list(tmp_path.iterdir())
    open_run_folder(values, "results/run", "auto")
    before = sorted(tmp_path.rglob("*"))
    check_inputs(values)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="no config.yaml of a run"):
        check_inputs(values | {"output_dir": "mine"})


@pytest.mark.parametrize("path", ["a/b/c", "./model", "broken"])
def test_a_download_is_not_proposed_for_a_local_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "none"}')
    for load in (lambda: load_shape(path), lambda: load_tokenizer(path, ModelArgs())):
        with pytest.raises(UserError) as error:
            load()
        assert "hf download" not in str(error.value) and path in str(error.value)


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses connections; the list grows by one for each time that it is asked."""
    asked = []

    def problem(timeout_s: float = 1.0) -> str:
        asked.append(timeout_s)
        return "the hub cannot be reached (ConnectError)"

    monkeypatch.setattr("preflight.inputs.hub_problem", problem)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield asked
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def config_with(*words: str):
    return load_run_config(compose_run_config("teacher_rlt_tiny", words))


def test_without_the_hub_everything_that_is_missing_is_in_one_message(no_hub):
    with pytest.raises(UserError) as error:
        check_hub(config_with("student_model=nobody/model", "dataset_id_or_path=nobody/rows"))
    assert "nobody/model, nobody/rows" in str(error.value) and "model_name_or_path=FOLDER" in str(error.value)
    assert len(no_hub) == 1


def test_a_run_without_anything_of_the_hub_does_not_ask_it(no_hub):
    check_hub(config_with())
    assert not no_hub


def test_what_is_cached_is_taken_without_asking_again(no_hub, tmp_path, monkeypatch):
    repo = tmp_path / "models--nobody--model"
    write_random_model(repo / "snapshots" / "1234")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1234")
    for constant in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, constant, str(tmp_path))
    monkeypatch.setattr(hub.os, "environ", dict(hub.os.environ))
    check_hub(config_with("student_model=nobody/model"))
    assert huggingface_hub.constants.is_offline_mode() and hub.os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(OfflineModeIsEnabled):  # at once, and not after five retries
        huggingface_hub.get_session().head("https://huggingface.co")


def test_the_hub_is_given_one_try(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert "http://127.0.0.1:9) cannot be reached (ConnectError)" in str(hub.hub_problem(timeout_s=5))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert hub.hub_problem() == "HF_HUB_OFFLINE is set"
