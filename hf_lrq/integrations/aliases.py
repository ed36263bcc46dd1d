"""Options by the names that other quantization libraries have for them."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from hf_lrq.errors import SpecError, did_you_mean

ALIASES = {
    "num_calibration_samples": "nsamples",
    "max_calibration_samples": "nsamples",
    "model_seqlen": "seqlen",
    "max_seq_length": "seqlen",
    "ignore": "modules_to_not_convert",
    "skip_modules": "modules_to_not_convert",
    "llm_int8_skip_modules": "modules_to_not_convert",
    "sigma_reg": "damp_percent",
    "dampening_frac": "damp_percent",
    "r": "rank",
    "w_bits": "bits",
    "nbits": "bits",
    "lr_bits": "factor_bits",
}


def by_own_names(options: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Options by the names they have here; one warning speaks of all that came by another name.

    Args:
        options: what a user gave.
        known: names of all options.

    Raises:
        SpecError: on what is no name, and on two names of one option.
    """
    known = list(known)
    found, renamed = {}, {}
    for name, value in options.items():
        own = ALIASES.get(name, name)
        if own not in known:
            hint = did_you_mean(name, [*known, *ALIASES])
            raise SpecError(f"LRQConfig has no option {name!r}.{hint} Options: {', '.join(known)}.")
        if own != name:
            if own in options or own in found:
                raise SpecError(f"{name!r} is another name of {own!r}, which is given as well. Give one of them.")
            renamed[name] = own
        found[own] = value
    if renamed:
        listed = ", ".join(f"{name} is {own} here" for name, own in renamed.items())
        warnings.warn(f"LRQConfig has other names for some options: {listed}.", FutureWarning, stacklevel=3)
    return found
