"""What is checked and set before a run on a GPU, with stand-ins for the GPU."""

from types import SimpleNamespace

import pytest
import torch

from preflight.hardware import check_hardware_and_plan
from schemas.compose import compose_run_config
from schemas.run import load_run_config


def config_of(*words, run="teacher_rlt_tiny"):
    return load_run_config(compose_run_config(run, words))


@pytest.fixture
def one_gpu(monkeypatch):
    """A CUDA build of torch that sees one GPU of 85 GB."""
    properties = SimpleNamespace(name="H100", major=9, minor=0, total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("run", ["teacher_rlt_tiny", "llada_tiny", "student_sft_tiny"])
def test_cudnns_attention_is_off_for_every_run_on_a_gpu(run, one_gpu):
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        check_hardware_and_plan(config_of("model_args.device_map=auto", run=run))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.gpu
def test_without_cudnn_attention_has_gradients_where_its_kernel_gives_nan():
    """pytorch#196678: a mask, a length of 64 mod 128, and queries whose every score is about -120."""
    length, head_dim = 704, 64
    query, key = (torch.randn(1, 1, length, head_dim, device="cuda", dtype=torch.bfloat16) * 0.1 for _ in range(2))
    query[..., 0], key[..., 0] = 1.0, -120 * head_dim**0.5
    value = torch.randn_like(query)
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None]
    check_hardware_and_plan(config_of("model_args.device_map=auto"))
    query.requires_grad_()
    torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    assert query.grad.isfinite().all()
