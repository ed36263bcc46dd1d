"""Digests that pin the format: a checkpoint written today decodes to the same values for ever.

A digest that changes means that `format_version` must change.
"""

import hashlib

import pytest
import torch
from torch import Tensor

from hf_lrq.codebooks import get_codebook, known_codebooks
from hf_lrq.codebooks.trellis import Trellis

POINTS = {
    "bnbfp4": "05e4404ac75a4735e9e065a4e2655a2a9ad535c0e50722c71e837df4b7f79d7e",
    "bnbnf4": "5bd0f41b84c2ffe6fd3dfe2b8b7f827a03beddd48c82a89bc0ac56f2c86d6461",
    "e8p2": "b0e62c4878f05dd6dd127ad8f2b9000addea3cd2f14dc82f2586b8a4179870fc",
    "e8p3": "320eaf5baa56856830d0e08ba27206fd2045bd36802e3fc4cc5a4ab4f73bc632",
    "e8p4": "5fbacda238eee2fa6d1324453b15a27e1e830274f4ef9053bfd66063cd677fd0",
    "gguf4": "e192b69dd536e58664a3c2991d0df8dc23decd0e21f33419ae562f39e915485e",
    "gguf8": "7eafad026cc6b6743d72c25c0e26165c7a5502b7a6c575d7066a9aabcf68f400",
    "int2": "5bcd6185880a89ce57b5b214779b3044f144b4a76597b05a0a0cd73d69b338e9",
    "int3": "31d9524e7ac9dc3281e3f385d95da522ed9b50fcb50d21651ecb2ca02e4a5286",
    "int4": "cf9076a0650ca629e143bd3e621d11a6eba59bc7ac0b3a414695b39b87d19d8f",
    "int6": "8d039295bc8e7f2dfeb8d545051dff7a9ca11c1629046c0b2eb81f2d04441f46",
    "int8": "0d04f19df7607c803a256a647ad5ebffa99b1dccb6237a115cca790d17fb1323",
    "lloyd2": "d51c2f3686a7755d8cefc4acb878e15653365dc757bd284573c1306989f41ace",
    "lloyd3": "a582331b32188bbe1b8e532e427527c12f32fded9601dcad504ff54f37db43f9",
    "lloyd4": "4a3e5bd5cc27e2e040c1535f779933977f1718b0e9c80c73a1f4eb9d9a85a61c",
    "nf2": "09798267d50d2715745a56b0d5f96f7aa9e43b1847f3fc5938d267e991c8e330",
    "nf3": "87b6332fa0629de8a66dc39fec63481f72eaec6524e516876de187df39278f8c",
    "nf4": "e876a131ee6915826148866d44b5ee5e3f2439d4fe9f727fecf856591ed17f1c",
}
CODES = {
    "bnbfp4": "040c9bf5ab37ce9c7604e327ead80bfe0e882b248a167b82f712e0958471e2c0",
    "bnbnf4": "3a6c2b30bd089edbb459fa5d3989a12391f593d0f1a67c39f47f37f0cbf81a81",
    "e8p2": "fa77684340b4d5e385f8ee0373006861d9626fb26448f62e03ef42ae75a9f5db",
    "e8p3": "b6897096712e8c60c3e184dd96f664e61b9295c1e06cfcaada9c6f155a5c527b",
    "e8p4": "a7224712fd08ae7e085586b038673810c2a9c2925ee33feb307ded5cece2ef98",
    "gguf4": "f054f01fffb630db1c097163c8890df8e976023b57ef02c0e9b3a32283ace2b5",
    "gguf8": "6b5e44c5830f28081e432f69816c2d9036afd101acb95bd6fb9ee6282555dfd4",
    "int2": "569f74125fc46430b27149b8248d1353b67bc3e109d1d5e2a69b0088d7d51822",
    "int3": "a434f674c3cf0851970ad14d5037b2680c11762dfdc0b8343ff6f24435031348",
    "int4": "44cab3696386e8c77a983d155ed9c37c982ba2e704867b63eaf52416bec8e5e8",
    "int6": "bf6c3de2fa8cabc51382b0113a169febab3884d3e0e92a4cf9c5bfd6afcaa12d",
    "int8": "2a545f26708e47218d6cf00f0e08a5d5190f8d2e23f5461cc9e0fdd8a147e106",
    "lloyd2": "73f7b351d6e533352d3d676235d38bc68deec651724215b3cbfe318ad88cdd7d",
    "lloyd3": "2916a7ffff13c3d7500a2d14ccedba5a59979980134dcca34fc1e01df507f23e",
    "lloyd4": "9aa8c6ac816cfb3118206b93ac7814c0f16cccfe8a50a3ed4925d813ea31e9e0",
    "nf2": "7a86e6299ba8e8d429dc5efbe315e797b4ab521a8e1d114697bb228607ab5c22",
    "nf3": "b9bf793880945ddd57edea10ee9c644b14c5453cfb1343b594995c67de52db9e",
    "nf4": "6252ecfb48663c073ffb860d1176b2a01317be1b13d686f996e0cdf6b9a30081",
}

