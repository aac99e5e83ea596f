"""Saving: after which steps a checkpoint is due, and how it is written while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import attrs
from torch import Tensor

from luthier.checkpoint import folder as checkpoint
from luthier.distributed.world import World
from luthier.logs import get_logger
from luthier.model.weights.shard_tensors import is_sharded
from luthier.state_tree import Snapshot, take_snapshot

if TYPE_CHECKING:
    from luthier.checkpoint.shards import ShardedSnapshot
    from luthier.recipe import Recipe

log = get_logger()
LONG: Final = 1.0  # seconds: a longer wait for the checkpoint before gets a line in the log


@attrs.frozen(kw_only=True)
class Cadence:
    """When a checkpoint is due by itself: every so many steps, examples, each epoch; and after the last step."""

    steps: int | None = None
    samples: int | None = None
    epochs: bool = False
    final: bool = True

    @classmethod
    def of(cls, recipe: Recipe) -> Cadence:
        """Return what a recipe asks for; its checks have seen to it that nothing is given which has no effect."""
        epochs = recipe.save_strategy == "epoch"
        cadence = cls(steps=recipe.save_steps, samples=recipe.save_samples, epochs=epochs, final=recipe.save_final)
        if not (cadence.steps or cadence.samples or cadence.epochs or cadence.final):
            log.warning("the run writes no checkpoint by itself: what is cut off begins anew", save_final=False)
        return cadence

    def due(self, *, step: int, samples: int, seen: int, epoch_ended: bool, last: bool) -> bool:
        """After `step` (from 1), which has seen `seen` of the `samples` examples that the run has had so far."""
        by_steps = bool(self.steps) and step % (self.steps or 1) == 0
        by_samples = bool(self.samples) and samples // (self.samples or 1) > (samples - seen) // (self.samples or 1)
        return by_steps or by_samples or (self.epochs and epoch_ended) or (self.final and last)


@attrs.define(kw_only=True, eq=False)
class _Writing:
    """One checkpoint on its way to the disk; `path` once it is complete, `error` where it is not."""

    step: int
    then: Callable[[Path], object]
    after: Callable[[], object]
    path: Path | None = None
    error: BaseException | None = None


class Saver:
    """Writes the checkpoints of one run, one at a time, in the background where that is wanted.

    What is written in the background is copied first, when `save` is called. Once the checkpoint is whole, `after` is
    called at once, wherever it was written; it counts, and `then` is called with its folder, by `collect` or `wait`, in
    the thread that trains. What the writing raised is raised there too.
    """

    def __init__(
        self,
        folder: Path,
        belongs: Mapping[str, Any],
        *,
        background: bool,
        limit: int | None,
        world: World | None = None,
    ) -> None:
        self.folder, self.belongs, self.background, self.limit = folder, belongs, background, limit
        self.world = world or World()
        self.constants: tuple[str, ...] = ()  # files of the run that every checkpoint needs
        self._aside: World | None = None  # the group in which ranks write a sharded state together
        self._writing: _Writing | None = None
        self._thread: threading.Thread | None = None
        self._spare: dict[str, Tensor] = {}

    def save(
        self,
        step: int,
        tree: Mapping[str, Any],
        best: Path | None,
        then: Callable[[Path], object] = lambda path: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        """Write `tree` as the checkpoint after `step`, and keep the newest ones and `best` of those before."""
        self._wait_aloud(step)
        snapshot = self._taken(tree)
        self._spare = snapshot.tensors if self.background else {}
        self._writing = _Writing(step=step, then=then, after=after)
        if not self.background:
            self._write(self._writing, snapshot, best)
            self.collect()
            return
        arguments = (self._writing, snapshot, best)
        self._thread = threading.Thread(target=self._write, args=arguments, name="luthier-checkpoint", daemon=True)
        self._thread.start()

    def collect(self) -> None:
        """Take note of a checkpoint that has been completed since."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
        done, self._writing, self._thread = self._writing, None, None
        if done is None:
            return
        if done.error is not None:
            raise done.error
        assert done.path is not None
        done.then(done.path)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Wait; after an error what is still being written is completed too, and what that raises only logged."""
        try:
            self.wait()
        except Exception as other:
            if error is None:
                raise
            log.warning("the checkpoint that was being written is lost", error=str(other))
        self._spare = {}

    def _taken(self, tree: Mapping[str, Any]) -> Snapshot | ShardedSnapshot:
        if not is_sharded(tree):
            return take_snapshot(tree, self._spare, copy=self.background)
        from luthier.checkpoint.shards import sharded_snapshot

        self._aside = self._aside or self.world.aside()
        return sharded_snapshot(tree, self._aside, self._spare)

    def _write(self, writing: _Writing, snapshot: Snapshot | ShardedSnapshot, best: Path | None) -> None:
        try:
            if isinstance(snapshot, Snapshot):
                writing.path = checkpoint.write_checkpoint(
                    self.folder, writing.step, snapshot.write, self.belongs, self.constants
                )
            else:
                writing.path = snapshot.write(self.folder, writing.step, self.belongs, self.constants)
            if self.world.is_main:
                checkpoint.prune_checkpoints(self.folder, self.limit, best)
            writing.after()
        except BaseException as error:
            writing.error = error

    def _wait_aloud(self, step: int) -> None:
        began = time.monotonic()
        self.wait()
        waited = time.monotonic() - began
        if waited > LONG:
            remedy = "save less often, or to a faster disk"
            log.warning("waited for the checkpoint before", seconds=round(waited, 1), step=step, remedy=remedy)
