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
        name="lq_lora",
        what="SVD and rounding to NormalFloat take turns, weighed by Fisher information, as a start for fine-tuning.",
        paper=Paper(
            authors="H. Guo et al.",
            title="LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
            year=2023,
            arxiv="2311.12023",
        ),
        options={
            "schedule": "lr-first",
            "iters": 20,
            "init": "zero",
            "metric": "diagonal",
            "two_sided": True,
            "rounding": "nearest",
            "bits": 3,
            "codebook": "nf",
            "rotation": "none",
            "rank": 64,
            "factor_bits": 16,
        },
        data="needed",
        gradients=True,
        deviations=(
            NF_SCALES,
            FLOAT16,
            "The diagonal Fisher information is that of outputs that the model draws itself, token by token, not of "
            "the text, sequence by sequence; its means over rows and columns are shrunk as far as the data is noisy.",
            "Of twenty iterations the one of least error is kept, by the whole Grams of inputs and outputs; the paper "
            "ends at the first that raises the error.",
            "All matrices have 3 bits, unless avg_bits or target_size is given: then 2, 3 or 4 by what each is "
            "predicted to lose, L and R included in the budget; not by an integer program over measured errors, which "
            "also chooses how scales are stored.",
            "The means get ridges of 0.01 (columns) and 0.001 (rows) of their mean.",
        ),
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
