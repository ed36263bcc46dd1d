"""One rule for all patterns of module names, and what is said of those that match nothing."""

import pytest

from hf_lrq.errors import SpecError
from hf_lrq.patterns import check_names, check_patterns, exactly, first_match, in_one, matches

NAMES = ["", "lm_head", *(f"model.layers.{n}.{name}" for n in (0, 1, 11) for name in ("attn.q_proj", "mlp.up_proj"))]


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("lm_head", ["lm_head"]),
        ("layers.1", NAMES[4:6]),
        ("model.layers.1", NAMES[4:6]),
        (r"layers\.1", NAMES[4:6]),
        (r"layers\.(0|11)\.mlp", [NAMES[3], NAMES[7]]),
        ("up_proj", [NAMES[3], NAMES[5], NAMES[7]]),
        ("q_proj|up_proj", NAMES[2:]),
        ("proj", []),
        ("layer", []),
        (r".*_proj", NAMES[2:]),
        (exactly("model.layers.1.mlp.up_proj"), [NAMES[5]]),
        (exactly("layers.1"), []),
        (exactly("model.layers.1"), []),
    ],
)
def test_patterns_match_whole_components_and_what_is_inside(pattern: str, matched: list[str]) -> None:
    assert [name for name in NAMES if matches(pattern, name)] == matched


def test_a_name_is_taken_as_it_is_where_it_is_no_pattern_of_itself() -> None:
    assert matches("conv(3)", "blocks.conv(3).up")


def test_the_first_pattern_that_matches_any_of_the_names() -> None:
    assert first_match(["a", "c", "b"], "x.b", "x.c") == "c"
    assert first_match(["a"], "x.b") is None
    assert first_match([], "x") is None


@pytest.mark.parametrize("pattern", ["(", "a)|(b", "*.lm_head"])
def test_what_is_no_regular_expression_is_refused(pattern: str) -> None:
    with pytest.raises(SpecError, match="is not a regular expression: "):
        matches(pattern, "x")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("lm_haed", "skip has 'lm_haed', which matches no module of the model. The nearest names are lm_head."),
        ("q_prj", "The nearest names are q_proj"),
        ("layers.9", "The nearest names are layers.1"),
        (r"layers\.9\.mlp", "The nearest names are layers.1.mlp"),
        ("h.c_fc", "Names end with lm_head, q_proj, up_proj."),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_names(pattern: str, message: str) -> None:
    check_patterns("skip", ["up_proj", "layers.0"], NAMES)
    with pytest.raises(SpecError) as caught:
        check_patterns("skip", ["up_proj", pattern], NAMES)
    assert message in str(caught.value)


def test_a_name_has_to_be_whole() -> None:
    check_names("layers", NAMES[2:3], NAMES)
    with pytest.raises(
        SpecError, match=r"layers has 'layers\.1\.mlp\.up_proj', which is no layer that can be compressed"
    ):
        check_names("layers", ["layers.1.mlp.up_proj"], NAMES)


def test_repeated_patterns_keep_their_order() -> None:
    """For every module, the dict does what the entries do one after the other."""
    entries = [
        ("mlp", {"bits": 2}), ("up_proj", {"bits": 4}), ("up_proj", {"rank": 1}), ("mlp", {"rank": 2}),
        ("up_proj", {"rank": 3}), ("up_proj", {"rank": 4}), ("mlp", {"bits": 3}),
    ]  # fmt: skip
    assert in_one(entries[:3]) == {"mlp": {"bits": 2}, "up_proj": {"bits": 4, "rank": 1}}
    for count in range(len(entries) + 1):
        for name in NAMES:
            one_by_one: dict[str, int] = {}
            for pattern, changes in entries[:count]:
                one_by_one |= changes if matches(pattern, name) else {}
            merged = {}
            for pattern, changes in in_one(entries[:count]).items():
                merged |= changes if matches(pattern, name) else {}
            assert merged == one_by_one
