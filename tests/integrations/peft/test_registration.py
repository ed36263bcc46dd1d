"""PEFT knows the adapter type once both packages are imported, whichever came first; neither needs the other."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

REGISTERED = """
import pickle
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftType
from peft.tuners.lora import LoraModel
from hf_lrq.integrations.peft import LRQAdapterConfig, LRQAdapterModel
assert PEFT_TYPE_TO_CONFIG_MAPPING["LRQ"] is LRQAdapterConfig
assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LRQ] is LRQAdapterModel
assert pickle.loads(pickle.dumps(PeftType.LRQ)) is PeftType.LRQ is PeftType("LRQ")
assert isinstance(PeftConfig.from_peft_type(peft_type="LRQ", mode="head:2"), LRQAdapterConfig)
assert hasattr(LoraModel._create_new_module, "_hf_lrq_original")
assert not [finder for finder in sys.meta_path if getattr(finder, "awaited", "").startswith("peft")]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "road",
    [
        "import hf_lrq; from peft import LoraConfig",
        "import peft, hf_lrq, importlib; importlib.reload(hf_lrq); import hf_lrq.integrations.peft as ours\n"
        "importlib.reload(ours.registration); importlib.reload(ours)",
    ],
)
def test_registered_by_every_road(road: str) -> None:
    result = run(road + REGISTERED)
    assert result.returncode == 0, result.stderr


def test_peft_is_not_needed() -> None:
    result = run(
        """
        sys.modules["peft"] = None  # makes its import fail, as if it were not installed
        import hf_lrq
        from hf_lrq import LRQConfig
        assert "hf_lrq.integrations.transformers" in sys.modules
        try:
            import hf_lrq.integrations.peft
        except ImportError as error:
            assert "peft" in str(error)
        else:
            raise SystemExit("no error")
        """
    )
    assert result.returncode == 0, result.stderr


def test_a_peft_without_what_is_needed_goes_on_with_a_warning() -> None:
    """Who imports PEFT for something else is not to be stopped."""
    result = run(
        """
        import warnings
        import hf_lrq
        sys.modules["hf_lrq.integrations.peft"] = None  # makes its import fail, as an old PEFT would
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import peft
        said = [str(each.message) for each in caught if "hf_lrq" in str(each.message)]
        assert len(said) == 1, caught
        assert f"could not register its adapters with peft {peft.__version__}" in said[0], said
        assert "needs peft >= 0.20: upgrade peft" in said[0], said
        assert "LRQ" not in peft.PeftType.__members__
        """
    )
    assert result.returncode == 0, result.stderr
