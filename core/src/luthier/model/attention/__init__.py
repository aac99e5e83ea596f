"""Attention over packed documents, given to transformers through its own registries under the name `luthier`."""

from luthier.model.attention.document_masks import document_arguments, documents_told
from luthier.model.attention.switch import NAME, generating, install, ordinary, packed
from luthier.model.attention.ways import attend, decide

__all__ = [
    "NAME",
    "attend",
    "decide",
    "document_arguments",
    "documents_told",
    "generating",
    "install",
    "ordinary",
    "packed",
]
