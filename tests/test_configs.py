"""Every shipped configuration composes and validates; every mistake is one message."""

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import trl.trainer.grpo_trainer
import yaml
from hydra import compose, initialize_config_dir
from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig

from core.errors import UserError
from core.units import format_gb
from planner.plan import plan_run
from planner.planned import plan_config
from preflight.hardware import check_hardware_and_plan
from preflight.loggers import prepare_loggers
from preflight.verification import check_plan
from schemas.compose import (
    CONFIG_ROOT,
    command_line,
    compose_run_config,
    register_search_path,
    run_config_names,
    to_hydra_overrides,
    to_values,
    with_sweep_folders,
)
from schemas.document import PAGE, page
from schemas.generation import GenerationConfig, generator_base_of
from schemas.methods import METHODS, method_of
from schemas.ranges import RANGES
from schemas.run import ConfigError, load_run_config
from schemas.trl_fields import argument_fields

ROOT = CONFIG_ROOT.parent
MONO = "teacher_rlt_mono_85gb"


def load(name: str = MONO, *overrides: str):
    return load_run_config(compose_run_config(name, overrides))


@pytest.mark.parametrize("name", run_config_names())
def test_every_run_config_is_valid_and_builds_the_trainers_arguments(name):
    config = load(name)
    assert config.run_name == name
    build = method_of(config).build_arguments
    if build is None:
        assert config.arguments.output_dir == f"results/{name}"
        return
    args = build(config, use_cpu=True)
    assert args.gradient_accumulation_steps * args.per_device_train_batch_size == config.train_batch_size
    assert args.output_dir == f"results/{name}"
    if config.method == "rlt":
        assert args.steps_per_generation == args.gradient_accumulation_steps


def test_an_unknown_method_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match="`method` is 'ppo'. Use rlt or masked_diffusion or "):
        load(MONO, "method=ppo")


@pytest.mark.parametrize("name", run_config_names())
def test_run_configs_are_the_same_from_either_root(name):
    register_search_path()
    composed = []
    for root in (CONFIG_ROOT, CONFIG_ROOT / "run_cfg"):
        with initialize_config_dir(config_dir=str(root), version_base="1.3"):
            composed.append(to_values(compose(config_name=name, overrides=[f"++run_name={name}"])))
    assert composed[0] == composed[1]


@pytest.mark.parametrize("name", run_config_names())
def test_a_run_configuration_says_which_card_it_is_for(name):
    """Its own file or its parent's; the name, where it holds a number, agrees."""
    values = compose_run_config(name)
    assert "card_gb" in values
    in_name = re.search(r"_(\d+)gb", name)
    assert in_name is None or values["card_gb"] == int(in_name[1])


# name: (train_batch_size, per_device, num_generations, prompt, completion, utilization, aggregation)
PUBLISHED_TABLE = {
    "train": (96, 3, 24, 6144, 6144, 0.55, 3),
    "teacher_rlt_mono_85gb": (64, 2, 16, 6144, 6144, 0.55, 3),
    "teacher_rlt_mono_85gb_trainer": (96, 3, 24, 6144, 6144, 0.55, 3),
    "teacher_rlt_mono_85gb_aggressive": (128, 4, 32, 8192, 8192, 0.55, 3),
    "teacher_rlt_mono_85gb_fallback": (64, 2, 16, 4096, 6144, 0.5, 3),
    "teacher_rlt_mono_basic": (32, 2, 8, 2048, 2048, 0.7, 3),
    "teacher_rlt_mono_96gb": (128, 4, 32, 8192, 8192, 0.6, 4),
}


