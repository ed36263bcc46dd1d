"""The name of the adapter type in PEFT: PEFT keeps its methods in an enumeration, which this adds a member to."""

from typing import Any

from peft import PeftType

NAME = "LRQ"
# transformers takes "<type in lower case>_" for granted when it deletes an adapter; no parameter of a base model may
# have it in its name.
PREFIX = "lrq_"


def extended(kind: Any, name: str) -> Any:
    """The member `name` of a str enumeration, added if it is missing.

    PEFT has no other way in: its methods are known by members of `PeftType`, whose `value` it and transformers read.
    """
    if name in kind.__members__:
        return kind[name]
    member = str.__new__(kind, name)
    member._name_ = member._value_ = name
    member.__objclass__ = kind
    member._sort_order_ = len(kind._member_names_)
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[name] = member
    getattr(kind, "_hashable_values_", []).append(name)  # Python 3.13 looks there for `"LRQ" in PeftType`.
    type.__setattr__(kind, name, member)  # That of enumerations refuses.
    return member


LRQ = extended(PeftType, NAME)
