"""The parts of torchao that this package uses."""

from __future__ import annotations

from typing import Any

import torch
from torchao.float8.config import Float8LinearConfig, ScalingType
from torchao.float8.float8_scaling_utils import get_maybe_axiswise_dim, hp_tensor_to_float8_dynamic
from torchao.float8.float8_training_tensor import GemmInputRole, LinearMMConfig, ScaledMMConfig
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
Float8Config: Any = Float8LinearConfig
LEFT_EXACT: Any = ScalingType.DISABLED
round_dynamic: Any = hp_tensor_to_float8_dynamic
scaled_axis: Any = get_maybe_axiswise_dim
INPUT, WEIGHT, GRADIENT = GemmInputRole.INPUT, GemmInputRole.WEIGHT, GemmInputRole.GRAD_OUTPUT
Product: Any = ScaledMMConfig
Products: Any = LinearMMConfig
