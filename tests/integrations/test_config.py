"""LRQConfig: strict towards users, silent about anything that inference does not need."""

import copy
import inspect
import json
import re
import warnings
from typing import Any

import pytest
import transformers
from transformers.quantizers.auto import AutoQuantizationConfig

from hf_lrq import LRQConfig
from hf_lrq.checkpoint import QuantizationHeader
from hf_lrq.codebooks import known_families
from hf_lrq.errors import CheckpointError, SpecError
from hf_lrq.integrations.aliases import ALIASES
from hf_lrq.integrations.config import OPTIONS
from hf_lrq.layout import LayerLayout
from hf_lrq.spec import CompressionSpec, LayerSpec

STORED = QuantizationHeader(LayerLayout(codebook="e8p2", rank=8), {}, ("lm_head",))


def stored(**changes: Any) -> dict[str, Any]:
    return STORED.to_dict() | changes


def test_defaults_are_those_of_the_spec() -> None:
    assert LRQConfig().spec.default == LayerSpec()


def test_the_signature_shows_every_option_with_its_default() -> None:
    shown = inspect.signature(LRQConfig).parameters
    config = LRQConfig()
    assert {name: each.default for name, each in shown.items()} == {name: getattr(config, name) for name in OPTIONS}
    assert {each.kind for each in shown.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert shown["bits"].annotation is int
    assert shown["rank"].annotation == int | None
    assert set(LayerSpec().to_dict()) <= set(shown)


def test_the_docstrings_say_what_each_option_means() -> None:
    for owner, names in ((LRQConfig, OPTIONS), (LayerSpec, LayerSpec().to_dict())):
        text = inspect.getdoc(owner) or ""
        assert "{options}" not in text
        for name in names:
            assert re.search(rf"^    {name}: [\w\"'].{{10}}", text, re.MULTILINE), name
        assert max(map(len, text.splitlines())) <= 120


def test_the_text_of_codebook_names_each_family_with_its_bits() -> None:
    text = OPTIONS["codebook"].metadata["text"].replace(" bits)", ")")
    for family, bits in known_families().items():
        assert f"{family} ({', '.join(map(str, bits))})" in text


@pytest.mark.parametrize(
    "spec",
    [
        CompressionSpec(),
        CompressionSpec(default=LayerSpec(bits=4, sweeps=0), seed=3, tensor_parallel=2),
        CompressionSpec(patterns={"up": {"rank": 2}, "layers.0": {"init": "zero"}}, layers={"a.b": LayerSpec(rank=1)}),
    ],
)
def test_a_config_is_made_of_a_spec_and_gives_it_back(spec: CompressionSpec) -> None:
    config = LRQConfig.from_spec(spec, dataset="bundled")
    assert config.spec == spec
    assert (config.dataset, config.nsamples) == ("bundled", 128)
    assert json.loads(json.dumps(config.options()))["seed"] == spec.seed
    assert LRQConfig(**config.options(), dataset="bundled") == config


def test_the_spec_of_a_layer_is_that_of_all() -> None:
    assert LRQConfig.from_spec(LayerSpec(rank=3)).spec == CompressionSpec(default=LayerSpec(rank=3))


def test_general_patterns_win_over_the_short_forms_and_names_over_all() -> None:
    config = LRQConfig(
        bits_pattern={"mlp": 4, "up": 2},
        rank_pattern={"up": 3, "mlp": 5},
        patterns={"up": {"rank": 7}},
        layers={"a.mlp.up": {"rank": 1}},
    )
    assert config.spec.for_layer("mlp.down") == LayerSpec(bits=4, rank=5)
    assert config.spec.for_layer("mlp.up") == LayerSpec(bits=2, rank=7)
    assert config.spec.for_layer("a.mlp.up") == LayerSpec(rank=1)


def test_config_and_quantizer_are_registered() -> None:
    mapping = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
    assert mapping["hf_lrq"] is LRQConfig
    assert transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["hf_lrq"].__name__ == "LRQHfQuantizer"


def test_patterns_reach_the_spec() -> None:
    spec = LRQConfig(rank_pattern={"down_proj": 16}, bits_pattern={r"layers\.0\..*": 4}).spec
    assert spec.for_layer("model.layers.1.mlp.down_proj").rank == 16
    assert spec.for_layer("model.layers.0.mlp.up_proj").bits == 4
    assert spec.for_layer("model.layers.1.mlp.up_proj") == LayerSpec()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rnk": 4}, "LRQConfig has no option 'rnk'. Did you mean 'rank'?"),
        ({"nsample": 4}, "Did you mean 'nsamples'?"),
        ({"preset": "caldra"}, "Unknown preset 'caldra'. Did you mean 'caldera'?"),
        ({"bits": 5}, "bits"),
        ({"rank": -1}, "rank must be between"),
        ({"rank_pattern": {"q_proj": -1}}, "for modules that match 'q_proj': rank must be between"),
        ({"bits_pattern": {"(": 2}}, "is not a regular expression"),
        ({"codebook": "e9p"}, "Unknown codebook family 'e9p'"),
        ({"nsamples": 0}, "nsamples must be an integer of at least 1, got 0"),
        ({"seqlen": True}, "seqlen must be an integer"),
        ({"batch_size": 1.5}, "batch_size must be an integer"),
        ({"dequantize": 1}, "dequantize must be True or False"),
        ({"modules_to_not_convert": "lm_head"}, r"must be a list of names, got 'lm_head'. Write \['lm_head'\]"),
        ({"seed": -1}, "seed must be between"),
        ({"tensor_parallel": 0}, "tensor_parallel must be between 1 and 64"),
        ({"quant_method": "gptq"}, "quant_method must be 'hf_lrq'"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("?", r"\?")):
        LRQConfig(**options)


def test_other_names_are_taken_with_one_warning() -> None:
    message = "ignore is modules_to_not_convert here, num_calibration_samples is nsamples here"
    with pytest.warns(FutureWarning, match=message) as caught:
        config = LRQConfig(ignore=["x"], num_calibration_samples=7)
    assert len(caught) == 1
    assert (config.modules_to_not_convert, config.nsamples) == (["x"], 7)


def test_every_alias_leads_to_an_option() -> None:
    assert set(ALIASES.values()) <= set(OPTIONS)
    assert not set(ALIASES) & set(OPTIONS)


@pytest.mark.parametrize(
    "options", [{"r": 4, "rank": 64}, {"model_seqlen": 4, "max_seq_length": 4}, {"rank": 4, "r": 4}]
)
def test_two_names_for_one_option_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="which is given as well"):
        LRQConfig(**options)


