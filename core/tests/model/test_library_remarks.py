"""What libraries remark on where they are imported is logged at `debug`; what they warn of is still heard."""

import logging

import pytest
from luthier.logs import captured_logs
from luthier.model.library_remarks import REMARKS, log_remarks


@pytest.mark.parametrize("name", REMARKS)
def test_a_remark_is_logged_once_at_debug_and_another_message_is_heard(name, caplog):
    logger = logging.getLogger(name)
    log_remarks()  # as importing luthier.model has done already
    logger.addHandler(caplog.handler)  # torch's loggers hand nothing on to the root
    try:
        with captured_logs() as lines:
            logger.warning("%sthis", REMARKS[name])
            logger.warning("the weights are broken")
    finally:
        logger.removeHandler(caplog.handler)
    told = [(line["event"], line["level"], line["logger"], line["text"]) for line in lines]
    assert told == [("library_remark", "debug", name, f"{REMARKS[name]}this")]
    assert set(caplog.messages) == {"the weights are broken"}
