"""Layout: the units of a global batch before packing: arranged by the loss, with their common prompts shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from luthier.data.batches.example_feed import START, Feed, Portion, Reached
from luthier.data.batches.shared_prompts import saved_by_unit, share_prompts
from luthier.data.batches.unit import Passage, Unit
from luthier.data.examples import TokenDataset, TokenExample
from luthier.data.stream.row_stream import Stream
from luthier.errors import LuthierError

Arrange = Callable[[Sequence[Unit]], Sequence[Unit]]
TRIED = 8  # units that show how many documents are derived


@attrs.frozen(kw_only=True)
class LaidOut:
    """Units ready for packing, with the number of documents that the loss derived and of those that were cut."""

    examples: Sequence[TokenExample]
    derived: int = 0
    cut: int = 0


@attrs.frozen(kw_only=True)
class UnitLayout:
    """The changes to units before packing. `arrange` is the loss's, None if the loss leaves them unchanged."""

    max_length: int = 0
    arrange: Arrange | None = None
    shares_prompts: bool = False

    @property
    def is_plain(self) -> bool:
        """Return True if units stay unchanged."""
        return self.arrange is None and not self.shares_prompts

    def lay_out(self, examples: Sequence[TokenExample]) -> LaidOut:
        """Return the units of one global batch as they are packed."""
        laid = LaidOut(examples=examples) if self.arrange is None else self._arranged(examples)
        if not self.shares_prompts:
            return laid
        return attrs.evolve(laid, examples=[share_prompts(example) for example in laid.examples])

    def lay_out_groups(self, examples: Sequence[TokenExample], size: int) -> Sequence[TokenExample]:
        """Return units for evaluation, arranged in groups of one global batch, as training does."""
        if self.is_plain:
            return examples
        starts = range(0, len(examples), size)
        groups = ([examples[i] for i in range(at, min(at + size, len(examples)))] for at in starts)
        return [example for group in groups for example in self.lay_out(group).examples]

    def unit_tokens(self, dataset: TokenDataset) -> NDArray[np.int64]:
        """Return [N], the tokens that each unit computes; an upper bound if the loss derives documents."""
        saved = saved_by_unit(dataset) if self.shares_prompts else 0
        longest = max((example.longest for example in dataset), default=0) if self.arrange else 0
        return dataset.lengths - saved + self._derived(dataset) * min(self.max_length, 2 * longest)

    def longest_unit(self, dataset: TokenDataset | Stream) -> int:
        """Return the largest number of tokens that a unit computes."""
        if isinstance(dataset, Stream):
            return dataset.longest + self._derived(dataset.sample) * self.max_length
        return dataset.longest if self.is_plain else int(self.unit_tokens(dataset).max())

    def _derived(self, dataset: TokenDataset) -> int:
        """Return the largest number of documents that the loss derives for a unit, judged by the first units."""
        if self.arrange is None:
            return 0
        tried = dataset.head(TRIED)
        derived = self._arranged(tried).examples
        return max((len(e.names) - max(len(t.named), 1) for e, t in zip(derived, tried, strict=True)), default=0)

    def _arranged(self, examples: Sequence[TokenExample]) -> LaidOut:
        assert self.arrange is not None
        units = [Unit.of_example(example) for example in examples]
        made = list(self.arrange(units))
        if [unit.index for unit in made] != [unit.index for unit in units]:
            problem = "arrange must return the same units in the same order, and no others"
            raise LuthierError("part-invalid", problem, where="loss", found=f"{len(made)} units of {len(units)}")
        further = [_derived_documents(unit, before) for unit, before in zip(made, units, strict=True)]
        longer = [len(passage) > self.max_length for own in further for passage in own.values()]
        examples = [self._with_documents(e, own) for e, own in zip(examples, further, strict=True)]
        return LaidOut(examples=examples, derived=len(longer), cut=sum(longer))

    def _with_documents(self, example: TokenExample, further: Mapping[str, Passage]) -> TokenExample:
        """Return the unit with derived documents after its own. One above `max_length` loses the end of its answer."""
        if not further:
            return example
        cut = {name: passage.cut(0, self.max_length) for name, passage in further.items()}
        empty = attrs.evolve(example, documents=None, names=())
        added = {name: attrs.evolve(empty, input_ids=p.input_ids, labels=p.labels) for name, p in cut.items()}
        return TokenExample.joined({**example.by_name(), **added})


def _derived_documents(unit: Unit, before: Unit) -> dict[str, Passage]:
    """Return the documents that a loss added. Raises `part-invalid` if it changed or emptied one."""
    for name, passage in before.documents.items():
        if unit.documents.get(name) is not passage:
            remedy = "Add documents with unit.with_document(name, passage), and leave the others alone."
            raise LuthierError("part-invalid", f"arrange changed document {name!r}", where="loss", remedy=remedy)
    further = {name: passage for name, passage in unit.documents.items() if name not in before.documents}
    for name, passage in further.items():
        if not len(passage) or len(passage.input_ids) != len(passage.labels):
            sizes = f"{len(passage.input_ids)} tokens, {len(passage.labels)} labels"
            raise LuthierError("part-invalid", f"document {name!r} of arrange is not one", where="loss", found=sizes)
    return further


@attrs.define(kw_only=True, eq=False)
class LaidOutFeed:
    """A feed whose portions are laid out."""

    feed: Feed
    layout: UnitLayout

    @property
    def total(self) -> int | None:
        return self.feed.total

    @property
    def steps_per_epoch(self) -> int | None:
        return self.feed.steps_per_epoch

    def head(self, count: int) -> list[TokenExample]:
        """Return the first units in the order of reading, laid out together."""
        return list(self.layout.lay_out(self.feed.head(count)).examples)

    def portions(self, first: int) -> Iterator[Portion]:
        for portion in self.feed.portions(first):
            laid = self.layout.lay_out(portion.examples)
            yield attrs.evolve(portion, examples=laid.examples, derived=laid.derived, cut=laid.cut)

    def state(self, portion: Portion | None) -> dict[str, Any]:
        return self.feed.state(portion)

    def load_state(self, state: Mapping[str, Any], reached: Reached = START) -> None:
        self.feed.load_state(state, reached)
