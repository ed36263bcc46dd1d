"""What holds for every codebook there is, by name."""

import copy
import dataclasses
import doctest
import importlib
import math
import re
from collections.abc import Iterator

import pytest
import torch

from hf_lrq.codebooks import Codebook, codebook_name, get_codebook, known_codebooks, known_families
from hf_lrq.codebooks.base import cached_table
from hf_lrq.errors import SpecError

NAMES = known_codebooks()
ALONE = [name for name in NAMES if get_codebook(name).row_block == 1]  # Trellises: see test_trellis.py.


@pytest.fixture(params=NAMES)
def any_book(request: pytest.FixtureRequest) -> Codebook:
    return get_codebook(request.param)


@pytest.fixture(params=ALONE)
def book(request: pytest.FixtureRequest) -> Codebook:
    """One that codes each vector on its own."""
    return get_codebook(request.param)


def test_families_are_those_of_the_format() -> None:
    assert known_families() == {
        "e8p": (2, 3, 4),
        "bt": (2, 4),
        "tcq": (2, 3, 4),
        "int": (2, 3, 4, 6, 8),
        "lloyd": (2, 3, 4),
        "nf": (2, 3, 4),
        "gguf": (4, 8),
        "bnbnf": (4,),
        "bnbfp": (4,),
    }


def test_name_family_and_bits_agree(any_book: Codebook) -> None:
    book = any_book
    assert book.name == f"{book.family}{book.bits}" == codebook_name(book.family, book.bits)
    assert book.column_block % book.dim == 0


def test_blocks_and_uniform_grids_have_group_scales(any_book: Codebook) -> None:
    assert any_book.grouped == (any_book.family in ("int", "gguf", "bnbnf", "bnbfp"))


