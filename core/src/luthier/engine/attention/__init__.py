"""Attention over packed documents, given to transformers through its own registries under the name `luthier`."""

from luthier.engine.attention.documents import document_arguments, documents_told
from luthier.engine.attention.switch import NAME, generating, install, ordinary, packed
from luthier.engine.attention.ways import attend, decide

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
