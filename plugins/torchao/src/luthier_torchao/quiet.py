"""Silence about what does not concern a run: transformers imports torchao if it is installed, whatever a run uses."""

from __future__ import annotations

import logging
from typing import Final

SAID: Final = {  # by logger, the beginning of messages that torchao 0.18 causes with every import
    "torchao": "Failed to load ",  # its kernels for GPUs, where there is none or an older one
    "torch.utils._pytree": "<enum '",  # a deprecation that is torchao's to mend
}


class Unheard(logging.Filter):
    """A filter of messages that begin with a text."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def silence_imports() -> None:
    """Hide these messages from now on; a second call changes nothing."""
    for name, beginning in SAID.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, Unheard) for one in logger.filters):
            logger.addFilter(Unheard(beginning))
