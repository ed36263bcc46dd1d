"""From whatever a user calls a data set to token batches."""

import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_lrq.calibration import make_batches
from hf_lrq.errors import CalibrationError


class Letters:
    """A token per character, numbered from 10; puts `before` and `after` around a text."""

    def __init__(self, before: tuple[int, ...] = (), after: tuple[int, ...] = (), limit: float = 1e30):
        self.before, self.after, self.model_max_length = before, after, limit

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        assert not verbose
        ids = [10 + ord(letter) - ord("a") for letter in text]
        return {"input_ids": [*self.before, *ids, *self.after] if add_special_tokens else ids}


def lists(batches: list[Any]) -> list[Any]:
    return [batch.tolist() for batch in batches]


def test_texts_are_joined_and_cut_without_overlap() -> None:
    batches = make_batches(["abc", "defgh"], Letters(), seqlen=3)
    assert lists(batches) == [[[10, 11, 12]], [[13, 14, 15]]]
    assert batches[0].dtype == torch.int64


def test_sequences_are_grouped_into_batches() -> None:
    batches = make_batches(["abcdefghijkl"], Letters(), seqlen=2, batch_size=4)
    assert [tuple(batch.shape) for batch in batches] == [(4, 2), (2, 2)]
    assert torch.cat(batches).flatten().tolist() == list(range(10, 22))


def test_a_text_that_is_too_short_is_used_as_it_is() -> None:
    assert lists(make_batches(["ab"], Letters(before=(1,)), seqlen=100)) == [[[1, 10, 11]]]


@pytest.mark.usefixtures("rng_untouched")
def test_some_of_many_sequences_are_drawn_by_the_seed() -> None:
    text = ["".join(chr(ord("a") + place) for place in range(520))]
    few = make_batches(text, Letters(), nsamples=5, seqlen=7)
    assert len(few) == 5
    assert lists(few) == lists(make_batches(text, Letters(), nsamples=5, seqlen=7))
    assert lists(few) != lists(make_batches(text, Letters(), nsamples=5, seqlen=7, seed=1))
    every = lists(make_batches(text, Letters(), nsamples=1000, seqlen=7))
    assert len(every) == 74
    # From all over the text, in its order.
    places = [every.index(sequence) for sequence in lists(few)]
    assert places == sorted(set(places))
    assert places[-1] > 37


@pytest.mark.parametrize(
    ("before", "after", "special_tokens", "expected"),
    [
        ((), (), None, [[10, 11, 12, 13], [14, 15, 16, 17]]),
        ((), (), True, [[10, 11, 12, 13], [14, 15, 16, 17]]),
        ((1,), (2,), None, [[1, 10, 11, 2], [1, 12, 13, 2], [1, 14, 15, 2], [1, 16, 17, 2]]),
        ((1,), (), True, [[1, 10, 11, 12], [1, 13, 14, 15]]),
        ((1,), (2,), False, [[10, 11, 12, 13], [14, 15, 16, 17]]),
    ],
)
def test_each_sequence_is_wrapped_in_special_tokens(
    before: tuple[int, ...], after: tuple[int, ...], special_tokens: bool | None, expected: list[list[int]]
) -> None:
    batches = make_batches(["abcdefgh"], Letters(before, after), seqlen=4, special_tokens=special_tokens, batch_size=9)
    assert lists(batches) == [expected]


def test_special_tokens_of_a_real_tokenizer() -> None:
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=5)
    batches = make_batches(["a b a b b b a"], fast, seqlen=2048)
    assert lists(batches) == [[[1, 3, 4, 3, 2]], [[1, 4, 4, 4, 2]]]


@pytest.mark.parametrize(("limit", "length"), [(6, 6), (6.0, 6), (1e30, 8), (0, 8), (None, 8), (512, 8)])
def test_sequences_are_no_longer_than_the_model_takes(limit: Any, length: int) -> None:
    (first, *_) = make_batches(["abcdefghijklmnop"], Letters(limit=limit), seqlen=8)
    assert first.shape[1] == length


