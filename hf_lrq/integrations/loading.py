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
from hf_lrq.errors import CheckpointError, did_you_mean
from hf_lrq.integrations.conversions import names_in_files, names_in_model
from hf_lrq.integrations.saved_class import SavedModel
from hf_lrq.layout import LayerLayout, TensorLayout
from hf_lrq.nn import LRQExpertStack, LRQLinear
from hf_lrq.nn.soundness import unsound_tensors
from hf_lrq.spec import LayerSpec
from hf_lrq.work import Inventory, Site, sites_of, take_census
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
    inventory = Inventory()
    found: list[Site] = []
    for name, module in model.named_modules():
        sites = sites_of(name, module)
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
    return inventory


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


def header_of_model(model: Any, default: LayerLayout) -> QuantizationHeader:
    """What config.json says of a model with compressed modules, in the names of the files.

    Args:
        model: a PreTrainedModel.
        default: layout of the modules that need no entry of their own.
    """
    layouts: dict[str, LayerLayout] = {}
    alone = []
    for name, module in model.named_modules():
        if isinstance(module, LRQLinear | LRQExpertStack):
            layouts[f"{name}.weight"] = module.layout
        elif sites_of(name, module):
            alone.append(f"{name}.weight")
    stored = names_in_files((*layouts, *alone), model)
    return QuantizationHeader.of(
        default,
        {stored[key].removesuffix(".weight"): layout for key, layout in layouts.items()},
        [stored[key].removesuffix(".weight") for key in alone],
    )


def default_layout(spec: LayerSpec, model: nn.Module) -> LayerLayout:
    """The layout that most modules have which were compressed as `spec` says."""
    automatic = [name for name, fits in (("codebook", spec.codebook == "auto"), ("rank", spec.rank is None)) if fits]
    layouts = [module.layout for module in model.modules() if isinstance(module, LRQLinear | LRQExpertStack)]
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
    keys = [f"{name}.weight" for name in (*header.modules_to_not_convert, *header.overrides)]
    name_of = {
        key.removesuffix(".weight"): name.removesuffix(".weight")
        for key, name in names_in_model(keys, model, wanted).items()
    }
    return QuantizationHeader(
        header.default,
        {name_of[name]: layout for name, layout in header.overrides.items()},
        tuple(name_of[name] for name in header.modules_to_not_convert),
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
    unknown += [
        ("modules_to_not_convert", name, owners)
        for name in header.modules_to_not_convert
        if name not in owners and not saved.may_have(name)
    ]
    if unknown:
        kind, name, known = unknown[0]
        what = "compressed module" if kind == "modules" else "module"
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
