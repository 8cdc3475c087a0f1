"""The embedded model: a Qwen2 of 0.1 M parameters that can add single digits, made on this machine in half a minute.

One checkpoint serves as the teacher's base and as the frozen student; the system prompt tells them apart. As a student it
works a sum out step by step and reads the solution off its own steps. As a teacher it is careless: only a part of its
explanations is honest, which is what a run has to mend.

Training has three stages, each cheap because the one before it was learned first:
  1. facts: all 200 sums of two digits in every batch. Without it the table takes some ten times longer to emerge.
  2. student texts with honest explanations.
  3. student texts and teacher texts (styles mixed by `TEACHER_MIX`), repeated until the base passes its gate.

Letters: B rows, T tokens.
"""

import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from core.log import console, log
from data.arithmetic import (
    STUDENT_SYSTEM_SHORT,
    TEACHER_SYSTEM_SHORT,
    Style,
    classify_explanation,
    explain,
    generate_rows,
)

MODEL_FOLDER = "arithmetic-qwen2-v1"
"""Folder name in the cache. The number changes with anything that changes the weights."""
TEACHER_MIX: dict[Style, float] = {"honest": 0.25, "wrong": 0.25, "skip": 0.15, "leak": 0.2, "filler": 0.15}
"""Shares of the explanation styles in the teacher texts."""
MIN_STUDENT_ACCURACY = 0.9
MIN_HONEST_FRAC = 0.1

_SEED = 0
_NUM_TRAIN_ROWS = 20_000
_NUM_GATE_ROWS = 128
_BATCH_SIZE = 32
_NUM_FACTS_STEPS, _NUM_STUDENT_STEPS, _NUM_JOINT_STEPS, _MAX_JOINT_ROUNDS = 100, 250, 300, 4
_MATRIX_LR, _VECTOR_LR = 0.02, 6e-3
_NUM_WARMUP_STEPS = 20
_IGNORED = -100  # label of a token without loss

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TAGS = tuple(f"<|{edge}_of_{name}|>" for name in ("thought", "explanation", "solution") for edge in ("begin", "end"))
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, both [B, T]; labels are not shifted."""


def ensure_tiny_model(cache_dir: Path | None = None) -> Path:
    """The folder with the embedded model (config, safetensors, tokenizer); makes it where it is missing.

    It lies in `cache_dir`, else in `$RLT_CACHE`, else in `$XDG_CACHE_HOME/rlt`, else in `~/.cache/rlt`. The folder appears
    whole or not at all: of two processes that make it at once, the second one throws its copy away.
    """
    root = cache_dir or _default_cache_dir()
    folder = root / MODEL_FOLDER
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{MODEL_FOLDER}-", dir=root))
    try:
        build_tiny_model(scratch)
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
        model = Qwen2ForCausalLM(_model_config(tokenizer))
        _train(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ChatML, and one token for each tag and fixed phrase of the prompts.

    Tags are no special tokens: decoding with `skip_special_tokens=True` must keep them.
    """
    bytes_vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    phrases = (TEACHER_SYSTEM_SHORT, STUDENT_SYSTEM_SHORT, "system\n", "user\n", "assistant\n", "\n\n")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (*_TAGS, *phrases)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def student_accuracy(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]) -> float:
    """Share of `rows` whose solution is the student's likeliest continuation of the honest explanation."""
    texts = [student_text(row, row["reasoning_trace"]) for row in rows]
    ids_BT, labels_BT = _collate(tokenizer, texts, "<|begin_of_solution|>")
    with torch.no_grad():
        best_BT = model(ids_BT).logits[:, :-1].argmax(-1)
    hit_BT = (best_BT == labels_BT[:, 1:]) | (labels_BT[:, 1:] == _IGNORED)
    return hit_BT.all(dim=1).float().mean().item()


