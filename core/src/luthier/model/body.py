"""Run a model's body over a batch, with its adapter's virtual tokens and prefixes, at once or document by document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import attrs
import torch
from torch import Tensor, nn

from luthier.data.batches.batch import Batch, chain_of
from luthier.errors import LuthierError
from luthier.model.attention import document_arguments, documents_told
from luthier.model.attention.recorded_inputs import Inputs, record_inputs
from luthier.model.recurrent import separation_reason, state_of, takes_attention
from luthier.plugins.completion import add_defaults
from luthier.plugins.contracts.protocols import Adapter


@attrs.frozen(kw_only=True, eq=False)
class BodyOutput:
    """The output of a body for the T tokens of a loss's batch, without virtual tokens."""

    kind: type[Any]  # transformers' class of the body's output
    states: Tensor  # [T, H], what the head reads
    layers: tuple[Tensor, ...]  # [T, H] before the first layer and after each; empty if nobody asked for them
    routers: tuple[Tensor, ...]  # [T, experts] of each sparse layer; empty if nobody asked for them
    attention: dict[int, Inputs]  # [T, heads, d] each, of the `asked` layers that attend
    asked: frozenset[int]  # the layers whose attention was to be kept


class Body:
    """The model without its head, called with packed batches."""

    def __init__(self, model: Any, adapter: Any = None) -> None:
        """Set the body's model and adapter. With `adapter` None no virtual tokens and prefixes are added."""
        self.model = model
        self.adapter = None if adapter is None else add_defaults(adapter, "adapter")
        self.module: nn.Module = getattr(model, model.base_model_prefix)
        self.is_stateful = state_of(model.config, model) is not None
        self.is_apart = separation_reason(model.config, model) is not None
        self.prefix_rows = 0 if self.adapter is None else self._count_prefix(self.adapter)

    @property
    def virtual_tokens(self) -> int:
        """Number of positions that the adapter takes before each document that continues none."""
        return self.prefix_rows + (0 if self.adapter is None else self.adapter.virtual_tokens())

    def run(
        self, batch: Batch, *, layers: bool = False, routers: bool = False, attention: frozenset[int] = frozenset()
    ) -> BodyOutput:
        """Return the output for each token of the batch, with what else is wanted.

        `attention` has the numbers of the layers whose queries, keys and values are kept.
        """
        prepared = batch if self.adapter is None else prepare_batch(self.adapter, batch)
        if self.prefix_rows:
            prepared = attrs.evolve(prepared, position_ids=prepared.position_ids + self.prefix_rows)
        parts = _split_apart(prepared) if self.is_apart and prepared.num_documents > 1 else [(prepared, None)]
        with_inputs = [self._call_recorded(part, layers, routers, attention) for part, _ in parts]
        answers, recorded = [answer for answer, _ in with_inputs], [inputs for _, inputs in with_inputs]
        places = _merge_places([tokens for _, tokens in parts], prepared, batch)

        def gather(tensors: Sequence[Tensor]) -> Tensor:
            joined = torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]
            return joined if places is None else joined.index_select(0, places)

        hidden = [getattr(answer, "hidden_states", None) or () for answer in answers]
        routed = [getattr(answer, "router_logits", None) or () for answer in answers]
        return BodyOutput(
            kind=type(answers[0]),
            states=gather([answer.last_hidden_state[0] for answer in answers]),
            layers=tuple(gather([own[0] for own in layer]) for layer in zip(*hidden, strict=True)),
            routers=tuple(gather(layer) for layer in zip(*routed, strict=True)),
            attention={layer: _map_inputs(gather, [part[layer] for part in recorded]) for layer in recorded[0]},
            asked=attention,
        )

    def _count_prefix(self, adapter: Adapter) -> int:
        rows = count_prefix_rows(adapter, self.model.config.get_text_config().num_hidden_layers)
        if rows and not takes_attention(type(self.model)):
            problem = f"{type(self.model).__name__} computes attention by itself, and takes no prefixes"
            raise LuthierError("model-architecture", problem, remedy="Choose another adapter or model.")
        return rows

    def _call_recorded(
        self, batch: Batch, layers: bool, routers: bool, attention: frozenset[int]
    ) -> tuple[Any, dict[int, Inputs]]:
        """Return the body's answer, and what the layers in `attention` attended with."""
        with record_inputs(attention) as inputs:
            return self._call(batch, layers, routers), inputs

    def _call(self, batch: Batch, layers: bool, routers: bool) -> Any:
        arguments = document_arguments(batch)
        if batch.num_documents == 1 and self.is_stateful:
            del arguments["cu_seq_lens_q"]  # recurrent layers refuse this argument for a single document
        if self.prefix_rows:
            arguments["prefixes"] = cast(Any, self.adapter).prefixes  # only adapters add prefixes
        if layers:
            arguments["output_hidden_states"] = True
        if routers:
            arguments["output_router_logits"] = True
        inputs = {"input_ids": batch.input_ids[None]}
        if batch.embeddings is not None:
            inputs = {"inputs_embeds": batch.embeddings[None].to(self.model.dtype)}
        with documents_told(arguments):
            return self.module(**inputs, position_ids=batch.position_ids[None], use_cache=False, **arguments)


