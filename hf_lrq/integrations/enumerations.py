"""New members for enumerations of the hosts that have no other way in."""

from typing import Any


def extended(kind: Any, name: str, value: str | None = None) -> Any:
    """The member `name` of a str enumeration, added if it is missing.

    Args:
        kind: a subclass of str and Enum.
        name: of the member.
        value: of a new member; None takes the name.
    """
    if name in kind.__members__:
        return kind[name]
    value = name if value is None else value
    member = str.__new__(kind, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = kind
    member._sort_order_ = len(kind._member_names_)
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[value] = member
    getattr(kind, "_hashable_values_", []).append(value)  # Python 3.13 looks there for `value in kind`.
    type.__setattr__(kind, name, member)  # That of enumerations refuses.
    return member
