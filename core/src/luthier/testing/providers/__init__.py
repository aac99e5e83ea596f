"""Checks of providers, and the bench that they stand on."""
