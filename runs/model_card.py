"""Model cards: README.md beside a run's result and beside each checkpoint."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runs.summary import DIFFUSION_REPORT, SFT_REPORT, TEACHER_REPORT, Report
from runs.usage import Usage, literal, quantisation
from schemas.any_run import AnyRunConfig
from schemas.data import DataConfig
from schemas.llada import DiffusionSamplingConfig, MaskedDiffusionRunConfig
from schemas.model import ModelArgs, is_embedded
from schemas.reward import as_list
from schemas.run import RunConfig
from schemas.sft import SupervisedRunConfig

_MAX_EXAMPLE_CHARS = 600
_LIBRARIES = ("transformers", "trl", "peft", "torch", "datasets", "bitsandbytes")


@dataclass(frozen=True, kw_only=True)
class TrainedSoFar:
    """Progress of the training."""

    step: int
    max_steps: int
    history: list[dict[str, Any]]
    """Logged figures, each with its `step`; those of evaluations among them."""


@dataclass(frozen=True, kw_only=True)
class TeacherCard(TrainedSoFar):
    """The card of a teacher's adapter."""

    config: RunConfig
    base_path: str
    """Hub id, or absolute path of a folder, that the code of the card loads."""
    question: str
    """With `solution` the example of the card."""
    solution: str
    num_rows: int

    def markdown(self) -> str:
        config, grpo, base = self.config, self.config.grpo, self.config.model_name_or_path
        question, solution = _shortened(self.question), _shortened(self.solution)
        usage = Usage(config=config, folder=".", base=self.base_path, question=question, solution=solution)
        student = config.student_model or "the base without the adapter"
        extra = ", ".join(config.extra_rewards)
        return f"""{_header(base, ["rlt", "grpo", "trl", "lora"], "peft")}
# {Path(grpo.output_dir).name}

A LoRA adapter on `{base}` in {_precision(config.model_args)}: a Reinforcement Learning Teacher (RLT, arXiv 2506.08388).
Given a question and its solution it writes an explanation from which a student reaches that solution.

## Use

The example is a row of the training data{_base_note(base)}. The code is to run in the folder of this file.

{usage.markdown()}

## Training

{_data(config)}, {self.num_rows} rows. {self.step} of {self.max_steps} steps of \
{config.train_batch_size} completions ({grpo.num_generations} a question) with GRPO: learning rate \
{grpo.learning_rate:g}, beta {grpo.beta:g}, sampling temperature {grpo.temperature:g}, seed {grpo.seed}.

The reward, under the student `{student}` at temperature {config.unbias_student_log_probs_temp:g}:

- log-prob of the solution's tokens: {_weighted(config.answer_log_prob_coeff, config.reduction_log_prob_fn)}
- minus KL of the explanation's tokens: {_weighted(config.kl_penalty_reward_coeff, config.reduction_kl_fn)}
- explanation never closed: {config.not_matched_penalty:g}{f"{chr(10)}- more rewards: {extra}" if extra else ""}
{_figures(self.history, TEACHER_REPORT)}{_versions()}"""


