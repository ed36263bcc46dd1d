"""`hf-lrq presets`: which methods there are by name, and what each of them sets."""

from collections.abc import Mapping
from typing import Any

from hf_lrq.cli.arguments import PresetsOptions
from hf_lrq.cli.output import console, print_json, print_table
from hf_lrq.presets import Preset, get_preset, known_presets


def run(options: PresetsOptions) -> None:
    """The command."""
    if options.name is not None:
        preset = get_preset(options.name)
        print_json(described(preset)) if options.as_json else show(preset)
        return
    presets = known_presets().values()
    if options.as_json:
        print_json({preset.name: described(preset) for preset in presets})
        return
    rows = [(each.name, _source(each), each.what, each.needs, " ".join(each.deviations) or "none") for each in presets]
    print_table("Presets", ("name", "paper", "what it is", "needs", "deviations from the paper"), rows)


def described(preset: Preset) -> Mapping[str, Any]:
    """Everything about a preset, as JSON values."""
    needs = {"data": preset.data, "gradients": preset.gradients, "recover": preset.recover}
    return {**preset.to_dict(), **needs, "options": dict(preset.options)}


def show(preset: Preset) -> None:
    """Print one."""
    rows = [("what it is", preset.what), ("paper", str(preset.paper or "none")), ("needs", preset.needs)]
    if preset.recover:
        rows.append(("at the end", "hf-lrq quantize recovers the model, as with --recover"))
    rows += [("deviation", text) for text in preset.deviations]
    print_table(preset.name, ("", ""), rows)
    print_table("Options", ("option", "value"), [(name, str(value)) for name, value in preset.options.items()])
    console().print(f"\nhf-lrq quantize MODEL --preset {preset.name} -o DIR", markup=False)


def _source(preset: Preset) -> str:
    paper = preset.paper
    return "–" if paper is None else f"{paper.authors}, {paper.year}, arXiv:{paper.arxiv}"
