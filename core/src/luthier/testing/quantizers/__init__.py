"""Checks of quantizers, and the worlds that they meet."""
