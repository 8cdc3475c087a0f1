"""The embedded model: a Qwen2 of 0.2 M parameters that can add digits, made on this machine in about a minute.

One checkpoint serves as the teacher's base and as the frozen student; the system prompt tells them apart. As a student
it works a sum out step by step and reads the solution off its own steps. As a teacher it is careless: only some of its
explanations are honest, which is what a run has to mend.

Training has three stages, each cheap because the one before it was learned first:
  1. facts: all 200 sums of two digits in every batch. Without it the table takes some ten times longer to emerge.
  2. honest: student and teacher texts with honest explanations, so that both roles can do the sum.
  3. careless: student texts as before, teacher texts in the styles of `TEACHER_MIX`.
The student never sees a bad explanation in training. That is what makes honesty pay: a wrong step leads it to a wrong
solution, and filler or a leaked solution are text that it would not have thought of (a large KL term).

Letters: B rows, T tokens.
"""

import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from core.cache import default_cache_dir
from core.log import can_animate, console, log
from data.embedded.task import Style, classify_explanation, explain, generate_facts, generate_rows
from data.embedded.tokenizer import EMBEDDED_FORMAT, build_tokenizer
from data.embedded.training import IGNORED, Draw, Example, collate, optimize
from data.formats import encode

MODEL_FOLDER = "arithmetic-qwen2-v4"
"""Folder name in the cache. The number changes with anything that changes the weights."""
TEACHER_MIX: dict[Style, float] = {"honest": 0.3, "wrong": 0.25, "skip": 0.15, "leak": 0.15, "filler": 0.15}
"""Shares of the explanation styles in the teacher texts."""
MIN_STUDENT_ACCURACY = 0.9
"""Share of held-out sums that the student must solve given the honest explanation."""
MIN_HONEST_FRAC = 0.1
"""Share of honest explanations that the careless teacher must still write, else GRPO has nothing to reinforce."""

_SEED = 0
_NUM_TRAIN_ROWS = 20_000
_NUM_GATE_ROWS = 256
_BATCH_SIZE = 32
_NUM_FACTS_STEPS, _NUM_HONEST_STEPS, _NUM_CARELESS_STEPS = 60, 250, 200
_MAX_ROUNDS = 4
_MIN_HONEST_FRAC_BEFORE_CARELESS = 0.9
_MAX_NEW_TOKENS = 48

Row = dict[str, str]


def ensure_tiny_model(cache_dir: Path | None = None) -> Path:
    """The folder with the embedded model (config, safetensors, tokenizer); makes it where it is missing.

    It lies in `cache_dir`, else in `$RLT_CACHE`, else in `$XDG_CACHE_HOME/rlt`, else in `~/.cache/rlt`. The folder
    appears whole or not at all: of two processes that make it at once, the second one throws its copy away.
    """
    return ensure_folder(MODEL_FOLDER, build_tiny_model, cache_dir)


