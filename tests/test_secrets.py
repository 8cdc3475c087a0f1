"""Secrets are refused as settings, and none of the environment's gets into what a run leaves or says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.log import CopyingConsole
from schemas.compose import CONFIG_ROOT, command_line, compose_run_config
from schemas.methods import METHODS
from schemas.run import ConfigError, load_run_config
from schemas.secrets import is_secret_name, masked
from tests.campaign.mutations import base_values, settings_of
from tests.helpers.tiny_run import SMALL, write_random_model

HUB_TOKEN = "hf_" + "QxZkWvYb" * 4 + "Jq"
LOGIN = "https://someone:pa55word-of-theirs@mirror.example/models"
SECRETS = {
    "HF_TOKEN": HUB_TOKEN,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "76543210",
    "MY_PASSWORD": "correct-horse-battery",
    "HF_ENDPOINT": LOGIN,
}


@pytest.mark.parametrize(
    "name",
    [
        *("hub_token", "hf_token", "token", "HF_TOKEN", "accessToken", "auth_token", "api_key", "WANDB_API_KEY"),
        *("apikey", "aws_secret_access_key", "password", "db.password", "client-secret", "private_key", "credentials"),
    ],
)
def test_a_name_of_a_secret_is_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("method", METHODS)
def test_no_setting_of_a_run_looks_like_a_secret_but_the_hubs_token(method):
    assert {name for name in settings_of(method) if is_secret_name(name)} <= {"hub_token"}


@pytest.mark.parametrize(
    "name", ["num_tokens", "micro_batch_tokens", "eos_token", "mask_token", "pad_token", "tokens", "key", "monkey", ""]
)
def test_a_name_of_something_else_is_none(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "changes",
    [
        {"wandb_api_key": "0123456789abcdef"},
        {"hub_token": "0123456789abcdef"},
        {"chat_template_kwargs": {"auth": {"password": "0123456789abcdef"}}},
        {"model_args": {"token": "0123456789abcdef"}},
        {"model_name_or_path": "https://someone:0123456789abcdef@host/model"},
        {"dataset_id_or_path": "https://0123456789abcdef@host/data.jsonl"},
        {"report_to": ["hf_0123456789abcdefABCDEF0123"]},
    ],
)
def test_a_secret_in_a_setting_is_refused_and_not_shown(method, changes):
    with pytest.raises(ConfigError) as error:
        load_run_config(base_values(method) | changes)
    assert "0123456789abcdef" not in str(error.value)
    assert "HF_TOKEN" in str(error.value) and "environment" in str(error.value)


def test_a_secret_of_the_environment_is_none_of_a_setting(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    values = compose_run_config("teacher_rlt_tiny", ["run_name=${oc.env:WANDB_API_KEY}"])
    with pytest.raises(ConfigError, match="`run_name` holds a secret") as error:
        load_run_config(values)
    assert SECRETS["WANDB_API_KEY"] not in str(error.value)


@pytest.mark.parametrize("word", ["hub_token=abc[", "+hub_token=abc[", "++a.api_key=abc[", f"output_dir={LOGIN}"])
def test_a_secret_on_the_command_line_is_refused_before_it_is_composed(word):
    with pytest.raises(ConfigError, match="a secret") as error:
        command_line([word, "--cfg", "job"])
    assert "abc[" not in str(error.value) and "pa55word" not in str(error.value)


def test_ordinary_words_are_no_secrets():
    command_line(["hub_token=null", "num_generations=4", "dataset_id_or_path=https://host/x@1", "-cn", "x"])


def test_the_log_file_masks_secrets(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    console = CopyingConsole(quiet=True)
    console.copy_to(tmp_path / "log")
    console.print(*SECRETS.values(), "and what is public")
    console.end_copy()
    text = (tmp_path / "log").read_text()
    assert "and what is public" in text and "mirror.example" in text
    assert not any(secret in text for secret in SECRETS.values()) and "pa55word" not in text


def test_an_address_without_a_login_is_not_masked():
    assert masked("https://host/a@b and user@host") == "https://host/a@b and user@host"


def run_train(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONFIG_ROOT.parent / "train.py"), *words]
    env = os.environ | SECRETS | {"RLT_CACHE": str(cwd / "cache"), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_refused_secret_ends_with_status_2_and_leaves_nothing(tmp_path):
    done = run_train("--config-name=teacher_rlt_tiny", "hub_token=0123456789abcdef", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "0123456789abcdef" not in done.stdout + done.stderr and "HF_TOKEN" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_nothing_that_a_run_leaves_holds_a_secret_of_the_environment(tmp_path):
    model = write_random_model(tmp_path / "model")
    words = [f"model_name_or_path={model}", f"student_model={model}", *SMALL, "max_steps=2", "save_steps=1"]
    loggers = "report_to=[wandb,tensorboard]"
    done = run_train("--config-name=teacher_rlt_tiny", *words, loggers, "output_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    written = {file.name: file.read_bytes() for file in files}
    assert {"config.yaml", "summary.json", "metrics.jsonl", "training.log", "README.md"} <= written.keys()
    assert any("wandb" in str(file) for file in files) and any("tfevents" in name for name in written)
    secrets = [value.encode() for value in SECRETS.values()] + [b"pa55word-of-theirs"]
    assert [file for file in files if any(secret in file.read_bytes() for secret in secrets)] == []
    assert not any(value in done.stdout + done.stderr for value in SECRETS.values())
