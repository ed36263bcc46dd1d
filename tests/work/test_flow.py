"""Matrices on their way: the same bytes whoever carries them, and nothing half-done in a sink."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from hf_lrq.decomposition import CompressedMatrix, InputGram, compress_matrix, generator_for, input_rotation
from hf_lrq.errors import CompressionError
from hf_lrq.spec import CompressionSpec
from hf_lrq.work import (
    Deferred,
    Executor,
    Held,
    Inline,
    LayerRecord,
    ModelSource,
    Site,
    Threads,
    compress_sites,
    make_plan,
)


class Listing:
    """A sink that only notes what came."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def put(self, site: Site, matrices: Sequence[CompressedMatrix]) -> None:
        assert len(matrices) == site.count
        self.labels.append(site.label)


def carried(model: nn.Module, spec: CompressionSpec, executor: Executor) -> dict[str, bytes]:
    plan = make_plan(model, spec)
    held = Held({site.label: model.get_parameter(site.parameter) for site in plan.specs})
    compress_sites(plan, plan.specs, held, held, executor)
    return {name: value.numpy().tobytes() for name, value in held.values.items()}


def test_executors_differ_in_nothing_but_time(homes: nn.Module, spec: CompressionSpec) -> None:
    with Threads(3) as threads:
        assert carried(homes, spec, threads) == carried(homes, spec, Inline())


def test_a_job_is_compress_matrix_with_the_name_and_seed_of_the_matrix(homes: nn.Module, spec: CompressionSpec) -> None:
    plan = make_plan(homes, CompressionSpec(default=spec.default, seed=5))
    site = next(site for site in plan.specs if site.label == "experts.down_proj")
    job = list(plan.jobs(site))[2]
    assert (job.name, job.kind, job.seed) == ("experts.down_proj.2", "experts", 5)
    W = homes.experts.down_proj[2]
    gram = InputGram.from_inputs(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    matrix, record = job.run(W, gram)
    rotation = input_rotation(5, job.name, 16, spec.default)
    expected = compress_matrix(W, gram, spec.default, generator_for(5, job.name), rotation)
    assert torch.equal(matrix.dense(), expected.dense())
    assert (record.name, record.kind, record.bits, record.n_tokens) == (job.name, "experts", 3, 64)


def test_grams_go_to_the_matrices_they_are_named_after(homes: nn.Module, spec: CompressionSpec) -> None:
    plan, records = make_plan(homes, spec), list[LayerRecord]()
    gram = InputGram.from_inputs(torch.randn(40, 32, generator=torch.Generator().manual_seed(0)))
    grams = {"experts.gate_up_proj.1": gram}
    compress_sites(plan, plan.specs, ModelSource(homes), Listing(), Inline(), grams, records.append)
    assert [record.name for record in records] == plan.matrices
    assert {record.name for record in records if record.n_tokens} == set(grams)


def test_a_failure_names_the_matrix_and_nothing_has_reached_the_sink(homes: nn.Module, spec: CompressionSpec) -> None:
    with torch.no_grad():
        homes.experts.down_proj[1, 0, 0] = float("inf")
    plan, sink = make_plan(homes, spec), Listing()
    with pytest.raises(CompressionError, match=r"^experts\.down_proj\.1: the weight holds 1 values"):
        compress_sites(plan, plan.specs, ModelSource(homes), sink, Inline())
    assert sink.labels == []


def test_what_is_deferred_comes_later_and_once(homes: nn.Module, spec: CompressionSpec) -> None:
    plan, sink = make_plan(homes, spec), Listing()
    later = Deferred(sink)
    compress_sites(plan, plan.specs, ModelSource(homes), later, Inline())
    assert sink.labels == []
    later.release()
    later.release()
    assert sink.labels == [site.label for site in plan.specs]
