"""Layouts and specs: exact sizes, strict parsing, patterns."""

import json
from dataclasses import replace

import pytest
import torch

from hf_lrq.errors import SpecError
from hf_lrq.layout import LayerLayout
from hf_lrq.spec import CompressionSpec, LayerSpec


def test_size_by_hand():
    """64 x 128: 2-bit codes 2048 B, scales 128 B, signs 2 x (128 + 64) B, rank 4 in 16 bits 8 x (64 + 128) B."""
    layout = LayerSpec(bits=2, rank=4, factor_bits=16, codebook="e8p").layout
    assert layout.bytes(64, 128) == 2048 + 128 + 384 + 1536
    assert layout.bits_per_weight(64, 128) == 8 * 4096 / (64 * 128)


def test_size_with_padding_groups_and_low_precision_factors():
    layout = LayerSpec(bits=3, rank=5, codebook="int", factor_bits=4, group_size=8, rotation="none").layout
    tensors = layout.tensors(10, 13)
    assert tensors["weight"].shape == (10, 2, 3)
    assert tensors["scales"].shape == (10, 2)
    assert tensors["lr_L"].shape == (10, 3)
    assert tensors["lr_R"].shape == (3, 13)
    assert tensors["lr_R_scale"].shape == (5,)
    assert "rot_in" not in tensors
    assert layout.bytes(10, 13) == 60 + 40 + 30 + 39 + 20


def test_codes_can_never_pass_for_a_weight():
    for shape in ((1, 8), (8, 8), (64, 2), (2, 1)):
        for bits in (2, 3, 4, 8):
            assert len(LayerSpec(bits=bits).layout.tensors(*shape)["weight"].shape) == 3


def test_rank_zero_stores_no_factors_and_large_ranks_are_clamped():
    assert set(LayerSpec(rank=0).layout.tensors(8, 8)) == {"weight", "scales", "rot_in", "rot_out"}
    assert LayerSpec(rank=1000).layout.tensors(8, 24)["lr_L"].shape == (8, 8)


def test_every_tensor_has_a_dtype_that_safetensors_and_all_devices_know():
    for factor_bits in (4, 8, 16):
        for tensor in LayerSpec(factor_bits=factor_bits).layout.tensors(16, 16).values():
            assert tensor.dtype in (torch.uint8, torch.int8, torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits must be between 1 and 8, got 0"),
        ({"bits": 5}, "no codebook has 5 bits per weight. Bits of each family: e8p: 2, 3, 4; bt: 2, 4; tcq"),
        ({"bits": 2.0}, r"bits must be an integer, got 2.0 \(float\)"),
        ({"bits": True}, "bits must be an integer"),
        ({"rank": -1}, "rank must be between 0 and 65536, got -1"),
        ({"factor_bits": 6}, "factor_bits must be one of 4, 8, 16, got 6"),
        ({"codebook": "e9p"}, "Did you mean 'e8p'"),
        ({"codebook": "e8p", "bits": 8}, "8"),
        ({"rounding": "ldql"}, "Did you mean 'ldlq'"),
        ({"init": "pca"}, "init must be one of"),
        ({"damp_percent": 0}, r"damp_percent must be a number in \(0, 1\], got 0"),
        ({"damp_percent": "0.1"}, "damp_percent must be a number"),
        ({"rotation_block": 96}, "power of two, got 96"),
        ({"group_size": 100}, "multiple of 8, got 100"),
        ({"iters": 0}, "iters must be between"),
    ],
)
def test_impossible_specs_are_refused(arguments, message):
    with pytest.raises(SpecError, match=message):
        LayerSpec(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook": "bt3"}, "Unknown codebook 'bt3'"),
        ({"codebook": ["bt2"]}, r"codebook must be a name, got \['bt2'\]"),
        ({"rank": 65537}, "rank must be between 0 and 65536, got 65537"),
        ({"ft_rank": -1}, "ft_rank must be between 0 and 65536, got -1"),
        ({"factor_bits": True}, "factor_bits must be one of 4, 8, 16, got True"),
        ({"group_size": 4}, "group_size must be between 8 and 65536, got 4"),
        ({"group_size": 100}, "group_size must be a multiple of 8, got 100. Use 96."),
        ({"rotation": "hadamrd"}, "Did you mean 'hadamard'"),
        ({"rotation_block": 8192}, "rotation_block must be between 8 and 4096"),
        ({"rotation_block": 96}, "rotation_block must be a power of two, got 96. Use 64 or 128."),
        ({"rank": "x" * 1000}, r"rank must be an integer, got 'x{70,}\.\.\. \(str\)"),
    ],
)
def test_impossible_layouts_are_refused(changes, message):
    with pytest.raises(SpecError, match=message):
        LayerLayout(**{"codebook": "bt2", "rank": 4, **changes})


