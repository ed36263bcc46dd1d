"""The rows of `hf-lrq bench quality` as a table: for a terminal, and in Markdown."""

from collections.abc import Sequence

from hf_lrq.cli.bench.records import OnText, Record, Row
from hf_lrq.cli.output import print_table
from hf_lrq.evaluation import Perplexity
from hf_lrq.report import with_error
from hf_lrq.report.text import code_cell

_FIXED = ("model", "bits", "bits, whole file", "MB", "seconds")


def columns(record: Record) -> list[str]:
    """Headings."""
    return [
        *_FIXED,
        *(f"{title}, {text}" for text in record.shared["texts"] for title in ("KL", "top 1", "perplexity")),
    ]


def rows(record: Record) -> list[list[str]]:
    """Cells of the original and of every row, the smallest file first."""
    ordered = sorted(record.rows, key=lambda row: row.bytes)
    original = record.shared["original"]
    first = [
        *(f"original, {original['stored']}", "", f"{original['bits_per_parameter']:.2f}"),
        *(f"{original['bytes'] / 1e6:.1f}", ""),
    ]
    if ordered:
        for text in record.shared["texts"]:
            first += ["", "", f"{_perplexity(ordered[0].texts[text], 'original'):.2f}"]
    return [first, *(_cells(row, list(record.shared["texts"])) for row in ordered)]


def conditions(record: Record) -> str:
    """What all rows share, in words."""
    shared = record.shared
    texts = ", ".join(f"{name} ({text['tokens']:,} tokens)" for name, text in shared["texts"].items())
    calibration = shared["calibration"]
    return (
        f"{shared['original']['name']}, {shared['original']['parameters']:,} parameters. Calibration: "
        f"{calibration['sequences']} sequences, {calibration['tokens']:,} tokens of {calibration['text']}. "
        f"Held out: {texts}, windows of {shared['window']}. Bits are those of the compressed layers and of all "
        "parameters, everything stored included; KL(original, compressed) in nats per token ± one standard error "
        "over windows; top 1: the same most likely token."
    )


def show(record: Record) -> None:
    """On standard output."""
    heads = columns(record)
    print_table(conditions(record), heads, rows(record), right=range(1, len(heads)))
    if record.not_run:
        print_table("Not run", ("model", "why"), list(record.not_run.items()))


def markdown(record: Record) -> str:
    """For a README."""
    heads = columns(record)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    table = [
        *lines,
        *([name if not index else code_cell(name), *cells] for index, (name, *cells) in enumerate(rows(record))),
    ]
    missing = [f"Not run: {code_cell(name)}: {reason}" for name, reason in record.not_run.items()]
    return "\n".join(
        [conditions(record), "", *(f"| {' | '.join(cells)} |" for cells in table), *(["", *missing] if missing else [])]
    )


def _cells(row: Row, texts: Sequence[str]) -> list[str]:
    cells = [row.name, f"{row.bits_per_weight:.2f}", f"{row.bits_per_parameter:.2f}"]
    cells += [f"{row.bytes / 1e6:.1f}", f"{row.seconds:.0f}"]
    for text in texts:
        found = row.texts[text]
        kl = found.mean("kl")
        cells += [
            with_error(kl.mean, kl.standard_error),
            f"{found.mean('top1_agreement').mean:.1%}",
            f"{_perplexity(found, 'compressed'):.2f}",
        ]
    return cells


def _perplexity(text: OnText, name: str) -> float:
    return Perplexity(text.mean(name), sum(text.tokens), 0, 0).perplexity
