"""The feed of a stream, shuffled in a bounded buffer that is part of the run's state."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from luthier.data.batches.example_feed import START, Portion, Reached
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.formats.bad_rows import SURE, TOLD, Fault, exceeds_limit
from luthier.data.stream.row_stream import Stream
from luthier.data.stream.source_turns import Turn, Turns
from luthier.data.stream.stream_position import Position
from luthier.errors import LuthierError
from luthier.logs import get_logger

log = get_logger()


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
        return (self.begin if portion is None else portion.position).state()

    def load_state(self, state: Mapping[str, Any], reached: Reached = START) -> None:
        self.reached = reached
        if not state:
            return
        if "taken" in state:  # the state of a checkpoint that counted steps
            batch = reached.batch or self.batch
            steps = {"samples": state["taken"], "epoch_samples": state["per_epoch"]}
            state = {**state, **{name: None if n is None else n * batch for name, n in steps.items()}}
        self.begin = Position.of_state(state)

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
        if sources := self.feed.stream.count_sources(at.taken):
            facts["sources"] = ", ".join(f"{s['path']} {s['epoch_rows']} ({s['share']:.1%})" for s in sources)
        log.info("epoch read", epoch=at.epoch, rows=at.rows, **facts)
        at.begin_epoch()
        self._open()
        return True

    def _open(self) -> None:
        stream, at = self.feed.stream, self.at
        at.turns = at.turns or [Turn() for _ in stream.lines]
        self.parts = stream.parts(self.feed.seed, at.epoch, [turn.place for turn in at.turns])
        self.turns = Turns(lines=stream.lines, turns=at.turns, fetch=self._fetch, taken=at.taken)
        self.blocks = stream.blocks()
        if self.blocks is not None:
            self.blocks.left = at.left

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
        at, documents = self.at, self.turns.take()
        if documents is None:
            at.read = True
            self._limit((), at.rows > 0)
            at.queue.extend(self.blocks.end() if self.blocks else ())
        else:
            at.queue.extend(documents if self.blocks is None else self.blocks.add(documents))
        if self.blocks is not None:
            at.left = self.blocks.left

    def _fetch(self, line: int) -> TokenDataset | None:
        """Return what is made of the next rows of a line, and count them."""
        at, part = self.at, self.parts.next_of(line)
        if part is None:
            return None
        made, at.turns[line].place = part
        at.rows += made.rows
        at.drops.update(made.drops)
        at.unrendered.update(made.unrendered)
        at.bad += len(made.faults)
        self._limit(made.faults, at.rows >= SURE)
        return made.examples

    def _limit(self, faults: Sequence[Fault], sure: bool) -> None:
        """Raise if the epoch has too many bad rows. A share of them is judged only after many rows."""
        at, data = self.at, self.feed.stream.data
        if (sure or not isinstance(data.max_bad_rows, float)) and exceeds_limit(at.bad, at.rows, data):
            problem = f"{at.bad} of the {at.rows} rows read so far are bad, more than max_bad_rows: {data.max_bad_rows}"
            listed = "".join(f"\n  {fault.line}" for fault in faults[:TOLD])
            raise LuthierError("data-row", f"{problem}{listed}", where="data.train")
