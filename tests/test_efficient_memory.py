"""`Efficient.estimate_memory` against the storages of real training steps."""

import pytest

from optimization import Efficient
from optimization.small.models import Size
from tests.helpers.full_step import measured_peak_bytes, small_model

NARROW, NANO = Size(128, 320, 4, 4), Size(192, 512, 8, 6)
# size, vocabulary, rows, tokens, precision, checkpointing, optimizer; each moment of the step binds somewhere
STEPS = [
    (NARROW, 512, 4, 128, "fp32", False, "adamw"),
    (NARROW, 512, 4, 128, "fp32", True, "adamw"),
    (NARROW, 4096, 4, 128, "fp32", True, "adamw"),
    (NARROW, 512, 2, 128, "bf16", False, "adamw"),
    (NARROW, 512, 2, 128, "mixed", False, "adamw"),
    (NARROW, 512, 2, 128, "mixed", True, "adamw"),
    (NANO, 8192, 1, 64, "fp32", False, "adamw"),
    (NANO, 8192, 1, 64, "fp32", False, "adam8bit"),
    (NANO, 8192, 1, 64, "fp32", False, "lion"),
    (NANO, 8192, 1, 64, "fp32", False, "muon"),
    (NANO, 8192, 1, 64, "fp32", False, "adafactor"),
    (NANO, 8192, 1, 64, "fp32", False, "adalomo"),
    (NANO, 8192, 1, 64, "fp32", False, "apollo"),
]


@pytest.mark.parametrize(("size", "vocab", "rows", "tokens", "precision", "checkpointing", "optimizer"), STEPS)
def test_estimate_is_within_ten_percent_of_a_real_step(size, vocab, rows, tokens, precision, checkpointing, optimizer):
    for name, package in (("adalomo", "lomo_optim"), ("apollo", "apollo_torch")):
        if optimizer == name:
            pytest.importorskip(package)
    model = small_model(size, vocab, precision)
    if checkpointing:
        Efficient.enable_checkpointing(model)
    measured = measured_peak_bytes(model, rows, tokens, precision, optimizer)
    estimate = Efficient.estimate_memory(
        model, rows, tokens, optimizer=optimizer, precision=precision, checkpointing=checkpointing
    )
    assert estimate.peak_bytes == pytest.approx(measured, rel=0.1)


def test_savings_are_those_of_real_steps():
    def measure(precision="fp32", checkpointing=False, optimizer="adamw"):
        model = small_model(NARROW, 512)
        if checkpointing:
            Efficient.enable_checkpointing(model)
        return measured_peak_bytes(model, 4, 128, precision, optimizer)

    savings, before = Efficient.estimate_training_savings(small_model(NARROW, 512), 4, 128), measure()
    assert savings["checkpointing"] == pytest.approx(before - measure(checkpointing=True), rel=0.1)
    assert savings["mixed precision"] == pytest.approx(before - measure("mixed"), rel=0.1)
    assert savings["adam8bit"] == pytest.approx(before - measure(optimizer="adam8bit"), rel=0.1)
    assert savings["all"] > max(saved for name, saved in savings.items() if name != "all")
