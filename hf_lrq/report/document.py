"""The document `quantization_report.json`: its fields, made from what was recorded and measured, and its text.

It holds everything about a compression that loading does not need; `calibration.records` has what it is made from.

Fields of version 1: `report_version`, `base_model` {name, hub_id, file where only one of its files was read, and
what its card says about licence and language}, `architecture`, `recipe`, `seed`, `versions`, `bits` {compressed_layers,
embeddings (and heads, where they are codes), whole_file, caldera}, `size` (`evaluation.Size`), `evaluation`
(`evaluation.Evaluation` without its size), `compression` (`calibration.CompressionReport`). Where a preset was named,
`preset` {name, what, paper, deviations, and `changed`, the options of it that have other values}. After `hf-lrq
recover`, or `quantize --recover`, `recovery` (`recovery.RecoveryReport`); after the latter,
`evaluation_before_recovery` (as `evaluation`). A figure that was not measured is null.
"""

import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from huggingface_hub import ModelCard

from hf_lrq.evaluation import Evaluation, Size
from hf_lrq.report.text import json_ready, public_name, without_paths
from hf_lrq.work.records import CompressionReport

REPORT_VERSION = 1
REPORT_NAME = "quantization_report.json"
# What the base model's card says that holds for the compressed model too.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
LIBRARIES = ("torch", "transformers", "safetensors", "accelerate", "huggingface_hub")


def build_report(
    compression: CompressionReport,
    *,
    recipe: Mapping[str, Any],
    seed: int,
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    size: Size | Mapping[str, Any] | None = None,
    base_model: str | None = None,
    base_file: str | None = None,
    base_card: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    versions: Mapping[str, str] | None = None,
    method: Mapping[str, Any] | None = None,
    recovery: Mapping[str, Any] | None = None,
    before_recovery: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report as JSON values.

    Args:
        compression: what happened to each matrix.
        recipe: what was asked for, in the words of the configuration; paths are cut down to names.
        seed: the seed that all random choices were made with.
        evaluation: what was measured.
        size: size of the saved files; None takes that of the evaluation.
        base_model: id on the Hub, or local path, of the original; only the last component of a path is kept.
        base_file: which of its files was read, in words, where it was one.
        base_card: metadata of the original's card, see `base_card`.
        architecture: class of the model, for example "LlamaForCausalLM".
        versions: library -> version; None asks the installed packages.
        method: the preset that was named.
        recovery: what came of a recovery.
        before_recovery: what was measured before it.
    """
    measured = _as_dict(evaluation)
    size_of_evaluation = measured.pop("size", None) if measured else None
    sizes = _as_dict(size) or size_of_evaluation
    report = {
        "report_version": REPORT_VERSION,
        "base_model": _base_model(base_model, base_file, base_card or {}),
        "architecture": architecture,
        "recipe": without_paths(dict(recipe)),
        "seed": seed,
        "versions": dict(installed_versions() if versions is None else versions),
        "bits": {
            "compressed_layers": compression.bits_per_weight,
            "embeddings": compression.embedding_bits,
            "whole_file": sizes["bits_per_parameter"] if sizes else None,
            "caldera": compression.caldera_bits,
        },
        "size": sizes,
        "evaluation": measured,
        "compression": without_paths(compression.to_dict()),
    }
    others = {"preset": method, "recovery": recovery, "evaluation_before_recovery": before_recovery}
    report |= {name: dict(value) for name, value in others.items() if value is not None}
    ready: dict[str, Any] = json_ready(report)
    return ready


def installed_versions() -> dict[str, str]:
    """Version of Python and of every library that had a hand in the result."""
    # The running package, which need not be the installed one.
    own = sys.modules[__name__.partition(".")[0]]
    found = {"hf_lrq": own.__version__, "python": python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def base_card(base_model: str) -> dict[str, Any]:
    """Metadata of the original's card, from its folder or from the Hub (the network, unless cached or offline).

    A card is a courtesy: where there is none, or none that can be read, the result is empty.
    """
    folder = Path(base_model)
    if folder.is_file():  # Of weights, with no card in it.
        return {}
    if folder.is_dir() and not (folder / "README.md").is_file():
        return {}
    try:
        card = ModelCard.load(folder / "README.md" if folder.is_dir() else base_model, ignore_metadata_errors=True)
    except Exception:
        return {}
    found: dict[str, Any] = card.data.to_dict()
    return found


def report_text(report: Mapping[str, Any]) -> str:
    """The report as JSON text; equal reports give equal bytes."""
    return json.dumps(json_ready(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a crash leaves either the old content or the new."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(staged, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _as_dict(value: Evaluation | Size | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if value is None:
        return None
    return dict(value) if isinstance(value, Mapping) else value.to_dict()


def _base_model(base_model: str | None, file: str | None, card: Mapping[str, Any]) -> dict[str, Any] | None:
    if base_model is None:
        return None
    name, hub_id = public_name(base_model)
    inherited = {key: card[key] for key in INHERITED if _is_text(card.get(key))}
    link = inherited.get("license_link")
    if isinstance(link, str) and "://" not in link:
        if hub_id is None:
            del inherited["license_link"]
        else:
            inherited["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link.lstrip('./')}"
    return {"name": name, "hub_id": hub_id, **({} if file is None else {"file": file}), **inherited}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
