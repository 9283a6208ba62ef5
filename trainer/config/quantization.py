"""How weights are quantized; imports no torch."""

from typing import Literal

QuantizationMethod = Literal["int8-weight", "int8-dynamic", "int4-weight"]
"""`int8-weight` and `int4-weight` store weights in so many bits, and compute in the format of the activations;
`int8-dynamic` rounds these too, at each product."""

BLOCK_SIZE = 32
"""Weights of a row that have one scale, where a graph's are stored in 8 or 4 bits."""
