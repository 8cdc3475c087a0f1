"""ModelHost: loads the roles that are asked for, and frees everything when it is closed, whoever holds a model."""

from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch

from core.types import Phase, Role, UnmappedMemory
from models.host import ModelHost
from rollout.types import ScoringRow
from schemas.compose import compose_run_config
from schemas.run import load_run_config
from tests.helpers.tiny_run import write_random_model

ROWS = [ScoringRow(token_ids=[5, 6, 7, 8, 9], spans=((2, 5),))]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    names = {name: write_random_model(folder / name, seed) for seed, name in enumerate(("teacher", "student"))}
    words = [f"model_name_or_path={names['teacher']}", f"student_model={names['student']}"]
    return load_run_config(compose_run_config("teacher_rlt_tiny", words))


def make_host(config, *roles: Role) -> ModelHost:
    return ModelHost(config, roles=roles, max_score_tokens=64)


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers, and what bitsandbytes keeps beside them."""
    kept = [getattr(getattr(module, "state", None), name, None) for module in model.modules() for name in ("CB", "SCB")]
    return [*model.parameters(), *model.buffers(), *(tensor for tensor in kept if tensor is not None)]


def num_values(models: list[torch.nn.Module]) -> int:
    return sum(tensor.numel() for model in models for tensor in tensors_of(model))


@pytest.mark.parametrize("precision", ["load_in_8bit", "load_in_4bit", "bfloat16"])
def test_a_closed_host_has_freed_every_weight_although_somebody_holds_the_models(precision, config):
    args = replace(
        config.model_args, load_in_8bit=precision == "load_in_8bit", load_in_4bit=precision == "load_in_4bit"
    )
    with make_host(replace(config, model_args=args), Role.TEACHER, Role.STUDENT) as host:
        for role in host.roles:
            host.score(role, ROWS, 1.0)
        held = [host.teacher, host.student]
        assert num_values(held) > 50_000
    assert num_values(held) == 0
    host.close()
    with pytest.raises(ValueError, match="the host is closed"):
        host.score(Role.STUDENT, ROWS, 1.0)


def test_a_host_loads_the_roles_that_are_asked_for_and_no_other(config):
    scored = {}
    with make_host(config, Role.STUDENT) as host:
        scored[Role.STUDENT] = host.score(Role.STUDENT, ROWS, 1.0)
        with pytest.raises(ValueError, match="no teacher: the host was made for student"):
            host.policy_logprobs([[1, 2]], adapter_on=True)
    with make_host(config, Role.TEACHER) as host:
        scored[Role.TEACHER] = host.score(Role.TEACHER, ROWS, 1.0)
        assert host.student is None and host.reference is None
        for role in (Role.STUDENT, Role.REFERENCE):
            with pytest.raises(ValueError, match=f"no {role}: the host was made for teacher"):
                host.score(role, ROWS, 1.0)
    with make_host(config, *Role) as host:
        for role, expected in scored.items():
            assert torch.equal(host.score(role, ROWS, 1.0)[0][0], expected[0][0])


@pytest.mark.parametrize("role", [Role.STUDENT, Role.REFERENCE])
def test_a_role_without_weights_of_its_own_brings_the_teachers_base(role, config):
    shared = replace(config, student_model=None, reference_model="shared")
    with make_host(shared, role) as host, host.acting_as(role) as model:
        assert model is host.teacher


def test_a_host_closes_its_engine_once_and_frees_the_weights_although_that_fails(config):
    events = []

    class Engine:
        def sleep(self):
            events.append("sleep")

        def wake(self):
            events.append("wake")

        def unmapped_memory(self):
            return UnmappedMemory()

        def close(self):
            events.append("close")
            raise RuntimeError("CUDA error")

    host = make_host(config, Role.TEACHER)
    host.attach_engine(Engine())
    with host.phase(Phase.GENERATE):
        events.append("generate")
    teacher = host.teacher
    with pytest.raises(RuntimeError, match="CUDA error"):
        host.close()
    host.close()
    assert events == ["sleep", "wake", "generate", "sleep", "close"]
    assert num_values([teacher]) == 0


def test_after_a_host_is_closed_another_run_of_the_process_trains(config):
    """bitsandbytes remembers every embedding of a model that was trained, and asks it at each new optimizer."""
    with make_host(config, Role.TEACHER) as host:
        embedding = host.teacher.get_input_embeddings()
        bnb.optim.GlobalOptimManager.get_instance().register_module_override(embedding, "weight", {"optim_bits": 32})
    parameter = torch.nn.Parameter(torch.ones(8))
    parameter.grad = torch.ones(8)
    bnb.optim.AdamW8bit([parameter], lr=0.1).step()
    assert (parameter < 1).all()
