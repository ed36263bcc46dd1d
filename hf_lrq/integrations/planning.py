"""The plan for a model: which of its matrices are compressed as a config says, and which are left alone."""

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_lrq.integrations.config import LRQConfig
from hf_lrq.integrations.skip_rules import skip_reasons
from hf_lrq.patterns import name_matches
from hf_lrq.work import Plan, excluded, find_sites, make_plan

logger = logging.getLogger(__name__)


def plan_for(model: nn.Module, config: LRQConfig) -> Plan:
    """Decide about every matrix of a model; of transformers or any other.

    Args:
        model: weights may be on the meta device.
        config: what to do.

    Raises:
        CompressionError: if nothing is left to compress.
    """
    _warn_of_idle_patterns(model, config)
    patterns = tuple(config.modules_to_not_convert or ())
    alone = skip_reasons(model, patterns) if isinstance(model, PreTrainedModel) else excluded(model, patterns)
    return make_plan(model, config.spec, alone)


def _warn_of_idle_patterns(model: Any, config: LRQConfig) -> None:
    names = [name for name, _ in model.named_modules()]
    names += [site.label for site in find_sites(model)]
    for option in ("modules_to_not_convert", "rank_pattern", "bits_pattern"):
        for pattern in getattr(config, option) or ():
            if not any(name_matches(name, [pattern]) for name in names):
                logger.warning("hf_lrq: %s has %r, which matches no module of the model", option, pattern)