def test_a_dict_holds_neither_data_nor_tokenizer() -> None:
    config = LRQConfig(dataset=["secret text"], tokenizer=object(), nsamples=3)
    assert json.loads(config.to_json_string()) == config.to_dict() == {"quant_method": "hf_lrq", "nsamples": 3}
    assert "secret" not in repr(config)


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": None}, {"rank": 0}, {"bits": 3, "codebook": "int", "patterns": {"up": {"rank": None}}, "seed": 4}],
)
def test_a_config_survives_its_dict_with_what_is_chosen_later(options: dict[str, Any]) -> None:
    config = LRQConfig(**options)
    again = LRQConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert (again.rank, again._given) == (options.get("rank"), set(options))
    assert again.for_compression().spec == config.spec


def test_stored_dict_survives_transformers() -> None:
    config = AutoQuantizationConfig.from_dict(stored(modules={"a": {"rank": 4}}))
    assert isinstance(config, LRQConfig)
    assert config.to_dict() == stored(modules={"a": {"rank": 4}})
    assert config.to_diff_dict() == config.to_dict() == dict(config)
    assert (config.bits, config.rank, config.codebook) == (2, 8, "e8p")
    assert LRQConfig.from_dict(config.to_dict()) == config


def test_a_users_dict_is_a_config() -> None:
    config = AutoQuantizationConfig.from_dict({"quant_method": "hf_lrq", "bits": 4, "rank": 2})
    assert config == LRQConfig(bits=4, rank=2)
    with pytest.raises(SpecError, match="no option 'bitz'"):
        AutoQuantizationConfig.from_dict({"quant_method": "hf_lrq", "bitz": 4})


