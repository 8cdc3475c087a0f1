"""Library settings: what becomes of each of TRL's GRPOConfig and transformers' TrainingArguments in a run.

used      passed on, and it changes something
derived   it follows from a setting of ours, which is named; it may not be set itself
refused   it would change nothing here, or break what a run promises; it keeps its default

Every field of the installed versions is in one of the three (tests/test_library_settings.py): one that a new version
brings fails there until it is entered here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schemas.trl_fields import SAMPLING_ARGUMENT_NAMES, ArgumentsClass, argument_fields


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ONE_PROCESS = "one process trains on one GPU, so there is nothing to share out"
_OWN_EVALUATION = "evaluation samples and scores held-out questions itself, not by the library's loop"
_OWN_ENGINE = "the generator is started by this framework (`generator`, `generator_weights`, `kv_cache_gb`)"
_NO_BEST = "the run's result is that of its last step; `save_total_limit` says how many checkpoints stay to choose from"
_NO_BATCHING = "the generator decodes all rows of a call together already (`generation_aggregation_steps`)"
_SHARDING = (
    "shards a model over processes, and this framework trains in one process on one GPU. An 8-bit or 4-bit base "
    "(`model_args.load_in_8bit`, `model_args.load_in_4bit`) and `optim=paged_adamw_8bit` save memory there"
)


def _says_the_same(value: Any, default: Any) -> bool:
    """Null and false are the same here, and no other two values are."""
    either = value is None or value is False
    return (default is None or default is False) if either else value == default


@dataclass(frozen=True, kw_only=True)
class LibrarySettings:
    """The settings of one arguments class, by what becomes of them."""

    arguments_class: ArgumentsClass
    used: frozenset[str]
    derived: Mapping[str, str]
    """Setting -> what to set instead."""
    refused: Mapping[str, str]
    """Setting -> why it has to keep its default."""

    def problems(self, values: Mapping[str, Any]) -> list[str]:
        """One line for each setting of the user's that is derived or refused. Values are not shown: some are secret."""
        derived = [
            f"`{key}` follows from other settings. Use {self.derived[key]}." for key in values if key in self.derived
        ]
        changed = self.changed(values)
        return derived + [
            f"`{key}` cannot be set: {why}. Remove it." for key, why in self.refused.items() if key in changed
        ]

    def changed(self, values: Mapping[str, Any]) -> set[str]:
        """The library's settings among `values` that differ from its default."""
        defaults = argument_fields(self.arguments_class)
        return {key for key, value in values.items() if key in defaults and not _says_the_same(value, defaults[key][1])}


_USED_BY_ALL = frozenset(
    _names("""
    output_dir run_name seed full_determinism bf16 fp16 debug log_level
    max_steps num_train_epochs per_device_train_batch_size
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    gradient_checkpointing neftune_noise_alpha torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter
    report_to project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps save_total_limit ignore_data_skip
    push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order
    """)
)

_DERIVED_BY_ALL = {
    "gradient_accumulation_steps": "train_batch_size and per_device_train_batch_size",
    "resume_from_checkpoint": "resume=auto|never|FOLDER",
    "per_device_eval_batch_size": "per_device_train_batch_size",
    "auto_find_batch_size": "per_device_train_batch_size (halving it would change the batch of a step)",
    "gradient_checkpointing_kwargs": "gradient_checkpointing (of every layer, as the memory plan has it)",
    "use_cpu": "model_args.device_map=cpu",
    "tf32": "allow_tf32=true|false",
    "disable_tqdm": "nothing: progress is shown by the run itself",
    "remove_unused_columns": "nothing: every column that the run needs is kept",
}

