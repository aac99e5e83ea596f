"""Recognition of what is made of the others: Llama's attention, and the layer of two norms, attention and MLP."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import attrs
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from luthier.model.operations import reference
from luthier.model.operations.findings import Findings, Signature
from luthier.model.operations.recognise_operations import (
    answered_forward,
    find_norm,
    forwards_agree,
    layer_sizes,
    measure_fault,
    training_mode,
    unhurt_randomness,
)

PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS: Final = ("q_norm", "k_norm")
DOCUMENTS: Final = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
RECORDER: Final = "luthier_recorder"
LENGTHS: Final = (4, 3)  # tokens of the documents on which a forward is tried
FAR: Final = 1_000_000  # positions up to this are tried, so that a scale which depends on them is noticed


@attrs.frozen(kw_only=True)
class Attention:
    """q, k and v from their layers, perhaps normalised head by head, turned, attended to, and through o."""

    head_dim: int
    normed: bool
    dropout: float
    # what its own forward passes to the attention function: scaling, sliding_window and the like
    settings: dict[str, Any]
    consumed: frozenset[str]  # arguments that its own forward takes and does not pass on: tables, mask, cache


@attrs.frozen(kw_only=True)
class Block:
    """h = x + m attention(norm(x)), then h + m mlp(norm(h)), by the names of the modules; m is `multiplier`."""

    first_norm: str
    attention: str
    second_norm: str
    mlp: str
    multiplier: float


def find_attention(module: nn.Module, verified: bool = True, findings: Findings | None = None) -> Attention | None:
    """Return the attention that a module is, or None; why not goes to `findings`."""
    findings = findings or Findings()
    names = {name for name, _ in module.named_children()}
    head_dim = getattr(module, "head_dim", None)
    normed = set(HEAD_NORMS) <= names
    wanted = {*PROJECTIONS, *HEAD_NORMS} if normed else {*PROJECTIONS}
    if names != wanted or not isinstance(head_dim, int) or not hasattr(module, "config"):
        return None
    if list(module.parameters(recurse=False)) or any(layer_sizes(getattr(module, n)) is None for n in PROJECTIONS):
        return None
    signature = Signature.of_forward(module)
    with unhurt_randomness(module) as random, ExitStack() as stack:
        x = _answer_projections(module, random, stack)
        arguments = signature.select(_trial_arguments(random, head_dim), findings)
        if arguments is None:
            return None
        call = _recorded(module, x, arguments, findings)
        if call is None:
            return None
        form = _read_call(call[1], arguments, signature, findings, head_dim=head_dim, normed=normed)
        if form is None or (verified and not _is_attention(module, form, x, arguments, call[0], findings)):
            return None
        return form


def _read_call(
    options: dict[str, Any],
    arguments: dict[str, Any],
    signature: Signature,
    findings: Findings,
    *,
    head_dim: int,
    normed: bool,
) -> Attention | None:
    """Return the form that the call of the attention function shows, or None."""
    settings = {name: value for name, value in options.items() if name not in arguments}
    dropout = settings.pop("dropout", 0.0)
    strange = [n for n, v in settings.items() if not (v is None or isinstance(v, (int, float, str)))]
    lost = [n for n in DOCUMENTS if n not in arguments or options.get(n) is not arguments[n]]
    if strange or lost:
        findings.add_unknown(", ".join([*strange, *(f"{name} (not passed on)" for name in lost)]))
        return None
    consumed = (signature.names | arguments.keys()) - options.keys()
    return Attention(head_dim=head_dim, normed=normed, dropout=dropout, settings=settings, consumed=consumed)


def attention_heads(
    module: Any, form: Attention, x: Tensor, turn: Callable[..., Any], tables: Any
) -> tuple[Tensor, ...]:
    """Query, key [1, heads, T, D], turned by `turn(query, key, cos, sin)`, and value."""
    shape = (*x.shape[:-1], -1, form.head_dim)
    query, key, value = (getattr(module, name)(x).view(shape) for name in PROJECTIONS[:3])
    if form.normed:
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = turn(query.transpose(1, 2), key.transpose(1, 2), *tables)
    return query, key, value.transpose(1, 2)


def _answer_projections(module: Any, random: torch.Generator, stack: ExitStack) -> Tensor:
    """x [1, T, H] in float64; the layers that it goes through answered by numbers that depend on it."""
    for name in PROJECTIONS[:3]:
        size = _known_sizes(getattr(module, name))[1]
        made = torch.randn(1, sum(LENGTHS), size, generator=random, dtype=torch.float64)
        stack.enter_context(answered_forward(getattr(module, name), lambda given, made=made: made * given.sum()))
    stack.enter_context(answered_forward(module.o_proj, lambda given: given))
    if hasattr(module, "q_norm"):  # compares whole rows, so that the dimension that is normalised shows
        stack.enter_context(answered_forward(module.q_norm, lambda given: given / given.norm(dim=-1, keepdim=True)))
        stack.enter_context(answered_forward(module.k_norm, lambda given: given - given.amax(dim=-1, keepdim=True)))
    stack.enter_context(training_mode(module))
    return torch.randn(1, sum(LENGTHS), _known_sizes(module.q_proj)[0], generator=random, dtype=torch.float64)


def _known_sizes(layer: Any) -> tuple[int, int]:
    sizes = layer_sizes(layer)
    assert sizes is not None, "a projection is a product"
    return sizes


def _trial_arguments(random: torch.Generator, size: int) -> dict[str, Any]:
    """Return what a model tells its layers: positions, their tables, documents. Everything else keeps its default."""
    tokens = sum(LENGTHS)
    starts = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    tables = tuple(torch.randn(1, tokens, size, generator=random, dtype=torch.float64) for _ in range(2))
    return {
        "position_embeddings": tables,
        "attention_mask": None,
        "use_cache": False,
        "position_ids": torch.randint(0, FAR, (1, tokens), generator=random),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(LENGTHS),
        "max_length_k": max(LENGTHS),
    }


@contextmanager
def _recording(module: Any) -> Iterator[list[tuple[tuple[Tensor, ...], dict[str, Any]]]]:
    """Let the module attend by `_record` within this context; the yielded list gets its arguments."""
    before = module.config._attn_implementation
    module.config._attn_implementation = RECORDER
    _CALLS.clear()
    try:
        yield _CALLS
    finally:
        module.config._attn_implementation = before
        _CALLS.clear()


def _recorded(
    module: Any, x: Tensor, arguments: dict[str, Any], findings: Findings
) -> tuple[tuple[Tensor, ...], dict[str, Any]] | None:
    """Return what the module's own forward gives the attention function: (query, key, value), the rest by name."""
    with _recording(module) as calls:
        if findings.attempt(lambda: module(x, **arguments)) is None:
            return None
        if len(calls) == 1:
            return calls[0]
    findings.add_difference(f"it attends {len(calls)} times by the config's function")
    return None