def test_codes_fill_what_is_stored(any_book: Codebook) -> None:
    book = any_book
    shape = book.packed_shape(book.row_block + 1, 3 * book.column_block - 1)
    assert math.prod(shape) == 2 * book.row_block * 3 * book.column_block * book.bits // 8 or book.row_block == 1
    assert shape[1] == 3
    codes = torch.zeros(book.row_block * -(-(book.row_block + 1) // book.row_block), 3 * book.column_block // book.dim)
    assert book.pack(codes.long()).shape == shape


def test_codebooks_are_values(any_book: Codebook) -> None:
    book = any_book
    twin = type(book)(book.bits)
    assert twin == book
    assert hash(twin) == hash(book)
    assert copy.deepcopy(book) == book
    with pytest.raises(dataclasses.FrozenInstanceError):
        book.bits = 5  # type: ignore[misc]


def test_codes_are_in_range_and_repeatable(book: Codebook, generator: torch.Generator, rng_untouched: None) -> None:
    x = torch.randn(3, 40, book.dim, generator=generator)
    kept = x.clone()
    codes = book.encode(x)
    assert codes.shape == (3, 40)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 2 ** (book.bits * book.dim)
    assert torch.equal(codes, book.encode(x))
    assert torch.equal(codes[1], book.encode(x[1]))
    assert torch.equal(x, kept)


def test_layout_in_memory_does_not_matter(book: Codebook, generator: torch.Generator) -> None:
    x = torch.randn(book.dim, 40, generator=generator)
    assert torch.equal(book.encode(x.T), book.encode(x.T.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_is_encoded_in_single_precision(book: Codebook, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(64, book.dim, generator=generator, dtype=torch.float64).to(dtype)
    assert torch.equal(book.encode(x), book.encode(x.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_points_are_rounded_once(book: Codebook, dtype: torch.dtype, generator: torch.Generator) -> None:
    codes = torch.randint(0, 2 ** (book.bits * book.dim), (5, 50), generator=generator)
    values = book.decode(codes, dtype)
    assert values.shape == (5, 50, book.dim)
    assert values.dtype == dtype
    assert torch.equal(values, book.decode(codes).to(dtype))


def test_small_integers_decode(book: Codebook) -> None:
    codes = torch.tensor([0, 1, 3], dtype=torch.int32)
    assert torch.equal(book.decode(codes), book.decode(codes.long()))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_values_give_no_codes(book: Codebook, shape: tuple[int, ...]) -> None:
    codes = book.encode(torch.zeros(*shape, book.dim))
    assert codes.shape == shape
    assert codes.dtype == torch.int64
    assert book.decode(codes).shape == (*shape, book.dim)


def test_one_vector_gives_one_code(book: Codebook) -> None:
    code = book.encode(torch.ones(book.dim))
    assert code.shape == ()
    assert book.decode(code).shape == (book.dim,)


def test_more_bits_cost_less_error(generator: torch.Generator) -> None:
    x = torch.randn(20_000, 8, generator=generator)
    for family in {get_codebook(name).family for name in ALONE}:
        choices = known_families()[family]
        errors = []
        for bits in choices:
            book = get_codebook(codebook_name(family, bits))
            values = x.reshape(-1, book.dim)
            errors.append((book.decode(book.encode(values)) - values).square().mean().item())
        assert errors == sorted(errors, reverse=True)


def test_nan_gives_some_code_in_range(book: Codebook) -> None:
    x = torch.tensor([[torch.nan] * book.dim, [torch.inf] * book.dim, [-torch.inf] * book.dim])
    codes = book.encode(x)
    assert 0 <= codes.min() <= codes.max() < 2 ** (book.bits * book.dim)


def test_encoding_needs_vectors_of_dim(book: Codebook) -> None:
    message = rf"'{book.name}' encodes vectors of {book.dim}, got values of shape \(2, 5\)"
    with pytest.raises(ValueError, match=message):
        book.encode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"shape \(\)"):
        book.encode(torch.tensor(1.0))


def test_encoding_needs_floating_values(book: Codebook) -> None:
    with pytest.raises(ValueError, match=rf"'{book.name}' encodes floating values, got torch.int64. Convert"):
        book.encode(torch.zeros(2, book.dim, dtype=torch.int64))


def test_a_code_out_of_range_is_an_error(book: Codebook) -> None:
    with pytest.raises(IndexError):
        book.decode(torch.tensor([2 ** (book.bits * book.dim)]))


def test_unknown_name_lists_the_known_ones() -> None:
    known = ", ".join(known_codebooks())
    message = f"Unknown codebook 'e9p2'. Known codebooks: {known}. Did you mean 'e8p2'?"
    with pytest.raises(SpecError, match=re.escape(message)):
        get_codebook("e9p2")


def test_unknown_family_lists_the_known_ones() -> None:
    message = f"family 'loyd'. Known families: {', '.join(known_families())}. Did you mean 'lloyd'?"
    with pytest.raises(SpecError, match=re.escape(message)):
        codebook_name("loyd", 2)


def test_impossible_bits_name_the_possible_ones() -> None:
    with pytest.raises(SpecError, match=r"'e8p' has no 8-bit codebook\. Choose bits from: 2, 3, 4\."):
        codebook_name("e8p", 8)


class TestCachedTable:
    """Tables are built once, and only real ones are kept."""

    cpu = torch.device("cpu")

    def test_is_built_once_per_device_dtype_and_argument(self) -> None:
        built = []

        @cached_table
        def table(size: int) -> torch.Tensor:
            built.append(size)
            return torch.zeros(size)

        assert table(self.cpu, torch.float32, 3) is table(self.cpu, torch.float32, 3)
        assert table(self.cpu, torch.float16, 3).dtype == torch.float16
        assert table(self.cpu, torch.float32, 4).shape == (4,)
        assert built == [3, 3, 4]

    def test_outlives_inference_mode_and_the_default_device(self) -> None:
        @cached_table
        def table() -> torch.Tensor:
            return torch.arange(3.0)

        with torch.inference_mode(), torch.device("meta"):
            values = table(self.cpu, torch.float32)
        assert values.device == self.cpu
        assert not values.is_inference()
        assert values.tolist() == [0.0, 1.0, 2.0]

    def test_a_fake_tensor_is_not_kept(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        @cached_table
        def table() -> torch.Tensor:
            return torch.arange(3.0)

        with FakeTensorMode():
            table(self.cpu, torch.float32)
        assert table(self.cpu, torch.float32).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("module", ["scalar", "lattice", "packing", "bitsandbytes"])
def test_examples_in_docstrings_run(module: str) -> None:
    results = doctest.testmod(importlib.import_module(f"hf_lrq.codebooks.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.fixture
def reduced_precision() -> Iterator[None]:
    """Products of float32 matrices may be computed in bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_reduced_matmul_precision_does_not_change_codes(
    book: Codebook, generator: torch.Generator, request: pytest.FixtureRequest
) -> None:
    x = torch.randn(2000, book.dim, generator=generator)
    codes = book.encode(x)
    request.getfixturevalue("reduced_precision")
    assert torch.equal(book.encode(x), codes)


@pytest.mark.gpu
@pytest.mark.usefixtures("reduced_precision")
def test_codes_on_a_gpu_are_as_near(book: Codebook, generator: torch.Generator) -> None:
    x = torch.randn(20_000, book.dim, generator=generator)
    near = (book.decode(book.encode(x)) - x).square().sum(1)
    codes = book.encode(x.cuda())
    assert torch.equal(book.decode(codes).cpu(), book.decode(codes.cpu()))
    there = (book.decode(codes).cpu() - x).square().sum(1)
    # Other kernels round other ways: a tie may fall to the other side, and then a second stage differs.
    assert ((there - near).abs() > 1e-4).float().mean() < 1e-3
