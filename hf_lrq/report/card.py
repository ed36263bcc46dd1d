"""The model card, `README.md`, made from the report alone: what the model is, how to load it, what was measured."""

import re
from collections import defaultdict
from collections.abc import Mapping
from importlib.resources import files
from statistics import median, mode
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_lrq.report.text import code_cell, human_bytes, plain, with_error
from hf_lrq.work.census import shares
from hf_lrq.work.records import TABLES

NOT_MEASURED = "not measured"
WORST_LAYERS = 10
MODULES_PER_REASON = 5
IDLE = ("dequantize",)  # Entries of the recipe that say nothing about what is stored.
IDLE_WITHOUT_DATA = ("nsamples", "seqlen", "batch_size", "sequential", "two_sided")
_AUTO_CLASSES = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "Model": ("AutoModel", "feature-extraction"),
}


def model_card(report: Mapping[str, Any]) -> ModelCard:
    """The card of a report made by `build_report`; text from outside is escaped."""
    base = report["base_model"] or {}
    auto_class, pipeline_tag = _class_and_task(report["architecture"])
    data = ModelCardData(
        base_model=base.get("hub_id"),
        base_model_relation="quantized" if base.get("hub_id") else None,
        language=base.get("language"),
        library_name="transformers",
        license=base.get("license"),
        license_name=base.get("license_name"),
        license_link=base.get("license_link"),
        pipeline_tag=base.get("pipeline_tag") or pipeline_tag,
        tags=["hf_lrq", "quantized", "low-rank", _bits_tag(report)],
    )
    template = files("hf_lrq.report").joinpath("templates/card.md.jinja").read_text(encoding="utf-8")
    card: ModelCard = ModelCard.from_template(
        data,
        template_str=template,
        title=plain(_title(report)),
        base_name=plain(base["name"]) if base else None,
        base_file=plain(base["file"]) if "file" in base else None,
        base_id=base.get("hub_id"),
        license_known=bool(base.get("license")),
        auto_class=auto_class,
        bits=_bits(report),
        parts=_parts(report),
        measured=_measurements(report),
        measured_on=_measured_on(report),
        recipe=[(code_cell(name), code_cell(_shown(value))) for name, value in _recipe(report)],
        method=_method(report),
        calibration=_calibration(report) + _recovery(report),
        errors=_errors(report),
        worst=_worst_layers(report),
        n_layers=len(report["compression"]["layers"]),
        skipped=_skipped(report),
        left=_left(report),
        warnings=[plain(warning) for warning in report["compression"]["warnings"]],
        versions=", ".join(plain(f"{name} {version}") for name, version in report["versions"].items()),
    )
    return card


def _title(report: Mapping[str, Any]) -> str:
    base = report["base_model"]
    name = base["name"].rpartition("/")[2] if base else report["architecture"] or "Language model"
    return f"{name} in {report['bits']['compressed_layers']:.2f} bits per weight"


def _class_and_task(architecture: str | None) -> tuple[str, str | None]:
    """The class to load with and, where it is sure, the pipeline tag."""
    if architecture is None or not architecture.isidentifier():
        return "AutoModel", None
    for suffix, found in _AUTO_CLASSES.items():
        if architecture.endswith(suffix):
            return found
    return architecture, None


def _bits_tag(report: Mapping[str, Any]) -> str:
    bits = [layer["bits"] for layer in report["compression"]["layers"]]
    return f"{mode(bits)}-bit" if bits else "low-bit"


