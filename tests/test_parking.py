"""A student in host memory: the same bits after every trip, off the GPU outside scoring, streamed or whole."""

from contextlib import closing
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch

from core.types import Phase, Role
from models import parking
from models.evaluation import evaluation_mode
from models.host import ModelHost
from models.load import load_frozen
from models.parking import ParkedModel
from optimization.fp8_optim import Fp8Linear
from optimization.training_optim import compile_forward
from planner.components import weight_bytes
from planner.plan import plan
from planner.shapes import load_shape
from planner.teacher import choose_parking
from rollout.logprobs import score_spans
from rollout.types import ScoringRow
from schemas.compose import compose_run_config
from schemas.run import load_run_config
from tests.helpers.tiny_run import make_trainer, write_random_model

CPU = torch.device("cpu")
ROWS = [ScoringRow(token_ids=list(range(2, 2 + n)), spans=((1, n),)) for n in (9, 30, 17)]
_STAYS = (".code", ".code2", ".offset")
PRECISIONS = ["load_in_8bit", "load_in_4bit", "bfloat16", "fp8"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = [write_random_model(folder / name, seed, num_layers=3) for seed, name in enumerate(("teacher", "student"))]
    words = [f"model_name_or_path={names[0]}", f"student_model={names[1]}"]
    return load_run_config(compose_run_config("teacher_rlt_tiny", words))


def in_precision(config, precision):
    args = replace(
        config.model_args, load_in_8bit=precision == "load_in_8bit", load_in_4bit=precision == "load_in_4bit"
    )
    return replace(config, model_args=args, scoring_weights="fp8" if precision == "fp8" else "auto")


def every_tensor(model):
    """By name: parameters, buffers, and what bitsandbytes keeps beside them, wherever it hangs just now."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            holder = module.weight if module.weight.CB is not None else module.state
            found |= {f"{name}.CB": holder.CB, f"{name}.SCB": holder.SCB}
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            found |= {f"{name}.absmax": state.absmax, f"{name}.code": state.code, f"{name}.offset": state.offset}
            found |= {f"{name}.absmax2": state.state2.absmax, f"{name}.code2": state.state2.code}
    return found


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).clone()


def num_bytes_here(model):
    """Without bitsandbytes' tables of a few values, which stay."""
    found = {name: t.untyped_storage() for name, t in every_tensor(model).items() if not name.endswith(_STAYS)}
    return sum({storage.data_ptr(): storage.nbytes() for storage in found.values()}.values())


@pytest.mark.parametrize("slab_bytes", [512, 3 * 512, parking._SLAB_BYTES])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_bit_is_the_same_after_several_trips(precision, slab_bytes, config, monkeypatch):
    """Also where a tensor lies across blocks of the host's memory."""
    monkeypatch.setattr(parking, "_SLAB_BYTES", slab_bytes)
    model = load_frozen(config.student_model, in_precision(config, precision), CPU)
    before = {name: bits(tensor) for name, tensor in every_tensor(model).items()}
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in every_tensor(model).items()}
    num_bytes = num_bytes_here(model)
    parked = ParkedModel(model, CPU, streamed=False)
    for _ in range(3):
        assert num_bytes_here(model) < 0.1 * num_bytes
        parked.fetch()
        parked.wait()
        with evaluation_mode(model):
            score_spans(model, ROWS)
        now = every_tensor(model)
        assert now.keys() == before.keys()
        assert all(torch.equal(bits(now[name]), before[name]) for name in before)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in now.items()} == shapes
        parked.leave()
    assert parked.num_bytes <= 1.1 * num_bytes + 512 * len(before)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_parked_student_scores_the_same_bits(precision, streamed, config):
    config = in_precision(config, precision)
    scored = {}
    for where in ("none", "streamed" if streamed else "scoring"):
        with ModelHost(config, roles=[Role.STUDENT], max_score_tokens=32, student_parking=where) as host:
            kinds = {type(module) for module in host.student.modules()}
            assert precision != "fp8" or Fp8Linear in kinds
            scored[where] = [host.score(Role.STUDENT, ROWS, 0.7) for _ in range(3)]
            assert where == "none" or num_bytes_here(host.student) < 5_000
    plain, parked = scored.values()
    assert all(torch.equal(a[0], b[0]) for x, y in zip(plain, parked, strict=True) for a, b in zip(x, y, strict=True))


