"""Recomputation: what a decoder layer computes in forward is computed again in backward instead of being kept."""

from luthier.model.recompute.install_recompute import Mode, install, refuse

__all__ = ["Mode", "install", "refuse"]