def ensure_folder(name: str, build: Callable[[Path], None], cache_dir: Path | None = None) -> Path:
    """The folder `name` of the cache, which `build` fills where it is missing; whole or not at all."""
    root = cache_dir or default_cache_dir()
    folder = root / name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    try:
        build(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def build_tiny_model(folder: Path) -> None:
    """Train the embedded model from scratch and write it to `folder`. Leaves torch's random state as it was.

    Raises:
        RuntimeError: the base missed its gate in every round.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = Qwen2ForCausalLM(model_config(tokenizer))
        _train(model, tokenizer)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def student_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> float:
    """Share of `rows` in which the student, given the honest explanation, finds every solution token the likeliest."""
    examples = []
    for row in rows:
        head = EMBEDDED_FORMAT.student_head_text(tokenizer, row["question"])
        tail = EMBEDDED_FORMAT.student_tail(tokenizer, row["question"], row["solution"])
        prompt = head + row["reasoning_trace"] + tail.text[: tail.solution_start]
        examples.append((prompt, row["solution"]))
    ids_BT, labels_BT = collate(tokenizer, examples)
    with torch.no_grad():
        best_BT = model(ids_BT).logits[:, :-1].argmax(-1)
    hit_BT = (best_BT == labels_BT[:, 1:]) | (labels_BT[:, 1:] == IGNORED)
    return hit_BT.all(dim=1).float().mean().item()


def sampled_ids(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> torch.Tensor:
    """[B, T] tokens that a model samples at temperature 1 behind prompts of one length."""
    prompt_ids_BT = torch.tensor([encode(tokenizer, prompt) for prompt in prompts])
    sampled_BT: torch.Tensor = model.generate(
        prompt_ids_BT,
        attention_mask=torch.ones_like(prompt_ids_BT),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        top_k=0,
    )
    return sampled_BT[:, prompt_ids_BT.shape[1] :]


def teacher_honest_frac(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> float:
    """Share of `rows` for which the teacher, sampled at temperature 1, writes the honest explanation."""
    prompts = [EMBEDDED_FORMAT.teacher_prompt_text(tokenizer, row["question"], row["solution"]) for row in rows]
    completions = tokenizer.batch_decode(
        sampled_ids(model, tokenizer, prompts, _MAX_NEW_TOKENS), skip_special_tokens=True
    )
    num_honest = 0
    for row, completion in zip(rows, completions, strict=True):
        explanation = completion.partition(EMBEDDED_FORMAT.tags.explanation.closing)[0]
        num_honest += classify_explanation(row["question"], row["solution"], explanation) == "honest"
    return num_honest / len(rows)


def model_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """Heads of 32, a size that vLLM's CPU attention accepts. Three of them find the operands far sooner than two."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def _train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """All stages, in place. A stage with a gate is repeated until the model passes it; a further round is rare."""
    rows = generate_rows(_NUM_TRAIN_ROWS, _SEED, "train")
    gate_rows = generate_rows(_NUM_GATE_ROWS, _SEED, "eval")
    rng = random.Random(_SEED)

    def student() -> list[Example]:
        return [student_example(tokenizer, row) for row in rng.sample(rows, _BATCH_SIZE)]

    def honest_teacher() -> list[Example]:
        return [_teacher_example(tokenizer, row, row["reasoning_trace"]) for row in rng.sample(rows, _BATCH_SIZE)]

    def careless_teacher() -> list[Example]:
        styles = rng.choices(list(TEACHER_MIX), list(TEACHER_MIX.values()), k=_BATCH_SIZE)
        drawn = zip(rng.sample(rows, _BATCH_SIZE), styles, strict=True)
        return [_teacher_example(tokenizer, row, explain(row["question"], style, rng)) for row, style in drawn]

    with Progress(console=console, transient=True, disable=not can_animate()) as progress:
        total = _NUM_FACTS_STEPS + _NUM_HONEST_STEPS + _NUM_CARELESS_STEPS
        task = progress.add_task("Making the embedded model (once)", total=total)

        def run_stage(num_steps: int, *draws: Draw) -> None:
            model.train()
            for _ in optimize(model, tokenizer, num_steps, draws):
                progress.advance(task)
            model.eval()

        def run_rounds(num_steps: int, teacher: Draw, min_honest_frac: float) -> None:
            for _ in range(_MAX_ROUNDS):
                run_stage(num_steps, student, teacher)
                accuracy = student_accuracy(model, tokenizer, gate_rows)
                honest_frac = teacher_honest_frac(model, tokenizer, gate_rows)
                log.info("Embedded model: student accuracy %.2f, honest explanations %.2f", accuracy, honest_frac)
                if accuracy >= MIN_STUDENT_ACCURACY and honest_frac >= min_honest_frac:
                    return
            raise RuntimeError(
                f"the embedded model reached student accuracy {accuracy:.2f} (needed: {MIN_STUDENT_ACCURACY}) and "
                f"{honest_frac:.2f} honest explanations (needed: {min_honest_frac}) in {_MAX_ROUNDS * num_steps} steps"
            )

        run_stage(_NUM_FACTS_STEPS, generate_facts)
        run_rounds(_NUM_HONEST_STEPS, honest_teacher, _MIN_HONEST_FRAC_BEFORE_CARELESS)
        run_rounds(_NUM_CARELESS_STEPS, careless_teacher, MIN_HONEST_FRAC)


def student_example(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    tail = EMBEDDED_FORMAT.student_tail(tokenizer, row["question"], row["solution"])
    return EMBEDDED_FORMAT.student_head_text(tokenizer, row["question"]), row["reasoning_trace"] + tail.text


def _teacher_example(tokenizer: PreTrainedTokenizerBase, row: Row, explanation: str) -> Example:
    prompt = EMBEDDED_FORMAT.teacher_prompt_text(tokenizer, row["question"], row["solution"])
    return prompt, EMBEDDED_FORMAT.teacher_completion_text(tokenizer, row["question"], explanation)
