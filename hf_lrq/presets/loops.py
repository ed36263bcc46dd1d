"""Q and L R in turn, many times."""

from hf_lrq.presets.base import Paper, Preset
from hf_lrq.presets.deviations import BEST, DAMPING, E8P_SCALES, FLOAT16, HADAMARD, NF_SCALES, PER_RANK

CALDERA = Paper(
    authors="R. Saha et al.",
    title="Compressing Large Language Models using Low Rank and Low Precision Decomposition",
    year=2024,
    arxiv="2405.18886",
)
LATTICE = {"bits": 2, "codebook": "e8p", "rotation": "hadamard", "rounding": "ldlq", "damp_percent": 0.01}
QUANTIZED = {"rank": 256, "factor_bits": 4, "metric": "gram"}
INNER = "L and R are improved in turn at most eight times in an iteration, and no longer than that helps."

LOOPS = (
    Preset(
        name="loftq",
        what="Rounding and the truncated SVD of its error take turns, on the weight alone, as a start for fine-tuning.",
        paper=Paper(
            authors="Y. Li et al.",
            title="LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models",
            year=2023,
            arxiv="2310.08659",
        ),
        options={
            "schedule": "q-first",
            "iters": 5,
            "init": "zero",
            "metric": "identity",
            "rounding": "nearest",
            "bits": 4,
            "codebook": "nf",
            "rotation": "none",
            "rank": 16,
            "factor_bits": 16,
        },
        deviations=(NF_SCALES, FLOAT16, BEST),
    ),
    Preset(
        name="caldera",
        what="LDLQ of W - L R and low-precision factors for W - Q take turns: the loop as published.",
        paper=CALDERA,
        options={**LATTICE, **QUANTIZED, "schedule": "q-first", "iters": 15, "init": "zero", "sweeps": 0},
        data="needed",
        deviations=(E8P_SCALES, PER_RANK, INNER, HADAMARD),
    ),
    Preset(
        name="caldera_repo",
        what="The loop as its authors released it: L R first, and Q rounded for the loss that a refit leaves.",
        paper=CALDERA,
        options={**LATTICE, **QUANTIZED, "schedule": "lr-first-marginal", "iters": 20, "init": "zero", "sweeps": 2},
        data="needed",
        deviations=(
            E8P_SCALES,
            PER_RANK,
            INNER,
            HADAMARD,
            "Two sweeps that keep only what lowers the loss take the place of ten that keep everything.",
            "The marginalised Gram gets its ridge of 0.01 once.",
        ),
    ),
    Preset(
        name="odlri",
        what="CALDERA, from factors that hold the weights of the input channels of largest energy.",
        paper=Paper(
            authors="Y. Cho et al.",
            title="Assigning Distinct Roles to Quantized and Low-Rank Matrices Toward Optimal Weight Decomposition",
            year=2025,
            arxiv="2506.02077",
        ),
        options={**LATTICE, **QUANTIZED, "schedule": "q-first", "iters": 15, "init": "outlier", "sweeps": 0},
        data="needed",
        deviations=(
            E8P_SCALES,
            PER_RANK,
            INNER,
            HADAMARD,
            "As many channels as a quarter of the ranks, which hold their weights exactly; the paper takes 16 for rank "
            "256.",
            DAMPING,
        ),
    ),
)
