"""The wrapper for a weight that is not a layer, such as the stacked experts of a mixture (PEFT's layout)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from luthier_lora.layers import Factor, Form, Switch


class ParameterWrapper(nn.Module):
    """Run `base_layer` with one of its parameters W replaced by W + scale B A. Wrappers of one module nest.

    W is [E, out, in] for E experts, [E, in, out] if the module has `is_transposed`, or [out, in]. As in PEFT, A is
    [E r, in], where the expert is the slower index, and B is [out, r E], where it is the faster one.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, form: Form, switch: Switch) -> None:
        super().__init__()
        self.base_layer, self.parameter_name = base_layer, parameter_name
        self.scale, self.switch = form.scale, switch
        self.experts, inputs, outputs = self._sizes()
        self.lora_A = Factor(form.zeros(self.experts * form.rank, inputs))
        self.lora_B = Factor(form.zeros(outputs, form.rank * self.experts))
        self.train(base_layer.training)

    @property
    def innermost(self) -> nn.Module:
        inner = self.base_layer
        while isinstance(inner, ParameterWrapper):
            inner = inner.base_layer
        return inner

    @property
    def parameter(self) -> nn.Parameter:
        """Return the frozen weight W."""
        return getattr(self.innermost, self.parameter_name)

    def own(self) -> dict[str, nn.Parameter]:
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.switch.enabled:
            return self.base_layer(*args, **kwargs)
        changed = self.parameter + self.delta().to(self.parameter.dtype)
        return functional_call(self.base_layer, {self._path(): changed}, args, kwargs)

    def delta(self) -> Tensor:
        """Return scale B A, in the shape of W and the dtype of the factors."""
        a = self.lora_A.weight.unflatten(0, (self.experts, -1))  # [E, r, in]
        b = self.lora_B.weight.unflatten(1, (-1, self.experts)).permute(2, 0, 1)  # [E, out, r]
        change = torch.matmul(b * self.scale, a)  # [E, out, in]
        if self.parameter.dim() == 2:
            return change[0]
        return change.mT if self._transposed() else change

    def folded(self) -> Tensor:
        """Return W + scale B A in float32 or better."""
        delta = self.delta()
        return self.parameter.to(torch.promote_types(self.parameter.dtype, delta.dtype)) + delta

    def _transposed(self) -> bool:
        return bool(getattr(self.innermost, "is_transposed", False))

    def _sizes(self) -> tuple[int, int, int]:
        """Return (experts, in, out)."""
        shape = self.parameter.shape
        if len(shape) == 2:
            return 1, shape[1], shape[0]
        return (shape[0], shape[1], shape[2]) if self._transposed() else (shape[0], shape[2], shape[1])

    def _path(self) -> str:
        """Return the name of the parameter within `base_layer`."""
        depth, inner = "", self.base_layer
        while isinstance(inner, ParameterWrapper):
            depth, inner = depth + "base_layer.", inner.base_layer
        return depth + self.parameter_name
