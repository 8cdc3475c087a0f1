"""Sampling from the policy: `make_generator` picks the engine, `Canary` watches it."""

from generation.base import Generator, SamplingSettings
from generation.canary import Canary
from generation.choose import (
    Precision,
    check_generator,
    make_generator,
    prepare_base,
    trainer_precision,
)
from generation.vllm_engine import BaseForVLLM

__all__ = [
    "BaseForVLLM",
    "Canary",
    "Generator",
    "Precision",
    "SamplingSettings",
    "check_generator",
    "make_generator",
    "prepare_base",
    "trainer_precision",
]
