"""Deviations that several presets share."""

# Q.
INT_SCALES = (
    "The levels of Q are symmetric, and a group of weights has the scale that is best for a normal distribution of its "
    "root mean square, in float16; not one from the least to the largest weight."
)
NF_SCALES = (
    "Each row of Q has one float16 scale, of its root mean square; not one for every 64 weights, of the largest of "
    "them, quantized once more."
)
EIGHT_BITS = "What is left of the weight is rounded to 8 bits in groups of 128, not kept in floating point."
E8P_SCALES = "Each row of Q has a scale of its own, refitted where sweeps run; not one scale for the matrix."
HADAMARD = "The rotation is made of Hadamard blocks of at most 256 channels, which any width allows."
NO_TUNING = "Nothing is fine-tuned afterwards."
# L R.
FLOAT16 = "L and R are balanced, and stored in float16."
PER_RANK = "L and R are integers with one scale for each rank, not points of a lattice with one scale in all."
# The loop.
BEST = (
    "Of all iterations the one of least error is kept, not the last: by the error of the outputs with data, by that of "
    "the weight without."
)
DAMPING = "The Gram of the inputs gets a ridge of 0.01 of its mean diagonal."
