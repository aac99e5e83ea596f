"""Training to weights, and activations, on evenly spaced levels: 8, 4 and 2 bits, ternary, and signs.

`grid` has the levels and their gradients, `observers` the ranges that levels cover, `layer` the layer, and `quantizer`
the parts `qat` and `qat_activations`.
"""
