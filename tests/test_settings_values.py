"""Values that no setting takes: each is refused with the configuration, in one message, whatever the setting is."""

import dataclasses
import inspect
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from schemas.methods import METHODS
from schemas.run import ConfigError, load_run_config
from schemas.schedules import OF_A_FIGURE, SCHEDULES
from tests.campaign.mutations import mutated_values, mutations, settings_of, single_mutations, validate

NAN, INF = math.nan, math.inf
ANY_METHOD: list[dict[str, Any]] = [
    {"optim_args": "foo"},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {}},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {}},
    {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": {}},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-9, "min_lr_rate": 0.1}},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5}},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {}, "learning_rate": 0},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": NAN}},
    {"lr_scheduler_type": "reduce_lr_on_plateau"},
    {"lr_scheduler_type": "greedy"},
    {"lr_scheduler_type": "foo"},
    {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"foo": 1}},
    {"lr_scheduler_kwargs": "foo"},
    {"save_strategy": "best"},
    {"fsdp": "full_shard"},
    {"fsdp": ""},
    {"deepspeed": "ds.json"},
    {"deepspeed": {}},
    {"accelerator_config": ""},
    {"accelerator_config": {"split_batches": True}},
    {"parallelism_config": {}},
    {"parallelism_config": 0},
    {"learning_rate": 1e30},
    {"learning_rate": True},
    {"learning_rate": "1e30"},
    {"adam_epsilon": 0},
    {"warmup_steps": 1e308},
    {"num_train_epochs": -1e308, "max_steps": 5},
    {"max_steps": 10**30},
    {"neftune_noise_alpha": -1},
    {"log_level": "foo"},
    {"output_dir": None},
    {"output_dir": ""},
    {"output_dir": "x" * 300},
    {"output_dir": "a\0b"},
    {"run_name": "\udc80"},
    {"dataloader_multiprocessing_context": "foo"},
    {"dataloader_multiprocessing_context": "fork"},
    {"dataloader_persistent_workers": True},
    {"dataloader_prefetch_factor": 2},
    {"model_args.lora_r": 513},
    {"gpu_gb": INF},
    {"card_gb": 1e308},
    {"gpu_gb": "foo", "per_device_train_batch_size": "auto"},
    {"train_batch_size": 2**31, "per_device_train_batch_size": 3},
    {"dataset_id_or_path": "[x]"},
    {"dataset_id_or_path": "/dev/null"},
    {"optim": "galore_adamw"},
    {"optim": "sgd", "optim_args": "momentum=foo"},
    {"optim": "rmsprop_bnb", "optim_args": "foo=1"},
]
RLT: list[dict[str, Any]] = [
    {"answer_log_prob_coeff": [], "reduction_log_prob_fn": []},
    {"kl_penalty_reward_coeff": [], "reduction_kl_fn": []},
    {"model_args.lora_target_modules": []},
    {"cache_implementation": "foo"},
    {"cache_implementation": ""},
    {"push_to_hub": True},
    {"log_completions_hub_repo": ""},
    {"beta": 1e308},
    {"epsilon_high": -1e308},
    {"delta": -1},
    {"sapo_temperature_pos": 0},
    {"temperature": 1e-30},
    {"reward_weights": [NAN]},
    {"chat_template_kwargs": {"x": {"y": [INF]}}},
]
MASKED_DIFFUSION: list[dict[str, Any]] = [
    {"lr_scheduler_kwargs": None},
    {"train_sampling_strategy": "group_by_length"},
    {"sampling_temperature": INF},
    {"guidance_scale": 1e308},
    {"new_model.rope_theta": INF},
    {"new_model.hidden_size": 10**400},
    {"tokenizer_name_or_path": "foo=1"},
]
TRACES: list[dict[str, Any]] = [
    {"num_samples": 0},
    {"choose": "worst"},
    {"max_trace_tokens": 0},
    {"questions_per_chunk": 10**30},
    {"teacher_run": ""},
    {"resume": "results/x/checkpoint-3"},
    {"extra_rewards": ["format"]},
    {"use_vllm_server": True},
    {"reference_model": "separate"},
    {"model_args.adapter_path": "results/x"},
    {"learning_rate": 1e-3},
    {"top_p": 0.5},
]
CASES = [
    *(("collect_traces", case) for case in TRACES),
    *((method, case) for method in METHODS for case in ANY_METHOD),
    *(("rlt", case) for case in RLT),
    *(("masked_diffusion", case) for case in MASKED_DIFFUSION),
]


@pytest.mark.parametrize(("method", "changes"), CASES)
def test_a_value_that_would_fail_late_is_refused(method, changes, tmp_path):
    outcome = validate((method, changes), tmp_path)
    assert outcome.kind == "refused", outcome.text
    given = {str(part) for key, value in changes.items() for part in (key.rpartition(".")[2], value)}
    assert any(part in outcome.text for part in given), "the message names the setting or what was given"
    assert not list(tmp_path.iterdir())