def test_a_damaged_stored_dict_is_refused() -> None:
    with pytest.raises(CheckpointError, match="unknown key 'dataset'"):
        AutoQuantizationConfig.from_dict(stored(dataset="/etc/passwd"))


def test_from_dict_gives_back_what_it_does_not_know() -> None:
    config, unused = LRQConfig.from_dict({"rank": 3}, return_unused_kwargs=True, dequantize=True, foo=1)
    assert (config.dequantize, unused) == (True, {"foo": 1})


def test_copies_share_the_data_and_nothing_else() -> None:
    dataset, tokenizer = ["text"], object()
    config = LRQConfig(dataset=dataset, tokenizer=tokenizer, rank_pattern={"a": 1})
    for clone in (copy.copy(config), copy.deepcopy(config)):
        assert clone == config
        assert clone.dataset is dataset
        assert clone.tokenizer is tokenizer
    clone.rank_pattern["a"] = 2
    assert config.rank_pattern == {"a": 1}


def test_equality_looks_at_the_options() -> None:
    assert LRQConfig(rank=4) == LRQConfig(rank=4)
    assert LRQConfig(rank=4) != LRQConfig(rank=5)
    assert LRQConfig(iters=4) != LRQConfig(iters=5)
    assert LRQConfig() != "LRQConfig"


@pytest.mark.parametrize(
    "options", [{}, {"dequantize": True}, {"bits": 2, "rank": 8}, {"codebook": "auto", "rank": None}]
)
def test_what_agrees_with_the_checkpoint_passes(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LRQConfig(**options).check_against_stored(STORED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 4}, "is compressed with bits=2; quantization_config asks for 4"),
        ({"rank": 64}, "is compressed with rank=8; quantization_config asks for 64"),
        ({"codebook": "lloyd"}, "codebook='e8p2'; quantization_config asks for 'lloyd2'"),
        ({"rotation": "none"}, "rotation='hadamard'"),
    ],
)
def test_what_contradicts_the_checkpoint_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LRQConfig(**options).check_against_stored(STORED)


def test_what_has_no_effect_on_a_checkpoint_is_said() -> None:
    with pytest.warns(UserWarning, match="compressed already: dataset, iters in quantization_config has no effect"):
        LRQConfig(dataset=["x"], iters=3).check_against_stored(STORED)


def test_the_config_of_a_checkpoint_compresses_another_model_alike() -> None:
    config = LRQConfig.from_dict(stored()).for_compression()
    assert config.spec.default.layout == STORED.default
    assert config.header is None
    with pytest.raises(SpecError, match="settings of its own for 1 modules"):
        LRQConfig.from_dict(stored(modules={"a": {"rank": 4}})).for_compression()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codebook": None}, "codebook must be the name of a family"),
        ({"codebook": 3}, "codebook must be the name of a family"),
        ({"bits_pattern": ["a"]}, "bits_pattern must map regular expressions to numbers"),
        ({"rank_pattern": {1: 4}}, "rank_pattern must map regular expressions to numbers"),
        ({"patterns": {"a": 4}}, "patterns must map regular expressions to options, such as"),
        ({"patterns": {"a": {"rnk": 4}}}, "for modules that match 'a': Unknown field 'rnk'"),
        ({"layers": {"a": 4}}, "layers must be a dict such as"),
        ({"modules_to_not_convert": ["*.lm_head"]}, r"'\*\.lm_head' is not a regular expression"),
        ({"modules_to_not_convert": 3}, "modules_to_not_convert must be a list of names, got 3"),
    ],
)
def test_a_wrong_type_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LRQConfig(**options)


def test_a_stored_dict_without_its_version_is_known_as_one() -> None:
    unversioned = stored(modules={})
    del unversioned["format_version"]
    with pytest.raises(CheckpointError, match="format_version"):
        LRQConfig.from_dict(unversioned)