# Of a trellis: every value a weight can take by the state it is computed from, and the bytes of the nearest path.
TRELLIS_POINTS = {
    "bt2": "c320e97e470a9768e89420bfc13fa3529b2b1a751d397bd974dbb9a74ead5d39",
    "bt4": "8d02809ec4714e554906fc9af8bbb22ac55423bf96f63d0ebce031ccfff66ff1",
    "tcq2": "9578c3a6c6dea31e6f8958d6cef64d8c9438702c006e7468c0cd8a4787da5b17",
    "tcq3": "660e83681a7bf3e5b8e22f704da9e88b5ec967fc7d16a7db0960f448f6b8b8d0",
    "tcq4": "322a68abd00a12229e085081ba92e2faf323e6f34cf8d447d9f654d840db4d09",
}
TRELLIS_CODES = {
    "bt2": "43d37ca82c5d82b18e0cfb3cef65964a05fcc5793da25bae718a2acc912c5bf0",
    "bt4": "e105307cbdaf92b02d5d0fc9eb57e8b8b1775642a35bebb4f03babcdd02e1a4a",
    "tcq2": "30443971c77eb68940926dba26765a5798dba7a1435ba8b8842b8bd05eec7efd",
    "tcq3": "3ab3c16c55f4454f63ce4dd0ec766cbce6b941b7685447fbf4fc66fd8bf37297",
    "tcq4": "2c3cfc27eeb903f617e11cdc9cdcc51118a2dc118812b6a3edc7585c8e3c64c8",
}

NAMES = list(POINTS)


def bell(rows: int, columns: int) -> Tensor:
    """Values about N(0, 1) from integer arithmetic: sums of four 16-bit hashes of their position, exact in float32."""
    at = torch.arange(rows * columns).unsqueeze(1) * 4 + torch.arange(4)
    hashed = (at * 2654435761 + 1) % 2**32  # Knuth's multiplicative hash.
    hashed = ((hashed ^ hashed >> 15) * 2246822519 % 2**32) >> 16
    return ((hashed.sum(1) - 2 * (2**16 - 1)) * (7 / 4) / 2**16).reshape(rows, columns).float()


def digest(values: Tensor) -> str:
    return hashlib.sha256(bytes(values.contiguous().view(torch.uint8).flatten().tolist())).hexdigest()


def fixed_point(values: Tensor) -> Tensor:
    """Multiples of 2**-20, far below the resolution of any dtype that models run in: int32."""
    return (values.double() * 2**20).round().to(torch.int32)


def test_input_is_about_unit_variance() -> None:
    x = bell(64, 128)
    assert x.mean().item() == pytest.approx(0, abs=0.05)
    assert x.square().mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_points_have_not_changed(name: str) -> None:
    book = get_codebook(name)
    bits = book.bits * book.dim
    stage = torch.arange(2 ** min(bits, 16))
    codes = stage if bits <= 16 else torch.cat((stage, torch.arange(2 ** (bits - 16)) << 16))
    assert digest(fixed_point(book.decode(codes))) == POINTS[name]


@pytest.mark.parametrize("name", NAMES)
def test_codes_have_not_changed(name: str) -> None:
    # Nothing here is within 2e-5 (scalars: 7e-7) of a tie, so the order of float32 additions does not matter.
    book = get_codebook(name)
    codes = book.encode(book.deviation * bell(64, 128).reshape(64, -1, book.dim))
    assert digest(book.pack(codes)) == CODES[name]


def trellis(name: str) -> Trellis:
    book = get_codebook(name)
    assert isinstance(book, Trellis)
    return book


def test_every_codebook_is_pinned() -> None:
    assert set(known_codebooks()) == POINTS.keys() | TRELLIS_POINTS.keys() == CODES.keys() | TRELLIS_CODES.keys()


@pytest.mark.parametrize("name", TRELLIS_POINTS)
def test_points_of_trellises_have_not_changed(name: str) -> None:
    book = trellis(name)
    assert digest(fixed_point(book.points().double() * book.gain)) == TRELLIS_POINTS[name]


@pytest.mark.parametrize("name", TRELLIS_CODES)
def test_paths_of_trellises_have_not_changed(name: str) -> None:
    """Targets are rounded to integers, and everything after that is exact."""
    book = trellis(name)
    codes = book.encode(bell(128, 16).reshape(128, -1, 16))
    assert digest(book.pack(codes)) == TRELLIS_CODES[name]
