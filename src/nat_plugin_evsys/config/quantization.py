"""The setting of how many bits a frozen base model's layers have, which policy and server share."""

from __future__ import annotations

from typing import Literal

Quantization = Literal["none", "nf4", "nf4-double", "fp4", "int8"]

QUANTIZATION = (
    "Pack the frozen base model's linear layers with bitsandbytes at load (QLoRA): `nf4` or `fp4` (transformers' "
    "`load_in_4bit`), `nf4-double` (with `bnb_4bit_use_double_quant`), `int8` (`load_in_8bit`). Less memory, slower. "
    "`none` leaves a model as it is stored."
)
