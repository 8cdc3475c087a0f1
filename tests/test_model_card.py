"""The README.md of a result: what it names, and that its code runs as it stands."""

import re
from pathlib import Path

import pytest
import yaml

from runs import usage
from runs.model_card import _header
from schemas.compose import CONFIG_ROOT, compose_run_config
from schemas.run import load_run_config
from tests.helpers.tiny_diffusion import make_diffusion_trainer
from tests.helpers.tiny_run import make_trainer, write_random_model
from tests.test_masked_diffusion_trainer import SMALL_BATCH, counting_samples, saved_nano


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("model"))


def run_code_of(folder: Path, monkeypatch) -> dict:
    """Run the card's first code (with transformers) in the folder of the card."""
    code, *_ = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(CONFIG_ROOT.parent))
    names: dict = {}
    exec(code, names)
    return names


@pytest.mark.parametrize("precision", ["load_in_8bit", "load_in_4bit", "bfloat16"])
def test_a_teachers_card_says_what_it_is_and_its_code_runs(precision, model, tmp_path, monkeypatch):
    eight, four = (str(precision == name).lower() for name in ("load_in_8bit", "load_in_4bit"))
    words = (f"model_args.load_in_8bit={eight}", f"model_args.load_in_4bit={four}", "student_model=null")
    trainer = make_trainer(model, tmp_path / "run", "max_steps=2", "save_steps=1", "eval_steps=1", *words)
    trainer.train()
    trainer.finish()
    text = (tmp_path / "run/README.md").read_text()
    assert "None" not in text and "time machine" not in text
    assert str(model) in text and "2506.08388" in text and "2 of 2 steps" in text
    assert {"load_in_8bit": "8-bit", "load_in_4bit": "4-bit"}.get(precision, precision) in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"
    last = [line for line in trainer.state.log_history if "eval_reward" in line][-1]
    assert f"{last['eval_reward']:.3f}" in text
    assert "1 of 2 steps" in (tmp_path / "run/checkpoint-1/README.md").read_text()

    for folder in (tmp_path / "run", tmp_path / "run/checkpoint-1"):
        names = run_code_of(folder, monkeypatch)
        assert names["prompt"] == trainer.train_dataset[0]["prompt"]
        assert names["model"].peft_config.keys() == {"default"}


@pytest.mark.parametrize("weights", ["all", "adapter"])
def test_a_masked_diffusion_models_card_says_what_it_is_and_its_code_runs(weights, tmp_path, monkeypatch):
    base = saved_nano(tmp_path)
    on_base = ("new_model=null", "use_muon=false", "trainable_weights=adapter", "model_args.load_in_8bit=true")
    words = (f"model_name_or_path={base}", *on_base) if weights == "adapter" else ()
    trainer = make_diffusion_trainer(tmp_path / "run", counting_samples(), *SMALL_BATCH, *words)
    trainer.train()
    trainer.finish()
    text = (tmp_path / "run/README.md").read_text()
    assert (
        "None" not in text
        and (str(base) if words else "from scratch") in text
        and "2502.09992" in text
        and "3 of 3 steps" in text
    )
    names = run_code_of(tmp_path / "run", monkeypatch)
    assert len(names["response"]) == trainer.config.max_response_length


def test_the_header_names_a_base_of_the_hub_alone(tmp_path):
    header = yaml.safe_load(_header("Qwen/Qwen2.5-7B-Instruct", ["rlt"], "peft").split("---")[1])
    assert header["base_model"] == "Qwen/Qwen2.5-7B-Instruct" and header["tags"] == ["rlt"]
    assert all("base_model" not in _header(base, [], "peft") for base in ("tiny", str(tmp_path), None))


def test_readme_and_cards_say_the_same():
    assert usage.main(["--check"]) == 0
    config = load_run_config(compose_run_config("teacher_rlt_tiny"))
    row = {"question": "7+4+7-2-9", "solution": "=7"}
    for_card = usage.Usage(config=config, folder=".", base="BASE", **row).markdown()
    for_readme = usage.readme_part()
    assert for_readme.count(config.grpo.output_dir) == 4 and usage._README_BASE in for_readme
    assert for_readme.replace(config.grpo.output_dir, ".").replace(usage._README_BASE, "BASE") == for_card