@dataclass(frozen=True, kw_only=True)
class DiffusionCard(TrainedSoFar):
    """The card of a masked-diffusion model, or of an adapter on one."""

    config: MaskedDiffusionRunConfig
    base_path: str | None
    """Hub id, or absolute path of a folder, of the base that was trained on; None: from scratch."""
    prompt: str
    """The example of the card."""
    optimizer: str
    """transformers' name of the optimizer."""

    def markdown(self) -> str:
        config, base, args = self.config, self.config.model_name_or_path, self.config.args
        is_adapter = config.trainable_weights == "adapter"
        settings = {name: getattr(config, name) for name in DiffusionSamplingConfig.__dataclass_fields__}
        usage = f"""import models.llada  # makes the model type known to transformers
from generation.masked_diffusion import generate_responses
from schemas.llada import DiffusionSamplingConfig
{_loading(self.base_path if is_adapter else None, config.model_args)}
prompt = {literal(self.prompt)}
settings = DiffusionSamplingConfig(**{settings})
(response,) = generate_responses(
    model,
    [tokenizer(prompt, add_special_tokens=False)["input_ids"]],
    settings,
    mask_token_id=model.config.mask_token_id,
    filler_token_id=tokenizer.eos_token_id,
    max_rows=1,
    seed=0,
)
print(tokenizer.decode(response))"""
        trained = {"sft": "the response is masked and learned", "pretrain": "the whole text is masked and learned"}
        start = f"trained from `{base}`" if base is not None else "trained from scratch"
        what = f"A LoRA adapter on `{base}` in" if is_adapter else f"A language model, {start} in"
        libraries = ["llada", "masked-diffusion", *(["lora"] if is_adapter else [])]
        return f"""{_header(base, libraries, "peft" if is_adapter else "transformers")}
# {Path(args.output_dir).name}

{what} {_precision(config.model_args)}: masked diffusion (LLaDA, arXiv 2502.09992), which fills masked tokens in any \
order instead of writing from left to right.

## Use

With the root of the framework that trained it on `PYTHONPATH`. The prompt is one of the run's data{_base_note(base)}.

```python
{usage}
```

## Training

{_data(config)}. Objective `{config.objective}`: {trained[config.objective]}. {self.step} of \
{self.max_steps} steps of {config.train_batch_size} rows, \
{"Muon and AdamW" if config.use_muon else self.optimizer}, \
learning rate {args.learning_rate:g}, seed {args.seed}.
{_figures(self.history, DIFFUSION_REPORT)}{_versions()}"""


@dataclass(frozen=True, kw_only=True)
class SupervisedCard(TrainedSoFar):
    """The card of a teacher's warm-up or of a student, an adapter or a whole model."""

    config: SupervisedRunConfig
    base_path: str
    """Hub id, or absolute path of a folder, of the base that was trained on."""
    prompt: str
    """The example of the card."""
    num_rows: int
    optimizer: str
    """transformers' name of the optimizer."""

    def markdown(self) -> str:
        config, base, sft = self.config, self.config.model_name_or_path, self.config.sft
        is_adapter = config.trainable_weights == "adapter"
        kind, learned = "student", "the whole answer (thought and solution)"
        if config.learns_explanations:
            kind, learned = "teacher", "the explanation of a given solution"
        what = f"A LoRA adapter on `{base}`" if is_adapter else f"A language model, trained from `{base}`,"
        return f"""{_header(base, ["rlt", "sft", "trl", *(["lora"] if is_adapter else [])], _library_of(is_adapter))}
# {Path(sft.output_dir).name}

{what} in {_precision(config.model_args)}: a {kind} of the RLT recipe (arXiv 2506.08388), fine-tuned on {learned}.

## Use

The prompt is that of a row of the training data{_base_note(base)}. The code is to run in the folder of this file.

```python
{_loading(self.base_path if is_adapter else None, config.model_args)}
prompt = {literal(self.prompt)}
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
output = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```

## Training

{_data(config)}, {self.num_rows} rows of at most {sft.max_length} tokens, of which {learned} and the end of the turn are
learned. {self.step} of {self.max_steps} steps of {config.train_batch_size} rows, \
{"Muon and AdamW" if config.use_muon else self.optimizer}, learning rate {sft.learning_rate:g}, seed {sft.seed}.
{_figures(self.history, SFT_REPORT)}{_versions()}"""


def _library_of(is_adapter: bool) -> str:
    return "peft" if is_adapter else "transformers"


def _header(base: str | None, tags: list[str], library: str) -> str:
    """The Hub takes a hub id alone as `base_model`."""
    is_hub_id = base is not None and not is_embedded(base) and not Path(base).exists()
    lines = [
        *([f"base_model: {base}"] if is_hub_id else []),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
    ]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def _loading(adapted_base: str | None, args: ModelArgs) -> str:
    """Code that loads an adapter on `adapted_base`, or a whole model (None)."""
    quantised = quantisation(args) if adapted_base is not None else ""
    imports = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if quantised else "")
    keywords = f'dtype="{args.torch_dtype}"' + (f", quantization_config={quantised}" if quantised else "")
    keywords += ", trust_remote_code=True" if args.trust_remote_code else ""
    lines = [f"from transformers import {imports}", "", 'folder = "."  # that of this file']
    if adapted_base is not None:
        lines.insert(0, "from peft import PeftModel")
        lines += [
            f"base = AutoModelForCausalLM.from_pretrained({literal(adapted_base)}, {keywords})",
            "model = PeftModel.from_pretrained(base, folder).eval()",
        ]
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained(folder, {keywords}).eval()")
    return "\n".join([*lines, "tokenizer = AutoTokenizer.from_pretrained(folder)", ""])


