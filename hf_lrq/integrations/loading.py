"""Compressed checkpoints: empty layers for what the files hold, and the header that describes what a model holds."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mode
from typing import Any

from torch import nn

from hf_lrq.checkpoint import (
    FileHeader,
    Headers,
    QuantizationHeader,
    check_headers,
    check_places,
    check_record,
    float_dtype,
    headers_of,
    listing,
    read_file_headers,
    verify_tensors,
)
from hf_lrq.codebooks import get_codebook
from hf_lrq.errors import CheckpointError, SpecError, did_you_mean
from hf_lrq.integrations.conversions import names_in_files, names_in_model
from hf_lrq.integrations.saved_class import SavedModel
from hf_lrq.integrations.tables import tables_of, tie_scales
from hf_lrq.layout import LayerLayout, TensorLayout
from hf_lrq.nn import COMPRESSED, LRQEmbedding, LRQExpertStack, LRQHead, LRQLinear
from hf_lrq.nn.embedding import check_table
from hf_lrq.nn.soundness import unsound_tensors
from hf_lrq.spec import LayerSpec
from hf_lrq.work import EmbeddingSite, Inventory, Site, sites_of, take_census
from hf_lrq.work.sites import joined


def empty_layers(model: Any, header: QuantizationHeader, files: Sequence[str], verify: bool = False) -> Inventory:
    """Put an empty compressed layer where the checkpoint has a compressed one.

    Args:
        model: a PreTrainedModel whose weights are still to be loaded.
        header: of the checkpoint, as its config.json has it.
        files: of the checkpoint; none leaves them unchecked.
        verify: compare all tensors with their digests.

    Raises:
        CheckpointError: if the files do not hold what header and model call for.
    """
    own = _in_model_names(model, header)
    alone = set(own.modules_to_not_convert)
    tables = _tables(model, own)
    inventory = Inventory({site: own.layout_for(site.holder) for site in tables})
    found: list[Site] = [*tables]
    shared = {name for site in tables for name in site.modules}
    for name, module in model.named_modules():
        sites = sites_of(name, module) if name not in shared else []
        found += sites
        if sites and name in alone:
            inventory.left_alone[name] = "left alone when the checkpoint was made"
        else:
            inventory.layouts |= {site: own.layout_for(site.holder) for site in sites}
    inventory.census = take_census(model, found)
    if files or verify:
        stored = files_in_place(model, files)
        _check_tensors(model, own, headers_of(stored), inventory)
        record = check_record(header, stored)
        if verify:
            verify_tensors(record, stored)
    put_empty(model, inventory.layouts, keep_parameters=False)
    tie_scales(model, tables)
    return inventory


def _tables(model: Any, header: QuantizationHeader) -> list[Site]:
    """The embeddings and heads of a model that the checkpoint has compressed.

    Raises:
        CheckpointError: if one of them cannot be a table of codes in this model.
    """
    names = {name for name, _ in model.named_modules()}
    wanted = [name for name in header.embeddings if name in names]  # Others are of the class that was saved.
    sites, left = tables_of(model) if wanted else ([], {})
    by_name = {site.name: site for site in sites}
    for name in wanted:
        if name not in by_name:
            why = left.get(name, f"it is a {type(model.get_submodule(name)).__name__}")
            raise CheckpointError(
                f"config.json says that {name} is an embedding or head of codes, which it cannot be in this "
                f"{type(model).__name__}: {why}. Load it with the class that was saved."
            )
        try:
            if isinstance(by_name[name], EmbeddingSite):
                check_table(header.layout_for(name))
        except SpecError as error:
            raise CheckpointError(f"modules[{name!r}] in config.json: {error}") from None
    return [by_name[name] for name in wanted]


def files_in_place(model: Any, files: Sequence[str]) -> tuple[FileHeader, ...]:
    """The headers of the files of a checkpoint, which are where they belong.

    Raises:
        CheckpointError: if they are not.
    """
    foreign = [file for file in files if not str(file).endswith(".safetensors")]
    if foreign:
        raise CheckpointError(f"{foreign[0]} is not a safetensors file; compressed checkpoints have no other.")
    check_places(files, model.config._name_or_path)
    return read_file_headers(files)


def check_values(model: Any) -> None:
    """Refuse scales, rotations and factors that no compression gives, once they are loaded.

    Raises:
        CheckpointError: naming the first ten.
    """
    unsound = [str(tensor) for tensor in unsound_tensors(model)]
    if unsound:
        raise CheckpointError(
            f"{len(unsound)} tensors hold values that cannot be right:\n{listing(unsound)}\n"
            "The files were damaged or edited. Download or copy them again."
        )


def put_empty(model: Any, layouts: Mapping[Site, LayerLayout], keep_parameters: bool) -> None:
    """Put empty compressed layers in the place of uncompressed ones, see `Site.empty`."""
    for site, layout in layouts.items():
        module = model.get_submodule(site.name)
        layer = site.empty(module, layout, keep_parameters)
        if layer is not module:
            model.set_submodule(site.name, layer)
        for _ in site.follow(model):
            pass


def header_of_model(model: Any, default: LayerLayout) -> QuantizationHeader:
    """What config.json says of a model with compressed modules, in the names of the files.

    Args:
        model: a PreTrainedModel.
        default: layout of the modules that need no entry of their own.
    """
    layouts: dict[str, LayerLayout] = {}
    alone, tables = [], []
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, COMPRESSED):
            if isinstance(module, LRQEmbedding | LRQHead) and module.shares:
                continue
            layouts[key] = module.layout
            tables += [key] if isinstance(module, LRQEmbedding | LRQHead) else []
        elif sites_of(name, module):
            alone.append(key)
    stored = {key: name.removesuffix(".weight") for key, name in names_in_files((*layouts, *alone), model).items()}
    return QuantizationHeader.of(
        default,
        {stored[key]: layout for key, layout in layouts.items()},
        [stored[key] for key in alone],
        [stored[key] for key in tables],
    )


def default_layout(spec: LayerSpec, model: nn.Module) -> LayerLayout:
    """The layout that most modules have which were compressed as `spec` says."""
    automatic = [name for name, fits in (("codebook", spec.codebook == "auto"), ("rank", spec.rank is None)) if fits]
    layers = [module for module in model.modules() if isinstance(module, LRQLinear | LRQExpertStack)]
    layouts = [layer.layout for layer in layers if not isinstance(layer, LRQHead)]
    alike = [layout for layout in layouts if get_codebook(layout.codebook).bits == spec.bits]
    # They fit each matrix; what most of those with these bits got need not be said of each.
    found: dict[str, Any] = {name: mode(getattr(layout, name) for layout in alike) for name in automatic if alike}
    return replace(spec.layout, **found)


def _in_model_names(model: Any, header: QuantizationHeader) -> QuantizationHeader:
    """The header with the modules named as they are in this class and release."""
    wanted = [
        joined(holder, "weight")
        for name, module in model.named_modules()
        if (sites := sites_of(name, module))
        for holder in dict.fromkeys([name, *(site.holder for site in sites)])
    ]
    wanted += [joined(name, "weight") for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    named = (*header.modules_to_not_convert, *header.overrides, *header.embeddings)
    keys = [f"{name}.weight" for name in named]
    name_of = {
        key.removesuffix(".weight"): name.removesuffix(".weight")
        for key, name in names_in_model(keys, model, wanted).items()
    }
    return QuantizationHeader(
        header.default,
        {name_of[name]: layout for name, layout in header.overrides.items()},
        tuple(name_of[name] for name in header.modules_to_not_convert),
        tuple(name_of[name] for name in header.embeddings),
    )


def _check_tensors(model: Any, header: QuantizationHeader, headers: Headers, inventory: Inventory) -> None:
    """Compare the tensors in the files with those of compressed modules; takes heads that were not saved out."""
    tensors = {site: site.tensors(layout) for site, layout in inventory.layouts.items()}
    keys = {*model.state_dict(), *(key for each in tensors.values() for key in each)}
    found = {name: headers[key] for key, name in names_in_model(headers, model, keys).items()}
    saved = SavedModel(model)
    # A head that this class adds to the model that was saved: transformers initialises it and says so.
    absent = {joined(s.holder, "weight"): s for s, each in tensors.items() if found.keys().isdisjoint(each)}
    for key in absent.keys() - saved.stored_of(absent.keys()):
        site = absent[key]
        del inventory.layouts[site], tensors[site]
        inventory.left_alone[site.name] = "not in the checkpoint"
    expected = {key: layout for each in tensors.values() for key, layout in each.items()}
    check_headers(expected | _biases(model, inventory, found), found)
    _check_names(header, found, saved)


def _check_names(header: QuantizationHeader, found: Headers, saved: SavedModel) -> None:
    """Whether the modules that config.json names are modules of the model that was saved."""
    compressed = {key.removesuffix(".scales") for key in found if key.endswith(".scales")}
    owners = {name[:i] for name in found for i, letter in enumerate(name) if letter == "."}
    unknown = [("modules", name, compressed) for name in header.overrides if name not in compressed]
    unknown += [("embeddings", name, compressed) for name in header.embeddings if name not in compressed]
    unknown += [
        ("modules_to_not_convert", name, owners)
        for name in header.modules_to_not_convert
        if name not in owners and not saved.may_have(name)
    ]
    if unknown:
        kind, name, known = unknown[0]
        what = "module" if kind == "modules_to_not_convert" else "compressed module"
        raise CheckpointError(
            f"{kind} in config.json names {name!r}, but the saved model has no such {what}.{did_you_mean(name, known)} "
            f"{len(unknown)} names are unknown. Download or copy config.json again."
        )


def _biases(model: Any, inventory: Inventory, found: Headers) -> dict[str, TensorLayout]:
    """Biases that compressed layers must find; their dtype is that of the uncompressed model, whatever it was."""
    expected = {}
    for site in inventory.layouts:
        if getattr(model.get_submodule(site.name), "bias", None) is not None:
            key = joined(site.holder, "bias")
            expected[key] = TensorLayout((site.out_features,), float_dtype(found.get(key, ("F32", ()))[0]))
    return expected
