"""The model that is trained: loading, the policy over it, attention, head, operations and recomputation."""

from luthier.model.library_remarks import log_remarks

log_remarks()  # before any module of this room imports transformers
