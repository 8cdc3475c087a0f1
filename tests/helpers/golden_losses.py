"""Losses of three steps of a small run, kept in a file: `python -m tests.helpers.golden_losses` renews it."""

import json
import tempfile
from pathlib import Path

from tests.helpers.tiny_run import make_trainer, write_random_model

GOLDEN_LOSSES_FILE = Path(__file__).parents[1] / "golden" / "losses_of_three_steps.json"


def three_steps(folder: Path) -> dict[str, list[float]]:
    """Loss, gradient norm and reward of each step of the embedded configuration, float32, on a random model."""
    trainer = make_trainer(
        write_random_model(folder / "model"),
        folder / "run",
        "model_args.load_in_8bit=false",
        "model_args.torch_dtype=float32",
        "max_steps=3",
        "num_eval_prompts=0",
        "save_strategy=no",
    )
    trainer.train()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    return {name: [step[name] for step in steps] for name in ("loss", "grad_norm", "reward", "kl")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        GOLDEN_LOSSES_FILE.write_text(json.dumps(three_steps(Path(made)), indent=1) + "\n")