@pytest.mark.parametrize("name", PUBLISHED_TABLE)
def test_values_are_those_of_the_documented_table(name):
    config = load(name)
    values = (
        config.train_batch_size,
        config.grpo.per_device_train_batch_size,
        config.grpo.num_generations,
        config.max_prompt_length,
        config.grpo.max_completion_length,
        config.grpo.vllm_gpu_memory_utilization,
        config.generation_aggregation_steps,
    )
    assert values == PUBLISHED_TABLE[name]
    assert config.model_args.load_in_8bit and config.model_args.device_map == "auto"
    assert (config.answer_log_prob_coeff, config.kl_penalty_reward_coeff) == ([1, 0.01], [3, 0.03])


def test_the_trainer_run_takes_the_trainer_file_as_it_stands():
    values = compose_run_config("teacher_rlt_mono_85gb_trainer")
    file = yaml.safe_load((CONFIG_ROOT / "trainer_cfg/grpo_mono_85gb.yaml").read_text())
    del file["defaults"]
    assert len(file) == 9 and file.items() <= values.items()
    default = compose_run_config(MONO)
    differing = {key for key in values if values[key] != default[key]} - {"run_name", "output_dir"}
    assert differing == {"train_batch_size", "per_device_train_batch_size", "num_generations"}
    nameless = compose_run_config("train")
    assert {key for key in values if values[key] != nameless.get(key)} == {"run_name", "output_dir", "card_gb"}


def test_another_reward_file_changes_the_coefficients_alone():
    default, other = load(MONO), load(MONO, "reward_cfg=teacher_logprob_kl")
    assert (other.answer_log_prob_coeff, other.kl_penalty_reward_coeff) == ([5, 0.05], [5, 0.05])
    coefficients = {"answer_log_prob_coeff": [1, 0.01], "kl_penalty_reward_coeff": [3, 0.03]}
    assert dataclasses.replace(other, **coefficients) == default


def test_grpo_settings_are_those_of_the_published_run():
    grpo = load().grpo
    published = {
        "loss_type": "grpo",
        "beta": 0.04,
        "use_bias_correction_kl": False,
        "scale_rewards": "group",
        "temperature": 0.7,
        "num_iterations": 1,
        "mask_truncated_completions": False,
        "sync_ref_model": True,
        "ref_model_mixup_alpha": 0.9,
        "ref_model_sync_steps": 32,
        "lr_scheduler_type": "constant",
        "top_k": 0,
    }
    assert {key: getattr(grpo, key) for key in published} == published


