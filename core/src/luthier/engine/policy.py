"""The policy: the model as a loss sees it. The body runs once per micro-batch, the head in chunks of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.engine.attention import document_arguments, documents_told
from luthier.engine.batch import Batch
from luthier.engine.head.scorer import CHUNK, Scorer
from luthier.engine.stateful import state_of
from luthier.errors import LuthierError


class ModelPolicy:
    """A transformers causal LM behind the `Policy` protocol. `Step` calls `forget` around each micro-batch."""

    def __init__(self, model: Any, adapter: Any = None, *, is_reference: bool = False) -> None:
        self.model, self.adapter, self.is_reference = model, adapter, is_reference
        self.body: nn.Module = getattr(model, model.base_model_prefix)
        self.want_routers = False
        self.is_stateful = state_of(model.config, model) is not None
        self.coefficients: Callable[[Batch], Tensor | None] | None = None  # the loss's, if it declares them
        self.scorer = Scorer(model, self.body, self.head)
        self._batch: Batch | None = None
        self._output: Any = None
        self._answer_type: Any = None
        self._reference: ModelPolicy | None = None

    def token_logprobs(self, batch: Batch, want: Sequence[str] = ()) -> Any:
        unknown = set(want) - {"entropy", "top1"}
        if unknown:
            raise LuthierError("part-invalid", f"token_logprobs cannot give {', '.join(sorted(unknown))}")
        positions = batch.supervised  # [S]
        rows = self._states(batch).index_select(0, batch.previous[positions])  # [S, H]
        with self._mode():
            logprobs, entropy, top1 = self.scorer.scores(
                rows, batch.labels[positions], tuple(want), lambda: self._coefficients(batch, positions)
            )
        found = _spread(logprobs, positions, batch)
        also = {"entropy": entropy, "top1": top1}
        return (found, {name: _spread(also[name], positions, batch) for name in want}) if want else found  # type: ignore[arg-type]

    def map_logits(
        self, batch: Batch, function: Callable[..., Tensor], *per_token: Tensor, other: ModelPolicy | None = None
    ) -> Tensor:
        positions = batch.supervised  # [S]
        sources = batch.previous[positions]  # [S]
        states = self._states(batch)[sources]  # [S, H]
        rival = None if other is None else other._states(batch)[sources]
        labels = batch.labels[positions]
        given = [p[positions] for p in per_token]
        chunk = max(1, CHUNK // self.model.config.get_text_config().vocab_size)
        results = []
        for start in range(0, max(len(positions), 1), chunk):
            span = slice(start, start + chunk)
            inputs = [states[span], labels[span], None if rival is None else rival[span], *(g[span] for g in given)]
            results.append(self._map_chunk(function, other, inputs, kept=len(positions) <= chunk))
        return _spread(torch.cat(results), positions, batch)

    def hidden(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        if all(layer == -1 for layer in layers):
            return [self._states(batch) for _ in layers]
        with self._mode():
            states = self._run(batch, output_hidden_states=True).hidden_states
        return [states[layer][0] for layer in layers]

    def score(self, batch: Batch) -> Tensor:
        head = getattr(self.model, "score", None)
        if head is None:
            raise LuthierError("part-unsupported", f"{type(self.model).__name__} has no scalar head")
        with self._mode():
            return head(self._states(batch)[batch.document_starts[1:] - 1]).squeeze(-1).float()

    def reference(self) -> ModelPolicy:
        if self.adapter is None:
            raise LuthierError("part-unsupported", "this policy has no adapter to switch off")
        if self._reference is None:
            self._reference = ModelPolicy(self.model, self.adapter, is_reference=True)
        return self._reference

    def teacher(self) -> ModelPolicy:
        raise LuthierError("part-unsupported", "the recipe names no teacher")

    def router_logits(self, batch: Batch) -> Sequence[Tensor]:
        """[T, experts] for each sparse layer, from the pass that the loss uses; empty where none were asked for."""
        self._states(batch)
        return tuple(getattr(self._output, "router_logits", None) or ())

    def _coefficients(self, batch: Batch, positions: Tensor) -> Tensor | None:
        """[S] what the loss declares of its gradient by the log-probabilities, if anything."""
        known = None if self.coefficients is None else self.coefficients(batch)
        return None if known is None else known[positions]

    def forget(self) -> None:
        """Let go of the body's output, so that the next micro-batch is computed afresh."""
        self._batch = self._output = None
        if self._reference is not None:
            self._reference.forget()

    def head(self, states: Tensor) -> Tensor:
        """[C, H] to [C, V], called as the model calls it: its own forward, with the body's answer put in place."""
        answer = self._answer_type(last_hidden_state=states[None])
        placeholder = torch.zeros((1, states.shape[0]), dtype=torch.int64, device=states.device)
        routers = {"output_router_logits": False} if self.want_routers else {}
        decoder = self.model.get_decoder()  # which OPT's forward calls past its base model
        inner = nullcontext() if decoder in (self.body, self.model) else _answering(decoder, answer)
        with _answering(self.body, answer), inner:
            return self.model(input_ids=placeholder, use_cache=False, **routers).logits[0]

    def _states(self, batch: Batch) -> Tensor:
        """[T, H] that the head reads."""
        if self._batch is not batch:
            with self._mode():
                self._output = self._run(batch)
            self._answer_type = type(self._output)  # outlives `forget`: backward calls the head again
            self._batch = batch
        return self._output.last_hidden_state[0]

    def _run(self, batch: Batch, **arguments: Any) -> Any:
        if self.want_routers:
            arguments["output_router_logits"] = True
        told = self._told(batch)
        with documents_told(told):
            return self.body(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                **told,
                **arguments,
            )

    def _told(self, batch: Batch) -> dict[str, Any]:
        """Where the documents are. Recurrent layers that cannot keep them apart refuse to be told of a single one."""
        told = document_arguments(batch)
        if batch.num_documents == 1 and self.is_stateful:
            del told["cu_seq_lens_q"]
        return told

    def _map_chunk(
        self, function: Callable[..., Tensor], other: ModelPolicy | None, inputs: list[Any], kept: bool
    ) -> Tensor:
        """One chunk's values, recomputed in backward; a chunk that is alone is `kept`, which is a head's pass less."""

        def compute(states: Tensor, labels: Tensor, rival: Tensor | None, *given: Tensor) -> Tensor:
            with self._mode():
                logits = self.head(states)
            if other is None or rival is None:
                return function(logits, labels, *given)
            with other._mode():
                theirs = other.head(rival)
            return function(logits, labels, *given, theirs)

        if torch.is_grad_enabled() and not self.is_reference and not kept:
            return checkpoint(compute, *inputs, use_reentrant=False)
        return compute(*inputs)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """As the policy trains, or without adapter, dropout and gradient."""
        with ExitStack() as stack:
            if self.is_reference:
                training = self.model.training
                stack.callback(self.model.train, training)
                self.model.eval()
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.adapter.disabled())
            yield


def _spread(values: Tensor, positions: Tensor, batch: Batch) -> Tensor:
    """[S, ...] to [T, ...], 0 where nothing is supervised."""
    return values.new_zeros((batch.num_tokens, *values.shape[1:])).index_copy(0, positions, values)


@contextmanager
def _answering(body: nn.Module, answer: Any) -> Iterator[None]:
    """Inside it this one body returns `answer` at once."""
    body.forward = lambda *_, **__: answer  # type: ignore[method-assign]
    try:
        yield
    finally:
        del body.forward  # the class's own forward is found again
