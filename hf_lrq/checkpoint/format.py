"""The checkpoint format, versions 1 and 2: specified by this docstring; this module reads, checks and makes headers.

A checkpoint is what `save_pretrained` of transformers writes: `config.json`, and safetensors files with an index where
there are several. Nothing in it is executed on loading, and no other file is read by it: `quantization_report.json` and
`README.md` are for people.

Tensors of one compressed linear layer, below the name of its module (out, in: features; r = min(rank, out, in)):

    weight      uint8    [out, ceil(in / 8), bits]        codes of Q; 8 columns take exactly `bits` bytes; for the
                                                          trellises (`bt`, `tcq`) [ceil(out / 128), ceil(in / 16),
                                                          256 bits]: tiles of 128 rows and 16 columns
    scales      float16  [out], or [out, ceil(in / group_size)] for codebooks with group scales (`int`)
    rot_in      float16  [in]                             signs; absent with rotation "none"; finite numbers with
                                                          "trained"
    rot_out     float16  [out]                            likewise
    lr_L        float16  [out, r]                         absent at rank 0; with factor_bits 8: int8 [out, r];
                                                          with factor_bits 4: uint8 [out, ceil(r / 2)], low nibble
                                                          first, code c means c - 8
    lr_R        float16  [r, in]                          likewise int8 [r, in] or uint8 [ceil(r / 2), in]
    lr_L_scale  float16  [r]                              only with factor_bits 8 or 4
    lr_R_scale  float16  [r]                              only with factor_bits 8 or 4
    ft_L        float16  [out, f]                         absent without ft_rank; f = min(ft_rank, out, in)
    ft_R        float16  [f, in]                          likewise
    bias        as in the uncompressed model

The layer computes y = rot_out * H_out(scales * (Q z) + L (R z) + ft_L (ft_R z)) + bias with z = H_in(rot_in * x). The
second pair is there where an adapter was merged into factors that are codes; float16 factors gain ranks instead. H is
block-diagonal orthonormal Sylvester-Hadamard; its block is the largest power of two that divides the axis, at most
rotation_block, and 1 where that is below 8. Codes are packed least significant bit first: bit i of a tile of 8 columns
is bit i % 8 of its byte i // 8, and code k of the tile takes the bits from k * (bits of a code) on; of `bnbnf` and
`bnbfp`, the first of the two codes of a byte is in its high nibble. Columns are padded to whole tiles with codes of
zeros. The docstring of `codebooks/trellis.py` says how a tile of a trellis is read; rows
and columns of its padding hold any codes. Which values a code means is fixed by the name of the codebook.

A transposed linear (Conv1D of GPT-2) is stored like a linear layer. A stack of E expert matrices, a parameter [E, out,
in] or transposed [E, in, out] called `<module>.gate_up_proj`, `<module>.up_proj`, `<module>.down_proj` or
`<module>.weight`, is stored as `<module>.qstack_gate_up_proj.*` and so on: the tensors of [out, in] with a leading axis
[E]. All else, biases of experts included, is as in the uncompressed model.

An embedding [V, D] is stored like a linear layer with out = V and in = D, without rotation and factors, in codes of
single rows: a lookup decodes the rows that it is asked for. What it does to them, such as a factor, is as in the
uncompressed model. Modules that the model ties to it, embeddings and output heads, share its tensors and have none of
their own in the files; an output head that is not tied is a linear layer like any other.

`weight` has three axes (four in a stack) so that it can never be taken for an uncompressed weight: a program that does
not know the format stops with a size mismatch instead of loading random numbers.

`config.json` holds `quantization_config`, with exactly these keys, the last one in version 2 alone:

    quant_method            "hf_lrq"
    format_version          1, or 2 where embeddings or output heads are compressed; readers refuse what is newer than
                            they know
    codebook                name, for example "bt2": family and bits
    bits                    1 to 8, bits per weight of Q; those of the codebook
    rank                    0 to 65536, before clamping to the matrix
    factor_bits             16, 8 or 4
    group_size              a multiple of 8; columns per scale of codebooks with group scales
    rotation                "hadamard", "none", or "trained": as "hadamard", but rot_in and rot_out need not be signs
    rotation_block          a power of two from 8 to 4096; the largest Hadamard block
    modules_to_not_convert  names of the linear layers and expert modules that are not compressed; all others are, of
                            those that transformers calls linear. Whoever calls more so asks the files: a module is
                            compressed where they hold its scales
    modules                 {name: {key: value}}: what differs from the above for one module; keys: codebook, bits,
                            rank, factor_bits, group_size, rotation, rotation_block, and ft_rank (0 to 65536; absent: 0)
    embeddings              names of the embeddings, and of the output heads that are not tied to one, that are
                            compressed; other embeddings are not. A version of its own, as readers of version 1 know no
                            compressed embeddings: they are to say so, instead of what the shapes of tensors tell them

The name of a module is that of its tensors in the files without the last component. (Releases of transformers differ in
what they call a module in memory, not in what they call it in files.) Loading is strict: an unknown key, a value out of
range, a tensor of another shape or dtype, a missing or an additional tensor of a compressed module is an error; so are
a name that no module of the saved model has, and scales, rotations or factors that are not finite.

The `__metadata__` of every safetensors file has two entries by which changes are noticed. Files without them are read.

    hf_lrq_header   SHA-256, in hexadecimal, of quantization_config as JSON with sorted keys and no white space
    hf_lrq_digests  JSON {name: digest} of all tensors of the checkpoint; a digest is the first 16 hexadecimal digits
                    of the SHA-256 of the text "<dtype> <shape> ", such as "F16 [64, 4] ", and the bytes of the tensor;
                    null for a tensor whose name in the files was not known when the files were written
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from hf_lrq.checks import check_integer, shown
from hf_lrq.codebooks import BITS, get_codebook
from hf_lrq.errors import CheckpointError, SpecError, did_you_mean
from hf_lrq.layout import LayerLayout, TensorLayout
from hf_lrq.safetensors_headers import Headers, dtype_name

FORMAT_VERSION = 2  # The newest that is read; what version 1 can say is written as version 1.
QUANT_METHOD = "hf_lrq"
MAX_MODULES = 1_000_000
MAX_NAME = 1024
SHOWN_OFFENDERS = 10
_DAMAGED = "The config.json of this checkpoint is damaged."

# What was merged into one module says nothing about the others: ft_rank has no default for all of them.
LAYOUT_KEYS = tuple(item.name for item in fields(LayerLayout) if item.name != "ft_rank")
_LAYER_KEYS = (*LAYOUT_KEYS, "bits")
_MODULE_KEYS = (*_LAYER_KEYS, "ft_rank")
_KEYS = ("quant_method", "format_version", *_LAYER_KEYS, "modules_to_not_convert", "modules")
_EMBEDDINGS = "embeddings"  # Since version 2.


@dataclass(frozen=True)
class QuantizationHeader:
    """`quantization_config` of `config.json`, parsed.

    Attributes:
        default: layout of the modules without an entry of their own.
        overrides: module name -> layout.
        modules_to_not_convert: names of the modules that are not compressed.
        embeddings: names of the embeddings and heads that are.
    """

    default: LayerLayout
    overrides: Mapping[str, LayerLayout] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        default: LayerLayout,
        layouts: Mapping[str, LayerLayout],
        modules_to_not_convert: Iterable[str],
        embeddings: Iterable[str] = (),
    ) -> "QuantizationHeader":
        """The header of a model with these compressed modules; only layouts other than the default get an entry."""
        overrides = {name: layout for name, layout in layouts.items() if layout != default}
        return cls(default, overrides, tuple(modules_to_not_convert), tuple(embeddings))

    @property
    def format_version(self) -> int:
        """The lowest that can say this."""
        return 2 if self.embeddings else 1

    def layout_for(self, name: str) -> LayerLayout:
        """The layout of the compressed module called `name`."""
        return self.overrides.get(name, self.default)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the inverse of `parse_header`."""
        default = _layer_dict(self.default)
        modules = {
            name: {
                key: value
                for key, value in {**_layer_dict(layout), "ft_rank": layout.ft_rank}.items()
                if value != default.get(key, 0)
            }
            for name, layout in self.overrides.items()
        }
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            **default,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "modules": modules,
            **({_EMBEDDINGS: list(self.embeddings)} if self.embeddings else {}),
        }


