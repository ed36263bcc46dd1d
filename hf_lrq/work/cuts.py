"""How serving engines spread matrices over processes, by what models call them; and whether compressed ones let them.

Of a layer whose outputs are used apart (q, k, v, gate, up) each process holds some rows, of one that brings them
together (o, down) some columns. A matrix of another name has to stand both.
"""

from collections.abc import Iterable
from itertools import chain

from hf_lrq.layout import MOST_SHARDS, LayerLayout, Side
from hf_lrq.nn.fused_experts import PREFIX
from hf_lrq.nn.groups import SAME_INPUT

BY_COLUMNS = ("o_proj", "out_proj", "down_proj", "dense_4h_to_h", "fc2", "c_proj", "wo", "w2", "out_lin", "lin2")
BY_ROWS = (*chain.from_iterable(SAME_INPUT), "gate_up_proj", "fc1", "dense_h_to_4h", "c_fc", "lin1")
# Two matrices of one size in one.
HALVES = ("gate_up_proj",)
# Several in one, whose sizes the name does not tell.
UNKNOWN = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")


def shard_counts(name: str, layout: LayerLayout, out_features: int, in_features: int) -> tuple[int, ...]:
    """Numbers of processes, at most `MOST_SHARDS`, that an [out, in] matrix can be spread over; the first is 1.

    Args:
        name: of the module in the model.
        layout: of the matrix.

    >>> layout = LayerLayout(codebook="bt2", rank=0)
    >>> shard_counts("mlp.up_proj", layout, 1024, 512), shard_counts("mlp.gate_up_proj", layout, 1024, 512)
    ((1, 2, 4), (1, 2))
    """
    role = name.rpartition(".")[2].removeprefix(PREFIX)
    if role in UNKNOWN:
        return (1,)
    features: dict[Side, int] = {"out": out_features, "in": in_features}
    if role in BY_COLUMNS or role in BY_ROWS:
        side: Side = "in" if role in BY_COLUMNS else "out"
        features = {side: features[side]}
    found = set(range(1, MOST_SHARDS + 1))
    for side, length in features.items():
        unit = layout.shard_unit(side, length)
        pieces = 2 if role in HALVES else 1
        found &= {1} | {count for count in found if length % (pieces * count * unit) == 0}
    return tuple(sorted(found))


def common_counts(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The numbers that are in all."""
    sets = [set(each) for each in counts]
    return tuple(sorted(set.intersection(*sets))) if sets else ()
