import os

import pytest

from core.errors import UserError
from preflight.loggers import prepare_loggers
from tests.helpers.tiny_run import make_trainer, write_random_model


@pytest.fixture
def no_wandb_settings(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def test_an_unknown_logger_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="'wandv'"):
        prepare_loggers("wandv", tmp_path)


def test_none_needs_nothing(tmp_path):
    prepare_loggers("none", tmp_path)
    prepare_loggers(None, tmp_path)


def test_wandb_works_without_an_account_and_keeps_its_files_in_the_run_folder(no_wandb_settings, tmp_path):
    pytest.importorskip("wandb")
    model = write_random_model(tmp_path / "model")
    trainer = make_trainer(model, tmp_path / "run", "max_steps=1", "report_to=wandb", "num_eval_prompts=0")
    assert os.environ["WANDB_MODE"] == "offline"
    trainer.train()
    import wandb

    wandb.finish()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize(("name", "pattern"), [("tensorboard", "runs/**/events*")])
def test_other_loggers_write_what_is_logged(name, pattern, tmp_path):
    pytest.importorskip(name)
    model = write_random_model(tmp_path / "model")
    trainer = make_trainer(model, tmp_path / "run", "max_steps=1", f"report_to={name}", "num_eval_prompts=0")
    trainer.train()
    assert list((tmp_path / "run").glob(pattern))
