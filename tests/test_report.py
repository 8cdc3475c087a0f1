"""report.html: what the page holds is what the folder holds, whatever state that is in, and text stays text."""

import hashlib
import json
import logging
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from optimization.record import nothing, records_table
from runs.metrics import METRICS_FILE, append_metrics
from runs.report.__main__ import main
from runs.report.page import _MAX_SAMPLE_BYTES, payload_of, report_html, write_report
from runs.report.read import read_run
from runs.report.samples import MAX_TEXT_CHARS
from runs.report.verdict import verdict_of
from runs.summary import FinishedRun
from runs.token_scores import write_token_scores
from tests.helpers.report_run import metrics_of, write_run
from trainers.start import _tell

EVIL = [
    "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>",
    "<!-- --> <![CDATA[ &lt;b&gt; &amp; ]]> ${policy} $payload \\u003c",
    "nul \x00 bell \x07 line\u2028paragraph\u2029 end",
    "right \u202eto left\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "x" * 1_000_000,
    "emoji \U0001f642\U0001f44d\U0001f3fd \u5e95\u8fba",
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "A", texts=EVIL)


def payload(*run_dirs):
    return payload_of([read_run(run_dir) for run_dir in run_dirs])


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.data = [], {}

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, text):
        if self.found:
            self.data[len(self.found)] = self.data.get(len(self.found), "") + text


def test_the_numbers_of_the_page_are_those_of_the_metrics_file(run_dir):
    run = payload(run_dir)["runs"][0]
    expected = {}
    for line in metrics_of(run_dir):
        for key, value in line.items():
            if key != "step":
                expected.setdefault(key, {})[line["step"]] = value
    shown = {key: dict(zip(run["axes"][axis], values, strict=True)) for key, (axis, values) in run["series"].items()}
    assert shown.keys() == expected.keys() and len(shown) > 20
    for key, values in expected.items():
        assert shown[key] == pytest.approx(values, rel=5e-6)
    figures = {figure["key"]: figure for figure in run["figures"]}
    rewards = list(expected["reward"].values())
    assert figures["reward"]["before"] == pytest.approx(sum(rewards[:5]) / 5, rel=5e-6)
    assert figures["reward"]["after"] == pytest.approx(sum(rewards[-5:]) / 5, rel=5e-6)
    held_out = list(expected["eval_solution_log_prob"].values())
    assert [figures["eval_solution_log_prob"][k] for k in ("before", "after")] == pytest.approx(held_out, rel=5e-6)
    assert run["seconds"]["generate"] == pytest.approx(sum(expected["time/generate_s"].values()), abs=1e-3)


def test_every_logged_figure_is_in_exactly_one_panel(run_dir):
    shown = [key for panel in payload(run_dir)["panels"] for key, _ in panel["lines"]]
    logged = {key for line in metrics_of(run_dir) for key in line} - {"step", "memory/train_predicted_gb"}
    assert sorted(shown) == sorted(logged)