_REFUSED_BY_ALL = {
    **dict.fromkeys(
        _names("""average_tokens_across_devices log_on_each_node log_level_replica save_on_each_node local_rank
        parallelism_config ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
        ddp_backend ddp_timeout"""),
        _ONE_PROCESS,
    ),
    "deepspeed": f"DeepSpeed {_SHARDING}",
    "fsdp": f"FSDP {_SHARDING}",
    "fsdp_config": f"FSDP {_SHARDING}",
    "accelerator_config": "gradient accumulation and the order of the data follow from the run's own settings",
    **dict.fromkeys(
        _names("""bf16_full_eval fp16_full_eval prediction_loss_only eval_do_concat_batches eval_use_gather_object
        eval_accumulation_steps include_for_metrics batch_eval_metrics do_eval do_predict"""),
        _OWN_EVALUATION,
    ),
    "do_train": "a run always trains",
    **dict.fromkeys(_names("load_best_model_at_end metric_for_best_model greater_is_better"), _NO_BEST),
    **dict.fromkeys(
        _names("torch_compile torch_compile_backend torch_compile_mode"),
        "the trained forward is not compiled (its lengths change every step); `compile_models=true` compiles the "
        "frozen models",
    ),
    "label_smoothing_factor": "the loss has no labels to smooth",
    "label_names": "the loss has no labels",
    "use_cache": "training reads no key-value cache, and sampling always has one",
    "include_num_input_tokens_seen": "tokens are counted as `tokens_per_s/*`, and in `num_tokens` if a method samples",
    "skip_memory_metrics": "memory is measured in every phase already (`memory/*` in metrics.jsonl, and the summary)",
    "save_only_model": "a run is continued from its checkpoints, which needs the optimizer; `save_total_limit=1` keeps "
    "the last one alone",
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM save the step at work already",
    "restore_callback_states_from_checkpoint": "the callbacks of a run keep nothing that a checkpoint would hold",
    "hub_token": "it would be written to config.yaml in clear; set HF_TOKEN in the environment instead",
    "length_column_name": "the data have no column of lengths",
}

TRAINING_ARGUMENTS = LibrarySettings(
    arguments_class="TrainingArguments",
    used=_USED_BY_ALL | {"data_seed", "dataloader_drop_last", "train_sampling_strategy"},
    derived=_DERIVED_BY_ALL,
    refused=_REFUSED_BY_ALL
    | dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "Liger has no kernels for masked-diffusion models"),
)

_USED_BY_GRPO = frozenset(
    _names("""
    chat_template_kwargs shuffle_dataset use_liger_kernel
    num_generations max_completion_length temperature top_p top_k min_p repetition_penalty
    vllm_gpu_memory_utilization
    beta num_iterations epsilon delta epsilon_high importance_sampling_level loss_type
    sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
    reward_weights multi_objective_aggregation scale_rewards mask_truncated_completions
    sync_ref_model ref_model_mixup_alpha ref_model_sync_steps use_bias_correction_kl
    vllm_importance_sampling_mode vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    off_policy_mask_threshold log_unique_prompts log_completions_hub_repo
    """)
)

ONLY_WITH_VLLM_SERVER = frozenset(
    _names("""vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_structured_outputs_regex generation_kwargs""")
)
"""Used where TRL's client samples (`use_vllm_server`), and nowhere else."""

