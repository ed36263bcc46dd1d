"""Q first: the weight is rounded, then L R are fitted once to what that broke."""

from hf_lrq.presets.base import Paper, Preset
from hf_lrq.presets.deviations import DAMPING, FLOAT16, INT_SCALES, NO_TUNING

ONCE = {"schedule": "q-first", "iters": 1, "init": "zero", "rotation": "none", "codebook": "int", "sweeps": 0}
MXINT = "The paper's MXINT formats, of one shared exponent for each group, are integers with a float16 scale here."

CORRECTIONS = (
    Preset(
        name="lorc",
        what="GPTQ, and the truncated SVD of its error.",
        paper=Paper(
            authors="Z. Yao et al.",
            title="ZeroQuant-V2: Exploring Post-training Quantization in LLMs from Comprehensive Study to Low Rank "
            "Compensation",
            year=2023,
            arxiv="2303.08302",
        ),
        options={
            **ONCE,
            "bits": 4,
            "group_size": 128,
            "rounding": "ldlq",
            "rank": 8,
            "factor_bits": 8,
            "metric": "identity",
        },
        data="needed",
        deviations=(INT_SCALES, "L and R are rounded in turn, each fitted to what the other has become."),
    ),
    Preset(
        name="lqer",
        what="The error of rounding is fitted with inputs weighed by their mean absolute value.",
        paper=Paper(
            authors="C. Zhang et al.",
            title="LQER: Low-Rank Quantization Error Reconstruction for LLMs",
            year=2024,
            arxiv="2402.02446",
        ),
        options={
            **ONCE,
            "bits": 4,
            "group_size": 16,
            "rounding": "nearest",
            "rank": 32,
            "factor_bits": 8,
            "metric": "magnitudes",
        },
        data="needed",
        deviations=(MXINT, "Inputs are weighed by their mean absolute value over all tokens.", DAMPING),
    ),
    Preset(
        name="qera_approx",
        what="The error of rounding is fitted as if the inputs were uncorrelated: weighed by their root mean square.",
        paper=Paper(
            authors="C. Zhang et al.",
            title="QERA: an Analytical Framework for Quantization Error Reconstruction",
            year=2024,
            arxiv="2410.06040",
        ),
        options={**ONCE, "bits": 4, "group_size": 32, "rounding": "nearest", "rank": 32, "factor_bits": 16}
        | {"metric": "diagonal"},
        data="needed",
        deviations=(MXINT, FLOAT16, DAMPING),
    ),
    Preset(
        name="qera",
        what="The error of rounding is fitted so that the error of the outputs is least: the exact solution.",
        paper=Paper(
            authors="C. Zhang et al.",
            title="QERA: an Analytical Framework for Quantization Error Reconstruction",
            year=2024,
            arxiv="2410.06040",
        ),
        options={**ONCE, "bits": 4, "group_size": 32, "rounding": "nearest", "rank": 32, "factor_bits": 16}
        | {"metric": "gram"},
        data="needed",
        deviations=(MXINT, FLOAT16, DAMPING),
    ),
    Preset(
        name="eora",
        what="The solution of QERA for the error of GPTQ, found in the eigenspace of the inputs.",
        paper=Paper(
            authors="S.-Y. Liu et al.",
            title="EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
            year=2024,
            arxiv="2410.21271",
        ),
        options={**ONCE, "bits": 4, "group_size": 128, "rounding": "ldlq", "rank": 128, "factor_bits": 16}
        | {"metric": "gram"},
        data="needed",
        deviations=(
            INT_SCALES,
            FLOAT16,
            "A Cholesky factor takes the place of the eigenspace, which gives the same L R. " + DAMPING,
        ),
    ),
    Preset(
        name="cloq",
        what="The solution of QERA for the error of GPTQ at 2 bits, as a start for fine-tuning L and R.",
        paper=Paper(
            authors="Y. Deng et al.",
            title="CLoQ: Enhancing Fine-Tuning of Quantized LLMs via Calibrated LoRA Initialization",
            year=2025,
            arxiv="2501.18475",
        ),
        options={**ONCE, "bits": 2, "group_size": 64, "rounding": "ldlq", "rank": 64, "factor_bits": 16}
        | {"metric": "gram"},
        data="needed",
        deviations=(
            INT_SCALES,
            FLOAT16,
            DAMPING,
            "The magnitudes of the weight are not reduced before it is rounded (MagR).",
            "Fine-tuning is a step of its own: LRQAdapterConfig().",
        ),
    ),
    Preset(
        name="srr",
        what="Of the ranks some keep the main directions of the weight from rounding, the others repair its error.",
        paper=Paper(
            authors="Y. Cho et al.",
            title="Preserve-Then-Quantize: Balancing Rank Budgets for Quantization Error Reconstruction in LLMs",
            year=2026,
            arxiv="2602.02001",
        ),
        options={**ONCE, "schedule": "complete", "init": "split", "bits": 3, "group_size": 32, "rounding": "nearest"}
        | {"rank": 64, "factor_bits": 16, "metric": "gram"},
        data="needed",
        deviations=(MXINT, FLOAT16, DAMPING, NO_TUNING),
    ),
)
