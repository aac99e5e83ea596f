"""What luthier-wandb offers: the callback `wandb`, described without importing the client."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

import attrs
from luthier import CallbackRecord, LuthierError, hookimpl, option

__all__ = ["Wandb", "luthier_callbacks"]


@attrs.frozen(kw_only=True)
class Wandb:
    """Options of the callback `wandb`, under the names of `wandb.init`.

    A key is never an option: the client reads WANDB_API_KEY or its own login. For options that are none, the client
    reads its own environment variables and settings.
    """

    project: str | None = option(None, help="The project; none: WANDB_PROJECT, else the client's `uncategorized`.")
    run_name: str | None = option(None, help="The run's name in W&B; none: the run's own.")
    entity: str | None = option(None, help="The team or user that owns the run; none: WANDB_ENTITY, else yours.")
    tags: list[str] | None = option(None, help="Words to filter runs by; none: WANDB_TAGS.")
    group: str | None = option(None, help="The group that this run belongs to; none: WANDB_RUN_GROUP.")
    notes: str | None = option(None, help="A longer description; none: WANDB_NOTES.")
    mode: Literal["online", "offline", "disabled"] | None = option(
        None, help="online sends, offline writes files for `wandb sync`, disabled does nothing; none: WANDB_MODE, "
                   "else online.")  # fmt: skip
    dir: str | None = option(None, help="The folder that gets a wandb/ folder; none: WANDB_DIR, else the run's.")
    base_url: str | None = option(None, help="The server's address; none: WANDB_BASE_URL, else W&B's own.")
    finish_timeout: float = option(60.0, help="Seconds to wait for the upload at the end; 0: as long as it takes.",
                                   low=0.0)  # fmt: skip

    def __attrs_post_init__(self) -> None:
        if self.base_url and "@" in urlsplit(self.base_url).netloc:
            raise LuthierError("recipe-conflict", "an address must not contain a secret", where="Wandb.base_url",
                               remedy="Set WANDB_API_KEY in the environment, or run `wandb login`.")  # fmt: skip


@hookimpl
def luthier_callbacks() -> list[CallbackRecord]:
    return [
        CallbackRecord(
            name="wandb",
            summary="The run's numbers in Weights & Biases, online or offline.",
            options=Wandb,
            build="luthier_wandb.tracker:Tracker",
        )
    ]
