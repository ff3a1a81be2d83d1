"""Amounts of memory as people write them, such as 12GiB, and their bytes."""

from __future__ import annotations

import re

GIB = 2**30


_UNITS = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(text: str) -> int:
    """The bytes of 12GiB (1024s), 12GB or 12G (1000s), or 12B.

    Raises:
        ValueError: it is none of them, or a number without a unit.
    """
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)", text.strip(), re.IGNORECASE)
    if amount is not None and not amount[2] and not amount[4]:
        raise ValueError(f"got {text!r} without a unit, wanted one, such as {amount[1]}GiB")
    if amount is None or float(amount[1]) == 0:
        raise ValueError(f"got {text!r}, wanted an amount of memory such as 12GiB or 800MiB")
    prefix = amount[2].upper()
    power = _UNITS[prefix] if prefix else 0
    return int(float(amount[1]) * (1024 if amount[3] else 1000) ** power)
