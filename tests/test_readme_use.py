"""What README.md says about Python, scoring and using a teacher runs as it is written, from an empty folder."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from schemas.compose import CONFIG_ROOT

pytestmark = pytest.mark.slow
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
ROOT = CONFIG_ROOT.parent


def section(title: str, language: str) -> list[str]:
    """Code of a README section."""
    (text,) = re.findall(rf"^## {title}\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(rf"```{language}\n(.*?)\n```", text, re.DOTALL)


def run(cwd: Path, *command: str) -> str:
    """Standard output of a command in an environment like that of `source .venv/bin/activate`."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),  # what the environment's .pth file does
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder in which the section on Python was run."""
    path = tmp_path_factory.mktemp("readme")
    (code,) = section("From Python", "python")
    (path / "output.txt").write_text(run(path, "python", "-c", code))
    return path


def test_python_plans_trains_explains_and_scores(folder):
    output = (folder / "output.txt").read_text()
    assert "teacher_rlt_mono_85gb on 24.0 GB, predicted" in output and "step 2/2" in output
    assert re.search(r"^ +explanation +reward +problem$", output, re.MULTILINE)
    summary = json.loads((folder / "results/teacher_rlt_tiny/summary.json").read_text())
    assert summary["steps"] == 2


def test_the_scoring_command(folder):
    (command,) = section("Score explanations of your own", "bash")
    run(folder, "bash", "-c", command)
    honest, leak, foreign = (json.loads(line) for line in (folder / "scored.jsonl").read_text().splitlines())
    assert honest["reward"] > leak["reward"] + 1 and honest["problem"] is None
    assert foreign["reward"] is None and "another format" in foreign["problem"]


def test_transformers_and_peft(folder):
    code, _ = section("Use the teacher", "python")
    assert run(folder, "python", "-c", code).strip()


@needs_vllm
def test_vllm_with_the_adapter(folder):
    _, code = section("Use the teacher", "python")
    (folder / "with_vllm.py").write_text(code)
    assert run(folder, "python", "with_vllm.py").strip().splitlines()[-1]


def test_the_merged_checkpoint_explains_without_peft(folder):
    (command,) = (code for code in section("Use the teacher", "bash") if "models.merge" in code)
    run(folder, "bash", "-c", command)
    code, _ = section("Use the teacher", "python")
    code = re.sub(r'folder = ".*?"', 'folder = "merged"', code)
    code = re.sub(r"\n    quantization_config=.*?,\n", "\n", code).replace("from peft", "from transformers")
    code = code.replace("AutoPeftModelForCausalLM", "AutoModelForCausalLM")
    assert "peft" not in code.lower()
    assert run(folder, "python", "-c", code).strip()


def test_the_quickstart_notebook_runs_from_top_to_bottom(tmp_path):
    pytest.importorskip("nbclient", reason="nbclient is not installed (make install)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (make install)")
    code = f"""
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read({str(ROOT / "examples/quickstart.ipynb")!r}, as_version=4)
NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, "executed.ipynb")
"""
    run(tmp_path, "python", "-c", code)
    cells = json.loads((tmp_path / "executed.ipynb").read_text())["cells"]
    shown = [json.dumps(cell["outputs"]) for cell in cells if cell["cell_type"] == "code"]
    imports, planned, trained, explained, scored = shown
    assert imports == "[]" and "KV cache" in planned and "text/html" in planned
    assert "step 20/20" in "".join(re.sub(r"\\u001b\[[0-9;]*m", "", trained)) and "held-out" in trained
    assert explained.count("=") >= 4 * 3
    assert "solution_log_prob_reward" in scored and "another format" in scored
    summary = json.loads((tmp_path / "results/quickstart/summary.json").read_text())
    assert summary["eval_solution_log_prob"]["after"] > summary["eval_solution_log_prob"]["before"] + 0.3
