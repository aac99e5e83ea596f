"""The parts of torchao that this package uses."""

from __future__ import annotations

from typing import Any

import torch
from torchao.optim.adam import single_param_adam
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, MappingType, PerRow

step_adamw: Any = single_param_adam
STATES: dict[str, Any] = {"8bit": OptimState8bit, "4bit": OptimState4bit, "fp8": OptimStateFp8}
Int8: Any = Int8Tensor
IntX: Any = IntxUnpackedToInt8Tensor
INT4: Any = torch.int4  # type: ignore[attr-defined]  # torch has it, its stubs do not
ROWS: Any = PerRow()
# not MappingType.SYMMETRIC, whose largest code is half a step short, so that a weight put back would change
EVEN: Any = MappingType.SYMMETRIC_NO_CLIPPING_ERR
MAPPINGS: dict[str, Any] = {"asymmetric": MappingType.ASYMMETRIC, "symmetric": EVEN}