@pytest.mark.parametrize("arguments_class", [GRPOConfig, TrainingArguments, SFTConfig])
def test_parsed_fields_are_those_of_the_imported_dataclass(arguments_class):
    fields = {field.name: field for field in dataclasses.fields(arguments_class) if field.init}
    parsed = argument_fields(arguments_class.__name__)
    assert set(parsed) >= set(fields)
    for name, (kind, default) in parsed.items():
        if kind in (int, float, bool) and fields[name].default is not dataclasses.MISSING:
            assert default == fields[name].default, name


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_knob_is_declared_by_the_library_and_by_us(method):
    assert not method.own_field_names() & set(argument_fields(method.library.arguments_class))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_refused_fields_of_the_library_exist(method):
    assert set(method.library.derived) <= set(argument_fields(method.library.arguments_class))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_stepz=3", "`max_stepz` is not a setting. Did you mean `max_steps`"),
        ("model_args.lora_rank=3", "`model_args.lora_rank` is not a setting"),
        ("max_steps=many", "`max_steps` is 'many'. Input should be a valid integer"),
        ("model_args.lora_r=0", "`model_args.lora_r` is 0. Input should be greater than or equal to 1"),
        ("generator=hf", "`generator` is 'hf'. Input should be 'auto', 'vllm' or 'transformers'"),
        ("use_ray=true", "starts no Ray cluster"),
        ("use_vllm_server=true", "merging into a quantised base re-rounds it"),
        ("gradient_accumulation_steps=4", "`gradient_accumulation_steps` follows from other settings"),
        ("per_device_train_batch_size=5", "Use per_device_train_batch_size=4"),
        ("num_generations=1", "use 2 or more"),
        ("top_p=0.9", "teacher_logprobs=forward"),
        ("reference_model=separate", "reference_model=shared"),
        ("model_args.load_in_4bit=true", "a base has one precision"),
        ("answer_log_prob_coeff=[1]", "Give both lists the same length"),
        ("use_vllm_server=true", "model_args.load_in_8bit=false and model_args.load_in_4bit=false"),
        ("load_in_8bit=true", "`load_in_8bit` is not a setting. Did you mean `model_args.load_in_8bit`?"),
        ("lora_r=8", "`lora_r` is not a setting. Did you mean `model_args.lora_r`?"),
        ("load_in_16bit=true", "Did you mean `model_args.load_in_8bit` or `model_args.load_in_4bit`?"),
        ("reduction_kl_fn=foo", "`reduction_kl_fn` is 'foo'. Input should be 'mean', 'sum', "),
        ("reduction_kl_fn=foo", "or 'last_quartile', or a valid list."),
        ("reduction_kl_fn=[mean,foo]", "`reduction_kl_fn.1` is 'foo'. Input should be 'mean', 'sum', "),
        (
            "answer_log_prob_coeff=foo",
            "`answer_log_prob_coeff` is 'foo'. Input should be a valid number, or a valid list.",
        ),
        ("kv_cache_gb=-1", "`kv_cache_gb` is -1. Input should be greater than 0, or 'auto'."),
        ("model_args.device_map=foo", "`model_args.device_map` is 'foo'. Use auto (or null), cpu, cuda or cuda:N"),
        ("model_args.device_map=cuda:x", "`model_args.device_map` is 'cuda:x'"),
        ("method=[rlt]", "Use rlt or masked_diffusion or "),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override, message):
    with pytest.raises(ConfigError) as error:
        load(MONO, override)
    assert message in str(error.value) and "\n" not in str(error.value)


