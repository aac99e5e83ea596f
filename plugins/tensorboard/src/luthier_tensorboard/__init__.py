"""What luthier-tensorboard offers: the callback `tensorboard`, described without importing TensorBoard."""

from __future__ import annotations

import attrs
from luthier import CallbackRecord, hookimpl, option

__all__ = ["TensorBoard", "luthier_callbacks"]


@attrs.frozen(kw_only=True)
class TensorBoard:
    """Options of the callback `tensorboard`, under TensorBoard's names."""

    log_dir: str | None = option(
        None, help="The folder of this run's event files, one folder per run; none: tensorboard/ in the run's folder."
    )


@hookimpl
def luthier_callbacks() -> list[CallbackRecord]:
    return [
        CallbackRecord(
            name="tensorboard",
            summary="The run's numbers as TensorBoard event files; local, no network.",
            options=TensorBoard,
            build="luthier_tensorboard.tracker:Tracker",
        )
    ]
