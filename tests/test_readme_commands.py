"""The commands of README.md, as they stand there, in a fresh copy of the repository.

Every command of a ```bash block is in one of the lists below; a new one fails the test until it is. The copy links to
the environment that runs the tests, so that nothing is installed, and sees no GPU.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from schemas.compose import CONFIG_ROOT
from tests.helpers.command import Done, run_command

pytestmark = pytest.mark.slow

ROOT = CONFIG_ROOT.parent


@dataclass(frozen=True)
class Expected:
    status: int
    says: str
    added: str = ""
    """Settings that make a run of minutes one of seconds."""
    timeout_s: int | None = None
    """For a command that goes on until it is stopped."""


NO_GPU = Expected(2, "no CUDA device on this machine")

# In the order of the README: later ones look at what earlier ones left.
WALKED = {
    "./launch_mono.sh": Expected(0, "after 2 steps", added="max_steps=2"),
    "python test_config_85gb.py": Expected(0, "ready"),
    "python test_config_85gb.py --gpu-gb 24 --all": Expected(1, "teacher_rlt_mono_85gb does not fit a GPU of 24.0 GB"),
    "python -m planner.contexts --gpu-gb 24": Expected(0, "longest context that fits"),
    "./launch_mono.sh teacher_rlt_mono_85gb max_steps=300 logging_steps=2": NO_GPU,
    "python train.py --config-name=teacher_rlt_mono_85gb learning_rate=2e-5": NO_GPU,
    "./optimize.sh --all": Expected(0, "to train with it:"),
    "./optimize.sh --memory --recover-nan --train teacher_rlt_mono_85gb": NO_GPU,
    "./launch_mono.sh pipeline_tiny --dry-run": Expected(0, "57 jobs, 0 of them finished"),
    "python train.py --config-name=pipeline_85gb --dry-run": Expected(0, "5 jobs, 0 of them finished"),
    "./launch_mono.sh llada_tiny": Expected(
        0, "after 2 steps", added="max_steps=2 num_eval_prompts=4 num_likelihood_samples=2"
    ),
    "./optimize.sh --all --train --model llada --size medium max_steps=1 --dry-run": Expected(0, "to train with it:"),
    "./launch_mono.sh teacher_rlt_mono_85gb dataset_id_or_path=my.jsonl "
    "model_name_or_path=Qwen/Qwen2.5-3B-Instruct student_model=Qwen/Qwen2.5-3B-Instruct": NO_GPU,
    """cat > explanations.jsonl <<'END'
{"question": "1+0+5+5+2", "solution": "=3", "explanation": "1+0=1;1+5=6;6+5=1;1+2=3;"}
{"question": "1+0+5+5+2", "solution": "=3", "explanation": "ans 3;"}
{"question": "1+0+5+5+2", "solution": "=3", "explanation": "<think>1+0=1;</think>"}
END""": Expected(0, ""),
    "python -m scoring explanations.jsonl scored.jsonl --run results/teacher_rlt_tiny": Expected(0, "scored.jsonl"),
    "python -m models.merge results/teacher_rlt_tiny merged": Expected(0, "merged"),
    "tail -f results/teacher_rlt_tiny/logs/training.log": Expected(124, "the results are in", timeout_s=2),
    "python -m trainers.watch results/teacher_rlt_tiny": Expected(0, "teacher_rlt_tiny finished, step 2/2"),
    "python -m runs.report results/teacher_rlt_tiny": Expected(
        0, "the report is in results/teacher_rlt_tiny/report.html"
    ),
}
NOT_WALKED = {
    "./launch_mono.sh pipeline_tiny": "20 minutes; tests/test_recipe.py runs it with other seeds",
    "make test": "the tests themselves",
    "python -m vllm.entrypoints.openai.api_server --model ~/.cache/rlt/arithmetic-qwen2-v4 "
    "--enable-lora --max-lora-rank 16 --lora-modules teacher=results/teacher_rlt_tiny "
    "--host 127.0.0.1": "a server, which goes on",
}


def readme_commands() -> list[str]:
    """Lines of the bash blocks: continued ones and texts in place joined, comments and runs of spaces left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    script = "\n".join(blocks).replace("\\\n", " ")
    texts = re.findall(r"^[^\n]*<<'END'\n.*?^END$", script, re.MULTILINE | re.DOTALL)
    for text in texts:
        script = script.replace(text, text.splitlines()[0])
    lines = [" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in script.splitlines()]
    in_place = {text.splitlines()[0]: text for text in texts}
    return [in_place.get(line, line) for line in lines if line]


def repository_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).is_file() and line != ".venv"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository as somebody gets it, beside a data file of their own."""
    folder = tmp_path_factory.mktemp("fresh") / "checkout"
    for file in repository_files():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
    (folder / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    (folder / "my.jsonl").write_text('{"question": "1+1", "solution": "2"}\n')
    return folder


@pytest.fixture(scope="module")
def walk(copy) -> dict[str, Done]:
    """What each command did, run one after the other."""
    environment = {
        "PATH": f"{copy / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",  # as `source .venv/bin/activate` does
        "PYTHON": "true",  # the scripts' set-up is left out: the environment is there
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = {}
    for command, expected in WALKED.items():
        stop = f"timeout {expected.timeout_s} " if expected.timeout_s else ""
        done[command] = run_command("bash", "-c", f"{stop}{command} {expected.added}".strip(), cwd=copy, **environment)
    return done


def test_every_command_of_the_readme_is_listed_and_every_listed_one_is_there():
    assert set(readme_commands()) == WALKED.keys() | NOT_WALKED.keys()
    assert [command for command in readme_commands() if command in WALKED] == list(WALKED)


@pytest.mark.parametrize("command", WALKED)
def test_a_command_does_what_the_readme_says(command, walk):
    done, expected = walk[command], WALKED[command]
    assert done.status == expected.status, done.text[-3000:]
    assert expected.says in " ".join(done.text.split()) and "Traceback" not in done.text, done.text[-3000:]


def test_the_commands_change_no_file_of_the_repository(walk, copy):
    assert [file for file in repository_files() if (copy / file).read_bytes() != (ROOT / file).read_bytes()] == []
    results = {path.name for path in (copy / "results").iterdir()}
    assert results == {"teacher_rlt_tiny", "llada_tiny"}, "what was refused has left nothing"