OUT_OF_RANGE = [
    ("learning_rate=-1e-5", "`learning_rate` is -1e-05. Input should be greater than or equal to 0"),
    ("learning_rate=nan", "`learning_rate` is nan. Input should be a finite number"),
    ("weight_decay=-0.1", "`weight_decay` is -0.1. Input should be greater than or equal to 0"),
    ("model_args.llm_int8_threshold=0", "Set model_args.int8_matmul=llm_int8, or leave it at 6.0"),
    ("warmup_steps=-1", "`warmup_steps` is -1. Input should be greater than or equal to 0"),
    ("max_grad_norm=-1", "`max_grad_norm` is -1. Input should be greater than or equal to 0"),
    ("seed=-1", "`seed` is -1. Input should be greater than or equal to 0"),
    ("seed=4294967296", "`seed` is 4294967296. Input should be less than 4294967296"),
    ("per_device_train_batch_size=0", "`per_device_train_batch_size` is 0. Input should be greater than or equal to 1"),
    ("max_steps=0", "`max_steps` is 0. Use 1 or more, or -1 to train for `num_train_epochs`"),
    ("max_steps=-1 num_train_epochs=0", "`num_train_epochs` is 0 with `max_steps` -1: nothing is trained"),
    ("save_steps=0", "`save_steps` is 0 with `save_strategy` steps. Use 1 or more, or save_strategy=no"),
    ("eval_steps=-5", "`eval_steps` is -5 with `eval_strategy` steps. Use 1 or more, or eval_strategy=no"),
    ("logging_steps=0", "`logging_steps` is 0 with `logging_strategy` steps"),
]
OUT_OF_RANGE_RLT = [
    ("temperature=0", "`temperature` is 0. Input should be greater than or equal to 0.01"),
    ("top_p=0", "`top_p` is 0. Input should be greater than or equal to 0.001"),
    ("top_p=1.5", "`top_p` is 1.5. Input should be less than or equal to 1"),
    ("max_completion_length=null", "`max_completion_length` is None. Input should be a valid integer"),
    ("max_completion_length=0", "`max_completion_length` is 0. Input should be greater than or equal to 1"),
    ("max_completion_length=-1", "`max_completion_length` is -1. Input should be greater than or equal to 1"),
    ("num_generations=null", "`num_generations` is None. Input should be a valid integer"),
    ("num_iterations=0", "`num_iterations` is 0. Input should be greater than or equal to 1"),
    ("beta=-0.1", "`beta` is -0.1. Input should be greater than or equal to 0"),
    ("loss_type=ppo", "`loss_type` is 'ppo'. Input should be 'grpo', 'dr_grpo', "),
    ("scale_rewards=std", "`scale_rewards` is 'std'. Input should be 'group', 'batch' or 'none'"),
    (
        "sync_ref_model=true ref_model_sync_steps=0",
        "`ref_model_sync_steps` is 0. Input should be greater than or equal",
    ),
    ("ref_model_mixup_alpha=1.1", "`ref_model_mixup_alpha` is 1.1. Input should be less than or equal to 1"),
    ("ref_model_mixup_alpha=-0.1", "`ref_model_mixup_alpha` is -0.1. Input should be greater than or equal to 0"),
    ("extra_rewards=[format] reward_weights=[1]", "`reward_weights` is [1.0], and the rewards are rlt, format"),
    ("reward_weights=[1,2]", "Give one weight for each, or reward_weights=null"),
    (
        "generator=transformers generator_weights=bf16",
        "samples with the trainer's own model. Set generator_weights=auto",
    ),
    ("generator=transformers kv_cache_dtype=fp8", "Set kv_cache_dtype=auto, or generator=vllm"),
    ("student_parking=host student_model=null", "Set student_parking=auto, or name a student_model"),
    ("generator=transformers generator_base=export", "Set generator_base=auto, or generator=vllm"),
    ("generator_base=shared generator_weights=bf16", "`generator_base` is shared with a teacher in int8"),
    ("generator_base=shared model_args.load_in_8bit=false", "`generator_base` is shared with a teacher in 16 bits"),
]


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        *((name, *case) for name in (MONO, "llada_sft") for case in OUT_OF_RANGE),
        *((MONO, *case) for case in OUT_OF_RANGE_RLT),
        ("llada_sft", "data_seed=-1", "`data_seed` is -1. Input should be greater than or equal to 0"),
    ],
)
def test_a_value_out_of_range_is_one_message(name, words, message):
    with pytest.raises(ConfigError) as error:
        load(name, *words.split())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        "max_steps=-1 num_train_epochs=1",
        "save_steps=0 save_strategy=no",
        "eval_steps=null",
        "save_steps=0.1",
        "max_grad_norm=0",
        "learning_rate=0",
        "data_seed=null",
        "extra_rewards=[format] reward_weights=[1,0.5]",
        "generator=transformers generator_weights=auto",
        "generator_base=shared generator_weights=int8",
        "generator_base=shared model_args.load_in_8bit=false model_args.load_in_4bit=true",
        "generator_base=export model_args.load_in_8bit=false",
        "model_args.device_map=null",
        "model_args.device_map=cuda",
        "model_args.device_map=cuda:1",
    ],
)
def test_values_at_the_edge_of_a_range_are_taken(words):
    load(MONO, *words.split())


def test_ranges_are_those_of_settings_that_exist():
    assert set(RANGES) <= set(argument_fields("GRPOConfig")) | set(argument_fields("SFTConfig"))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, kind in RANGES.items()
        if get_origin(kind) is Literal and name not in argument_fields("TrainingArguments")
    ],
)
def test_names_that_a_setting_may_have_are_those_that_trl_compares_it_with(name):
    compared = set()
    for node in ast.walk(ast.parse(inspect.getsource(trl.trainer.grpo_trainer))):
        if isinstance(node, ast.Compare) and ast.unparse(node.left) == f"self.{name}":
            known = ast.literal_eval(node.comparators[0])
            compared |= {known} if isinstance(known, str) else set(known)
    assert set(get_args(RANGES[name])) == compared


