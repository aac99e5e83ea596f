"""The cached reference: its log-probabilities of every row's own documents, computed once before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs
import numpy as np
import torch
from torch import Tensor

from luthier.data.batches.batch import IGNORED
from luthier.data.batches.micro_batches import deal_batches
from luthier.data.stream.row_stream import Stream
from luthier.errors import LuthierError
from luthier.step.over_batches import run_over

if TYPE_CHECKING:
    from luthier.data.batches.batch import Batch
    from luthier.data.examples import TokenDataset
    from luthier.model.policy import ModelPolicy
    from luthier.plugins.contracts.policy_protocol import Policy
    from luthier.step.setup import Setup

AT_ONCE: Final = 64  # micro-batches that are made before they are run
DIGITS: Final = 16  # bytes of the hash that identifies a document
OPTION: Final = "reference_cache"


class CachedReference:
    """Keeps the `Policy` protocol as far as `token_logprobs` with the labels as stored; anything else is refused.

    A document is found by its content: its tokens with those of what it continues, and its labels. One that no row
    has, such as a derived one, is asked of `live`; None: there is none any more. `identity` says of which weights,
    data and template the values are.
    """

    option: ClassVar[str] = OPTION
    width: int = 1  # numbers in float32 that are kept of each supervised token

    def __init__(self, identity: Mapping[str, Any], *, derives: bool, sharded: bool) -> None:
        self.identity, self.derives, self.sharded = dict(identity), derives, sharded
        self.live: Policy | None = None
        self.values: dict[bytes, Tensor] = {}  # [S] log-probabilities of a document's supervised tokens

    def token_logprobs(self, batch: Batch, want: Sequence[str] = (), labels: Tensor | None = None) -> Tensor:
        if want or labels is not None:
            raise _refused("token_logprobs with want or labels")
        together = self.sharded and self.derives  # every rank must run its model equally often
        if batch.idle or not self.values:
            return self.live.token_logprobs(batch) if self.live and (together or self.derives) else _nothing(batch)
        cached_logprobs = {place: self.values.get(key) for place, key in document_keys(batch)}
        missing = [place for place, values in cached_logprobs.items() if values is None]
        if missing and self.live is None:
            remedy = f"Set {OPTION}: false to ask the reference about other rows."
            raise LuthierError("part-unsupported", "these documents are none of the run's rows", where=OPTION,
                               remedy=remedy)  # fmt: skip
        live = self.live.token_logprobs(batch) if self.live is not None and (missing or together) else None
        positions = batch.supervised_by(batch.labels)
        result = _nothing(batch) if live is None else torch.zeros_like(live)
        parts = [live_part(live, batch, place) if v is None else v for place, v in cached_logprobs.items()]
        flat = torch.cat([part.to(batch.device) for part in parts]) if parts else result[:0]
        return result.to(flat.dtype).index_copy(0, positions, flat)

    def map_logits(
        self, batch: Batch, function: Callable[..., Tensor], *per_token: Tensor, other: Policy | None = None
    ) -> Tensor:
        raise _refused("map_logits")

    def states(self, batch: Batch) -> Tensor:
        raise _refused("states")

    def head(self, states: Tensor) -> Tensor:
        raise _refused("head")

    def hidden(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        raise _refused("hidden")

    def attention_inputs(self, batch: Batch, layers: Sequence[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
        raise _refused("attention_inputs")

    def score(self, batch: Batch) -> Tensor:
        raise _refused("score")

    def reference(self) -> Policy:
        return self

    def teacher(self) -> Policy:
        raise _refused("teacher")

    def forget(self) -> None:
        if self.live is not None:
            self.live.forget()  # type: ignore[attr-defined]

    def fill(self, setup: Setup) -> None:
        """Ask the live reference about every row of the run, in packed passes shared by the ranks."""
        alone = attrs.evolve(setup.packing, ranks=1, rank=0)
        for dataset in cached_rows(setup):
            batches = deal_batches(dataset, alone, setup.device)
            while turn := list(islice(batches, AT_ONCE)):
                for keys, counts, values in run_over(setup, turn, self.ask):
                    parts = values.cpu().split(counts)
                    self.values |= {bytes.fromhex(key): part for key, part in zip(keys, parts, strict=True)}

    def ask(self, policy: ModelPolicy, batch: Batch) -> Any:
        """Return documents, their counts of supervised tokens, and the values of all these."""
        return gather_values(self.live_values(policy, batch), batch)

    def live_values(self, policy: ModelPolicy, batch: Batch) -> Tensor:
        """Return [T, ...], of which each supervised token's row is kept."""
        return policy.others["reference"].live.token_logprobs(batch)

    def constants(self) -> dict[str, Tensor]:
        """Return the values with the names of their documents, and the identity."""
        if not self.values:
            return {}
        keys = np.frombuffer(b"".join(self.values), np.uint8).reshape(-1, DIGITS).copy()
        text = np.frombuffer(json.dumps(self.identity, sort_keys=True).encode(), np.uint8).copy()
        counts = torch.tensor([len(part) for part in self.values.values()])
        values = torch.cat(list(self.values.values()))
        return {"keys": torch.from_numpy(keys), "counts": counts, "values": values, "identity": torch.from_numpy(text)}

    def load_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Take what `constants` returned; `checkpoint-other` where that is of other weights, data or template."""
        was = json.loads(constants["identity"].numpy().tobytes())
        differs = sorted(name for name in {**was, **self.identity} if was.get(name) != self.identity.get(name))
        if differs:
            problem = f"the cached values are those of other {', '.join(differs)}"
            remedy = f"Restore it, start with --fresh, or set {self.option}: false."
            raise LuthierError("checkpoint-other", problem, where=self.option, remedy=remedy)
        parts = constants["values"].split(constants["counts"].tolist())
        keys = [key.tobytes() for key in constants["keys"].numpy()]
        self.values = dict(zip(keys, parts, strict=True))


def cached_rows(setup: Setup) -> list[TokenDataset]:
    """Return the sets of rows that a cache keeps values of."""
    assert not isinstance(setup.train, Stream), "the recipe's checks refuse a cache of a stream"
    return [setup.train, *([] if setup.validation is None else [setup.validation])]


def document_keys(batch: Batch) -> Iterator[tuple[int, bytes]]:
    """Return each document that has a supervised token, and what it is found by."""
    ids, labels = batch.input_ids.cpu().numpy(), batch.labels.cpu().numpy()
    supervised = (labels != IGNORED) & (batch.previous.cpu().numpy() >= 0)
    starts, continues = batch.document_starts.tolist(), batch.continues.tolist()
    spans = [slice(*pair) for pair in zip(starts, starts[1:], strict=False)]
    for document, span in enumerate(spans):
        places = supervised[span].nonzero()[0]
        if not len(places):
            continue
        chain = [document]
        while continues[chain[0]] >= 0:
            chain.insert(0, continues[chain[0]])
        tokens = np.concatenate([ids[spans[each]] for each in chain])
        first = len(tokens) - (span.stop - span.start)
        state = hashlib.blake2b(tokens.tobytes(), digest_size=DIGITS)
        state.update(b"|" + (places + first).astype(np.int64).tobytes() + labels[span][places].tobytes())
        yield document, state.digest()


def live_part(live: Tensor | None, batch: Batch, document: int) -> Tensor:
    """Return [S] of one document from [T] that the live reference has given."""
    assert live is not None
    start, end = batch.document_starts[document : document + 2].tolist()
    supervised = batch.supervised_by(batch.labels)
    return live[supervised[(supervised >= start) & (supervised < end)]]


def gather_values(live: Tensor, batch: Batch) -> Any:
    """Return documents by their keys, their counts of supervised tokens, and the rows of all these."""
    documents = dict(document_keys(batch))
    parts = [live_part(live, batch, document) for document in documents]
    values = torch.cat(parts) if parts else live[:0]
    return [key.hex() for key in documents.values()], [len(part) for part in parts], values


def _nothing(batch: Batch) -> Tensor:
    return torch.zeros(batch.num_tokens, device=batch.device)


def _refused(asked: str) -> LuthierError:
    problem = f"it is asked for {asked}, and only the log-probabilities of the rows' own labels are kept"
    return LuthierError("recipe-conflict", problem, where=OPTION, remedy=f"Set {OPTION}: false.")
