"""The policy: the model as a loss sees it. The body runs once per micro-batch, the head in chunks of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luthier.data.batches.batch import Batch
from luthier.errors import LuthierError
from luthier.model.attention.recorded_inputs import Inputs
from luthier.model.body import Body, BodyOutput
from luthier.model.head.scorer import CHUNK, Scorer
from luthier.plugins.contracts.policy_protocol import Policy

Frozen = Callable[[], AbstractContextManager[Any]]


class ModelPolicy:
    """A transformers causal LM behind the `Policy` protocol. `Step` calls `forget` around each micro-batch.

    `frozen` None: the policy that trains. Else it computes without gradient and dropout, inside what `frozen` gives.
    With an `adapter` the body runs on the batch that it prepares, and with its prefixes; the loss keeps its own batch.
    """

    def __init__(self, model: Any, adapter: Any = None, *, frozen: Frozen | None = None) -> None:
        self.model, self.adapter, self.frozen = model, adapter, frozen
        self.body = Body(model, adapter)
        self.want_routers = False
        self.coefficients: Callable[[Batch], Tensor | None] | None = None  # the loss's, if it declares them
        self.scorer = Scorer(model, self.body.module, self._call_head)
        self._batch: Batch | None = None
        self._output: BodyOutput | None = None
        self._generators: Any = None  # the random states at the start of the body's pass
        self._keeps_layers = False  # True once a loss asks for hidden states, which every pass then returns
        self._keeps_attention: set[int] = set()  # the layers whose attention a loss has asked about, likewise
        self._answer_type: Any = None
        self.others: dict[str, Any] = {}  # the reference and the teacher, if the recipe names them

    def token_logprobs(self, batch: Batch, want: Sequence[str] = (), labels: Tensor | None = None) -> Any:
        unknown = set(want) - {"entropy", "top1"}
        if unknown:
            raise LuthierError("part-invalid", f"token_logprobs cannot give {', '.join(sorted(unknown))}")
        asked = batch.labels if labels is None else labels  # [T]
        positions = batch.supervised_by(asked)  # [S]
        rows = self.states(batch).index_select(0, batch.previous[positions])  # [S, H]
        known = (lambda: self._coefficients(batch, positions)) if labels is None else lambda: None
        with self._mode():
            logprobs, entropy, top1 = self.scorer.scores(rows, asked[positions], tuple(want), known)
        values = _spread(logprobs, positions, batch)
        also = {"entropy": entropy, "top1": top1}
        return (values, {name: _spread(also[name], positions, batch) for name in want}) if want else values  # type: ignore[arg-type]

    def map_logits(
        self, batch: Batch, function: Callable[..., Tensor], *per_token: Tensor, other: Policy | None = None
    ) -> Tensor:
        positions = batch.supervised  # [S]
        sources = batch.previous[positions]  # [S]
        states = self.states(batch)[sources]  # [S, H]
        rival = None if other is None else other.states(batch)[sources]
        labels = batch.labels[positions]
        given = [p[positions] for p in per_token]
        chunk = max(1, CHUNK // self.model.config.get_text_config().vocab_size)
        results = []
        for start in range(0, max(len(positions), 1), chunk):
            span = slice(start, start + chunk)
            inputs = [states[span], labels[span], None if rival is None else rival[span], *(g[span] for g in given)]
            results.append(self._map_chunk(function, other, inputs, alone=len(positions) <= chunk))
        return _spread(torch.cat(results), positions, batch)

    def states(self, batch: Batch) -> Tensor:
        if self._batch is not batch:
            self._generators = _random_states(self.model.device)
            self._keep(batch)
        assert self._output is not None
        return self._output.states

    def head(self, states: Tensor) -> Tensor:
        with self._mode():
            return self._call_head(states)

    def hidden(self, batch: Batch, layers: Sequence[int]) -> list[Tensor]:
        if all(layer == -1 for layer in layers):
            return [self.states(batch) for _ in layers]
        self._keeps_layers = True
        states = self._complete_output(batch, lambda output: bool(output.layers)).layers
        if any(not -len(states) <= layer < len(states) for layer in layers):
            raise IndexError(f"the model has {len(states) - 1} layers")
        return [states[layer] for layer in layers]

    def attention_inputs(self, batch: Batch, layers: Sequence[int]) -> list[Inputs]:
        numbers = list(range(self.model.config.get_text_config().num_hidden_layers))
        if any(not -len(numbers) <= layer < len(numbers) for layer in layers):
            raise IndexError(f"the model has {len(numbers)} layers")
        wanted = [numbers[layer] for layer in layers]
        self._keeps_attention |= set(wanted)
        passed = self._complete_output(batch, lambda output: output.asked >= set(wanted))
        for layer in wanted:
            if layer not in passed.attention:
                problem = f"it does not give the queries, keys and values of layer {layer}"
                remedy = f"Layers that give them: {sorted(passed.attention) or 'none'}. Choose one, or another model."
                raise LuthierError("part-unsupported", problem, where=type(self.model).__name__, remedy=remedy)
        return [passed.attention[layer] for layer in wanted]

    def score(self, batch: Batch) -> Tensor:
        head = getattr(self.model, "score", None)
        if head is None:
            raise LuthierError("part-unsupported", f"{type(self.model).__name__} has no scalar head")
        with self._mode():
            return head(self.states(batch)[batch.document_starts[1:] - 1]).squeeze(-1).float()

    def reference(self) -> Policy:
        if "reference" not in self.others:
            remedy = (
                "Let the loss say so: needs={'reference'} in its record, or as an attribute of an object in Python."
            )
            raise LuthierError("part-unsupported", "no part of the run needs a reference", remedy=remedy)
        return self.others["reference"]

    def without_adapter(self) -> ModelPolicy:
        """Return the policy with the adapter switched off, without gradient."""
        assert self.adapter is not None
        return ModelPolicy(self.model, frozen=self.adapter.disabled)

    def teacher(self) -> Policy:
        if "teacher" not in self.others:
            raise LuthierError("part-unsupported", "the recipe names no teacher", remedy="Set teacher: {model: ...}.")
        return self.others["teacher"]

    def router_logits(self, batch: Batch) -> Sequence[Tensor]:
        """Return [T, experts] for each sparse layer, from the pass that the loss uses; empty if none were asked for."""
        self.states(batch)
        assert self._output is not None
        return self._output.routers

    def _coefficients(self, batch: Batch, positions: Tensor) -> Tensor | None:
        """Return [S] what the loss declares of its gradient by the log-probabilities, if anything."""
        known = None if self.coefficients is None else self.coefficients(batch)
        return None if known is None else known[positions]

    def forget(self) -> None:
        """Let go of the body's output, so that the next micro-batch is computed afresh."""
        self._batch = self._output = None
        for other in self.others.values():
            other.forget()

    def _call_head(self, states: Tensor) -> Tensor:
        """Return logits [C, V] of states [C, H] by the model's own forward, with the body's answer put in place."""
        answer = (self._answer_type or _plain_answer())(last_hidden_state=states[None])
        placeholder = torch.zeros((1, states.shape[0]), dtype=torch.int64, device=states.device)
        routers = {"output_router_logits": False} if self.want_routers else {}
        decoder = self.model.get_decoder()  # OPT's forward calls its decoder directly, past the base model
        inner = nullcontext() if decoder in (self.body.module, self.model) else _answering(decoder, answer)
        with _answering(self.body.module, answer), inner:
            return self.model(input_ids=placeholder, use_cache=False, **routers).logits[0]

    def _complete_output(self, batch: Batch, is_complete: Callable[[BodyOutput], bool]) -> BodyOutput:
        """Return the body's output; where its pass kept too little, that of another one with the same dropout."""
        self.states(batch)
        if not is_complete(cast(BodyOutput, self._output)):
            with _drawing_again(self._generators, self.model.device):
                self._keep(batch)
        return cast(BodyOutput, self._output)  # of that pass

    def _keep(self, batch: Batch) -> None:
        """Run the body over the batch, and keep its answer with all that a loss has asked for by now."""
        with self._mode():
            self._output = self.body.run(
                batch, layers=self._keeps_layers, routers=self.want_routers, attention=frozenset(self._keeps_attention)
            )
        self._answer_type = self._output.kind  # outlives `forget`, because backward calls the head again
        self._batch = batch

    def _map_chunk(
        self, function: Callable[..., Tensor], other: Policy | None, inputs: list[Any], alone: bool
    ) -> Tensor:
        """Return one chunk's values. A chunk that is `alone` is not recomputed in backward: a pass of the head less."""

        def compute(states: Tensor, labels: Tensor, rival: Tensor | None, *given: Tensor) -> Tensor:
            logits = self.head(states)
            if other is None or rival is None:
                return function(logits, labels, *given)
            return function(logits, labels, *given, other.head(rival))

        if torch.is_grad_enabled() and self.frozen is None and not alone:
            return checkpoint(compute, *inputs, use_reentrant=False)
        return compute(*inputs)

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """As the policy trains; or, where it is frozen, without dropout and gradient."""
        with ExitStack() as stack:
            if self.frozen is not None:
                training = self.model.training
                stack.callback(self.model.train, training)
                self.model.eval()
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.frozen())
            yield


def _plain_answer() -> Any:
    """Return what a body answers with where it has not run yet."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    return BaseModelOutputWithPastAndCrossAttentions  # GPT-2's forward reads cross-attentions


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a pass on this device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def _drawing_again(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Let the generators continue from `states` within this context, and restore them after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, device)
        yield


def _spread(values: Tensor, positions: Tensor, batch: Batch) -> Tensor:
    """Return values [S, ...] as [T, ...], with 0 where nothing is supervised."""
    return values.new_zeros((batch.num_tokens, *values.shape[1:])).index_copy(0, positions, values)


@contextmanager
def _answering(body: nn.Module, answer: Any) -> Iterator[None]:
    """Let this one body return `answer` at once within this context."""
    body.forward = lambda *_, **__: answer
    try:
        yield
    finally:
        del body.forward  # makes the class's own forward visible again
