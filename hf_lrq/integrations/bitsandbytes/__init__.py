"""Models in 4 bits of bitsandbytes become ours and ours become theirs, code by code; bitsandbytes is not needed."""

# First, as it needs the other integrations whole: the first to import transformers would be met half-way.
import hf_lrq.integrations.transformers  # noqa: F401
from hf_lrq.integrations.bitsandbytes.exporting import export_bitsandbytes
from hf_lrq.integrations.bitsandbytes.importing import import_bitsandbytes

__all__ = ["export_bitsandbytes", "import_bitsandbytes"]
