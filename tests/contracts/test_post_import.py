"""The hook that registers the package with transformers whenever, and by whichever road, transformers is imported."""

import importlib
import importlib.util
import inspect
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from hf_lrq.integrations import post_import
from hf_lrq.integrations.post_import import after_import

ROOT = Path(__file__).resolve().parents[2]

# `inner` is reached from the middle of `outer`, as transformers.quantizers is from transformers.modeling_utils.
HOST = {
    "__init__.py": "",
    "outer.py": "import made_up_host.inner\nDONE = True\n",
    "inner.py": 'class Thing:\n    """A class to find the source of."""\n',
    "other.py": "",
    "broken.py": "import made_up_host.inner\nraise ValueError('broken host')\n",
    "spy.py": "import made_up_host.inner\nLOADER = __loader__\nSPEC_LOADER = __spec__.loader\n",
}
AWAITED = "made_up_host.inner"


def forget_host() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up_host"]:
        del sys.modules[name]
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "awaited", None) != AWAITED]


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `made_up_host` that can be imported and is not."""
    folder = tmp_path / "made_up_host"
    folder.mkdir()
    for name, source in HOST.items():
        (folder / name).write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    forget_host()
    yield
    forget_host()


def finders() -> list[object]:
    return [finder for finder in sys.meta_path if getattr(finder, "awaited", None) == AWAITED]


class Recorder:
    """An action that counts its calls and looks at the host while it runs."""

    def __init__(self, look: Callable[[], object] = lambda: None, name: str = "record") -> None:
        self.seen: list[object] = []
        self.look = look
        self.__qualname__ = name

    def __call__(self) -> None:
        self.seen.append(self.look())


def test_acts_at_once_when_the_module_is_there() -> None:
    importlib.import_module(AWAITED)
    action = Recorder()
    after_import(AWAITED, action)
    assert len(action.seen) == 1
    assert finders() == []


def test_acts_once_after_the_import_and_leaves() -> None:
    action = Recorder(lambda: sys.modules[AWAITED].Thing.__name__)
    after_import(AWAITED, action)
    assert action.seen == []
    importlib.import_module(AWAITED)
    assert action.seen == ["Thing"]
    assert finders() == []
    importlib.reload(sys.modules[AWAITED])
    assert action.seen == ["Thing"]


def test_other_modules_of_the_package_do_not_set_it_off() -> None:
    action = Recorder()
    after_import(AWAITED, action)
    importlib.import_module("made_up_host.other")
    assert action.seen == []
    assert len(finders()) == 1


def test_waits_for_the_outermost_import() -> None:
    action = Recorder(lambda: getattr(sys.modules["made_up_host.outer"], "DONE", False))
    after_import(AWAITED, action)
    importlib.import_module("made_up_host.outer")
    assert action.seen == [True]


def test_asking_twice_installs_one_finder_even_after_a_reload() -> None:
    first, second = Recorder(), Recorder()
    after_import(AWAITED, first)
    after_import(AWAITED, second)
    importlib.reload(post_import).after_import(AWAITED, second)
    assert len(finders()) == 1
    importlib.import_module(AWAITED)
    assert (len(first.seen), len(second.seen)) == (1, 0)


def test_two_actions_both_run() -> None:
    first, second = Recorder(), Recorder(name="another")
    after_import(AWAITED, first)
    after_import(AWAITED, second)
    assert len(finders()) == 2
    importlib.import_module("made_up_host.outer")
    assert (len(first.seen), len(second.seen)) == (1, 1)
    assert finders() == []


def test_a_finder_that_asks_all_the_others_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asking:
        """As the finders of other post-import hooks do: looks a module up again while it is being looked up."""

        busy = False

        def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            if self.busy or not name.startswith("made_up_host."):
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.busy = False

    action = Recorder()
    monkeypatch.setattr(sys, "meta_path", [Asking(), *sys.meta_path])
    after_import(AWAITED, action)
    importlib.import_module(AWAITED)
    sys.meta_path.insert(0, Asking())
    assert len(action.seen) == 1


def test_what_the_action_raises_comes_out_of_the_import_each_time() -> None:
    def fail() -> None:
        raise LookupError("no such quantizer")

    after_import(AWAITED, fail)
    for _ in range(2):
        with pytest.raises(LookupError, match="no such quantizer"):
            importlib.import_module("made_up_host.outer")
        assert "made_up_host.outer" not in sys.modules
    assert len(finders()) == 1


def test_a_host_that_fails_by_itself_does_not_upset_the_count() -> None:
    action = Recorder()
    after_import(AWAITED, action)
    with pytest.raises(ValueError, match="broken host"):
        importlib.import_module("made_up_host.broken")
    assert action.seen == []
    importlib.import_module("made_up_host.other")
    assert len(action.seen) == 1


def test_the_action_may_import_from_the_host() -> None:
    action = Recorder(lambda: importlib.import_module("made_up_host.outer").DONE)
    after_import(AWAITED, action)
    importlib.import_module(AWAITED)
    assert action.seen == [True]
    assert finders() == []


def test_modules_keep_their_own_loader_and_spec() -> None:
    after_import(AWAITED, Recorder())
    spy = importlib.import_module("made_up_host.spy")
    inner = sys.modules[AWAITED]
    ordinary = type(importlib.import_module("json").__spec__.loader)
    for module in (spy, inner):
        assert type(module.__spec__.loader) is ordinary
        assert module.__loader__ is module.__spec__.loader
    assert spy.LOADER is spy.SPEC_LOADER is spy.__spec__.loader
    assert "A class to find the source of." in inspect.getsource(inner.Thing)


def test_looking_for_a_spec_without_an_import_gives_a_working_loader() -> None:
    action = Recorder()
    after_import(AWAITED, action)
    spec = importlib.util.find_spec(AWAITED)
    assert spec is not None
    assert spec.loader is not None
    assert "class Thing" in spec.loader.get_source(AWAITED)
    assert action.seen == []
    assert len(finders()) == 1


def test_a_missing_module_stays_missing() -> None:
    after_import(AWAITED, Recorder())
    with pytest.raises(ModuleNotFoundError, match=r"made_up_host\.nothing"):
        importlib.import_module("made_up_host.nothing")


def test_imports_from_several_threads() -> None:
    action = Recorder(lambda: sys.modules[AWAITED].Thing.__name__)
    after_import(AWAITED, action)
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def work(name: str) -> None:
        start.wait()
        try:
            importlib.import_module(name)
        except BaseException as error:
            failures.append(error)

    names = ["made_up_host.outer", AWAITED, "made_up_host.other", "made_up_host.spy"]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert set(action.seen) == {"Thing"}
    assert finders() == []


# With the real transformers: each road to it in an interpreter of its own.

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
import hf_lrq
assert AUTO_QUANTIZER_MAPPING["hf_lrq"] is hf_lrq.LRQHfQuantizer
assert AUTO_QUANTIZATION_CONFIG_MAPPING["hf_lrq"] is hf_lrq.LRQConfig

import inspect, pickle
from transformers.quantizers import HfQuantizer
assert pickle.loads(pickle.dumps(HfQuantizer)) is HfQuantizer
assert "class HfQuantizer" in inspect.getsource(HfQuantizer)
assert not [finder for finder in sys.meta_path if getattr(finder, "awaited", "") == "transformers.quantizers.auto"]
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{textwrap.dedent(code)}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    "road",
    [
        "import hf_lrq, importlib; importlib.reload(hf_lrq)",
        "import hf_lrq; hf_lrq.LRQConfig",
        # Its home imports transformers, and is imported by the registration.
        "import hf_lrq; hf_lrq.plan_for",
        # The quantizers are reached from the middle of modeling_utils here.
        "import hf_lrq; from transformers import LlamaForCausalLM",
        "import transformers.quantizers.auto; import hf_lrq, importlib; importlib.reload(hf_lrq)",
    ],
)
def test_registered_with_transformers_by_every_road(road: str) -> None:
    result = run(road + REGISTERED)
    assert result.returncode == 0, result.stderr


def test_a_transformers_without_what_is_needed_is_named() -> None:
    """An error of the registration is neither swallowed nor mistaken for an absent transformers."""
    result = run(
        """
        import hf_lrq
        sys.modules["hf_lrq.integrations.transformers"] = None  # makes its import fail, as an old transformers would
        try:
            import transformers.quantizers.auto
        except ImportError:
            raise SystemExit("taken for an absent library")
        except hf_lrq.LRQError as error:
            assert "could not register itself with transformers 5." in str(error), error
            assert "transformers >= 5.2" in str(error), error
            assert isinstance(error.__cause__, ImportError)
        else:
            raise SystemExit("no error")
        """
    )
    assert result.returncode == 0, result.stderr
