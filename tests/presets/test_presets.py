"""Presets are data: whole, valid, found by name, and outdone by what a user writes out."""

import json
import re

import pytest
import torch

from hf_lrq.decomposition import InputGram, compress_matrix, proxy_loss
from hf_lrq.decomposition.compress_matrix import generator_for
from hf_lrq.errors import SpecError
from hf_lrq.integrations.config import LRQConfig
from hf_lrq.options import LayerOptions, options_of
from hf_lrq.presets import Paper, Preset, get_preset, known_presets, presets_without_data, register_preset
from hf_lrq.presets import base as registry

PRESETS = known_presets()
OURS = ("lrq", "lrq_fast", "lrq_best")
NO_PAPER = (*OURS, "rtn")
# What a Gram decides that is only used to choose among iterates.
CHOSEN_WITH_DATA = ("loftq",)


def layer():
    """A weight and inputs that are correlated, with an outlier."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    x[:, 7] *= 20
    return torch.randn(32, 32, generator=generator), InputGram.from_inputs(x)


def compressed(name, gram):
    """What a preset makes of the weight, with few ranks, and few iterations in schedules that have many."""
    options = {"rank": min(PRESETS[name].options.get("rank") or 4, 4), "iters": 2}
    options = {key: value for key, value in options.items() if PRESETS[name].options.get(key) not in (0, 1)}
    spec = LRQConfig(preset=name, dataset="bundled", **options).spec.default
    return compress_matrix(layer()[0], gram, spec, generator_for(0, name))


@pytest.mark.parametrize("name", sorted(PRESETS.keys() - OURS))
def test_methods_of_others_take_none_of_our_defaults_around_the_layers(name):
    config = LRQConfig(preset=name, dataset="bundled")
    assert config.embedding_bits == 16
    assert config.two_sided == PRESETS[name].gradients


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_whole(name):
    preset = get_preset(name)
    assert preset.name == name == name.lower()
    assert preset.what.endswith(".")
    assert all(text.endswith(".") for text in preset.deviations)
    assert (preset.paper is None) == (name in NO_PAPER)
    assert bool(preset.deviations) == (name not in OURS)
    if preset.paper is not None:
        assert re.fullmatch(r"\d{4}\.\d{5}", preset.paper.arxiv)
        assert preset.paper.year - 2000 == int(preset.paper.arxiv[:2])
    assert preset.options
    json.dumps({**preset.to_dict(), "options": dict(preset.options)})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_config_and_survives_its_dict(name):
    config = LRQConfig(preset=name, dataset="bundled")
    for option, value in PRESETS[name].options.items():
        assert getattr(config, option) == value
    again = LRQConfig.from_dict({**config.to_dict(), "dataset": "bundled"})
    assert again == config
    assert again.preset == name


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_compresses_a_matrix_as_its_layout_says(name):
    W, gram = layer()
    found = compressed(name, gram)
    stored = found.layout.tensors(*W.shape)
    assert {key: tensor.shape for key, tensor in found.tensors().items()} == {
        key: each.shape for key, each in stored.items()
    }
    assert proxy_loss(W, found.dense(), gram.H) < (1 if name in ("lord", "lplr", "welore") else 0.3)


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].data == "unused"])
def test_what_needs_no_data_does_not_look_at_it(name):
    with_data, without = (compressed(name, gram).tensors() for gram in (layer()[1], None))
    same = {key: torch.equal(with_data[key], without[key]) for key in without}
    assert all(same.values()) or name in CHOSEN_WITH_DATA


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].data == "needed" and name != "qtip"])
def test_what_needs_data_makes_something_else_of_it(name):
    with_data, without = (compressed(name, gram).tensors() for gram in (layer()[1], None))
    assert any(not torch.equal(with_data[key], without[key]) for key in without)


def test_lrq_is_what_is_done_by_default():
    assert LRQConfig(preset="lrq").spec == LRQConfig().spec
    assert LRQConfig(preset="lrq").embedding_bits == LRQConfig().embedding_bits == 8
    assert dict(PRESETS["lrq"].options) == {
        **{name: item.default for name, item in options_of(LayerOptions).items()},
        "embedding_bits": 8,
    }


def test_what_is_written_out_wins_even_if_it_is_the_default():
    config = LRQConfig(preset="caldera", rank=8, iters=8, init="svd")
    assert (config.rank, config.iters, config.init, config.codebook) == (8, 8, "svd", "e8p")
    assert LRQConfig(preset="caldera", rank=None).rank is None
    assert LRQConfig(preset="caldera", patterns={"q_proj": {"rank": 2}}).spec.for_layer("q_proj").codebook == "e8p"
    assert PRESETS["caldera"].changed(config.options()) == {"rank": 8, "iters": 8, "init": "svd"}


def test_presets_of_one_matrix_do_not_touch_the_others():
    assert LRQConfig().preset is None
    assert LRQConfig().method is None
    with pytest.raises(TypeError):
        PRESETS["lrq"].options["rank"] = 3


def test_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(SpecError, match=r"Unknown preset 'caldra'. Did you mean 'caldera'\? Known presets: lrq, "):
        LRQConfig(preset="caldra")
    with pytest.raises(SpecError, match="Unknown preset 3"):
        LRQConfig(preset=3)


def test_an_unknown_schedule_is_an_error_before_any_weight_is_read():
    for options in ({"schedule": "q-frist"}, {"patterns": {"a": {"schedule": "q-frist"}}}):
        with pytest.raises(SpecError, match=r"Unknown schedule 'q-frist'.* Did you mean 'q-first'"):
            LRQConfig(**options)


def test_a_preset_from_outside_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(registry, "_BY_NAME", dict(registry._BY_NAME))
    mine = Preset(name="mine", what="Mine.", paper=Paper(authors="A", title="B", year=2026, arxiv="1"), data="useful")
    assert register_preset(mine) is mine
    assert LRQConfig(preset="mine").spec == LRQConfig().spec
    assert "mine" in presets_without_data()
    register_preset(mine)
    with pytest.raises(SpecError, match="a preset 'mine' already"):
        register_preset(Preset(name="mine", what="Another."))


def test_a_preset_of_unknown_options_is_refused():
    with pytest.raises(SpecError, match=r"preset 'mine' sets 'itres', which is no option. Did you mean 'iters'"):
        Preset(name="mine", what="Mine.", options={"itres": 3})
