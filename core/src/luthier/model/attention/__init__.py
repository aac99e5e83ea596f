"""Attention over packed documents, given to transformers through its own registries under the name `luthier`."""

from luthier.model.attention.document_masks import document_arguments, documents_told
from luthier.model.attention.switch import (
    NAME,
    generating_attention,
    install_attention,
    ordinary_attention,
    packed_attention,
)
from luthier.model.attention.ways import attend_documents, decide_attention

__all__ = [
    "NAME",
    "attend_documents",
    "decide_attention",
    "document_arguments",
    "documents_told",
    "generating_attention",
    "install_attention",
    "ordinary_attention",
    "packed_attention",
]