@pytest.mark.parametrize(
    ("version", "package"), [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")]
)
def test_an_attention_kernel_that_is_not_installed_is_named_with_its_package(version, package, monkeypatch):
    monkeypatch.setattr("preflight.hardware.is_installed", lambda name: name != package)
    config = load("teacher_rlt_tiny", f"model_args.attn_implementation={version}")
    with pytest.raises(UserError, match=f"(?s)attn_implementation` is {version}.*the Python package {package} .*=sdpa"):
        check_hardware_and_plan(config)


def test_a_card_that_is_not_there_is_named_with_those_that_are(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="(?s)'cuda:3', and torch sees 1 CUDA device\n.*device_map=auto"):
        check_hardware_and_plan(load("teacher_rlt_tiny", "model_args.device_map=cuda:3"))


def test_all_loggers_at_once_are_refused_like_an_unknown_one(tmp_path):
    with pytest.raises(UserError, match="(?s)`report_to` names 'all'.*wandb, tensorboard, trackio"):
        prepare_loggers("all", tmp_path)


def test_batch_that_splits_a_prompt_group_is_refused_with_its_neighbours():
    with pytest.raises(ConfigError, match="train_batch_size=96 or 120"):
        load(MONO, "train_batch_size=97", "num_generations=24")


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        load(MONO, "max_stepz=3", "learning_rate=fast")
    assert str(error.value).count("\n- ") == 1


def test_groups_are_mounted_at_the_root_and_settings_need_no_plus():
    words = ["model_cfg=tiny_int8", "learning_rate=1e-6", "hydra.verbose=true", "-m", "~seed"]
    assert to_hydra_overrides(words) == [
        "model_cfg@_global_=tiny_int8",
        "++learning_rate=1e-6",
        "hydra.verbose=true",
        "-m",
        "~seed",
    ]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "train"),
        (["--config-name=teacher_rlt_tiny"], "teacher_rlt_tiny"),
        (["--config-name", "teacher_rlt_tiny.yaml"], "teacher_rlt_tiny"),
        (["-cn", "run_cfg/teacher_rlt_tiny"], "teacher_rlt_tiny"),
        (["-cn", "teacher_rlt_tiny.yml"], "teacher_rlt_tiny"),
        (["--config-name=cfgs/run_cfg/teacher_rlt_tiny.yml"], "teacher_rlt_tiny"),
        (["run_name=mine", "--config-name=teacher_rlt_tiny"], "mine"),
    ],
)
def test_run_name_is_the_name_of_the_configuration_unless_set(words, name):
    assert f"++run_name={name}" in command_line(words)


def test_options_and_settings_may_come_in_any_order():
    words = command_line(["max_steps=1", "-m", "learning_rate=1e-3,2e-3", "--config-name", "teacher_rlt_tiny"])
    options = ["-m", "--config-name", "teacher_rlt_tiny"]
    assert words == [*options, "++max_steps=1", "++learning_rate=1e-3,2e-3", "++run_name=teacher_rlt_tiny"]


def test_the_runs_of_a_sweep_have_folders_named_after_what_differs():
    runs = [compose_run_config(MONO, [f"learning_rate={lr}", "max_steps=3"]) for lr in ("1e-5", "2e-5")]
    folders = [values["output_dir"] for values in with_sweep_folders(runs)]
    assert folders == [f"results/{MONO}.sweep/learning_rate={lr}" for lr in ("1e-05", "2e-05")]
    assert with_sweep_folders(runs[:1]) == runs[:1]


