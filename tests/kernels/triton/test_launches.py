"""Launches by rule and from the tuner's file, and the search itself with times that are made up."""

import json
import logging

import pytest
import torch

from hf_lrq.errors import BackendError
from hf_lrq.kernels.triton import launches
from hf_lrq.kernels.triton.launches import DotLaunch, GemvLaunch, Shape
from hf_lrq.kernels.triton.tuner import candidates, tune

CPU = torch.device("cpu")
BY_RULE = launches.gemv_launch  # before a fixture replaces it


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LRQ_CACHE", str(tmp_path))
    monkeypatch.setattr(launches, "gemv_launch", BY_RULE)
    launches.tuned.cache_clear()
    yield
    launches.tuned.cache_clear()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4096, 4096), (28672, 8192), (128, 100_000)])
def test_rules_give_every_split_columns(rows, columns):
    for vectors in (1, 3, 64):
        shape = Shape.of("bt2", rows, columns, vectors)
        rule = launches.gemv_launch if vectors <= 3 else launches.dot_launch
        assert 1 <= rule(shape, CPU).splits <= -(-columns // 256)


@pytest.mark.parametrize(("vectors", "bucket"), [(1, 1), (3, 3), (4, 4), (5, 8), (17, 32), (64, 64)])
def test_many_vectors_share_a_launch(vectors, bucket):
    assert Shape.of("bt2", 1, 1, vectors).vectors == bucket


def test_the_search_keeps_the_fastest_and_the_next_call_finds_it(tmp_path):
    fast = GemvLaunch(rows=512, tiles=2, warps=8, splits=1, fused=False)
    wide = DotLaunch(rows=64, warps=8, stages=3, vectors=16, splits=1)

    def measure(copies, vectors, launch):
        assert copies[0].rows == 256
        return 1.0 if launch in (fast, wide) else 2.0

    table = tune([("bt2", 256, 512)], CPU, vectors=(1, 16), measure=measure)
    assert table == {
        ("gemv", Shape("bt2", 256, 512, 1)): fast,
        ("dot", Shape("bt2", 256, 512, 16)): wide,
    }
    assert launches.read_table(launches.tuned_path(CPU)) == table
    assert launches.gemv_launch(Shape("bt2", 256, 512, 1), CPU) == fast
    assert launches.dot_launch(Shape.of("bt2", 256, 512, 9), CPU) == wide
    assert launches.gemv_launch(Shape("bt2", 256, 512, 2), CPU) != fast
    assert [p.name for p in tmp_path.iterdir()] == ["triton-interpreter.json"]


def test_a_second_search_adds_to_the_file():
    for codebook in ("bt2", "int4"):
        tune([(codebook, 128, 256)], CPU, vectors=(1,), measure=lambda *_: 0.0)
    assert {shape.codebook for _, shape in launches.read_table(launches.tuned_path(CPU))} == {"bt2", "int4"}


def test_candidates_are_launches_that_kernels_have():
    """Each one checks itself, so making them is the test; the rule's own is among them."""
    for vectors, rule in ((1, launches.gemv_launch), (64, launches.dot_launch)):
        shape = Shape("bt2", 4096, 4096, vectors)
        assert rule(shape, CPU) in candidates(shape, CPU)


def test_a_codebook_without_decoder_cannot_be_tuned():
    with pytest.raises(BackendError, match="no decoder for codebook 'nf4'"):
        tune([("nf4", 128, 256)], CPU, measure=lambda *_: 0.0)


def entry(**changes):
    shape = {"codebook": "bt2", "rows": 128, "columns": 256, "vectors": 1}
    launch = {"rows": 128, "tiles": 4, "splits": 1, "warps": 4, "fused": True}
    return {"kernel": "gemv", "shape": shape, "launch": launch} | changes


def document(*items, **changes):
    return {"format": 1, "launches": list(items)} | changes


FAULTS = {
    "not json": "{",
    "a list": [],
    "another format": document(entry(), format=2),
    "a key too many": document(entry(), more=1),
    "unknown kernel": document(entry(kernel="gemm")),
    "no shape": document({"kernel": "gemv", "launch": {}}),
    "rows of another type": document(entry(shape={"codebook": "bt2", "rows": "128", "columns": 1, "vectors": 1})),
    "a field too many": document(entry(launch={"rows": 128, "stages": 2})),
    "no power of two": document(entry(launch={"rows": 100})),
    "true for one": document(entry(launch={"splits": True})),
    "a huge launch": document(entry(launch={"rows": 1 << 40})),
    "entries that are no objects": document(1),
    "launches that are no list": document(launches=3),
    "deep": "[" * 100_000,
    "large": " " * (1 << 21),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_named_and_rules_are_used(fault, caplog):
    path = launches.tuned_path(CPU)
    content = FAULTS[fault]
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(BackendError, match=r"triton-interpreter\.json .*Delete it or tune again"):
        launches.read_table(path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert launches.tuned(CPU) == {}
    assert len(caplog.records) == 1


def test_the_entry_that_faults_are_made_from_is_right():
    path = launches.tuned_path(CPU)
    path.write_text(json.dumps(document(entry())), encoding="utf-8")
    assert launches.read_table(path) == {("gemv", Shape("bt2", 128, 256, 1)): GemvLaunch()}