FIRST = 500


@pytest.mark.parametrize("seed", [0])
def test_a_mutated_configuration_is_valid_or_refused_with_one_message(seed, tmp_path):
    outcomes = [(mutation, validate(mutation, tmp_path)) for mutation in itertools.islice(mutations(seed), FIRST)]
    crashed = [(mutation, outcome.text) for mutation, outcome in outcomes if outcome.kind == "crashed"]
    assert not crashed, crashed[0]
    kinds = {kind: sum(outcome.kind == kind for _, outcome in outcomes) for kind in ("valid", "refused")}
    assert min(kinds.values()) > FIRST / 20, f"both kinds are seen: {kinds}"


def test_mutations_follow_from_their_seed():
    first, again, other = (list(itertools.islice(mutations(seed), 50)) for seed in (1, 1, 2))
    assert repr(first) == repr(again) != repr(other)
    assert {method for method, _ in first} == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_mutated(method):
    mutated = {key for name, changes in single_mutations() if name == method for key in changes}
    own = METHODS[method].own_field_names()
    assert own <= mutated and set(settings_of(method)) == mutated
    assert {f"model_args.{field.name}" for field in dataclasses.fields(type(load(method).model_args))} <= mutated


def load(method: str, /, **changes: Any) -> Any:
    return load_run_config(mutated_values((method, changes), Path("results/x")))


def number_settings(method: str) -> list[str]:
    """Settings that may be a number, of those that a run takes."""
    library = METHODS[method].library
    return [
        key
        for key in settings_of(method)
        if key not in library.refused and key not in library.derived and takes(method, key, 1, 2, 0.5)
    ]


def takes(method: str, key: str, *values: Any) -> bool:
    for value in values:
        try:
            load(method, **{key: value})
        except ConfigError:
            continue
        return True
    return False


@pytest.mark.parametrize("method", METHODS)
def test_no_number_is_endless_or_a_switch(method):
    """NaN, infinities, 1e30 and true are refused by every setting that is a number, own ones and the libraries'."""
    numbers = [key for key in number_settings(method) if not takes(method, key, "yes")]
    of_a_training = {"learning_rate", "max_steps", "weight_decay"} if METHODS[method].build_arguments else set()
    assert {"model_args.lora_r", "card_gb"} | of_a_training <= set(numbers)
    wrong = (NAN, INF, -INF, 1e30, -1e30, 1e308, 10**30, 10**400, True, "1e30", "inf", "nan")
    taken = {(key, value) for key in numbers for value in wrong if takes(method, key, value)}
    assert taken == set()


def test_arguments_of_schedules_are_those_that_the_library_takes():
    theirs = {kind.value: inspect.signature(make).parameters for kind, make in TYPE_TO_SCHEDULER_FUNCTION.items()}
    given_by_the_trainer = {"optimizer", "last_epoch", "num_warmup_steps", "num_training_steps"}
    assert {name: set(takes) for name, takes in SCHEDULES.items()} == {
        name: set(parameters) - given_by_the_trainer for name, parameters in theirs.items() if name not in OF_A_FIGURE
    }


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("warmup_stable_decay", {"num_decay_steps": 1, "min_lr_ratio": 0.1, "decay_type": "1-sqrt"}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("cosine_warmup_with_min_lr", {"min_lr": 1e-7, "warmup_lr_rate": 0.5}),
        ("polynomial", {"power": 2, "lr_end": 0}),
        ("inverse_sqrt", {"timescale": 10}),
        ("cosine_with_restarts", {"num_cycles": 2}),
        ("cosine", {"num_cycles": 0.5}),
        ("linear", {}),
        ("constant_with_warmup", {}),
    ],
)
def test_a_schedule_with_what_it_needs_is_taken(schedule, kwargs, tmp_path):
    changes = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs}
    assert validate(("rlt", changes), tmp_path).kind == "valid"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adafactor", "sgd"])
def test_the_trial_of_an_optimizer_refuses_none_that_works(optim, tmp_path):
    outcome = validate(("rlt", {"optim": optim}), tmp_path)
    assert outcome.kind == "valid", outcome.text


def test_a_message_shows_what_was_given_and_what_to_do():
    with pytest.raises(ConfigError) as error:
        load("rlt", lr_scheduler_type="warmup_stable_decay")
    assert str(error.value) == (
        "- `lr_scheduler_type` warmup_stable_decay needs num_decay_steps in `lr_scheduler_kwargs`. Set e.g. "
        '"lr_scheduler_kwargs={num_decay_steps: 100}".'
    )
