"""L R first: what is largest of the weight goes into L R, and Q is what is left, or nothing at all."""

from hf_lrq.presets.base import Paper, Preset
from hf_lrq.presets.deviations import DAMPING, EIGHT_BITS, FLOAT16, INT_SCALES, NF_SCALES

FIRST = {"schedule": "lr-first", "iters": 1, "init": "zero", "rounding": "nearest", "rotation": "none"}
IN_8_BITS = {"bits": 8, "codebook": "int", "group_size": 128, "rounding": "nearest", "rotation": "none"}
ZERO_Q = {"schedule": "lr-only", "iters": 1, "init": "zero", "rotation": "none", "bits": 2, "codebook": "int"}
STORED_ZEROS = "Q is zero, and its 2 bits per weight are stored and counted all the same."
RANK_IS_GIVEN = "The rank is one number for all matrices; --rank, or rank_pattern, sets it."

PISSA = Paper(
    authors="F. Meng et al.",
    title="PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    year=2024,
    arxiv="2404.02948",
)

LOW_RANK_FIRST = (
    Preset(
        name="qpissa",
        what="L R are the main singular directions of the weight, to be fine-tuned; what is left is rounded to NF4.",
        paper=PISSA,
        options={**FIRST, "bits": 4, "codebook": "nf", "rank": 128, "factor_bits": 16, "metric": "identity"},
        deviations=(NF_SCALES, FLOAT16),
    ),
    Preset(
        name="pissa",
        what="L R are the main singular directions of the weight, to be fine-tuned; what is left stays as it is.",
        paper=PISSA,
        options={**FIRST, **IN_8_BITS, "rank": 16, "factor_bits": 16, "metric": "identity"},
        deviations=(EIGHT_BITS, FLOAT16),
    ),
    Preset(
        name="svdquant",
        what="L R take the main singular directions of the weight, so that what is left has no outliers to round.",
        paper=Paper(
            authors="M. Li et al.",
            title="SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models",
            year=2024,
            arxiv="2411.05007",
        ),
        options={**FIRST, "bits": 4, "codebook": "int", "group_size": 64, "rank": 32, "factor_bits": 16}
        | {"metric": "identity"},
        deviations=(
            "Weights alone are quantized: no outliers of the inputs are smoothed into the weight, as inputs stay in "
            "floating point.",
            INT_SCALES,
            FLOAT16,
        ),
    ),
    Preset(
        name="corda",
        what="L R are the main directions of the weight times the covariance of the inputs, to be fine-tuned.",
        paper=Paper(
            authors="Y. Yang et al.",
            title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware "
            "Parameter-Efficient Fine-tuning",
            year=2024,
            arxiv="2406.05223",
        ),
        options={**FIRST, **IN_8_BITS, "rank": 128, "factor_bits": 16, "metric": "squared"},
        data="needed",
        deviations=(
            EIGHT_BITS,
            FLOAT16,
            "Its instruction-previewed mode alone: the largest directions, not the smallest.",
            "The square of the covariance gets a ridge of 0.01 of its mean diagonal, not the covariance.",
        ),
    ),
    Preset(
        name="svfit",
        what="L R are the main singular directions of the weight, of which the singular values alone are fine-tuned.",
        paper=Paper(
            authors="C. Sun et al.",
            title="SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values",
            year=2024,
            arxiv="2409.05926",
        ),
        options={**FIRST, **IN_8_BITS, "rank": 64, "factor_bits": 16, "metric": "identity"},
        deviations=(
            EIGHT_BITS,
            FLOAT16,
            "What is trained multiplies the singular values, and starts at one.",
            'Fine-tuning is a step of its own: LRQAdapterConfig(mode="core:diag").',
        ),
    ),
    Preset(
        name="eva",
        what="R are the main directions of the inputs and L is zero: a start for fine-tuning that changes nothing.",
        paper=Paper(
            authors="F. Paischer et al.",
            title="One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
            year=2024,
            arxiv="2410.07170",
        ),
        options={**IN_8_BITS, "schedule": "q-only", "iters": 1, "init": "inputs", "rank": 16, "factor_bits": 16},
        data="needed",
        deviations=(
            EIGHT_BITS,
            FLOAT16,
            "All matrices have the same rank: ranks are not moved to where the inputs have more directions.",
        ),
    ),
    Preset(
        name="lord",
        what="No Q: L R are the rank-r approximation with the least error of the outputs.",
        paper=Paper(
            authors="A. Kaushal et al.",
            title="LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression",
            year=2023,
            arxiv="2309.14021",
        ),
        options={**ZERO_Q, "rank": 256, "factor_bits": 16, "metric": "gram"},
        data="needed",
        deviations=(STORED_ZEROS, RANK_IS_GIVEN, FLOAT16, DAMPING),
    ),
    Preset(
        name="welore",
        what="No Q: truncated SVDs, with as many ranks as singular values pass one threshold for all matrices.",
        paper=Paper(
            authors="A. Jaiswal et al.",
            title="From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge from Low-Rank Gradients",
            year=2024,
            arxiv="2407.11239",
        ),
        options={**ZERO_Q, "rank": None, "rank_threshold": 0.135, "factor_bits": 16, "metric": "identity"},
        deviations=(
            STORED_ZEROS,
            "The threshold is given, and is that of half of LLaMA-2-7B's weights; the paper searches for the one that "
            "leaves a wanted share of the weights.",
            "What is left alone is what would not get smaller, with the bits of Q counted.",
            FLOAT16,
            "Fine-tuning is a step of its own: LRQAdapterConfig(), which trains the factors that there are.",
        ),
    ),
    Preset(
        name="lplr",
        what="No Q: L R approximate the weight itself, in few bits, each making up for the rounding of the other.",
        paper=Paper(
            authors="R. Saha et al.",
            title="Matrix Compression via Randomized Low Rank and Low Precision Factorization",
            year=2023,
            arxiv="2310.11028",
        ),
        options={**ZERO_Q, "rank": 256, "factor_bits": 8, "metric": "identity"},
        deviations=(
            STORED_ZEROS,
            RANK_IS_GIVEN,
            "The start is a truncated SVD, not a random sketch, and L and R take up to eight turns, as in CALDERA.",
            "Each rank has a scale of its own.",
        ),
    ),
)
