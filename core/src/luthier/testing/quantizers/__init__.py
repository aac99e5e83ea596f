"""Checks of quantizers, and the models that they run on."""
