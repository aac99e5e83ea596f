"""The feed of a stream, shuffled in a bounded buffer that is part of the run's state."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from luthier.data.batches.example_feed import START, Portion, Reached
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.formats.bad_rows import SURE, TOLD, Fault, exceeds_limit
from luthier.data.stream.row_stream import Place, Stream
from luthier.data.tokenise.examples_of_rows import Made
from luthier.data.tokenise.token_blocks import NOTHING
from luthier.errors import LuthierError
from luthier.logs import get_logger

log = get_logger()
ARRAYS = ("input_ids", "labels", "starts", "weights", "documents", "index")
COUNTS = ("epoch", "read", "samples", "epoch_samples", "supervised", "rows", "bad")


@attrs.define(kw_only=True, eq=False)
class Position:
    """The position of a stream between two steps."""

    epoch: int = 0
    place: Place = attrs.field(factory=Place)
    read: bool = False  # True once all rows of the epoch are read
    buffer: list[TokenExample] = attrs.field(factory=list)  # examples to draw from
    queue: deque[TokenExample] = attrs.field(factory=deque)  # examples that wait for room in the buffer
    left: TokenDataset = NOTHING  # the rest of documents that are cut into blocks
    samples: int = 0  # taken in this epoch
    epoch_samples: int | None = None  # of the epoch before
    supervised: int = 0  # tokens trained on so far
    rows: int = 0  # read in this epoch
    drops: Counter[str] = attrs.field(factory=Counter)  # of these rows, by reason
    bad: int = 0  # bad rows among them
    unrendered: Counter[str] = attrs.field(factory=Counter)  # parts of these rows that the template leaves out, by role

    @property
    def passes(self) -> float:
        """Return the passes over the rows so far. Parts of a pass are known once one pass is complete."""
        part = self.samples / self.epoch_samples if self.epoch_samples else 0.0
        return self.epoch + min(part, math.nextafter(1.0, 0.0))

    def copy(self) -> Position:
        """Return a copy that shares the examples, which nobody changes."""
        buffer, queue, drops = list(self.buffer), deque(self.queue), Counter(self.drops)
        return attrs.evolve(self, buffer=buffer, queue=queue, drops=drops, unrendered=Counter(self.unrendered))


@attrs.define(kw_only=True, eq=False)
class StreamFeed:
    """A feed of portions of `batch` examples of a stream.

    Each portion is drawn from a buffer of `buffer` examples that is filled in the order of reading; the draws of a step
    depend on (seed, step) alone. An epoch ends with the rows, and its last portion may be short. The run ends after
    `total` steps, `epochs` passes or `max_tokens` supervised tokens, whichever is given and comes first.
    """

    stream: Stream
    batch: int
    seed: int
    buffer: int
    total: int | None = None
    epochs: float = math.inf
    max_tokens: int | None = None
    begin: Position = attrs.field(factory=Position)
    reached: Reached = START

    @property
    def steps_per_epoch(self) -> int | None:
        samples = self.begin.epoch_samples
        return None if samples is None else math.ceil(samples / self.batch)

    def head(self, count: int) -> list[TokenExample]:
        return self.stream.head(count)

    def portions(self, first: int) -> Iterator[Portion]:
        at, step, samples = self.begin.copy(), first, self.reached.samples
        reader = _Reader(self, at)
        while not self._over(step, at):
            begun, examples = at.passes, reader.draw(step)
            if not examples:
                raise LuthierError("data-empty", f"no row is left to train on; dropped: {dict(at.drops)}", where="data")
            at.supervised += sum(example.num_supervised for example in examples)
            at.samples += len(examples)
            ends = reader.ended()
            yield Portion(
                step=step,
                samples=samples,
                examples=examples,
                begun=begun,
                ended=at.passes,
                ends_epoch=ends,
                last=self._over(step + 1, at),
                position=at.copy(),
            )
            step, samples = step + 1, samples + len(examples)

    def state(self, portion: Portion | None) -> dict[str, Any]:
        at = self.begin if portion is None else portion.position
        sets = {"buffer": TokenDataset.of(at.buffer), "queue": TokenDataset.of(at.queue), "left": at.left}
        state = {name: getattr(at, name) for name in COUNTS} | {"place": [at.place.unit, at.place.row]}
        counts = {"drops": dict(at.drops), "unrendered": dict(at.unrendered)}
        return {**state, **counts, **{name: _tensors(dataset) for name, dataset in sets.items()}}

    def load_state(self, state: Mapping[str, Any], reached: Reached = START) -> None:
        self.reached = reached
        if not state:
            return
        if "taken" in state:  # the state of a checkpoint that counted steps
            batch = reached.batch or self.batch
            steps = {"samples": state["taken"], "epoch_samples": state["per_epoch"]}
            state = {**state, **{name: None if n is None else n * batch for name, n in steps.items()}}
        sets = {name: _dataset(state[name]) for name in ("buffer", "queue", "left")}
        self.begin = Position(
            **{name: state.get(name, 0) for name in COUNTS},  # older checkpoints lack the counts of bad rows
            place=Place(*state["place"]),
            drops=Counter(state["drops"]),
            unrendered=Counter(state.get("unrendered", {})),
            buffer=list(sets["buffer"]),
            queue=deque(sets["queue"]),
            left=sets["left"],
        )

    def _over(self, step: int, at: Position) -> bool:
        enough = self.max_tokens is not None and at.supervised >= self.max_tokens
        return enough or at.epoch >= self.epochs or (self.total is not None and step >= self.total)


class _Reader:
    """A reader that moves a position along its stream."""

    def __init__(self, feed: StreamFeed, at: Position) -> None:
        self.feed, self.at = feed, at
        self._open()

    def draw(self, step: int) -> list[TokenExample]:
        """Return the examples of a step: fewer where the epoch ends, none if the epoch has none left."""
        random = np.random.Generator(np.random.PCG64([self.feed.seed, step, 1]))
        examples: list[TokenExample] = []
        buffer = self.at.buffer
        while len(examples) < self.feed.batch:
            self._fill()
            if not buffer:
                break
            chosen = int(random.integers(len(buffer)))
            buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
            examples.append(buffer.pop())
        return examples

    def ended(self) -> bool:
        """Return True if the epoch is over, and begin the next one."""
        self._fill()
        at = self.at
        if at.buffer:
            return False
        counts = {"dropped": at.drops, "not_rendered": at.unrendered}
        facts = {name: ", ".join(f"{what} {n}" for what, n in c.most_common()) for name, c in counts.items() if c}
        log.info("epoch read", epoch=at.epoch, rows=at.rows, **facts)
        at.epoch, at.place, at.read, at.left = at.epoch + 1, Place(), False, NOTHING
        at.epoch_samples, at.samples, at.rows, at.bad = at.samples, 0, 0, 0
        at.drops, at.unrendered = Counter(), Counter()
        self._open()
        return True

    def _open(self) -> None:
        self.parts = self.feed.stream.parts(self.feed.seed, self.at.epoch, self.at.place)
        self.blocks = self.feed.stream.blocks()
        if self.blocks is not None:
            self.blocks.left = self.at.left

    def _fill(self) -> None:
        """Read until the buffer is full or the epoch's rows are read."""
        at = self.at
        while len(at.buffer) < self.feed.buffer:
            if at.queue:
                at.buffer.append(at.queue.popleft())
            elif at.read:
                return
            else:
                self._read()

    def _read(self) -> None:
        at, part = self.at, next(self.parts, None)
        if part is None:
            at.read = True
            self._limit((), at.rows > 0)
            at.queue.extend(self.blocks.end() if self.blocks else ())
        else:
            made, at.place = part
            at.queue.extend(self._cut(made))
            at.rows += made.rows
            at.drops.update(made.drops)
            at.unrendered.update(made.unrendered)
            at.bad += len(made.faults)
            self._limit(made.faults, at.rows >= SURE)
        if self.blocks is not None:
            at.left = self.blocks.left

    def _limit(self, faults: Sequence[Fault], sure: bool) -> None:
        """Raise if the epoch has too many bad rows. A share of them is judged only after many rows."""
        at, data = self.at, self.feed.stream.data
        if (sure or not isinstance(data.max_bad_rows, float)) and exceeds_limit(at.bad, at.rows, data):
            problem = f"{at.bad} of the {at.rows} rows read so far are bad, more than max_bad_rows: {data.max_bad_rows}"
            listed = "".join(f"\n  {fault.line}" for fault in faults[:TOLD])
            raise LuthierError("data-row", f"{problem}{listed}", where="data.train")

    def _cut(self, made: Made) -> TokenDataset:
        return made.examples if self.blocks is None else self.blocks.add(made.examples)


def _tensors(dataset: TokenDataset) -> dict[str, Any]:
    import torch

    def tensor(array: Any) -> Any:
        return None if array is None else torch.from_numpy(np.array(array))

    arrays = {name: tensor(getattr(dataset, name)) for name in ARRAYS}
    columns = {name: tensor(values) for name, values in dataset.columns.items()}
    return {**arrays, "where": list(dataset.where), "names": list(dataset.names), "columns": columns}


def _dataset(tensors: Mapping[str, Any]) -> TokenDataset:
    """Return the set that `_tensors` was given. Older checkpoints lack names, columns and index."""
    arrays: dict[str, Any] = {name: None if tensors.get(name) is None else tensors[name].numpy() for name in ARRAYS}
    columns = {name: values.numpy() for name, values in tensors.get("columns", {}).items()}
    return TokenDataset(**arrays, where=tuple(tensors["where"]), names=tuple(tensors.get("names", ())), columns=columns)
