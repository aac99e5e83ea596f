"""Attention within documents, computed in blocks whose scores are never all kept."""

from luthier_kernels.attention.documents import attend_documents, is_fast

__all__ = ["attend_documents", "is_fast"]
