"""Recomputation: what a decoder layer computes in forward is computed again in backward instead of being kept."""

from luthier.model.recompute.install_recompute import Mode, install_recompute, refuse_recompute

__all__ = ["Mode", "install_recompute", "refuse_recompute"]
