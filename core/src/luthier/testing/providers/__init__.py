"""Checks of providers, and the bench that they run on."""
