"""Precision: dtypes of weights and of arithmetic, loss scaling, and steps of bfloat16 weights."""