def _layer_dict(layout: LayerLayout) -> dict[str, Any]:
    return {**{key: getattr(layout, key) for key in LAYOUT_KEYS}, "bits": get_codebook(layout.codebook).bits}


def parse_header(data: Mapping[str, Any]) -> QuantizationHeader:
    """Check a `quantization_config` and turn it into a `QuantizationHeader`.

    Raises:
        CheckpointError: on a missing or unknown key, a wrong type or value, or a newer format.
    """
    _check_version(data)
    keys = _KEYS if data["format_version"] == 1 else (*_KEYS, _EMBEDDINGS)
    _check_keys("quantization_config", data, known=keys, required=keys)
    default = _parse_layout("quantization_config", {key: data[key] for key in _LAYER_KEYS})
    skipped, embeddings = (_names(key, data.get(key, [])) for key in ("modules_to_not_convert", _EMBEDDINGS))
    if data["format_version"] > 1 and not embeddings:
        raise CheckpointError(f"{_EMBEDDINGS} is empty, as in no checkpoint of format_version 2. {_DAMAGED}")
    modules = data["modules"]
    if not isinstance(modules, Mapping):
        raise CheckpointError(f"modules must be an object of module names, got {shown(modules)}.")
    for kind, listed in (("modules_to_not_convert", skipped), ("modules", modules), (_EMBEDDINGS, embeddings)):
        if len(listed) > MAX_MODULES:
            raise CheckpointError(f"{kind} has {len(listed)} entries; at most {MAX_MODULES} are allowed.")
    for name in (*skipped, *modules, *embeddings):
        if not 0 < len(name) <= MAX_NAME:
            raise CheckpointError(f"a module name has {len(name)} characters; 1 to {MAX_NAME} are allowed.")
    overrides = {name: _parse_override(name, changes, default) for name, changes in modules.items()}
    return QuantizationHeader(default, overrides, tuple(skipped), tuple(embeddings))


