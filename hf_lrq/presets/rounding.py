"""Q alone: the weight rounded, by itself or with feedback."""

from hf_lrq.presets.base import Paper, Preset
from hf_lrq.presets.deviations import E8P_SCALES, HADAMARD, INT_SCALES, NO_TUNING

ONLY_Q = {"rank": 0, "schedule": "q-only", "init": "zero"}
FEEDBACK = {**ONLY_Q, "rounding": "ldlq", "sweeps": 0}

ROUNDING = (
    Preset(
        name="rtn",
        what="Every weight is rounded to the nearest level; what all others are measured against.",
        options={
            **ONLY_Q,
            "rounding": "nearest",
            "bits": 4,
            "codebook": "int",
            "group_size": 128,
            "rotation": "none",
            "metric": "identity",
        },
        deviations=(INT_SCALES,),
    ),
    Preset(
        name="gptq",
        what="Columns are rounded one after the other, and what each breaks is made up for by those to come.",
        paper=Paper(
            authors="E. Frantar et al.",
            title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
            year=2022,
            arxiv="2210.17323",
        ),
        options={**FEEDBACK, "bits": 4, "codebook": "int", "group_size": 128, "rotation": "none"},
        data="needed",
        deviations=(
            INT_SCALES,
            "Scales are set before the first column is rounded, and columns come in their own order.",
        ),
    ),
    Preset(
        name="ldlq",
        what="The same rounding in a rotated basis, in which no weight and no direction sticks out.",
        paper=Paper(
            authors="J. Chee et al.",
            title="QuIP: 2-Bit Quantization of Large Language Models With Guarantees",
            year=2023,
            arxiv="2307.13304",
        ),
        options={**FEEDBACK, "bits": 2, "codebook": "int", "group_size": 128, "rotation": "hadamard"},
        data="needed",
        deviations=(
            INT_SCALES,
            HADAMARD + " The paper takes Kronecker products of random orthogonal matrices, and scales channels first.",
        ),
    ),
    Preset(
        name="quip_sharp",
        what="Feedback over blocks of eight columns, which are rounded to points of the E8 lattice.",
        paper=Paper(
            authors="A. Tseng et al.",
            title="QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks",
            year=2024,
            arxiv="2402.04396",
        ),
        options={**FEEDBACK, "bits": 2, "codebook": "e8p", "rotation": "hadamard"},
        data="needed",
        deviations=(E8P_SCALES, HADAMARD, NO_TUNING),
    ),
    Preset(
        name="qtip",
        what="Feedback over blocks of columns, which are rounded along the paths of a trellis.",
        paper=Paper(
            authors="A. Tseng et al.",
            title="QTIP: Quantization with Trellises and Incoherence Processing",
            year=2024,
            arxiv="2406.11235",
        ),
        options={**FEEDBACK, "bits": 2, "codebook": "tcq", "rotation": "hadamard"},
        data="needed",
        deviations=("Each row of Q has a scale of its own.", HADAMARD, NO_TUNING),
    ),
    Preset(
        name="yaqa",
        what="Feedback over rows as well as columns, by the curvature of the model's own predictions.",
        paper=Paper(
            authors="A. Tseng et al.", title="Model-Preserving Adaptive Rounding", year=2025, arxiv="2505.22988"
        ),
        options={**FEEDBACK, "bits": 2, "codebook": "bt", "rotation": "hadamard", "two_sided": True},
        data="needed",
        gradients=True,
        deviations=(
            "Rows feed back in at most eight blocks, and inside of a block they count alike.",
            "Both Grams take one round of the power iteration, and are shrunk as far as the data is noisy.",
            "The trellis is the byte trellis of this package.",
            HADAMARD,
            NO_TUNING,
        ),
    ),
    Preset(
        name="guidedquant",
        what="Tokens count in the Gram of the inputs by the gradient that comes back to the layer.",
        paper=Paper(
            authors="J. Kim et al.",
            title="GuidedQuant: Large Language Model Quantization via Exploiting End Loss Guidance",
            year=2025,
            arxiv="2505.07004",
        ),
        options={**FEEDBACK, "bits": 2, "codebook": "bt", "rotation": "hadamard", "two_sided": True},
        data="needed",
        gradients=True,
        deviations=(
            "The weight of a token is the same for all outputs of a layer, not one for each of a few groups of them, "
            "and is shrunk as far as the data is noisy.",
            "Outputs are weighed as well, as in yaqa: the options of both are the same.",
            "Gradients are those of outputs that the model draws itself, not of the text.",
            "The trellis is the byte trellis of this package, in a rotated basis.",
        ),
    ),
)