def test_tensors_and_mappings_are_used_as_they_are() -> None:
    given = [torch.arange(5), torch.ones(2, 3, dtype=torch.int32), {"pixel_values": torch.zeros(1, 3, 4, 4)}]
    batches = make_batches(given, nsamples=1, seqlen=2, batch_size=7)
    assert len(batches) == 3
    assert all(one is other for one, other in zip(batches, given, strict=True))


def test_the_rows_of_one_tensor_are_the_sequences() -> None:
    batches = make_batches(torch.arange(15).reshape(5, 3), batch_size=2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 3), (2, 3), (1, 3)]


@pytest.mark.parametrize("kind", [str, Path])
def test_a_text_file(kind: type, tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_text("abcd", encoding="utf-8")
    assert lists(make_batches(kind(file), Letters(), seqlen=2)) == [[[10, 11]], [[12, 13]]]


def test_an_existing_file_goes_before_a_data_set_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/corpus.md").write_text("abcd")
    assert len(make_batches("data/corpus.md", Letters(), seqlen=2, special_tokens=False)) == 2


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot read the calibration text '.*none\.txt': No such file"):
        make_batches(str(tmp_path / "none.txt"), Letters())
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(CalibrationError, match="it is not UTF-8"):
        make_batches(tmp_path / "latin.txt", Letters())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("bundeld", r"unknown calibration data set 'bundeld'. Did you mean 'bundled'\? Give \"bundled\", a list of"),
        ("wiki text 2", "unknown calibration data set 'wiki text 2'"),
        ("word " * 5000, r"unknown calibration data set 'word [word ]{75}'\.\.\. \(a text goes into a list\). Give"),
        ([], "the list of calibration texts is empty"),
        ([1, 2], "a list of calibration data holds int. Give"),
        (["a", torch.ones(2)], "a list of calibration data holds Tensor, str"),
        ([b"abc"], "a list of calibration data holds bytes"),
        (3, "calibration data cannot be of type int. Give"),
        ({"text": "a"}, "calibration data cannot be of type dict"),
        ([""], "the calibration text is empty: it has no tokens"),
        (["", ""], "the calibration text is empty: it has no tokens"),
    ],
)
def test_what_is_no_data_set(dataset: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        make_batches(dataset, Letters())


def test_texts_need_a_tokenizer() -> None:
    for dataset in ("bundled", ["abc"]):
        with pytest.raises(CalibrationError, match=r"calibration texts need a tokenizer. Pass tokenizer=, or a list"):
            make_batches(dataset)
    with pytest.raises(CalibrationError, match="unknown calibration data set 'no such'"):
        make_batches("no such")


@pytest.mark.parametrize("name", ["nsamples", "seqlen", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True, None])
def test_sizes_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(CalibrationError, match=rf"{name} must be an integer of at least 1, got {value!r}"):
        make_batches(["abc"], Letters(), **{name: value})


def test_special_tokens_need_room() -> None:
    with pytest.raises(CalibrationError, match="seqlen=2 leaves no room between 2 special tokens"):
        make_batches(["abc"], Letters((1,), (2,)), seqlen=2)


class Rows:
    """What `datasets` returns for a streamed data set: rows without end."""

    def __init__(self, row: dict[str, Any]):
        self.row, self.read, self.shuffled = row, 0, False

    def shuffle(self, seed: int, buffer_size: int) -> "Rows":
        self.shuffled = True
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.read += 1
            yield self.row


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package `datasets`, which notes what it is asked for."""
    module: Any = ModuleType("datasets")
    module.rows = Rows({"id": "x", "text": "abcd"})
    module.asked = []

    def load_dataset(*args: Any, **options: Any) -> Rows:
        module.asked.append((*args, options))
        if args[0] == "some/missing":
            raise FileNotFoundError("no such data set")
        return module.rows

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


@pytest.mark.parametrize(
    ("dataset", "name", "config", "split"),
    [
        ("org/name", "org/name", None, "train"),
        ("org/name/validation", "org/name", None, "validation"),
        ("org/name:a-b.c", "org/name", "a-b.c", "train"),
        ("org/name:conf/test", "org/name", "conf", "test"),
        ("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("c4", "allenai/c4", "en", "train"),
    ],
)
def test_data_sets_on_the_hub(dataset: str, name: str, config: str | None, split: str, library: Any) -> None:
    batches = make_batches(dataset, Letters(), nsamples=5, seqlen=8)
    assert lists(batches) == [[[10, 11, 12, 13] * 2]] * 5
    assert library.asked == [(name, config, {"split": split, "streaming": True})]
    # No more rows than it takes: the data set has no end.
    assert library.rows.read == 10
    assert library.rows.shuffled


def test_the_only_column_of_strings_is_the_text(library: Any) -> None:
    library.rows = Rows({"id": 3, "content": "ab"})
    assert lists(make_batches("org/name", Letters(), nsamples=1, seqlen=4)) == [[[10, 11, 10, 11]]]
    library.rows = Rows({"title": "a", "body": "b"})
    with pytest.raises(CalibrationError, match="has no column 'text'; its columns with strings: title, body"):
        make_batches("org/name", Letters())


def test_a_data_set_that_does_not_load(library: Any) -> None:
    with pytest.raises(CalibrationError, match="cannot load 'some/missing' from the Hub: FileNotFoundError: no such"):
        make_batches("some/missing", Letters())


def test_the_hub_needs_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r'not installed\. Run: pip install "hf_lrq\[datasets\]"\. Or use'):
        make_batches("org/name", Letters())


@pytest.fixture(scope="module")
def bundled() -> str:
    """The text that comes with the package."""
    return files("hf_lrq").joinpath("data/calibration.txt").read_text(encoding="utf-8")


class Bytes(Letters):
    """A token per byte."""

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_the_bundled_text_is_large_enough(bundled: str) -> None:
    assert 250_000 < len(bundled.encode()) < 400_000
    batches = make_batches("bundled", Bytes(), seqlen=2048)
    assert len(batches) == 128
    assert all(batch.shape == (1, 2048) for batch in batches)


def test_the_bundled_text_is_prose_and_says_nothing_twice(bundled: str) -> None:
    paragraphs = [" ".join(p.split()) for p in bundled.split("\n\n")]
    long = [p for p in paragraphs if len(p) > 100]
    assert len(long) > 500
    assert len(set(long)) == len(long)
    words = re.findall(r"[A-Za-z]+", bundled)
    assert len(words) > 40_000
    common = sum(word.lower() in {"the", "of", "and", "to", "a", "in", "is", "that"} for word in words)
    assert common > 0.15 * len(words)


def test_the_bundled_text_belongs_to_nobody_in_particular(bundled: str) -> None:
    assert re.findall(r"[\w.+-]+@[\w-]+\.\w+", bundled) == []
    assert re.findall(r"(?<![\w./~-])/(?:work|tmp|opt|root|home|farm|Users)/", bundled) == []
    assert "http" not in re.sub(r"[Hh]ttp[A-Z_/ ]|httpd|https?[ ,.)]", "", bundled)
    licences = files("hf_lrq").joinpath("data/LICENSES.txt").read_text(encoding="utf-8")
    owners = "Python Software Foundation", "scikit-learn developers", "NetworkX Developers", "SymPy Development Team"
    for owner in owners:
        assert re.search(rf"Copyright \(c\).*{owner}", licences), owner
    assert "Rust book" in licences


def test_the_example_model_is_never_calibrated_on_the_text_it_is_measured_on(bundled: str) -> None:
    held_out = Path(__file__).resolve().parents[2] / "examples" / "tiny_lm" / "heldout.txt"
    text = held_out.read_text(encoding="utf-8")
    assert [p for p in bundled.split("\n\n") if len(p) > 80 and p.strip() in text] == []