def _bits(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    bits = report["bits"]
    tables = bits.get("embeddings")  # Reports of earlier releases have none.
    return [
        ("compressed layers: codes with padding, scales, rotations, factors", f"{bits['compressed_layers']:.3f}"),
        *([] if tables is None else [("compressed embeddings and heads: codes and scales", f"{tables:.3f}")]),
        ("whole file, embeddings and everything else included", _number(bits["whole_file"], "{:.3f}")),
        ("compressed layers as the CALDERA paper counts: codes and factors only", f"{bits['caldera']:.3f}"),
    ]


def _parts(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(part, weights, bytes, bits per weight) of each part of the model that has bytes, and of the whole."""
    size = report["size"]
    if not size:
        return []
    named = {
        "compressed": "compressed layers",
        "linears": "other matrices",
        "embeddings": "embeddings",
        "norms": "norms",
        "other": "biases and buffers",
    }
    rows = [
        (title, f"{part['weights']:,}", human_bytes(part["bytes"]), _number(part["bits_per_weight"], "{:.3f}"))
        for key, title in named.items()
        if (part := size[key])["bytes"]
    ]
    whole = human_bytes(size["total_bytes"]), _number(size["bits_per_parameter"], "{:.3f}")
    return [
        *rows,
        ("file headers", "", human_bytes(size["header_bytes"]), ""),
        ("whole file", f"{size['parameters']:,}", *whole),
    ]


def _measurements(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of (name of a figure, its value for the original, its value for the compressed model)."""
    evaluation = report["evaluation"] or {}
    own, both, outputs = (evaluation.get(name) for name in ("perplexity", "comparison", "outputs"))
    if outputs and not own:
        return [
            (f"relative error of the {outputs['output'].replace('_', ' ')}", "0", f"{outputs['relative_error']:.4f}"),
            ("cosine similarity with the original", "1", f"{outputs['cosine']:.4f}"),
        ]
    missing = {"mean": None, "standard_error": None}
    get = (both or {}).get
    return [
        ("perplexity", _number(both and both["original"]["perplexity"]), _number(own and own["perplexity"])),
        ("rise of ln perplexity, nats per token", "", _estimate(get("nats_rise", missing))),
        ("KL(original, compressed), nats per token", "", _estimate(get("kl", missing))),
        ("KL(compressed, original), nats per token", "", _estimate(get("reverse_kl", missing))),
        ("same most likely token", "", _share(get("top1_agreement", missing))),
        ("shared among the five most likely tokens", "", _share(get("top5_agreement", missing))),
    ]


def _measured_on(report: Mapping[str, Any]) -> str | None:
    evaluation = report["evaluation"]
    if not evaluation:
        return None
    text = plain(evaluation.get("text") or "an unnamed text")
    if own := evaluation.get("perplexity"):
        return f"{text}; {own['tokens']:,} tokens scored, window {own['window']}, stride {own['stride']}"
    if outputs := evaluation.get("outputs"):
        return f"{text}; {outputs['positions']:,} positions"
    return None


def _recipe(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    idle = IDLE if _tokens(report) else (*IDLE, *IDLE_WITHOUT_DATA)
    settings = [*{**report["recipe"], **_chosen(report)}.items(), ("seed", report["seed"])]
    return [(name, value) for name, value in settings if value is not None and name not in idle]


def _method(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the card says about the preset that was named."""
    preset = report.get("preset")
    if preset is None:
        return None
    changed = ", ".join(f"{code_cell(name)} is {code_cell(_shown(value))}" for name, value in preset["changed"].items())
    return {
        "name": code_cell(preset["name"]),
        "what": plain(preset["what"]),
        "paper": preset["paper"] and {key: plain(value) for key, value in preset["paper"].items()},
        "changed": changed,
        "deviations": [plain(text) for text in preset["deviations"]],
    }


def _chosen(report: Mapping[str, Any]) -> dict[str, str]:
    """What bits and a rank that were left to the library became."""
    recipe, budget = report["recipe"], report["compression"].get("budget")
    size = "by the size of each matrix" if recipe.get("rank_threshold") is None else "by its singular values"
    why = "by what each matrix was predicted to lose" if budget else size
    open_to = [name for name, left in (("bits", budget), ("rank", recipe.get("rank", 0) is None)) if left]
    found = {name: [layer[name] for layer in report["compression"]["layers"]] for name in open_to}
    return {name: f"{min(values)} to {max(values)}, {why}" for name, values in found.items() if values}


def _calibration(report: Mapping[str, Any]) -> str:
    tokens = _tokens(report)
    if not tokens:
        return "Compressed without calibration data: every input direction of a layer counted the same."
    dataset = report["recipe"].get("dataset")
    source = f" of {plain(_shown(dataset))}" if dataset else ""
    sequences = report["compression"]["calibration"].get("sequences")
    return f"Calibrated on {f'{sequences:,} sequences, ' if sequences else ''}{tokens:,} tokens{source}."


def _recovery(report: Mapping[str, Any]) -> str:
    """A sentence about the recovery after the compression; empty if there was none."""
    recovery = report.get("recovery")
    if not recovery or recovery["stopped"] == "no gain":
        return ""
    both = [_kl(report.get(name)) for name in ("evaluation_before_recovery", "evaluation")]
    measured = (
        ""
        if None in both
        else f" On the text of the table above, KL(original, compressed) went from {both[0]} to {both[1]}."
    )
    return (
        f" Then trained on {recovery['tokens']:,} tokens of the original's outputs, without labels, which brought the "
        f"divergence from it on held-out text from {recovery['before']['divergence']:.4g} to "
        f"{recovery['after']['divergence']:.4g} nats per token.{measured}"
    )


def _kl(evaluation: Mapping[str, Any] | None) -> str | None:
    """The divergence from the original; None where there is none."""
    both = (evaluation or {}).get("comparison")
    return None if both is None else _estimate(both["kl"])


def _tokens(report: Mapping[str, Any]) -> int:
    """Number of calibration tokens; 0 means data-free."""
    return max((layer["n_tokens"] for layer in report["compression"]["layers"]), default=0)


def _errors(report: Mapping[str, Any]) -> str | None:
    layers = [layer for layer in report["compression"]["layers"] if layer["kind"] not in TABLES]
    errors = [layer["relative_error"] for layer in layers if layer["relative_error"] is not None]
    if not errors:
        return None
    what = "outputs, on the calibration inputs" if any(layer["n_tokens"] for layer in layers) else "weights"
    if any(layer.get("output_shrinkage") is not None for layer in layers):
        what += ", weighed by what they do to the predictions"
    return f"Relative error of their {what}: median {median(errors):.4f}, largest {max(errors):.4f}."


def _worst_layers(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    layers = sorted(report["compression"]["layers"], key=lambda layer: -(layer["relative_error"] or 0.0))
    return [
        (
            code_cell(layer["name"]),
            " × ".join(map(str, layer["shape"])),
            code_cell(layer["codebook"]),
            str(layer["rank"]),
            f"{layer['bits_per_weight']:.3f}",
            _number(layer["relative_error"], "{:.4f}"),
        )
        for layer in layers[:WORST_LAYERS]
    ]


def _left(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(reason, share of all weights) of what is not compressed; none in reports that do not count it."""
    compression = report["compression"]
    found = shares(compression.get("left_parameters", {}), compression["total_parameters"])
    return [(plain(reason), f"{share:.2%}") for reason, share in found.items()]


def _skipped(report: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(reason, number of modules, names of the first of them)."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in report["compression"]["skipped"].items():
        by_reason[reason].append(name)
    return [
        (
            plain(reason),
            len(names),
            ", ".join(map(code_cell, names[:MODULES_PER_REASON])) + (", …" if len(names) > MODULES_PER_REASON else ""),
        )
        for reason, names in by_reason.items()
    ]


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return re.sub(r"\s+", " ", str(value))


def _number(value: float | None, form: str = "{:.4g}") -> str:
    return NOT_MEASURED if value is None else form.format(value)


def _estimate(estimate: Mapping[str, float | None]) -> str:
    mean, error = estimate["mean"], estimate["standard_error"]
    if mean is None:
        return NOT_MEASURED
    return with_error(mean, error)


def _share(estimate: Mapping[str, float | None]) -> str:
    mean, error = estimate["mean"], estimate["standard_error"]
    if mean is None:
        return NOT_MEASURED
    return f"{mean:.2%}" if error is None else f"{mean:.2%} ± {error:.2%}"