def test_spec_round_trips_through_plain_data():
    spec = LayerSpec(bits=4, rank=3, factor_bits=8, codebook="int")
    assert LayerSpec.from_dict(spec.to_dict()) == spec


def test_unknown_fields_get_a_hint():
    with pytest.raises(SpecError, match=r"Unknown field 'rnak'\. Did you mean 'rank'"):
        LayerSpec.from_dict({"rnak": 3})
    with pytest.raises(SpecError, match="Did you mean 'rank'"):
        CompressionSpec(patterns={"q_proj": {"rnk": 3}})


def test_patterns_match_whole_components_and_later_ones_win():
    spec = CompressionSpec(
        default=LayerSpec(rank=8),
        patterns={r"q_proj|k_proj": {"rank": 2}, "layers.1": {"bits": 4}, r"k_proj": {"rank": 3}},
    )
    assert spec.for_layer("model.layers.0.attn.q_proj").rank == 2
    assert spec.for_layer("model.layers.0.attn.k_proj").rank == 3
    assert spec.for_layer("model.layers.0.attn.xq_proj").rank == 8
    assert spec.for_layer("model.layers.1.attn.v_proj").bits == 4
    assert spec.for_layer("model.layers.11.attn.v_proj").bits == 2


def test_a_broken_pattern_is_refused():
    with pytest.raises(SpecError, match="not a regular expression"):
        CompressionSpec(patterns={"(": {}})


def test_a_name_wins_over_patterns_and_is_no_pattern():
    named = LayerSpec(bits=4, rank=1)
    spec = CompressionSpec(patterns={"mlp": {"rank": 2}}, layers={"a.mlp.up": named, "a.mlp.down": {"rank": 5}})
    assert spec.for_layer("a.mlp.up") == named
    assert spec.for_layer("a.mlp.down") == LayerSpec(rank=5)
    assert spec.for_layer("b.a.mlp.up") == spec.for_layer("a.mlp.upper") == LayerSpec(rank=2)


def test_any_field_can_be_given_by_pattern():
    changes = {"codebook": "nf", "bits": 4, "rounding": "nearest", "sweeps": 0}
    assert CompressionSpec(patterns={"up": changes}).for_layer("mlp.up") == LayerSpec(**changes)


def test_a_compression_spec_round_trips_through_json():
    spec = CompressionSpec(
        default=LayerSpec(rank=3), patterns={"q": {"bits": 4}, "k": {}}, layers={"a.b": LayerSpec(sweeps=0)}, seed=7
    )
    again = CompressionSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert list(again.patterns) == ["q", "k"]
    assert CompressionSpec.from_dict({}) == CompressionSpec()
    with pytest.raises(SpecError, match=r"Unknown field 'pattern'\. Did you mean 'patterns'"):
        CompressionSpec.from_dict({"pattern": {}})