@pytest.mark.parametrize(
    ("first", "second", "folders"),
    [
        ("model_args.lora_r=4", "model_args.lora_r=8", ["x.sweep/model_args.lora_r=4", "x.sweep/model_args.lora_r=8"]),
        ("student_model=a/b", "student_model=a/c", ["x.sweep/student_model=a_b", "x.sweep/student_model=a_c"]),
        ("seed=1", "seed=1", ["x.sweep/1", "x.sweep/2"]),
        ("output_dir=a", "output_dir=b", ["a", "b"]),
    ],
)
def test_no_run_of_a_sweep_lies_in_another_or_in_that_of_a_single_run(first, second, folders):
    runs = [compose_run_config(MONO, ["output_dir=x", word]) for word in (first, second)]
    assert [values["output_dir"] for values in with_sweep_folders(runs)] == folders


def run_train(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), *words]
    env = os.environ | {"RLT_CACHE": str(cwd / "cache")}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--config-name=teacher_rlt_tiny"],
        ["--config-path=cfgs/run_cfg", "--config-name=teacher_rlt_mono_85gb"],
        ["--config-path", str(CONFIG_ROOT / "run_cfg"), "--config-name=teacher_rlt_mono_85gb.yaml"],
        ["--config-name=teacher_rlt_mono_85gb.yml"],
    ],
)
def test_each_way_to_call_train_composes_from_another_folder(words, tmp_path):
    done = run_train(*words, "--cfg", "job", "max_steps=7", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "max_steps: 7\n" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-name=nope"], "llada_pretrain, "),
        (["max_stepz=3"], "Did you mean"),
        (["--config-name=teacher_rlt_tiny", "loss_type=ppo"], "`loss_type` is 'ppo'"),
        (["--config-name=teacher_rlt_tiny", "report_to=all"], "`report_to` names 'all'"),
        (["--config-name=teacher_rlt_tiny", "model_args.device_map=foo"], "`model_args.device_map` is 'foo'"),
        (["learning_rate=["], "cannot be composed"),
    ],
)
def test_a_bad_call_ends_with_status_2_and_leaves_nothing(words, message, tmp_path):
    done = run_train(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_that_needs_a_gpu_says_what_it_plans_for(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_train(f"--config-name={MONO}", cwd=tmp_path)
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout and "./launch_mono.sh" in done.stdout
    figures = set(re.findall(r"\d+\.\d GB", done.stdout))
    assert figures == {"39.3 GB", "85.0 GB"}, "the plan's peak on the GPU that the configuration is for, and that GPU"
    assert format_gb(plan_run(load(), int(85e9)).max_bytes) in figures


@pytest.mark.parametrize("name", [name for name in run_config_names() if "_mono_" in name])
def test_a_refusal_the_verification_and_the_readme_name_the_same_peak(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        check_hardware_and_plan(load(name))
    card = load(name).card_gb
    peak = f"{plan_run(load(name), int(card * 1e9)).max_bytes / 1e9:.1f}"
    assert re.findall(r"(\d+\.\d) GB", str(refused.value)) == [peak, f"{card:.1f}"]
    assert f"peaks at {peak} GB" in check_plan(plan_config(name, int(card * 1e9))).detail
    assert f"| `{name}` | {card:.0f} GB: {peak} |" in (ROOT / "README.md").read_text()


def test_the_page_of_settings_is_current():
    assert PAGE.read_text() == page(), "python -m schemas.document"


@pytest.mark.parametrize(
    ("settings", "device_kind", "quantisation", "base"),
    [
        ({}, "cuda", "int8", "shared"),
        ({}, "cuda", "nf4", "shared"),
        ({}, "cuda", None, "export"),
        ({}, "cpu", "int8", "export"),
        ({"generator_weights": "nf4"}, "cuda", "nf4", "shared"),
        ({"generator_weights": "fp8"}, "cuda", "int8", "export"),
        ({"generator_base": "export"}, "cuda", "int8", "export"),
        ({"generator_base": "shared"}, "cpu", "nf4", "shared"),
    ],
)
def test_the_generators_base_is_shared_where_it_is_quantised_and_on_a_gpu(settings, device_kind, quantisation, base):
    assert generator_base_of(GenerationConfig(**settings), device_kind, quantisation) == base