def _names(key: str, found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{key} must be a list of module names, got {shown(found)}.")
    return found


def _check_version(data: Mapping[str, Any]) -> None:
    if data.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"quant_method must be {QUANT_METHOD!r}, got {shown(data.get('quant_method'))}.")
    version = data.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"format_version must be an integer from 1 to {FORMAT_VERSION}, got {shown(version)}. "
            "The config.json of this checkpoint is damaged or was written by hand."
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"This checkpoint has format_version {version}; the installed hf_lrq reads up to version {FORMAT_VERSION}. "
            "Upgrade hf_lrq: pip install -U hf_lrq"
        )


def _check_keys(where: str, data: Mapping[str, Any], known: Iterable[str], required: Iterable[str]) -> None:
    known = tuple(known)
    for key in data:
        if key not in known:
            raise CheckpointError(
                f"{where} has the unknown key {shown(key)}.{did_you_mean(str(key), known)} "
                f"Known keys: {', '.join(known)}."
            )
    missing = [key for key in required if key not in data]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}. {_DAMAGED}")


def _parse_override(name: str, changes: Any, default: LayerLayout) -> LayerLayout:
    where = f"modules[{name!r}]"
    if not isinstance(changes, Mapping):
        raise CheckpointError(f"{where} must be an object, got {shown(changes)}.")
    _check_keys(where, changes, known=_MODULE_KEYS, required=())
    return _parse_layout(where, {**_layer_dict(default), **changes})


def _parse_layout(where: str, values: Mapping[str, Any]) -> LayerLayout:
    bits = values["bits"]
    try:
        check_integer("bits", bits, *BITS)
        layout = LayerLayout(**{key: value for key, value in values.items() if key != "bits"})
    except SpecError as error:
        raise CheckpointError(f"{where}: {error}") from None
    stored = get_codebook(layout.codebook).bits
    if bits != stored:
        raise CheckpointError(f"{where}: bits is {bits}, but codebook {layout.codebook!r} has {stored} per weight.")
    return layout


def check_headers(expected: Mapping[str, TensorLayout], found: Headers) -> None:
    """Compare the tensors of compressed modules with those in the files.

    Args:
        expected: every tensor of every compressed module.
        found: from `read_headers`; tensors of other modules are not looked at.

    Raises:
        CheckpointError: if one is missing, has another shape or dtype, or if a compressed module has one more. The
            first ten are listed.
    """
    modules = {name.rpartition(".")[0] for name in expected}
    offenders = []
    for name, tensor in expected.items():
        wanted = f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
        if name not in found:
            offenders.append(f"{name}: expected {wanted}, missing")
            continue
        dtype, shape = found[name]
        if (dtype, shape) != (dtype_name(tensor.dtype), tensor.shape):
            offenders.append(f"{name}: expected {wanted}, found {dtype} {list(shape)}")
    for name, (dtype, shape) in found.items():
        if name not in expected and name.rpartition(".")[0] in modules:
            offenders.append(f"{name}: not expected, found {dtype} {list(shape)}")
    if offenders:
        more = len(offenders) - SHOWN_OFFENDERS
        lines = [*offenders[:SHOWN_OFFENDERS], *([f"and {more} more"] if more > 0 else [])]
        raise CheckpointError(
            f"{len(offenders)} tensors do not match config.json and the model:\n  " + "\n  ".join(lines) + "\n"
            "Files and config.json are of different checkpoints, or one was edited. Download or copy both again."
        )
