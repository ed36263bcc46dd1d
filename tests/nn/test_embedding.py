"""LRQEmbedding and LRQHead: rows decoded on demand, dtypes, copies, and one table for two modules."""

import copy

import pytest
import torch
from torch import nn

from hf_lrq.decomposition import compress_matrix
from hf_lrq.errors import SpecError
from hf_lrq.layout import LayerLayout
from hf_lrq.nn import LRQEmbedding, LRQHead
from hf_lrq.nn.embedding import Lookup
from hf_lrq.spec import LayerSpec

ROWS, COLUMNS = 11, 20
IDS = torch.tensor([[3, 0, 10], [3, 3, 7]])


def spec(bits: int = 8) -> LayerSpec:
    return LayerSpec(bits=bits, codebook="int", rank=0, rotation="none", rounding="fitted", group_size=16)


def table() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def embedding(bits: int = 8, **options) -> LRQEmbedding:
    layer = LRQEmbedding(ROWS, COLUMNS, spec(bits).layout, **options)
    layer.load_matrix(compress_matrix(table(), None, spec(bits), torch.Generator()))
    return layer


def test_an_embedding_of_codes_is_an_nn_embedding_with_frozen_parameters_and_no_buffers():
    layer = embedding()
    assert isinstance(layer, nn.Embedding)
    assert (layer.num_embeddings, layer.embedding_dim) == (ROWS, COLUMNS)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": (ROWS, 3, 8),
        "scales": (ROWS, 2),
    }
    assert not any(p.requires_grad for p in layer.parameters())
    assert not list(layer.buffers())


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lookup_gives_the_rows_of_the_dense_table(bits, dtype):
    layer = embedding(bits, dtype=dtype)
    assert torch.equal(layer(IDS), layer.dense(dtype)[IDS])
    error = (layer.dense() - table()).norm() / table().norm()
    assert error < {4: 0.12, 6: 0.03, 8: 0.008}[bits]


@pytest.mark.parametrize(
    "ids", [torch.tensor(4), torch.empty(2, 0, dtype=torch.long), torch.tensor([1], dtype=torch.int32)]
)
def test_indices_of_any_shape_and_integer_type(ids):
    layer = embedding()
    found = layer(ids)
    assert found.shape == (*ids.shape, COLUMNS)
    assert torch.equal(found, layer.dense()[ids.long()])


def test_only_the_rows_asked_for_are_decoded(monkeypatch):
    layer, decoded = embedding(), []
    original = LRQEmbedding.table

    def watch(self, weight, scales):
        decoded.append(len(weight))
        return original(self, weight, scales)

    monkeypatch.setattr(LRQEmbedding, "table", watch)
    layer(IDS)
    assert decoded == [IDS.numel()]


def test_a_row_that_is_not_there_is_an_error():
    with pytest.raises((IndexError, RuntimeError)):
        embedding()(torch.tensor([ROWS]))


def test_rows_follow_the_dtype_that_the_module_is_cast_to():
    layer = embedding(dtype=torch.float32)
    assert layer.to(torch.bfloat16)(IDS).dtype == torch.bfloat16
    assert layer.half()(IDS).dtype == torch.float16
    assert layer.to("cpu")(IDS).dtype == torch.float16
    assert nn.Sequential(layer).float()[0](IDS).dtype == torch.float32
    assert layer.weight.dtype == torch.uint8


@pytest.mark.parametrize("rounded", [False, True])
def test_a_factor_is_that_of_a_scaled_embedding(rounded):
    factor = 48**0.5
    layer = embedding(dtype=torch.bfloat16, lookup=Lookup(factor, rounded))
    rows = layer.dense(torch.bfloat16)[IDS]
    assert torch.equal(layer(IDS), rows * (torch.tensor(factor).bfloat16() if rounded else factor))


def test_state_dict_round_trip_and_copies_are_independent():
    source = embedding(padding_idx=2)
    target = LRQEmbedding(ROWS, COLUMNS, source.layout, padding_idx=2)
    target.load_state_dict(source.state_dict())
    twin = copy.deepcopy(source)
    twin.scales.data.zero_()
    assert torch.equal(source(IDS), target(IDS))
    assert twin.padding_idx == 2
    assert not twin(IDS).any()


def test_a_head_that_shares_the_table_multiplies_with_its_rows():
    layer = embedding()
    head = LRQHead(COLUMNS, ROWS, False, layer.layout)
    head.share(layer)
    assert head.weight is layer.weight
    x = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head(x), x @ layer.dense().T, rtol=1e-4, atol=1e-4)
    pair = copy.deepcopy(nn.ModuleDict({"embedding": layer, "head": head}))
    assert pair["head"].scales is pair["embedding"].scales is not layer.scales
    pair.to(torch.bfloat16)
    assert pair["head"].scales is pair["embedding"].scales


def test_nothing_can_be_merged_into_a_shared_table():
    layer = embedding()
    head = LRQHead(COLUMNS, ROWS, False, layer.layout)
    head.share(layer)
    with pytest.raises(SpecError, match="11 rows shares its table with the embedding, so that nothing can be merged"):
        head.absorb(torch.ones(ROWS, 1), torch.ones(1, COLUMNS))
    assert head.rank == 0


def test_rows_of_trellises_rotations_and_factors_cannot_be_looked_up():
    for layout in (
        LayerLayout(codebook="bt2", rank=0, rotation="none"),
        LayerLayout(codebook="int8", rank=0),
        LayerLayout(codebook="int8", rank=1, rotation="none"),
    ):
        with pytest.raises(SpecError, match=r"without rotation and factors; got codebook .* Use a codebook such as"):
            LRQEmbedding(ROWS, COLUMNS, layout)


def test_a_compiled_lookup_gives_the_same_rows():
    layer = embedding(6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(IDS), layer(IDS))


def test_one_graph_looks_up_any_number_of_rows():
    layer, graphs = embedding(6), []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=keep, fullgraph=True, dynamic=True)
    for count in (3, 2, 9):
        ids = torch.arange(count)
        assert torch.equal(compiled(ids), layer(ids))
    assert len(graphs) == 1