def test_text_of_a_model_stays_text_and_nothing_of_the_page_is_loaded(run_dir):
    page = write_report([run_dir]).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    names = [name for name, _ in tags.found]
    assert names.count("script") == 2 and "img" not in names
    addresses = [
        value for name, attributes in tags.found for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses == ["data:,", "#main"]
    texts = {
        dict(tags.found[i - 1][1]).get("id"): text for i, text in tags.data.items() if tags.found[i - 1][0] == "script"
    }
    held = json.loads(texts["data"])
    shown = [
        row["e"] for s in held["runs"][0]["samples"]["completions"]["steps"] for g in s["groups"] for row in g["rows"]
    ]
    shown += [row["e"] for pair in held["runs"][0]["samples"]["held_out"]["pairs"] for row in pair["rows"]]
    for text in EVIL:
        assert text[:MAX_TEXT_CHARS] in shown
    policy = next(a["content"] for _, a in tags.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag in ("script", "style"):
        content = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)[-1]
        assert f"'sha256-{b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy


def test_half_a_surrogate_pair_can_be_written_and_comes_back():
    page = report_html({"text": "half \ud83d, \udc00, whole \U0001f642"})
    found = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert json.loads(found[1])["text"].encode("utf-16", "surrogatepass") == (
        "half \ud83d, \udc00, whole \U0001f642".encode("utf-16", "surrogatepass")
    )
    page.encode("utf-8")


def test_a_torn_metrics_file_leaves_its_whole_lines(tmp_path):
    run_dir = write_run(tmp_path / "A", num_steps=6, finished=False)
    file = run_dir / METRICS_FILE
    file.write_bytes(file.read_bytes()[:-40] + b"\xff\n[1, 2]\n")
    run = payload(run_dir)["runs"][0]
    assert f"{METRICS_FILE}: 2 torn lines left out" in run["missing"]
    assert len(run["series"]["reward"][1]) == 6 and "eval_reward" in run["series"]
    assert "so far, at step 6 of 6" in run["verdict"]["sentence"]


@pytest.mark.parametrize("damage", ["removed", "cut", "no parquet", "other columns"])
def test_a_damaged_table_is_said_and_the_others_are_shown(tmp_path, damage):
    run_dir = write_run(tmp_path / "A", num_steps=3)
    file = run_dir / "completions" / "completions_00002.parquet"
    evaluation = run_dir / "evaluations" / "evaluation_00003.parquet"
    for table in (file, evaluation):
        match damage:
            case "removed":
                table.unlink()
            case "cut":
                table.write_bytes(table.read_bytes()[:-100])
            case "no parquet":
                table.write_text("")
            case "other columns":
                write_token_scores(run_dir, "completions", 9, {"a": [1]})
                (run_dir / "token_scores" / "completions_00009.parquet").replace(table)
    run = payload(run_dir)["runs"][0]
    samples = run["samples"]
    assert [shown["step"] for shown in samples["completions"]["steps"]] == [1, 3]
    assert samples["held_out"]["steps"] == [0] and len(samples["held_out"]["pairs"]) == 10
    said = any("completions_00002.parquet could not be read" in text for text in run["missing"])
    assert said == (damage in ("cut", "no parquet"))
    assert run["verdict"]["title"].startswith("Better") and "±" not in run["verdict"]["sentence"]


def test_a_run_without_token_scores_shows_its_texts(tmp_path):
    run_dir = write_run(tmp_path / "A", num_steps=2)
    for file in (run_dir / "token_scores").iterdir():
        file.unlink()
    samples = payload(run_dir)["runs"][0]["samples"]
    rows = [row for step in samples["completions"]["steps"] for group in step["groups"] for row in group["rows"]]
    assert len(rows) == 16 and not any("st" in row or "et" in row for row in rows)


def test_a_run_that_never_finished_a_step_has_a_page_that_says_so(tmp_path):
    run_dir = write_run(tmp_path / "A", num_steps=1)
    for file in [METRICS_FILE, "summary.json", "logs/training.log", "completions/completions_00001.parquet"]:
        (run_dir / file).unlink()
    run = payload(run_dir)["runs"][0]
    assert run["verdict"]["title"] == "No step was finished"
    assert {"no metrics.jsonl: no step was logged", "no logs/training.log", "no table in completions/"} <= {
        *run["missing"]
    }
    assert write_report([run_dir]).stat().st_size > 50_000


def test_the_command_refuses_what_is_no_run_and_writes_nothing(tmp_path, capsys):
    assert main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert "holds no config.yaml" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_command_writes_into_the_folder_of_one_run_and_here_for_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x/A", "y/A"):
        write_run(tmp_path / name, num_steps=2)
    assert main(["x/A"]) == 0 and (tmp_path / "x/A/report.html").exists()
    assert main(["x/A", "y/A"]) == 0 and (tmp_path / "report.html").exists()
    assert [run["name"] for run in payload(Path("x/A"), Path("y/A"))["runs"]] == ["x/A", "y/A"]


def test_differences_from_the_shipped_configuration(tmp_path):
    run_dir = write_run(tmp_path / "A", num_steps=2, overrides=("learning_rate=1e-4", "model_args.lora_r=4"))
    shipped = payload(run_dir)["runs"][0]["shipped"]
    rows = {row[0]: row[2] for row in shipped["rows"]}
    assert shipped["name"] == "teacher_rlt_tiny"
    assert rows == {"learning_rate": "0.0001", "max_steps": "2", "model_args.lora_r": "4"}


# The sample


def test_a_large_sample_is_cut_to_whole_groups_of_evenly_spread_steps(tmp_path):
    run_dir = write_run(tmp_path / "A", num_steps=12, num_prompts=4, num_generations=8, num_words=800, num_held_out=40)
    run = read_run(run_dir)
    held = payload_of([run, run, run, run, run, run])["runs"][0]["samples"]
    assert len(json.dumps(held, separators=(",", ":"))) < 1.1 * _MAX_SAMPLE_BYTES / 6
    completions = held["completions"]
    steps = [shown["step"] for shown in completions["steps"]]
    assert 4 <= len(steps) < 12 and steps[0] == 1 and steps[-1] == 12
    groups = [group for shown in completions["steps"] for group in shown["groups"]]
    assert all(len(group["rows"]) == 8 for group in groups)
    assert completions["num_shown"] == 8 * len(groups) < completions["num_rows"] == 32 * len(steps)
    assert completions["num_steps"] == 12
    row = groups[0]["rows"][0]
    assert len(row["e"]) == MAX_TEXT_CHARS and row["cut"] > 0
    assert sum(row["et"]["l"]) <= MAX_TEXT_CHARS and len(row["et"]["l"]) == len(row["et"]["v"])
    assert 0 < len(held["held_out"]["pairs"]) < held["held_out"]["num_questions"] == 40


def test_token_values_lie_on_their_texts_in_utf16_units(tmp_path):
    text = "a\U0001f642b\u5e95"
    run_dir = write_run(tmp_path / "A", num_steps=1, num_held_out=0, texts=[text])
    row = payload(run_dir)["runs"][0]["samples"]["completions"]["steps"][0]["groups"][0]["rows"][0]
    assert row["e"] == text and row["et"]["l"] == [1, 2, 1, 1]
    assert row["st"]["l"] == [4, 7, 1] and row["st"]["o"] == 0


def test_the_folder_of_token_scores_stays_below_its_bound_and_covers_the_run(tmp_path):
    (tmp_path / "token_scores").mkdir()
    table = {"row": [0], "explanation_kl": [[float(i) for i in range(500)]]}
    write_token_scores(tmp_path, "evaluation", 0, table)
    size = (tmp_path / "token_scores" / "evaluation_00000.parquet").stat().st_size
    for step in range(1, 41):
        write_token_scores(tmp_path, "completions", step, table, max_folder_bytes=10 * size)
        assert sum(file.stat().st_size for file in (tmp_path / "token_scores").iterdir()) <= 10 * size
    steps = sorted(int(file.stem[-5:]) for file in (tmp_path / "token_scores").glob("completions_*"))
    gaps = [after - before for before, after in zip(steps, steps[1:], strict=False)]
    assert (steps[0], steps[-1]) == (1, 40) and len(steps) >= 8 and max(gaps) <= 8
    assert (tmp_path / "token_scores" / "evaluation_00000.parquet").exists()


# The head line


@pytest.mark.parametrize(
    ("gain", "title", "verb"),
    [(2.0, "Learned", "rose by"), (-2.0, "Got worse", "fell by"), (0.0, "No clear change", "")],
)
def test_the_head_line_says_whether_it_learned_and_by_how_much(tmp_path, gain, title, verb):
    verdict = verdict_of(read_run(write_run(tmp_path / "A", gain=gain, num_held_out=20)))
    assert verdict.title == title and verb in verdict.sentence
    amount, width = re.search(r"by (\S+) ± (\S+) nats per token", verdict.sentence).groups()
    assert float(amount) == pytest.approx(abs(gain), abs=0.5) and 0 < float(width) < 0.5


def test_without_evaluations_the_reward_is_judged(tmp_path):
    run_dir = write_run(tmp_path / "A", num_steps=30, num_held_out=0)
    sentence = verdict_of(read_run(run_dir)).sentence
    assert sentence.startswith("Reward rose by 1.") and "nothing held out tells more" in sentence


def test_a_masked_diffusion_run_is_judged_by_its_bound_and_has_no_tables_to_miss(tmp_path):
    (tmp_path / "config.yaml").write_text("method: masked_diffusion\nmax_steps: 10\nrun_name: llada_tiny\n")
    for step in range(11):
        bound = {"eval_nll_bound": 5.0 - step / 10, "eval_exact_match": 0.1} if step in (0, 10) else {}
        append_metrics(tmp_path / METRICS_FILE, step, bound | ({"loss": 3.0 - step / 10} if step else {}))
    held = payload(tmp_path)
    run = held["runs"][0]
    assert run["verdict"]["title"] == "Better, by how much is uncertain" and run["verdict"]["warnings"] == []
    assert (
        "fell by 1 nats per token, from 5 to 4, so far, at step 10 of 10 (lower is better" in run["verdict"]["sentence"]
    )
    assert {panel["title"] for panel in held["panels"]} >= {"Loss", "Held-out exact match"}
    assert run["missing"] == ["no logs/training.log", "no summary.json: the run has not ended"]
    assert run["samples"]["completions"]["num_steps"] == 0


@pytest.mark.parametrize(
    ("figures", "warning"),
    [
        ({"rlt/format_rate": 0.5}, "keep to the format"),
        ({"rlt/unprocessed_thought_kl_mean": 4.0}, "KL grew from 0.20 to 4.00"),
        ({"completions/clipped_ratio": 0.6}, "cut off at max_completion_length"),
        ({"frac_reward_zero_std": 0.9}, "groups of equal rewards"),
        ({"clip_ratio/region_mean": 0.4}, "clipped by the loss"),
        ({"entropy": 0.001}, "entropy fell"),
        ({"sampling/logp_difference": 0.5}, "Generator and trainer are 0.50"),
        ({"recovery/action": "skipped", "recovery/cause": "the loss is nan"}, "the loss is nan"),
        ({"grad_norm": float("nan")}, "not finite: grad_norm"),
        ({"memory/train_reserved_gb": 9.0, "memory/train_predicted_gb": 5.0}, "train 9.0 of 5.0 GB"),
        ({"eval_share/leak": 0.4}, "give the solution away"),
        ({"eval_solution_log_prob": -9.0}, "the reward is being hacked"),
    ],
)
def test_what_to_worry_about_is_said_and_nothing_else(tmp_path, figures, warning):
    run_dir = write_run(tmp_path / "A", num_steps=20)
    assert verdict_of(read_run(run_dir)).warnings == []
    for step in range(21, 61):
        append_metrics(run_dir / METRICS_FILE, step, figures)
    if "eval_solution_log_prob" in figures:
        (run_dir / "evaluations" / "evaluation_00060.parquet").write_bytes(
            (write_run(tmp_path / "B", gain=-6.0, num_steps=20) / "evaluations/evaluation_00020.parquet").read_bytes()
        )
    warnings = verdict_of(read_run(run_dir)).warnings
    assert len(warnings) == 1 and warning in warnings[0]


# At the end of a run


def test_a_finished_run_has_its_report_and_one_that_cannot_be_made_is_said(tmp_path, caplog):
    run_dir = write_run(tmp_path / "A", num_steps=2)
    told = []
    with caplog.at_level(logging.INFO, logger="rlt"):
        _tell(FinishedRun(folder=run_dir, summary={}), told.append)
        _tell(FinishedRun(folder=tmp_path / "none", summary={}), told.append)
    assert [run.folder for run in told] == [run_dir, tmp_path / "none"] and (run_dir / "report.html").exists()
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines[0] == ("INFO", f"the report is in {run_dir / 'report.html'}")
    assert lines[1][0] == "WARNING" and lines[1][1].endswith(f"to make it: python -m runs.report {tmp_path / 'none'}")


def test_the_optimizations_of_the_log_are_shown_as_it_has_them(tmp_path):
    run_dir = write_run(tmp_path / "A", num_steps=1, overrides=("recover_from_nan=true",))
    with open(run_dir / "logs" / "training.log", "a") as log_file:
        console = Console(file=log_file, width=160)
        console.print(records_table([nothing("packing", "there is nothing to pack")], "optimizations of the models"))
        console.print("something else")
    found = payload(run_dir)["runs"][0]["optimizations"]
    assert ["recover_from_nan", "true"] in found["settings"]
    (table,) = found["tables"]
    assert table.startswith("optimizations of the models\n┏") and table.endswith("┘")
    assert "there is nothing to pack" in table
