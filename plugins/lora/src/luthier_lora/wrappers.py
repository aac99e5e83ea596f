"""The wrappers that replace a layer: their forward pass, and the one weight that is equal to it.

LoRA: Hu et al. 2021, arXiv 2106.09685; rsLoRA's scale: Kalajdzievski 2023, 2312.03732; DoRA: Liu et al. 2024,
2402.09353. Tensors carry PEFT's names, so that the path of a parameter is its name in a file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from luthier_lora.kept import free_bias, has_bias, with_bias
from luthier_lora.layers import Dequantize, Factor, Form, Switch, compute_dtype, dense_weight, is_dense, sizes_of
from luthier_lora.product import FAST, adapted_product, applies, lends, rescaled_product


class LoraLayer(nn.Module):
    """y = base(x) + scale B A x, with A [r, in] and B [out, r]."""

    def __init__(self, base_layer: nn.Module, form: Form, switch: Switch, dequantize: Dequantize) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = sizes_of(base_layer)
        self.scale, self.switch, self.dequantize = form.scale, switch, dequantize
        self.lora_A = Factor(form.zeros(form.rank, self.in_features))
        self.lora_B = Factor(form.zeros(self.out_features, form.rank))
        self.lora_scale = nn.Parameter(torch.ones_like(form.zeros(1))) if form.learns_scale else None
        self.lora_dropout = nn.Dropout(form.dropout)
        self.first_bias = free_bias(base_layer) if form.trains_bias and has_bias(base_layer) else None
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """Return the base layer's weight, because some models read its dtype or device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    def own(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by their names in this module."""
        bias = {} if self.first_bias is None else {"base_layer.bias": self.bias}
        scale = {} if self.lora_scale is None else {"lora_scale": self.lora_scale}
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight, **scale, **bias}  # type: ignore[dict-item]

    @property
    def scaled_a(self) -> Tensor:
        """Return A [r, in] as it is used in the product."""
        return self.lora_A.weight

    @property
    def scaled_b(self) -> Tensor:
        """Return B [out, r] times the learned scale."""
        b = self.lora_B.weight
        return b if self.lora_scale is None else b * self.lora_scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # x [..., in]
        if self.switch.enabled and not args and not kwargs and self.is_product(x):
            base = self.base_layer
            factors = self.scaled_a, self.scaled_b
            dropout = self.lora_dropout.p if self.training else 0.0
            weight = dense_weight(base) if is_dense(base) else base.lend_weight
            product = adapted_product(x, weight, getattr(base, "bias", None), *factors, self.scale, dropout)
            return self.finish(product)
        if self.first_bias is not None and not self.switch.enabled:
            return with_bias(self.base_layer, self.first_bias, x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        return self.adapted(x, result) if self.switch.enabled else result

    def is_product(self, x: Tensor) -> bool:
        """Return True if `product` can compute the forward pass, because the frozen matrix is dense or lent."""
        return applies(self.base_layer, x) if is_dense(self.base_layer) else lends(self.base_layer, x)

    def adapted(self, x: Tensor, result: Tensor) -> Tensor:
        """Return the base layer's `result` [..., out] with the update of `x` [..., in]."""
        return self.finish(result + self.update(x).to(result.dtype))

    def finish(self, product: Tensor) -> Tensor:
        """Return the output [..., out] for the product with the adapted weight and the bias."""
        return product

    def update(self, x: Tensor) -> Tensor:
        """Return scale B A x [..., out]. It is scaled last, as in PEFT, so that float32 results have the same bits."""
        dtype = compute_dtype(x, self.lora_A.weight)
        inner = functional.linear(self.lora_dropout(x.to(dtype)), self.scaled_a.to(dtype))  # [..., r]
        return functional.linear(inner, self.scaled_b.to(dtype)) * self.scale

    def base_weight(self) -> Tensor:
        """Return the base weight [out, in], dequantized if necessary, in float32 or better."""
        layer = self.base_layer
        weight = (dense_weight(layer) if is_dense(layer) else self.dequantize(layer)).detach()
        return weight.to(torch.promote_types(weight.dtype, self.lora_A.weight.dtype))

    def folded(self) -> Tensor:
        """Return the weight [out, in] of a plain layer that computes the same, in float32 or better."""
        weight = self.base_weight()
        return weight.addmm(self.scaled_b.to(weight.dtype), self.scaled_a.to(weight.dtype), alpha=self.scale)


class PissaLayer(LoraLayer):
    """y = base(x) + scale (B A - B0 A0) x, where B0 A0 are the first r singular directions of the base weight, frozen.

    PiSSA (Meng et al. 2024, arXiv 2404.02948) subtracts scale B0 A0 from the base weight. Here the weight stays as it
    is, so that it may be quantized, and the base is exact when the update is off. At the start both products are equal.
    """

    def __init__(self, base_layer: nn.Module, form: Form, switch: Switch, dequantize: Dequantize) -> None:
        super().__init__(base_layer, form, switch, dequantize)
        self.first_A = nn.Parameter(form.zeros(form.rank, self.in_features), requires_grad=False)
        self.first_B = nn.Parameter(form.zeros(self.out_features, form.rank), requires_grad=False)

    def is_product(self, x: Tensor) -> bool:
        """Return False: the difference of the two updates must be taken first to be exactly zero."""
        return False

    @torch.no_grad()
    def begin(self, a: Tensor, b: Tensor) -> None:
        """Set both the trained and the frozen factors to the principal ones."""
        for factor, first, value in ((self.lora_A.weight, self.first_A, a), (self.lora_B.weight, self.first_B, b)):
            factor.copy_(value)
            first.copy_(value)

    def update(self, x: Tensor) -> Tensor:
        """Return the difference of both updates. Dropout applies to the trained one only."""
        dtype = compute_dtype(x, self.first_A)
        inner = functional.linear(x.to(dtype), self.first_A.to(dtype))  # [..., r]
        return super().update(x) - functional.linear(inner, self.first_B.to(dtype)) * self.scale

    def folded(self) -> Tensor:
        weight = self.base_weight()
        a, b, a0, b0 = (
            tensor.to(weight.dtype) for tensor in (self.lora_A.weight, self.scaled_b, self.first_A, self.first_B)
        )
        return weight + self.scale * (b @ a - b0 @ a0)


def principal_factors(weight: Tensor, rank: int, scale: float) -> dict[str, Tensor]:
    """Return A [r, in] and B [out, r] such that scale B A is the best rank-r approximation of a weight [out, in].

    Rows and columns beyond the largest possible rank are zero.
    """
    left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    a, b = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    a[: len(root)], b[:, : len(root)] = root[:, None] * right[:rank], left[:, :rank] * root
    return {"A": a, "B": b}


class AdaLoraLayer(LoraLayer):
    """y = base(x) + scale B (E o A) x, E [r, 1] being like singular values (Zhang et al. 2023, 2303.10512)."""

    def __init__(self, base_layer: nn.Module, form: Form, switch: Switch, dequantize: Dequantize) -> None:
        super().__init__(base_layer, form, switch, dequantize)
        self.lora_E = nn.Parameter(form.zeros(form.rank, 1))

    @property
    def scaled_a(self) -> Tensor:
        return self.lora_A.weight * self.lora_E

    def own(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by PEFT's names, which differ from those of LoRA."""
        return {"lora_A": self.lora_A.weight, "lora_B": self.lora_B.weight, "lora_E": self.lora_E}


class DoraLayer(LoraLayer):
    """y = m / n (W + scale B A) x + bias, where n is the norm of each row of W + scale B A, constant in backward."""

    def __init__(self, base_layer: nn.Module, form: Form, switch: Switch, dequantize: Dequantize) -> None:
        super().__init__(base_layer, form, switch, dequantize)
        square = self.base_weight().square().sum(1).to(form.dtype)
        self.base_square: Tensor
        self.register_buffer("base_square", square, persistent=False)  # [out] |W|^2 of each row
        self.lora_magnitude_vector = nn.Parameter(form.zeros(self.out_features))

    def own(self) -> dict[str, nn.Parameter]:
        return {**super().own(), "lora_magnitude_vector": self.lora_magnitude_vector}

    @torch.no_grad()
    def begin(self) -> None:
        """Set each magnitude to the norm of its row, after A and B are drawn."""
        self.lora_magnitude_vector.copy_(self.norm())

    @torch.no_grad()
    def norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the norm [out] of each row of W + scale B A, without forming it, and without gradient (section 4.3).

        n^2 = |W|^2 + 2 scale rowsum((W A^T) o B) + scale^2 rowsum((B A A^T) o B). It is kept above the rounding error
        of the sum, so that a row of zeros causes no division by zero.

        If the layer's output is bfloat16 or float16 (`dtype`), so is W A^T of a dense weight: its rounding changes n by
        at most |scale B A| / |W| times that of the output. To read W in float32 would take a twentieth of a step.
        """
        a, b = self.lora_A.weight, self.scaled_b
        device = "cpu" if a.is_meta else a.device.type  # autocast has no meta device
        with torch.autocast(device, enabled=False):
            if is_dense(self.base_layer):
                own, used = self.base_square, dtype if dtype in FAST else a.dtype
                cross = functional.linear(dense_weight(self.base_layer).to(used), a.to(used)).to(a.dtype)  # [out, r]
            else:
                weight = self.base_weight().to(a.dtype)
                own, cross = weight.square().sum(1), functional.linear(weight, a)  # a schedule may change the weight
            inner = 2 * self.scale * cross + self.scale**2 * functional.linear(b, a @ a.T)  # a @ a.T is symmetric
            square = own + (inner * b).sum(1)
        bounds = torch.finfo(a.dtype)
        return square.maximum(own * bounds.eps + bounds.tiny).sqrt()

    def finish(self, product: Tensor) -> Tensor:
        """Scale the rows, written as a change, so that the product stays as it is before the first step.

        Dropout applies to the update only. PEFT, like the paper's code, computes the base layer again on the dropped
        inputs.
        """
        return rescaled_product(product, self.lora_magnitude_vector, self.norm(product.dtype), self.bias)

    def folded(self) -> Tensor:
        weight = super().folded()
        return weight * (self.lora_magnitude_vector / self.norm()).to(weight.dtype)[:, None]
