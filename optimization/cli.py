"""./optimize.sh: chosen optimizations, what they would change, what they give, and training with them.

Without --train nothing runs: the settings, what applies to this machine and what it gives are printed.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.table import Table

from core.errors import UserError
from core.log import configure_logging, console
from core.units import format_gb
from schemas.compose import CONFIG_ROOT, compose_run_config, run_config_name, run_config_names
from schemas.methods import method_of
from schemas.run import AnyRunConfig, ConfigError, load_run_config

DEFAULT_RUN = "teacher_rlt_tiny"
"""What ./launch_mono.sh trains; a model chosen by --model takes batch and lengths of the 85 GB run instead."""

GROUPS = {
    "memory": "expandable segments, checkpoints in host memory, tiled MLP, paged 8-bit optimizer",
    "cuda": "TF32 and the order of attention kernels",
    "fp8": "fp8 KV cache, generator and scoring, on a GPU that has it",
    "attention": "the attention kernel that torch tries first",
    "flash_attention": "Flash Attention 3 or 2 where it is installed",
    "prealloc": "take the planned memory at once, to fail early",
    "compile": "compiled forwards of a student and a reference of their own",
    "recover_nan": "past non-finite losses, gradients and rewards",
}
"""Flag (with - for _) -> what cfgs/optimization_cfg/NAME.yaml sets."""
_GIVES = {
    "allow_tf32": "faster float32 products (16-bit ones are as they were)",
    "compile_models": "fewer launches in scoring; speed not measured",
    "optim": "states may move to host memory when the GPU is full",
    "per_device_train_batch_size": "fewer, larger forwards",
    "preallocate_memory": "a GPU that is too full fails in the first second",
    "recover_from_nan": "a bad step does not end the run",
    "sdpa_backend": "flash or efficient first; auto: nothing more, every run has cuDNN's kernel off (NaN gradients)",
    "use_flash_attention": "padding is not computed, no mask in memory, where it applies",
    "use_fp8": "half the bytes of the KV cache, faster scoring, where it applies; speed not measured",
}
"""What a setting is for, apart from memory."""
_FOR_FROZEN_MODELS = {"compile_models", "use_fp8"}
_KEY_VALUE = re.compile(r"^[A-Za-z_][\w.@]*=")


def parser() -> argparse.ArgumentParser:
    """Flags as in --help; unknown ones end with a message and status 2."""
    from optimization.catalogue import MODELS

    families = f"a family: {', '.join(MODELS)} (teachers), llada (masked diffusion)"
    parse = argparse.ArgumentParser(
        prog="./optimize.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parse.add_argument("words", nargs="*", metavar="RUN | key=value", help="a run configuration and settings of it")
    parse.add_argument("--all", action="store_true", help="everything below but --stats, with --auto-batch")
    for name, text in GROUPS.items():
        parse.add_argument("--" + name.replace("_", "-"), action="store_true", help=text)
    parse.add_argument("--auto-batch", action="store_true", help="micro-batch and accumulation from the memory plan")
    parse.add_argument("--stats", action="store_true", help="what the GPU is and what is free on it")
    parse.add_argument("--setup-only", action="store_true", help="install what is missing, and stop")
    parse.add_argument("--train", action="store_true", help="start train.py with the result")
    parse.add_argument("--dry-run", action="store_true", help="only show what --train would start")
    parse.add_argument("--model", metavar="M", help=families)
    parse.add_argument("--size", metavar="S", help="size in the family, e.g. 7b")
    parse.add_argument("--output-dir", metavar="D", help="folder of the run")
    return parse


def run_and_words(options: argparse.Namespace) -> tuple[str, list[str], list[str]]:
    """The run configuration, the `key=value` words of its model, and those of the flags; the user's own come last.

    Raises:
        UserError: a word that is neither, two runs, or a model without a size.
    """
    from optimization.catalogue import run_for_model

    own = [word for word in options.words if _KEY_VALUE.match(word)]
    names = [run_config_name(word) for word in options.words if not _KEY_VALUE.match(word)]
    if len(names) > 1 or any(name not in run_config_names() for name in names):
        raise UserError(
            f"{' '.join(names)!r} as the run configuration",
            expected="at most one of " + ", ".join(run_config_names()),
            remedy="settings are written key=value, flags begin with --",
        )
    if (options.model is None) != (options.size is None):
        raise UserError("--model and --size", expected="both or none", remedy="e.g. --model qwen2.5 --size 7b")
    words: dict[str, Any] = {}
    for name in GROUPS:
        if options.all or getattr(options, name):
            words |= yaml.safe_load((CONFIG_ROOT / "optimization_cfg" / f"{name}.yaml").read_text(encoding="utf-8"))
    run_of_model, chosen = run_for_model(options.model, options.size) if options.model else (DEFAULT_RUN, [])
    folder = [f"output_dir={options.output_dir}"] if options.output_dir else []
    run = names[0] if names else run_of_model
    return run, chosen, [*folder, *(f"{key}={_word(value)}" for key, value in words.items()), *own]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def choose_batch(config: AnyRunConfig) -> list[str]:
    """The planned micro-batch as a word, said with its accumulation and peak."""
    from optimization.gpu import find_card
    from optimization.training_optim import choose_batch_size, planned_card

    choice = choose_batch_size(config, *planned_card(config, find_card()))
    console.print(
        f"batch {choice.batch_size}, accumulation {choice.gradient_accumulation_steps}: {choice.reason}; "
        f"predicted peak {format_gb(choice.peak_bytes)} of {format_gb(choice.card_bytes)}",
        highlight=False,
        soft_wrap=True,
    )
    return [f"per_device_train_batch_size={choice.batch_size}"]


def settings_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Each setting that differs, and what that change alone gives; memory as the plan predicts it for a GPU."""
    table = Table(title="settings", title_justify="left")
    for column in ("setting", "from", "to", "alone gives (memory: predicted for a GPU)"):
        table.add_column(column, overflow="fold")
    config = load_run_config(before)
    method = method_of(config)
    no_use = f"nothing: {method.title} has no generator and no frozen model of its own"
    for key in sorted(key for key in after if after[key] != before.get(key)):
        old = getattr(config if hasattr(config, key) else config.arguments, key)
        use = no_use if key in _FOR_FROZEN_MODELS and not method.frozen_roles else _GIVES.get(key)
        gives = [part for part in (_saving(before, {key: after[key]}), use) if part]
        table.add_row(key, _word(old), _word(after[key]), "; ".join(gives))
    return table