def test_a_spec_does_not_change_with_what_it_was_made_of():
    changes = {"rank": 2}
    patterns = {"q": changes}
    spec = CompressionSpec(patterns=patterns)
    changes["rank"] = 3
    patterns["k"] = {}
    assert spec.patterns == {"q": {"rank": 2}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patterns": [("q", {})]}, r"patterns must be a dict such as \{'q_proj': \{'rank': 8\}\}, got \[\('q'"),
        ({"patterns": {"q": 4}}, "patterns must be a dict"),
        ({"layers": {"q": 4}}, "layers must be a dict"),
        ({"layers": {"q": {"rnk": 4}}}, "Did you mean 'rank'"),
        ({"patterns": {"q": {"bits": 9}}}, "for modules that match 'q': bits must be between 1 and 8, got 9"),
    ],
)
def test_wrong_patterns_and_layers_are_refused(arguments, message):
    with pytest.raises(SpecError, match=message):
        CompressionSpec(**arguments)


def test_patterns_that_do_not_go_together_are_refused_where_they_meet():
    spec = CompressionSpec(patterns={"up": {"codebook": "nf", "bits": 4}, "layers.0": {"bits": 8}})
    assert spec.for_layer("layers.1.up").bits == 4
    with pytest.raises(SpecError, match=r"for layers\.0\.up: Codebook family 'nf' has no 8-bit codebook"):
        spec.for_layer("layers.0.up")


def test_auto_picks_a_codebook_that_has_the_bits():
    assert [LayerSpec(bits=bits).resolved_codebook for bits in (2, 3, 4, 8)] == ["bt2", "e8p3", "bt4", "int8"]


@pytest.mark.parametrize(
    ("shapes", "blocks", "codebook"),
    [
        ([(128, 16)], True, "bt2"),
        ([(120, 256)], True, "bt2"),
        ([(192, 576)], True, "bt2"),
        ([(64, 256)], True, "e8p2"),
        ([(128, 7)], True, "e8p2"),
        ([(4096, 4096)], False, "e8p2"),
        ([(576, 576), (64, 576), (64, 576)], True, "bt2"),
        ([(64, 256), (64, 256)], True, "e8p2"),
    ],
)
def test_auto_fits_the_matrices_that_are_computed_together(shapes, blocks, codebook):
    """Blocks of 128 rows and 16 columns, where padding takes at most half of what the codes of all take."""
    fitted = LayerSpec(bits=2).fitted(*shapes, blocks=blocks)
    assert fitted.resolved_codebook == codebook
    assert fitted.fitted(*shapes, blocks=not blocks) == fitted
    explicit = LayerSpec(bits=2, rank=3, codebook="bt")
    assert explicit.fitted(*shapes, blocks=blocks) == explicit


def test_layout_is_the_inference_side_of_the_spec():
    assert LayerSpec(bits=2, rank=7, factor_bits=16).layout == LayerLayout(codebook="bt2", rank=7)
    assert LayerSpec().layout == LayerLayout(codebook="bt2", rank=0, factor_bits=8)


@pytest.mark.parametrize("factor_bits", [4, 8, 16])
@pytest.mark.parametrize("shapes", [[(1, 1)], [(64, 64)], [(192, 576)], [(896, 896), (128, 896), (128, 896)]])
def test_an_automatic_rank_is_the_largest_within_its_budget(shapes, factor_bits):
    def bits(rank):
        layout = LayerLayout(codebook="bt2", rank=rank, factor_bits=factor_bits)
        weights = sum(rows * columns for rows, columns in shapes)
        return 8 * sum(layout.factor_bytes(*shape) for shape in shapes) / weights

    rank = LayerSpec(factor_bits=factor_bits).fitted(*shapes).rank
    assert bits(rank) <= 0.3 < bits(rank + (8 if rank >= 8 else 1))
    assert rank % 8 == 0 or rank < 8


def test_an_automatic_rank_has_an_upper_bound_and_is_nothing_that_was_asked_for():
    assert LayerSpec().fitted((16384, 16384)).rank == 64
    for rank in (0, 9, 200):
        assert LayerSpec(rank=rank).fitted((16384, 16384)).rank == rank
    assert LayerSpec.from_dict(LayerSpec().to_dict()).rank is None


def test_bits_count_what_will_be_stored():
    """A rank is chosen before bits are counted, as when the matrix is compressed."""
    spec = LayerSpec(codebook="int")
    assert spec.bits_per_weight((576, 576)) == spec.fitted((576, 576)).layout.bits_per_weight(576, 576)
    assert spec.bits_per_weight((576, 576)) > replace(spec, rank=0).bits_per_weight((576, 576)) + 0.2
