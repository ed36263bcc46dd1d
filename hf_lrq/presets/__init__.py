"""Methods by name: each is data, the values of options, with its paper and how it differs from it.

`LRQConfig(preset="caldera")` and `hf-lrq quantize --preset caldera` take what is not written out from there.
"""

from dataclasses import replace

from hf_lrq.presets.base import (
    Paper,
    Preset,
    get_preset,
    known_presets,
    presets_without_data,
    register_preset,
)
from hf_lrq.presets.corrections import CORRECTIONS
from hf_lrq.presets.first import LOW_RANK_FIRST
from hf_lrq.presets.loops import LOOPS
from hf_lrq.presets.own import OWN
from hf_lrq.presets.rounding import ROUNDING

__all__ = [
    "Paper",
    "Preset",
    "get_preset",
    "known_presets",
    "presets_without_data",
    "register_preset",
]

for _preset in OWN:
    register_preset(_preset)
for _preset in (*ROUNDING, *CORRECTIONS, *LOOPS, *LOW_RANK_FIRST):
    # These leave embeddings and output heads as they are, and few of them look at what comes out.
    register_preset(replace(_preset, options={"embedding_bits": 16, "two_sided": False, **_preset.options}))