def _precision(args: ModelArgs) -> str:
    if args.load_in_8bit:
        return "8-bit (LLM.int8)"
    return f"4-bit ({args.bnb_4bit_quant_type})" if args.load_in_4bit else args.torch_dtype


def _base_note(base: str | None) -> str:
    return f"; `{base}` is a small model that this framework makes itself" if base and is_embedded(base) else ""


def _data(config: DataConfig) -> str:
    subset = f", subset `{config.dataset_config_name}`" if config.dataset_config_name else ""
    return f"Data: `{config.dataset_id_or_path}`{subset}, split `{config.dataset_split}`"


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_EXAMPLE_CHARS else text[:_MAX_EXAMPLE_CHARS] + " [...]"


def _weighted(coefficients: Any, reductions: Any) -> str:
    return ", ".join(f"{c:g} x {r}" for c, r in zip(as_list(coefficients), as_list(reductions), strict=True))


def _figures(history: list[dict[str, Any]], report: Report) -> str:
    """The first and the last evaluation so far; nothing where there was none."""
    evaluations = [line for line in history if any(key in line for key in report.eval_rows)]
    if not evaluations:
        return ""
    first, last = evaluations[0], evaluations[-1]
    rows = [f"| {name} | {first[k]:.3f} | {last[k]:.3f} |" for k, name in report.eval_rows.items() if k in first]
    head = [f"| | step {first['step']} | step {last['step']} |", "| --- | ---: | ---: |"]
    return "\n".join(["", "## Held-out figures", "", *head, *rows, ""])


def _versions() -> str:
    return "\n## Versions\n\n" + ", ".join(f"{name} {version(name)}" for name in _LIBRARIES) + "\n"


@dataclass(frozen=True, kw_only=True)
class MergedCard:
    """The card of a checkpoint that was exported from a run (models/merge.py)."""

    config: AnyRunConfig | None
    """Of the run; None for an adapter that was trained elsewhere."""
    source: str
    """Name of the run's folder."""
    base: str
    """The model that was trained, or that the adapter is of."""
    prompt_file: str | None
    dtype: str
    """Of the weights."""
    is_merged: bool
    """An adapter is in them; else all weights were trained."""
    check: str
    """How far its log-probs are from those of the model that was trained."""

    def markdown(self) -> str:
        kind = "language model"
        if self.config is not None:
            kind = "teacher, which explains a given solution," if self.config.learns_explanations else "student"
        how = (
            f"The adapter of `{self.source}` and its base `{self.base}`, added up in float32 and rounded once"
            if self.is_merged
            else f"The weights of `{self.source}`, all of which were trained, rounded once"
        )
        return f"""{_header(self.base, ["rlt"], "transformers")}
# {Path(self.source).name}, exported

A {kind} of the RLT recipe (arXiv 2506.08388), in {self.dtype}. {how}. Held against the model that was \
trained: {self.check}.

## Use

Tokenizer and chat template are those of the training{self._prompt_note()}.

```python
{_loading(None, ModelArgs())}
prompt = {self._prompt()}
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```

vLLM serves it: `python -m vllm.entrypoints.openai.api_server --model . --dtype {self.dtype} --host 127.0.0.1`
{_versions()}"""

    def _prompt_note(self) -> str:
        return f"; `{self.prompt_file}` is the prompt that it was trained behind" if self.prompt_file else ""

    def _prompt(self) -> str:
        if self.prompt_file is None:
            return 'tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)'
        filled = f'open(f"{{folder}}/{self.prompt_file}", encoding="utf-8").read()'
        solution = '.replace("{solution}", "4")' if self.config and self.config.learns_explanations else ""
        return f'{filled}.replace("{{question}}", "What is 2 + 2?"){solution}'