GRPO_CONFIG = LibrarySettings(
    arguments_class="GRPOConfig",
    used=_USED_BY_ALL | _USED_BY_GRPO | ONLY_WITH_VLLM_SERVER,
    derived=_DERIVED_BY_ALL
    | {
        "use_vllm": "generator=vllm|transformers",
        "vllm_mode": "use_vllm_server=true|false",
        "vllm_max_model_length": "max_prompt_length and max_completion_length",
        "vllm_importance_sampling_correction": "importance_sampling_correction=auto|true|false",
        "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max (its new name)",
        "steps_per_generation": "train_batch_size (one generation phase per optimizer step)",
        "generation_batch_size": "train_batch_size (one generation phase per optimizer step)",
        "model_init_kwargs": "model_args.*",
        "trust_remote_code": "model_args.trust_remote_code",
        "num_generations_eval": "nothing: evaluation samples one explanation per held-out question",
        "disable_dropout": "model_args.lora_dropout (0 by default; nothing else has dropout)",
        "log_completions": "nothing: completions/*.parquet holds those of every logged step",
        "num_completions_to_print": "nothing: completions/*.parquet holds those of every logged step",
    },
    refused=_REFUSED_BY_ALL
    | {
        "data_seed": "the order of the questions follows from `seed`",
        "dataloader_drop_last": "a step always has all its questions; what is left over of an epoch is passed over",
        "train_sampling_strategy": "a step needs whole groups; `shuffle_dataset=false` keeps the order of the data",
        "pad_to_multiple_of": "a micro-batch is padded to its own longest row",
        "top_entropy_quantile": "it is taken over a micro-batch, and the rows of a micro-batch depend on their lengths",
        **dict.fromkeys(
            _names("""entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta
            entropy_target"""),
            "the bonus is a mean over a micro-batch, which does not add up to the step's",
        ),
        "router_aux_loss_coef": "it weighs the experts of a mixture, and only dense models are trained",
        "cast_lm_head_to_fp32": "it replaces the head, which an adapter model shares with sampling and scoring",
        "liger_kernel_config": "`use_liger_kernel` takes every layer kernel that Liger has for the model",
        "ds3_gather_for_generation": f"DeepSpeed {_SHARDING}",
        "cache_implementation": _OWN_ENGINE,
        "vllm_model_impl": _OWN_ENGINE,
        "vllm_enable_sleep_mode": "vLLM always sleeps while the GPU scores and trains",
        "vllm_tensor_parallel_size": _ONE_PROCESS,
        "use_transformers_continuous_batching": _NO_BATCHING,
        "transformers_continuous_batching_config": _NO_BATCHING,
        "use_transformers_paged": _NO_BATCHING,
        "max_tool_calling_iterations": "a teacher calls no tools",
        "log_multimodal": "prompts and completions are texts",
    },
)

SAMPLING_ARGUMENTS = LibrarySettings(
    arguments_class="SamplingArguments", used=SAMPLING_ARGUMENT_NAMES, derived={}, refused={}
)
"""Of methods that sample and train nothing: the few of TRL's settings that then have an effect; no other is one."""

_OWN_LAYOUT = "rows are prepared, and laid out without padding, by this framework (`model_args.sequence_layout`)"
_OWN_MASK = "what is learned follows from the method: the explanation (`teacher_sft`) or the answer (`student_sft`)"

SFT_CONFIG = LibrarySettings(
    arguments_class="SFTConfig",
    used=_USED_BY_ALL
    | {"data_seed", "dataloader_drop_last", "train_sampling_strategy", "max_length", "use_liger_kernel"},
    derived=_DERIVED_BY_ALL
    | {
        "model_init_kwargs": "model_args.*",
        "trust_remote_code": "model_args.trust_remote_code",
        "packing": "model_args.sequence_layout (rows of a forward follow one another, kept apart, unless it is padded)",
        "padding_free": "model_args.sequence_layout",
        "shuffle_dataset": "train_sampling_strategy=random|sequential",
        "activation_offloading": "offload_checkpoints=true|false",
        "dataset_text_field": "column_names.*",
    },
    refused=_REFUSED_BY_ALL
    | {
        **dict.fromkeys(_names("packing_strategy eval_packing pad_to_multiple_of dataset_kwargs"), _OWN_LAYOUT),
        **dict.fromkeys(_names("completion_only_loss assistant_only_loss"), _OWN_MASK),
        **dict.fromkeys(
            _names("chat_template_path eos_token pad_token"), "tokenizer and chat template are the model's own"
        ),
        "dataset_num_proc": "tokenising is spread over all cores by the tokenizer",
        "truncation_mode": "a row that is too long is left out and counted, never cut (`max_length`)",
        "loss_type": "the loss is the mean negative log-likelihood of what is learned",
        "router_aux_loss_coef": "it weighs the experts of a mixture, and only dense models are trained",
        "liger_kernel_config": "`use_liger_kernel` takes every layer kernel that Liger has for the model",
    },
)