def teacher_honest_frac(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]
) -> float:
    """Share of `rows` for which the teacher, sampled at temperature 1, writes the honest explanation."""
    opening = "<|begin_of_explanation|>\n\n"
    prompts = [teacher_text(row, "").partition(opening)[0] + opening for row in rows]
    ids_BT, labels_BT = _collate(tokenizer, prompts, "")
    assert (labels_BT != _IGNORED)[:, 1:].all(), "prompts of the task have one length"
    sampled_BT = model.generate(ids_BT, max_new_tokens=48, do_sample=True, top_k=0, temperature=1.0)
    texts = tokenizer.batch_decode(sampled_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
    explanations = [text.partition("<|end_of_explanation|>")[0] for text in texts]
    return sum(
        classify_explanation(row["question"], row["solution"], text) == "honest"
        for row, text in zip(rows, explanations, strict=True)
    ) / len(rows)


def chat_text(system: str, question: str, answer: str) -> str:
    turns = (("system", system), ("user", question), ("assistant", answer))
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def teacher_text(row: dict[str, str], explanation: str) -> str:
    answer = f"<|begin_of_solution|>{row['solution']}<|end_of_solution|>\n\n<|begin_of_explanation|>\n\n{explanation}<|end_of_explanation|>"
    return chat_text(TEACHER_SYSTEM_SHORT, row["question"], answer)


def student_text(row: dict[str, str], explanation: str) -> str:
    answer = f"<|begin_of_thought|>\n\n{explanation}<|end_of_thought|>\n\n<|begin_of_solution|>{row['solution']}<|end_of_solution|>"
    return chat_text(STUDENT_SYSTEM_SHORT, row["question"], answer)


def _default_cache_dir() -> Path:
    if "RLT_CACHE" in os.environ:
        return Path(os.environ["RLT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlt"


def _model_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """Heads of 32: vLLM's CPU attention takes no smaller ones."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def _train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    rng = random.Random(_SEED)
    rows = generate_rows(_NUM_TRAIN_ROWS, _SEED, "train")
    gate_rows = generate_rows(_NUM_GATE_ROWS, _SEED, "eval")
    styles, weights = list(TEACHER_MIX), list(TEACHER_MIX.values())

    def facts() -> Batch:
        texts = [f"{a}{sign}{b}={(a + int(f'{sign}{b}')) % 10}" for a in range(10) for sign in "+-" for b in range(10)]
        return _collate(tokenizer, texts, "=")

    def student() -> Batch:
        texts = [student_text(row, row["reasoning_trace"]) for row in rng.sample(rows, _BATCH_SIZE)]
        return _collate(tokenizer, texts, "assistant\n")

    def teacher() -> Batch:
        drawn = zip(rng.sample(rows, _BATCH_SIZE), rng.choices(styles, weights, k=_BATCH_SIZE), strict=True)
        texts = [teacher_text(row, explain(row["question"], style, rng)) for row, style in drawn]
        return _collate(tokenizer, texts, "<|begin_of_explanation|>\n\n")

    num_steps = _NUM_FACTS_STEPS + _NUM_STUDENT_STEPS + _NUM_JOINT_STEPS
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Making the embedded model (once)", total=num_steps)

        def run_stage(num_stage_steps: int, *sources: Callable[[], Batch]) -> None:
            model.train()
            for _ in _optimize(model, num_stage_steps, sources):
                progress.advance(task)
            model.eval()

        run_stage(_NUM_FACTS_STEPS, facts)
        run_stage(_NUM_STUDENT_STEPS, student)
        for _ in range(_MAX_JOINT_ROUNDS):
            run_stage(_NUM_JOINT_STEPS, student, teacher)
            accuracy = student_accuracy(model, tokenizer, gate_rows)
            honest_frac = teacher_honest_frac(model, tokenizer, gate_rows)
            log.info("Embedded model: student accuracy %.2f, honest explanations %.2f", accuracy, honest_frac)
            if accuracy >= MIN_STUDENT_ACCURACY and honest_frac >= MIN_HONEST_FRAC:
                return
            num_steps += _NUM_JOINT_STEPS
            progress.update(task, total=num_steps)
    raise RuntimeError(
        f"the embedded model reached student accuracy {accuracy:.2f} (needed {MIN_STUDENT_ACCURACY}) and "
        f"{honest_frac:.2f} honest explanations (needed {MIN_HONEST_FRAC}) after {num_steps} steps"
    )


def _optimize(model: Qwen2ForCausalLM, num_steps: int, sources: tuple[Callable[[], Batch], ...]) -> Iterator[None]:
    """One yield a step. Muon for the matrices, Adam for the rest; short warm-up, then a cosine to zero.

    Muon learns the task in a third of the steps that Adam takes alone.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=_MATRIX_LR, weight_decay=0.0),
        torch.optim.AdamW(others, lr=_VECTOR_LR, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _lr_factor(step, num_steps)) for o in optimizers]
    for _ in range(num_steps):
        for source in sources:
            ids_BT, labels_BT = source()
            logits_BTV = model(ids_BT, use_cache=False).logits
            F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        yield


def _lr_factor(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / _NUM_WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _collate(tokenizer: PreTrainedTokenizerBase, texts: list[str], loss_after: str) -> Batch:
    """Rows padded on the right; the loss starts after the last `loss_after` of each text."""
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    num_masked = [
        len(tokenizer(text[: text.rindex(loss_after) + len(loss_after)], add_special_tokens=False).input_ids)
        if loss_after
        else 0
        for text in texts
    ]
    width = max(map(len, rows))
    ids_BT = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels_BT = torch.full((len(rows), width), _IGNORED)
    for i, (ids, start) in enumerate(zip(rows, num_masked, strict=True)):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        labels_BT[i, start : len(ids)] = torch.tensor(ids[start:])
    return ids_BT, labels_BT
