"""Imports at a run's start: what is left out, and that nothing of it stays behind."""

import gc
import importlib.metadata
import importlib.util
import subprocess
import sys

import pytest

from core.imports import importing
from preflight.unneeded import unneeded_packages
from schemas.compose import CONFIG_ROOT

_IMPORTS = """
import gc, sys
from core.imports import importing
from preflight.unneeded import unneeded_packages

run = {{"report_to": "none", "generator": {generator!r}}}
with importing(unneeded_packages([run])):
    import trainers.teacher_run
assert gc.isenabled() and gc.get_freeze_count() > 100_000
from trl import GRPOTrainer
print(*(name for name in ("vllm", "wandb", "trackio", "opentelemetry") if name in sys.modules))
"""


@pytest.mark.parametrize("enabled", [True, False])
def test_afterwards_the_process_is_as_before(enabled, tmp_path, monkeypatch):
    (tmp_path / "left_out.py").touch()
    (tmp_path / "taken.py").write_text("import importlib.util\nfound = importlib.util.find_spec('left_out')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "taken", raising=False)
    before = importlib.metadata.packages_distributions
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError), importing(["left_out", "sys"]):
            assert not gc.isenabled()
            assert importlib.metadata.packages_distributions() is importlib.metadata.packages_distributions()
            import taken

            with pytest.raises(ImportError):
                import left_out  # noqa: F401
            raise ZeroDivisionError
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
        gc.unfreeze()
    assert taken.found is None
    assert importlib.util.find_spec("left_out") is not None
    assert sys.modules["sys"] is sys, "what is loaded stays"
    assert importlib.metadata.packages_distributions is before


def test_the_collector_goes_on_with_what_was_made_before_where_nothing_was_imported():
    with importing():
        import gc
    assert gc.get_freeze_count() == 0


def test_a_package_is_left_out_only_where_no_run_needs_it():
    assert set(unneeded_packages([{"report_to": "none", "generator": "auto"}])) >= {"wandb", "trackio", "opentelemetry"}
    for report_to in ("wandb", ["tensorboard", "wandb"], "all"):
        runs = [{"report_to": "none"}, {"report_to": report_to}]
        assert not {"wandb", "opentelemetry"} & set(unneeded_packages(runs))
    sampling = {"generator": "transformers"}
    assert "vllm" in unneeded_packages([sampling, sampling])
    for needs in ({}, {"generator": "auto"}, {"generator": "vllm"}, sampling | {"use_vllm_server": True}):
        assert "vllm" not in unneeded_packages([sampling, needs])


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["transformers", "auto"])
def test_the_libraries_do_without_what_is_left_out(generator):
    """Pins that TRL, transformers and vLLM take packages that count as not installed for optional."""
    script = _IMPORTS.format(generator=generator)
    done = subprocess.run([sys.executable, "-c", script], cwd=CONFIG_ROOT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    has_vllm = generator == "auto" and importlib.util.find_spec("vllm") is not None
    assert done.stdout.split() == (["vllm"] if has_vllm else [])
    assert "leaked" not in done.stderr, "what nanobind says of objects that no collector looks at any more"