def _is_attention(
    module: Any,
    form: Attention,
    x: Tensor,
    arguments: dict[str, Any],
    given: tuple[Tensor, ...],
    findings: Findings,
) -> bool:
    ours = attention_heads(module, form, x, reference.rope, arguments["position_embeddings"])
    if any(measure_fault(theirs, own) == float("inf") for theirs, own in zip(given, ours, strict=True)):
        findings.add_difference("its query, key or value")
        return False
    output = _mixed(ours[0], ours[2]).reshape(1, x.shape[1], -1)
    with _recording(module):
        return forwards_agree(lambda: module(x, **arguments)[0], lambda: output, findings)


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
    """Return an attention function that computes nothing and records its arguments."""
    if mask is None:
        _CALLS.append(((query, key, value), arguments))
    return _mixed(query, value), None


def _mixed(query: Tensor, value: Tensor) -> Tensor:
    """Return a random result [1, T, heads, D], of the shape that attention gives."""
    return (query + value.repeat_interleave(query.shape[1] // value.shape[1], 1)).transpose(1, 2)


_CALLS: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
AttentionInterface.register(RECORDER, _record)


def find_block(module: nn.Module, verified: bool = True, findings: Findings | None = None) -> Block | None:
    """Return the layer that a module is, or None; why not goes to `findings`."""
    findings = findings or Findings()
    children = dict(module.named_children())
    norms = [name for name, child in children.items() if find_norm(child, verified=False) is not None]
    others = [name for name in children if name not in norms]
    if len(norms) != 2 or len(others) != 2 or list(module.parameters(recurse=False)):
        return None
    factors = dict.fromkeys([1.0, *(v for v in vars(module).values() if type(v) is float)])
    for (first, second), (attention, mlp), factor in itertools.product(
        itertools.permutations(norms), itertools.permutations(others), factors
    ):
        form = Block(first_norm=first, attention=attention, second_norm=second, mlp=mlp, multiplier=factor)
        if not verified or _is_block(module, form, findings):
            return form
    return None


def _is_block(module: Any, form: Block, findings: Findings) -> bool:
    """Return True if its own forward, its modules answered, adds up as the form says and passes on what it is told."""
    calls: list[dict[str, Any]] = []

    def attend(hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, None]:
        calls.append(arguments)
        return hidden_states.tanh() * 1.3, None

    with unhurt_randomness(module) as random, ExitStack() as stack:
        arguments = Signature.of_forward(module).select(_trial_arguments(random, 4), findings)
        if arguments is None:
            return False
        answers: dict[str, Callable[..., Any]] = {form.first_norm: lambda x: x * 0.7 + 0.1, form.attention: attend}
        answers |= {form.second_norm: torch.sin, form.mlp: torch.cos}
        for name, answer in answers.items():
            stack.enter_context(answered_forward(module.get_submodule(name), answer))
        stack.enter_context(training_mode(module))
        x = torch.randn(1, sum(LENGTHS), 8, generator=random, dtype=torch.float64)
        middle = x + ((x * 0.7 + 0.1).tanh() * 1.3) * form.multiplier
        expected = middle + middle.sin().cos() * form.multiplier
        same = forwards_agree(lambda: module(x, **arguments), lambda: expected, findings)
        return same and _is_passed_on(calls, arguments, findings)


def _is_passed_on(calls: list[dict[str, Any]], arguments: dict[str, Any], findings: Findings) -> bool:
    """Return True if the attention was called once and told what the layer was told, or what it need not know: None."""
    if len(calls) != 1:
        findings.add_difference(f"its attention is called {len(calls)} times")
        return False
    call = calls[0]
    strange = [name for name, value in call.items() if value is not arguments.get(name)]
    strange += [name for name in DOCUMENTS if name not in call]
    if strange:
        findings.add_unknown(", ".join(dict.fromkeys(strange)))
    return not strange
