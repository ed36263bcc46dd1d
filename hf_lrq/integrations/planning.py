"""The plan for a model: which of its matrices are compressed as a config says, and which are left alone."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from hf_lrq.errors import CompressionError
from hf_lrq.integrations.config import LRQConfig
from hf_lrq.integrations.skip_rules import skip_reasons
from hf_lrq.integrations.tables import tables_of
from hf_lrq.integrations.trial import try_out
from hf_lrq.patterns import check_names
from hf_lrq.work import Plan, Site, excluded, find_sites, make_plan, with_ranks
from hf_lrq.work.plan import listed, nothing_left

TABLE_BITS = 8  # Until a budget chooses.


def plan_for(model: nn.Module, config: LRQConfig) -> Plan:
    """Decide about every matrix of a model; of transformers or any other.

    Args:
        model: weights may be on the meta device.
        config: what to do.

    Raises:
        SpecError: if a pattern or a name matches nothing.
        CompressionError: if nothing is left to compress.
    """
    patterns, spec = tuple(config.modules_to_not_convert or ()), config.spec
    tables, left = _tables(model, config, patterns)
    labels = [site.label for site in (*find_sites(model), *tables)]
    config.check_patterns([*(name for name, _ in model.named_modules()), *labels])
    check_names("layers", config.layers or (), labels)
    if not isinstance(model, PreTrainedModel):
        return with_ranks(make_plan(model, spec, excluded(model, patterns)), model)
    alone = skip_reasons(model, patterns)
    alone |= {name: reason for name, reason in left.items() if name in alone}
    bits = TABLE_BITS if config.embedding_bits == "auto" else config.embedding_bits
    plan = make_plan(model, spec, alone, tables={site: spec.for_table(site.label, bits) for site in tables})
    return with_ranks(without_read(model, replace(plan, left_alone={**left, **plan.left_alone})), model)


def _tables(model: nn.Module, config: LRQConfig, patterns: Sequence[str]) -> tuple[list[Site], dict[str, str]]:
    """Embeddings and heads that are compressed, and why others are not; none of either where nobody asks for it."""
    asked = isinstance(model, PreTrainedModel) and config.embedding_bits != 16
    return tables_of(model, patterns) if asked else ([], {})


def without_read(model: PreTrainedModel, plan: Plan, will_run: bool = False) -> Plan:
    """The plan without matrices that the model reads itself, as far as a trial pass shows it.

    A pass on the meta device ends where the code looks at values; once the weights are there, it may show more.

    Args:
        model: not changed.
        plan: made for it.
        will_run: whether the model itself runs before it is saved.

    Raises:
        CompressionError: if nothing is left to compress; if the model will run, and changes its weights when it does.
    """
    trial = try_out(model, plan.specs)
    reads = trial.reads
    plan = plan.without(
        {
            site.label: f"{reads[name]} reads its weight directly"
            for site in plan.specs
            for name in site.modules
            if name in reads
        }
    )
    if not plan.specs:
        raise CompressionError(nothing_left(type(model).__name__, plan.left_alone))
    # What is left alone only now was not there to be written into.
    writes = () if not will_run else try_out(model, plan.specs).writes if reads else trial.writes
    if writes:
        raise CompressionError(
            f"{type(model).__name__} changes weights of its own when it runs ({listed(writes, 3)}): after calibration "
            "they would be saved changed. Compress it without data, or turn that off in its config, as with "
            "rescale_every=0 of RWKV."
        )
    return plan