def test_at_most_two_blocks_of_a_streamed_student_are_here_at_once(config):
    model = load_frozen(config.student_model, in_precision(config, "load_in_8bit"), CPU)
    blocks = model.get_decoder().layers
    in_blocks, total = sum(num_bytes_here(block) for block in blocks), num_bytes_here(model)
    parked, seen = ParkedModel(model, CPU, streamed=True), []
    for block in blocks:
        block.self_attn.register_forward_hook(lambda *_: seen.append(num_bytes_here(model)))
    assert "one by one" in compile_forward(model, backend="eager").skipped
    parked.fetch()
    score_spans(model, ROWS)
    assert len(seen) >= 3 and max(seen) < total - in_blocks + 2.2 * in_blocks / 3
    parked.leave()
    assert num_bytes_here(model) < 0.1 * total


def test_the_student_is_here_from_its_first_use_to_the_end_of_scoring(config):
    with ModelHost(config, roles=list(Role), max_score_tokens=64, student_parking="early") as host:
        is_here = lambda: num_bytes_here(host.student) > 5_000  # noqa: E731
        assert not is_here()
        with host.phase(Phase.GENERATE):
            host.prefetch_student()
            assert is_here()
        with host.phase(Phase.SCORE):  # of the policy alone
            host.score(Role.TEACHER, ROWS, 1.0)
        assert is_here()
        with host.phase(Phase.SCORE):
            for _ in range(2):
                host.score(Role.STUDENT, ROWS, 1.0)
                assert is_here()
        assert not is_here()
        host.score(Role.STUDENT, ROWS, 1.0)
        assert not is_here()
        host.prefetch_student()
        with host.phase(Phase.GENERATE):  # an engine that wakes needs the room
            assert not is_here()


def test_a_student_that_has_no_room_beside_the_generator_is_not_prefetched(config):
    with ModelHost(config, roles=list(Role), max_score_tokens=64, student_parking="scoring") as host:
        host.prefetch_student()
        assert num_bytes_here(host.student) < 5_000


def test_a_run_does_with_its_student_what_its_plan_says(config, tmp_path):
    words = [f"student_model={config.student_model}", "student_parking=host"]
    with closing(make_trainer(config.model_name_or_path, tmp_path / "run", *words)) as trainer:
        assert "parked student (early)" in trainer.plan.host_components
        assert num_bytes_here(trainer.host.student) < 5_000


@pytest.mark.slow
def test_a_run_earns_the_same_rewards_and_gradients_with_its_student_parked(config, tmp_path, monkeypatch):
    """Two steps as `train.py` takes them; the plan's answer is replaced, as every tiny student fits its GPU."""
    logs = {}
    for where in ("none", "early", "streamed"):
        monkeypatch.setattr("trainers.build.choose_parking", lambda *_, where=where: where)
        words = [f"student_model={config.student_model}", "max_steps=2", "student_parking=auto", "report_to=none"]
        trainer = make_trainer(config.model_name_or_path, tmp_path / where, *words)
        trainer.train()
        adapter = [bits(p) for p in trainer.host.teacher.parameters() if p.requires_grad]
        log = trainer.state.log_history
        kept = [{k: v for k, v in row.items() if "reward" in k or k.startswith("rlt/")} for row in log]
        logs[where] = kept, adapter
        trainer.close()
    plain = logs.pop("none")
    assert any(row for row in plain[0])
    for kept, adapter in logs.values():
        assert kept == plain[0]
        assert all(torch.equal(a, b) for a, b in zip(adapter, plain[1], strict=True))


# The plan


