"""`hf-lrq bench quality`: the same windows for all, exact bytes, rows that can be compared and kept."""

import ctypes
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_lrq.cli.bench.candidates import Material, MeanSquares, in_file
from hf_lrq.cli.bench.peers import FAMILIES, peers_named
from hf_lrq.cli.bench.peers.base import MatrixPeer, Rounded
from hf_lrq.cli.bench.plot import front
from hf_lrq.cli.bench.quality import Remembering
from hf_lrq.cli.bench.recipes import Recipe
from hf_lrq.cli.bench.records import OnText, Record
from hf_lrq.errors import EvaluationError, SpecError
from hf_lrq.evaluation import Size, compare

INT = "codebook=int,rank=0,rounding=nearest,rotation=none,dataset=none"
SMALL = ("--window", 32, "--windows", 3, "--nsamples", 2, "--seqlen", 32, "--device", "cpu", "--quiet")


class Floats(MatrixPeer):
    """A peer that keeps floats of 8 bits."""

    by, package, variants = "floats", "torch", ("8",)

    def round(self, layer: nn.Linear) -> Rounded:
        """To three digits after the first."""
        codes = layer.weight.to(torch.float8_e4m3fn)
        return Rounded(codes.float(), {"codes": codes})


@pytest.fixture
def quality(cli: Any, original: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command on the tiny Llama, as JSON; the peer above is known."""
    monkeypatch.setitem(FAMILIES, Floats.by, Floats)

    def run(*arguments: object) -> dict[str, Any]:
        texts = ("--calibration", text, "--text", f"lines={text}")
        result = cli("bench", "quality", original, *texts, *SMALL, "--json", *arguments)
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    return run


def material(original: Path, stored: torch.dtype = torch.bfloat16) -> Material:
    model = AutoModelForCausalLM.from_pretrained(original, dtype=stored).float()
    batches = [torch.arange(32).view(1, 32), torch.arange(100, 148).view(2, 24)]
    return Material(model, batches, None, stored)


def test_rows_hold_what_compare_measures(quality: Any, original: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    found = quality("--recipe", f"rtn: bits=4,{INT}", "--peer", "floats", "--out", out)
    assert json.loads(out.read_text(encoding="utf-8")) == found
    ours, theirs = found["rows"]
    assert (ours["name"], ours["by"], theirs["name"]) == ("rtn", "hf_lrq", "floats:8")
    windows = ours["texts"]["lines"]["windows"]
    assert windows["tokens"] == [31, 31, 31]
    assert ours["texts"]["lines"]["kl"]["mean"] == pytest.approx(math.fsum(windows["kl"]) / 93)
    assert 0 < theirs["texts"]["lines"]["kl"]["mean"] < ours["texts"]["lines"]["kl"]["mean"]
    assert theirs["bits_per_weight"] == 8
    compressed = theirs["size"]["compressed"]["bytes"]
    assert found["shared"]["original"]["bytes"] == pytest.approx(theirs["bytes"] + compressed, rel=0.01)


def test_bytes_are_those_of_a_saved_file(original: Path, tmp_path: Path) -> None:
    given = material(original)
    plain = Size.of(in_file(given.original, given.stored))
    given.original.to(torch.bfloat16).save_pretrained(tmp_path)
    # The library writes {"format": "pt"} into the header, which the size of a compressed file has other metadata for.
    assert plain.total_bytes == pytest.approx((tmp_path / "model.safetensors").stat().st_size, abs=64)


def test_rows_are_added_to_those_of_the_same_original(quality: Any, tmp_path: Path, text: Path, cli: Any) -> None:
    out = tmp_path / "rows.json"
    first = quality("--peer", "floats", "--out", out)
    both = quality("--recipe", f"bits=8,{INT}", "--add", out)
    assert json.loads(out.read_text(encoding="utf-8")) == both
    assert both["rows"][0] == first["rows"][0]
    assert [row["by"] for row in both["rows"]] == ["floats", "hf_lrq"]
    again = quality("--peer", "floats", "--add", out)
    assert [row["by"] for row in again["rows"]] == ["hf_lrq", "floats"]


def test_rows_of_other_windows_are_refused(quality: Any, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    quality("--peer", "floats", "--out", out)
    record = Record.read(out)
    shared = json.loads(json.dumps(record.shared))
    record.check_same(shared)
    shared["texts"]["lines"]["tokens"] = 62
    with pytest.raises(EvaluationError, match=r"texts\.lines\.tokens was 93 and is 62"):
        record.check_same(shared)


def test_the_table_of_an_earlier_run(quality: Any, cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    quality("--peer", "floats", "--out", out)
    result = cli("bench", "quality", "any", "--add", out, "--markdown")
    assert result.exit_code == 0, result.output
    table = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert table[0].startswith("| model | bits | bits, whole file | MB | seconds | KL, lines |")
    assert table[2].startswith("| original, bfloat16 |  | 16.")
    assert table[3].startswith("| `floats:8` | 8.00 |")


def test_differences_are_taken_window_by_window() -> None:
    kl = [[1.0, 5.0, 3.0], [1.5, 5.5, 3.5]]
    one, other = (OnText([10, 10, 10], *[[0.0] * 3] * 2, each, *[[0.0] * 3] * 3) for each in kl)
    assert other.minus(one).mean == pytest.approx(0.05)
    assert other.minus(one).standard_error == pytest.approx(0, abs=1e-9)
    assert one.mean("kl").standard_error == pytest.approx(other.mean("kl").standard_error)


def test_what_is_remembered_is_what_the_model_says(original: Path) -> None:
    model = material(original).original
    ids = torch.arange(80)
    room = 2 * 20 * model.config.vocab_size * 4  # Of four windows.
    found = [compare(model, reference, ids, 20, 19) for reference in (model, Remembering(model, room)) for _ in "ab"]
    assert found[0] == found[2] == found[3]
    assert found[0].kl.mean == pytest.approx(0, abs=1e-7)


def test_mean_squares_are_over_all_tokens(original: Path) -> None:
    given = material(original)
    layer = given.original.model.layers[0].self_attn.q_proj
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    for batch in given.batches:
        given.original(batch)
    hook.remove()
    expected = torch.cat(seen).square().mean(0)
    found = MeanSquares.of(given.original, given.batches).values
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj"], expected.detach())
    assert set(found) == {name for name, each in given.original.named_modules() if isinstance(each, nn.Linear)}


def test_what_is_shared_is_done_once_and_counted_for_each(original: Path) -> None:
    given = material(original)
    first, second = (peer.prepare(given) for peer in peers_named(["gguf:q4_0", "gguf:q2_k"]))
    assert first == second == given.mean_squares.seconds > 0
    assert peers_named(["nf4:64"])[0].prepare(given) == 0


def test_recipes_are_options_in_words() -> None:
    named = Recipe.parse('two: {"bits": 2, "patterns": {"up_proj": {"bits": 4}}}', seed=3)
    assert (named.name, named.config.patterns, named.config.seed) == ("two", {"up_proj": {"bits": 4}}, 3)
    assert Recipe.parse("defaults").config.options() == Recipe.parse("bits=2").config.options()
    assert not Recipe.parse("bits=4,dataset=none").calibrated


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits", "'bits', which is no KEY=VALUE"),
        ("bits=2,dataset=c4", "all share --calibration"),
        ("seqlen=4", "which all candidates share"),
        ("bitz=2", "bitz"),
        ("{bits", "is none"),
    ],
)
def test_a_wrong_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Recipe.parse(text)


def test_a_family_stands_for_its_variants() -> None:
    assert [peer.name for peer in peers_named(["nf4", "gguf:q4_k+across", "nf4:64"])] == [
        "nf4:64",
        "nf4:64-double",
        "gguf:q4_k+across",
    ]
    for wrong in ("gguf:q9", "awq"):
        with pytest.raises(SpecError, match=r"Peers are gguf:\{"):
            peers_named([wrong])


def test_a_peer_that_cannot_run_is_listed(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_LRQ_GGML", raising=False)
    monkeypatch.setattr("hf_lrq.cli.bench.peers.base.find_spec", lambda name: name == "torch")
    found = quality("--peer", "hqq:4-64", "--peer", "floats", "--peer", "gguf:q4_0")
    assert [row["name"] for row in found["rows"]] == ["floats:8"]
    assert found["not_run"]["hqq:4-64"] == "not installed. Run: pip install hqq"
    assert set(found["not_run"]) == {"hqq:4-64", "gguf:q4_0"}


def test_the_front_is_what_nothing_is_better_than() -> None:
    points = [(2.0, 2.0), (1.0, 3.0), (3.0, 2.0), (3.0, 1.0), (1.0, 4.0)]
    assert front(points) == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]


def test_the_plot_names_every_row(quality: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn: list[Any] = []
    write = figure.savefig
    monkeypatch.setattr(
        figure, "savefig", lambda self, *given, **more: (drawn.append(self), write(self, *given, **more))
    )
    path = tmp_path / "rows.png"
    recipes = ("--recipe", f"one: bits=8,{INT}", "--recipe", f"same: bits=8,{INT}", "--recipe", f"bits=8,{INT}")
    quality("--peer", "floats", *recipes, "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG")
    texts = [text for text in drawn[0].axes[0].texts if text.get_text()]
    assert {
        "FLOATS 8",
        "one",
        "same",
        "bits=8, codebook=int,\nrank=0, rounding=nearest,\nrotation=none,\ndataset=none",
    } == {text.get_text() for text in texts}


def test_a_plot_needs_matplotlib(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lrq.cli.bench.plot.find_spec", lambda name: None)
    message = cli.fails("bench", "quality", "any", "--plot", tmp_path / "a.png")
    assert 'pip install "hf_lrq[plot]"' in message


def q8_0(kind: int, source: int, target: int, start: int, rows: int, width: int, weights: int | None) -> int:
    """Stands for ggml, by the definition of Q8_0: 32 weights share a scale of absmax / 127 in float16."""
    values = torch.tensor((ctypes.c_float * (rows * width)).from_address(source)).view(-1, 32)
    scales = (values.abs().amax(1, keepdim=True) / 127).half()
    codes = (values / scales.float()).round().clamp(-127, 127).to(torch.int8)
    packed = torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], 1)
    ctypes.memmove(target, packed.contiguous().data_ptr(), packed.numel())
    return packed.numel()


def test_llama_cpp_bytes_and_values(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")

    class Function:
        argtypes: Any = None
        restype: Any = None

        def __call__(self, *arguments: Any) -> int:
            return q8_0(*arguments)

    library = tmp_path / "libggml-base.so"
    library.touch()
    monkeypatch.setattr(ctypes, "CDLL", lambda path: type("Library", (), {"ggml_quantize_chunk": Function()})())
    given = material(original)
    given = Material(given.original, given.batches, None, given.stored, ggml=tmp_path)
    (peer,) = peers_named(["gguf:q8_0"])
    assert peer.missing(given) is None
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).float()
    found = peer.compress(model, given)
    matrices = [each for each in model.modules() if isinstance(each, nn.Linear | nn.Embedding)]
    inner = [each for each in matrices if isinstance(each, nn.Linear) and each is not model.lm_head]
    assert found.size.compressed.bytes == sum(each.weight.numel() for each in inner) * 34 // 32
    assert found.size.embeddings.bytes == found.size.linears.bytes == 258 * 64 * 34 // 32
    assert found.size.norms.bytes == 5 * 64 * 4
    for name, weight in given.original.named_parameters():
        error = (model.get_parameter(name) - weight).abs().max() / weight.abs().max()
        assert (0 < error < 0.5 / 127 + 1e-3) if weight.ndim > 1 else error == 0
    assert found.details["weights_by_type"] == {"Q8_0": sum(each.weight.numel() for each in matrices)}
