"""The name of the adapter type in PEFT: PEFT keeps its methods in an enumeration, which this adds a member to.

It has no other way in: methods are known by members of `PeftType`, whose `value` PEFT and transformers read.
"""

from peft import PeftType

from hf_lrq.integrations.enumerations import extended

NAME = "LRQ"
# transformers takes "<type in lower case>_" for granted when it deletes an adapter; no parameter of a base model may
# have it in its name.
PREFIX = "lrq_"

LRQ = extended(PeftType, NAME)