def planned(card_gb, **changes):
    values = compose_run_config("teacher_rlt_mono_85gb")
    return load_run_config({**values, **changes}), int(card_gb * 1e9)


def settings_and_answer(card_gb, **changes):
    from planner.plan import settings_of

    config, card = planned(card_gb, **changes)
    settings = settings_of(config)
    return settings, card, choose_parking(settings, card)


@pytest.mark.parametrize(
    ("card_gb", "changes", "answer"),
    [
        (85, {}, "none"),
        (40, {}, "scoring"),
        (24, {"per_device_train_batch_size": 1}, "streamed"),
        (85, {"student_parking": "host"}, "early"),
        (40, {"student_parking": "none"}, "none"),
        (24, {"student_model": None}, "none"),
    ],
)
def test_the_plan_parks_a_student_as_mildly_as_the_card_allows(card_gb, changes, answer):
    settings, card, parking_ = settings_and_answer(card_gb, **changes)
    assert parking_ == answer
    made = plan(settings, card)
    student = 0 if settings.student is None else weight_bytes(load_shape("bespokelabs/Bespoke-Stratos-7B"), "int8")
    train, generate, score = (made.components[p].get("student", 0) for p in (Phase.TRAIN, Phase.GENERATE, Phase.SCORE))
    assert train == (round(student) if answer == "none" else 0)
    assert generate == (round(student) if answer in ("none", "early") else 0)
    assert (0.25 * student < score < 0.35 * student) if answer == "streamed" else score == round(student)
    parked = made.host_components.get(f"parked student ({answer})", 0)
    assert parked == 0 if answer == "none" else student <= parked <= student + parking._SLAB_BYTES


def test_auto_is_never_worse_than_either_setting():
    """It fits where any arrangement fits, and its cache is the largest."""
    for card_gb in (20, 24, 28, 34, 40, 48, 85):
        made = {}
        for setting in ("auto", "none", "host"):
            settings, card, _ = settings_and_answer(card_gb, per_device_train_batch_size=1, student_parking=setting)
            made[setting] = plan(settings, card)
        fitting = [made[name] for name in ("none", "host") if made[name].fits()]
        assert made["auto"].fits() == bool(fitting)
        if fitting:
            assert made["auto"].kv_cache_bytes == max(p.kv_cache_bytes for p in fitting)


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("streamed", [False, True])
def test_on_a_card_the_memory_is_freed_and_the_copy_runs_beside_the_computation(streamed, tmp_path):
    """2 GB of blocks: launching `fetch` takes no time, computing goes on beside it, and all of it goes."""
    device = torch.device("cuda")
    folder = write_random_model(tmp_path / "model", hidden=2048, num_layers=12)
    values = compose_run_config("teacher_rlt_tiny", [f"model_name_or_path={folder}", f"student_model={folder}"])
    before = torch.cuda.memory_allocated()
    model = load_frozen(str(folder), in_precision(load_run_config(values), "bfloat16"), device)
    resident = torch.cuda.memory_allocated() - before
    plain = score_spans(model, ROWS)
    parked = ParkedModel(model, device, streamed=streamed)
    assert torch.cuda.memory_allocated() - before < 0.05 * resident
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    def milliseconds(work):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def compute():
        for _ in range(30):
            matrix @ matrix

    def copy():
        parked.fetch()
        parked.wait()

    compute()
    for _ in range(3):
        copying, computing = milliseconds(copy), milliseconds(compute)
        parked.leave()

    def both():
        parked.fetch()
        compute()
        parked.wait()

    together = milliseconds(both)
    print(f"copy {copying:.1f} ms, compute {computing:.1f} ms, both {together:.1f} ms")
    assert together < max(copying, computing) + 0.5 * min(copying, computing)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(score_spans(model, ROWS), plain, strict=True))
    torch.cuda.reset_peak_memory_stats()
    score_spans(model, ROWS)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < (0.6 if streamed else 1.5) * resident + matrix.nbytes
    parked.leave()
    assert torch.cuda.memory_allocated() - before < 0.05 * resident + matrix.nbytes
    parked.close()