def _saving(before: dict[str, Any], change: dict[str, Any]) -> str:
    """`train -2.7 GB` for each phase whose predicted peak a change lowers by at least 1 MB."""
    from core.types import Phase
    from planner.plan import plan_run

    plans = [plan_run(load_run_config(values), None) for values in (before, before | change)]
    saved = {phase: plans[0].peak_bytes(phase) - plans[1].peak_bytes(phase) for phase in Phase}
    parts = [f"{phase} -{num_bytes / 1e9:.3g} GB" for phase, num_bytes in saved.items() if num_bytes >= 1e6]
    return ", ".join(parts)


def show(run: str, model_words: list[str], words: list[str]) -> None:
    """What the words change in the run of that model, and what applies to this machine. Everything is undone again."""
    from optimization.apply import announce_models, apply_optimizations
    from optimization.record import records_table, undo_all

    before, after = compose_run_config(run, model_words), compose_run_config(run, model_words + words)
    config, records = apply_optimizations(load_run_config(after))
    undo_all(records)
    changed = settings_table(before, after)
    console.print(changed if changed.row_count else "no setting differs from the run configuration's own")
    records += announce_models(config)
    if records:
        console.print(records_table(records, "on this machine"))
    console.print("to train with it:", highlight=False)
    console.print(f"  ./launch_mono.sh {' '.join([run, *model_words, *words])}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    configure_logging()
    if not arguments:
        arguments = ["--help"]
    options = parser().parse_intermixed_args(arguments)
    try:
        run, model_words, words = run_and_words(options)
        if options.stats or options.setup_only:
            from optimization.cuda_optim import print_gpu_stats

            print_gpu_stats()
            if options.setup_only:
                console.print("the environment is ready; ./launch_mono.sh trains the embedded model", highlight=False)
                return 0
        if options.auto_batch or options.all:
            words = choose_batch(load_run_config(compose_run_config(run, model_words + words))) + words
        if options.dry_run or not options.train:
            show(run, model_words, words)
            return 0
    except (UserError, ConfigError, HydraException, OmegaConfBaseException) as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    command = [sys.executable, str(CONFIG_ROOT.parent / "train.py"), f"--config-name={run}", *model_words, *words]
    console.print("starting train.py", " ".join(command[2:]), highlight=False, soft_wrap=True)
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
