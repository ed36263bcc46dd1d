"""DDP and FSDP2 over two processes end where one process ends; see distributed_run.py for what they train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., Any]) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    script, folder = Path(__file__).with_name("distributed_run.py"), tmp_path_factory.mktemp("ranks")
    return run_ranks(lambda rank: [str(script), str(folder), str(rank)], lambda rank: {})


@pytest.mark.parametrize("name", ["one_sided", "two_sided", "kept", "sgd"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(ranks, wrapper, name):
    """In two_sided and sgd with clipping, and a trust bound that binds."""
    for found in ranks:
        assert found[f"moved {name}"] > 1e-3
        assert found[f"{wrapper} {name}"] < 1e-12


def test_parameters_that_are_sharded_after_the_optimizer_was_built_are_preconditioned(ranks):
    for found in ranks:
        assert found["sharded type"] == "DTensor"
        assert found["fsdp2 swapped"] < 1e-12


def test_sharded_training_resumes_from_a_distributed_state_dict(ranks):
    """With preconditioners that are kept for two steps, between the two."""
    for found in ranks:
        assert found["fsdp2 resumed"] == 0


@pytest.mark.parametrize("wrapper", ["alone", "ddp", "fsdp2"])
def test_in_graph_with_torch_adamw_equals_the_optimizer(ranks, wrapper):
    for found in ranks:
        assert found[f"in-graph {wrapper}"] < 1e-12


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_hooks_with_torch_adamw_equal_the_optimizer(ranks, wrapper):
    for found in ranks:
        assert found[f"hooks {wrapper}"] < 1e-12


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_so_they_do_with_grams(ranks, wrapper):
    for found in ranks:
        assert found[f"h_aware {wrapper}"] < 1e-12


def test_a_gradient_broken_on_one_rank_stops_all_of_them(ranks):
    for found in ranks:
        assert "R of pair 1 (1.lr_L) in group 0. Nothing was updated" in found["broken"]