def _map_inputs(gather: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Inputs]) -> Inputs:
    """Return queries, keys and values gathered from those of the parts."""
    queries, keys, values = zip(*parts, strict=True)
    return gather(queries), gather(keys), gather(values)


def prepare_batch(adapter: Adapter, batch: Batch) -> Batch:
    """Return the batch that the adapter makes of this one; `part-invalid` where it does not keep what it declares."""
    prepared = adapter.prepare(batch)
    if prepared is batch:
        return batch
    origin, free = prepared.origin, int((batch.continues < 0).sum())
    if origin is None:
        raise _unkept("prepare(batch) returned another batch without origin", value=None)
    if len(origin) != prepared.num_tokens or not torch.equal(origin[origin >= 0], _range_like(origin, batch)):
        problem = "the origin of a prepared batch does not name each token of the loss's batch once, in order"
        raise _unkept(problem, value=origin.tolist()[:8])
    added, declared = prepared.num_tokens - batch.num_tokens, adapter.virtual_tokens()
    if added != declared * free:
        problem = f"prepare(batch) added {added} tokens to {free} documents, and virtual_tokens() is {declared}"
        raise _unkept(problem, value=added)
    return prepared


def count_prefix_rows(adapter: Adapter, layers: int) -> int:
    """Return how many keys `prefixes` gives, 0 for none; `part-invalid` where layers differ."""
    with torch.no_grad():
        pairs = [adapter.prefixes(layer) for layer in range(layers)]
    counts = sorted({0 if pair is None else pair[0].shape[0] for pair in pairs})
    if len(counts) > 1:
        raise _unkept("prefixes differ in number from layer to layer", value=counts)
    return counts[0]


def _unkept(problem: str, value: object) -> LuthierError:
    remedy = "See `Adapter.prepare` in the documentation of hooks."
    return LuthierError("part-invalid", problem, where="adapter", found=value, remedy=remedy)


def _range_like(origin: Tensor, batch: Batch) -> Tensor:
    return torch.arange(batch.num_tokens, device=origin.device)


def _split_apart(batch: Batch) -> list[tuple[Batch, Tensor]]:
    """Return each document that none continues, with what it continues, as a batch; and its tokens in `batch`."""
    links, starts = batch.continues.tolist(), batch.document_starts.tolist()
    branches = []
    for document in sorted(set(range(batch.num_documents)) - set(links)):
        spans = [torch.arange(starts[d], starts[d + 1]) for d in chain_of(links, document)]
        tokens = torch.cat(spans).to(batch.device)
        branches.append((_select_tokens(batch, tokens), tokens))
    return branches


def _select_tokens(batch: Batch, tokens: Tensor) -> Batch:
    """Return these tokens as one document, with all that a body reads."""
    return attrs.evolve(
        batch,
        input_ids=batch.input_ids[tokens],
        position_ids=batch.position_ids[tokens],
        embeddings=None if batch.embeddings is None else batch.embeddings[tokens],
        document_starts=torch.tensor([0, len(tokens)]),
        continues=torch.tensor([-1]),
    )


def _merge_places(parts: Sequence[Tensor | None], prepared: Batch, batch: Batch) -> Tensor | None:
    """Return [T]: where each token of `batch` stands in the parts' outputs, one after another; None: where it stands.

    A prompt that several documents continue is in the part of each; its place is in the first.
    """
    places = None
    if parts[0] is not None:
        places = torch.empty(prepared.num_tokens, dtype=torch.int64, device=prepared.device)
        end = sum(len(part) for part in parts if part is not None)
        for part in reversed(parts):
            assert part is not None
            end -= len(part)
            places[part] = torch.arange(end, end + len(part), device=places.device)
    if prepared.origin is None:
        return places
    own = (prepared.origin >= 0).nonzero().squeeze(1)
    return own if places is None else places[own]
