"""Options that are given when an engine starts."""

import pytest

from hf_lrq.errors import SpecError
from hf_lrq.serving import Way, read_way


@pytest.mark.parametrize(
    ("options", "way"),
    [(None, Way("auto", "float")), ({}, Way()), ({"backend": "torch", "activation": "int8"}, Way("torch", "int8"))],
)
def test_options_are_read(options, way):
    assert read_way(options) == way


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int8"}, "Unknown option 'activations'. Did you mean 'activation'?"),
        ({"activation": "int4"}, "activation must be one of .* got 'int4'"),
        ({"backend": "fast"}, "backend must be one of .* got 'fast'"),
        ("int8", "are a dict such as"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(SpecError, match=message):
        read_way(options)
