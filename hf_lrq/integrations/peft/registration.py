"""Making the adapter type known to PEFT."""

from peft import mapping
from peft.utils.peft_types import register_peft_method

from hf_lrq.integrations.peft.config import LRQAdapterConfig
from hf_lrq.integrations.peft.lora import adapt_lora
from hf_lrq.integrations.peft.model import LRQAdapterModel
from hf_lrq.integrations.peft.others import adapt_others
from hf_lrq.integrations.peft.peft_type import LRQ, NAME, PREFIX


def register() -> None:
    """Tell PEFT about configs and models of this type, and its other methods about compressed layers. Idempotent."""
    # PEFT refuses a name that is taken, also where it was taken by an earlier import of this very module.
    for table in (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
    ):
        table.pop(LRQ, None)
    register_peft_method(name=NAME.lower(), config_cls=LRQAdapterConfig, model_cls=LRQAdapterModel, prefix=PREFIX)
    adapt_lora()
    adapt_others()
