"""Export of runs of every method: adapters merged, all weights written, held against what was trained, pushed."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from core import hub
from core.errors import UserError
from data.formats import PromptFormat
from models import merge, merge_check
from models.trained import open_model
from schemas.compose import compose_run_config
from schemas.model import ModelArgs
from tests.helpers.tiny_run import write_random_model

FORMAT = PromptFormat.from_styles("bespoke", "short")
FLOAT32 = ("model_args.load_in_8bit=false", "model_args.torch_dtype=float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("base"))


def write_config(folder: Path, name: str, *words: str) -> Path:
    (folder / "config.yaml").write_text(json.dumps(compose_run_config(name, [*words, f"output_dir={folder}"])))
    return folder


def write_adapter(base: Path, folder: Path) -> Path:
    """An adapter on `base` as a training leaves it, and the tokenizer beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student_run(base, tmp_path_factory) -> Path:
    folder = write_adapter(base, tmp_path_factory.mktemp("runs") / "student")
    words = (f"model_name_or_path={base}", "trainable_weights=adapter", "use_muon=false", *FLOAT32)
    return write_config(folder, "student_sft_tiny", *words)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(torch.arange(3, 40)[None]).logits


def test_a_students_adapter_is_merged_with_prompt_and_card(student_run, base, tmp_path):
    merged = merge.merge_run(student_run, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    bare = logits(plain)
    plain.load_adapter(str(student_run))
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-4, rtol=1e-4)
    assert (logits(plain) - bare).abs().max() > 0.1
    assert merged.check.mean_nats < 1e-4 < merged.check.adapter_nats and merged.check.num_tokens > 100
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    assert (merged.folder / "student_prompt.txt").read_text() == FORMAT.student_head_text(tokenizer, "{question}")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    card = (merged.folder / "README.md").read_text()
    assert str(merged.check) in card and "A student" in card and "added up in float32" in card
    assert not [path for path in tmp_path.iterdir() if path.name != "merged"]


def test_a_run_of_all_weights_is_written_in_its_16_bits(base, tmp_path):
    run = write_random_model(tmp_path / "run", seed=3)
    words = (f"model_name_or_path={base}", "model_args.torch_dtype=bfloat16")
    merged = merge.merge_run(write_config(run, "student_sft_tiny", *words), tmp_path / "merged")
    written = load_file(merged.folder / "model-00001.safetensors")
    trained = load_file(run / "model.safetensors")
    assert written.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[name].bfloat16()) for name, tensor in written.items())
    assert merged.check.adapter_nats is None and merged.check.mean_nats == 0.0
    assert "all of which were trained" in (merged.folder / "README.md").read_text()


def test_an_adapter_from_elsewhere_is_merged_into_the_base_that_it_names(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter")
    assert open_model(adapter, ModelArgs()).weights == str(base)
    merged = merge.merge_run(adapter, tmp_path / "merged")
    assert merged.check.adapter_nats > 0.1 and not list(merged.folder.glob("*_prompt.txt"))


def test_a_merge_that_is_not_what_was_trained_is_refused_and_leaves_nothing(student_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        merge, "merged_tensors", lambda model: merge.exported_tensors(model.get_base_model(), "dequantized")
    )
    assert merge.main([str(student_run), str(tmp_path / "merged")]) == 2
    assert "away from the one that was trained" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_bound_is_half_of_what_the_adapter_does_or_rounding():
    def check(mean: float, adapter: float | None) -> None:
        merge_check.LogprobCheck(num_tokens=9, mean_nats=mean, largest_nats=mean, adapter_nats=adapter).require()

    check(0.09, None), check(0.09, 2.0), check(0.039, 0.0), check(0.045, 0.1)
    for mean, adapter in ((0.11, None), (0.11, 2.0), (0.06, 0.1), (0.041, 0.0), (float("nan"), None)):
        with pytest.raises(UserError, match="nats per token in the mean"):
            check(mean, adapter)


@pytest.mark.parametrize("kind", ["whole model", "masked diffusion", "nothing trained"])
def test_what_cannot_be_exported_is_named(kind, base, tmp_path):
    folder, message = base, "is no run, but a whole model"
    if kind == "masked diffusion":
        folder, message = write_config(write_random_model(tmp_path / "run"), "llada_tiny"), "whose model fills masks"
    elif kind == "nothing trained":
        (tmp_path / "run").mkdir()
        folder, message = write_config(tmp_path / "run", "student_sft_tiny"), "holds no model and no trained adapter"
    with pytest.raises(UserError, match=message):
        merge.merge_run(folder, tmp_path / "merged")


class FakeHub:
    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def create_repo(self, repository: str, **keywords) -> str:
        self.calls.append((repository, keywords))
        return f"https://hub/{repository}"

    def upload_folder(self, **keywords) -> None:
        self.calls.append((keywords["repo_id"], {"files": sorted(p.name for p in keywords["folder_path"].iterdir())}))


@pytest.mark.parametrize("words", [["--push", "me/model"], ["--push", "me/model", "--public"]])
def test_push_uploads_what_was_written_and_never_shows_the_token(words, student_run, tmp_path, monkeypatch, capsys):
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    assert merge.main([str(student_run), str(tmp_path / "merged"), *words]) == 0
    (made, how), (uploaded, what) = fake.calls
    assert made == uploaded == "me/model" and how["private"] == ("--public" not in words)
    assert {"README.md", "config.json", "model-00001.safetensors", "tokenizer.json"} <= set(what["files"])
    assert "hf_verysecret" not in capsys.readouterr().out


def test_push_without_a_token_is_refused_before_anything_is_loaded(student_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr(merge, "load_base", lambda *_: pytest.fail("loaded"))
    for repository, message in (("me/model", "no access token"), ("a/b/c", "cannot be the name of a repository")):
        assert merge.main([str(student_run), str(tmp_path / "merged"), "--push", repository]) == 2
        assert message in capsys.readouterr().out
    with pytest.raises(SystemExit):
        merge.main([str(student_run), str(tmp_path / "merged"), "--public"])
    assert not list(tmp_path.iterdir())


def test_what_the_hub_refuses_is_said_with_what_to_do(tmp_path, monkeypatch):
    import httpx

    class Refusing(FakeHub):
        def create_repo(self, repository: str, **keywords) -> str:
            raise httpx.ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", Refusing)
    with pytest.raises(UserError, match="hf upload me/model"):
        hub.push_folder(tmp_path, "me/model", private=True)
