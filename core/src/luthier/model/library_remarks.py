"""Remarks of libraries that concern no run: transformers imports torchao where it is installed, whatever is used."""

from __future__ import annotations

import logging
from typing import Final

REMARKS: Final = {  # by logger, the beginning of messages that torchao 0.18 causes with every import
    "torchao": "Failed to load ",  # its kernels for GPUs, where there is none or an older one
    "torch.utils._pytree": "<enum '",  # a deprecation that is torchao's to mend
}


class RemarkFilter(logging.Filter):
    """A filter that logs the messages that begin with a text at `debug`, and passes on all others."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(self.beginning):
            return True
        from luthier.logs import get_logger

        get_logger().debug("library_remark", logger=record.name, text=text)
        return False


def log_remarks() -> None:
    """Log these remarks at `debug` from now on, instead of printing them; a second call changes nothing."""
    for name, beginning in REMARKS.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, RemarkFilter) for one in logger.filters):
            logger.addFilter(RemarkFilter(beginning))
