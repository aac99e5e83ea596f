"""Make the inputs of a plain transformers model, whose adapter's prompts are embeddings or a filled cache in them."""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch
from torch import Tensor

from luthier.data.batches.batch import Batch
from luthier.errors import LuthierError
from luthier.model.body import count_prefix_rows, prepare_batch
from luthier.plugins.completion import add_defaults
from luthier.plugins.contracts.protocols import Adapter

PLAIN: Final = frozenset(("input_ids", "attention_mask", "output_router_logits"))
CACHES: Final = ("cache", "past_key_values")  # transformers' names of the cache over time, the newest first


def prepare_generation(model: Any, adapter: Adapter, input_ids: Tensor) -> dict[str, Any]:
    """Return the inputs of `generate` or of the model's forward for one prompt [1, L], the adapter on.

    They are those of `adapter.generating`; where it leaves them as they are, they follow from the adapter's `prepare`
    and `prefixes`. `adapter` None: the prompt alone.
    """
    plain = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if adapter is None:
        return complete_inputs(model, plain)
    add_defaults(adapter, "adapter")
    inputs = adapter.generating(dict(plain))
    if inputs.keys() == plain.keys() and all(inputs[name] is plain[name] for name in plain):
        inputs = _derive_inputs(model, adapter, plain)
    return complete_inputs(model, inputs)


def compute_logits(model: Any, input_ids: Tensor, adapter: Any = None) -> Tensor:
    """Return [L, V] of the model's own forward over the prompt [L], the adapter on; the attention is as it is set."""
    inputs = prepare_generation(model, adapter, input_ids[None])
    inputs["use_cache"] = any(name in inputs for name in CACHES)
    return model(**inputs).logits[0, -len(input_ids) :]


def _derive_inputs(model: Any, adapter: Adapter, plain: dict[str, Any]) -> dict[str, Any]:
    ids = plain["input_ids"][0]
    batch = _batch_of(ids)
    prepared = prepare_batch(adapter, batch)
    rows = count_prefix_rows(adapter, model.config.get_text_config().num_hidden_layers)
    if rows and prepared is not batch:
        problem = "it has virtual tokens and prefixes, of which generation takes one kind"
        raise LuthierError("part-unsupported", problem, where="adapter", remedy="Write its generating(inputs).")
    if rows:
        return {**plain, "past_key_values": _fill_cache(model, adapter)}
    if prepared is batch:
        return plain
    if prepared.embeddings is None:
        return {**plain, "input_ids": prepared.input_ids[None]}
    return {"inputs_embeds": prepared.embeddings[None].to(model.dtype), "attention_mask": plain["attention_mask"]}


def _fill_cache(model: Any, adapter: Adapter) -> Any:
    from transformers import DynamicCache

    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        rows = adapter.prefixes(layer)
        assert rows is not None, "an adapter with rows of prefixes gives them for each layer"
        key, value = (t.to(model.dtype).transpose(0, 1)[None] for t in rows)
        cache.update(key, value, layer)
    return cache


def complete_inputs(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs with the cache under the name that this model has for it, and a mask over all that it sees."""
    name = cache_name(model)
    caches = [inputs[known] for known in CACHES if inputs.get(known) is not None]
    given = {key: value for key, value in inputs.items() if key not in CACHES and value is not None}
    length = given["inputs_embeds" if "inputs_embeds" in given else "input_ids"].shape[1]
    mask = given["attention_mask"]
    missing = length + sum(cache.get_seq_length() for cache in caches) - mask.shape[1]
    if missing > 0:
        given["attention_mask"] = torch.cat([mask.new_ones((mask.shape[0], missing)), mask], 1)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        # the load balance means nothing in generation, and its mask does not fit a cache
        given["output_router_logits"] = False
    return {**given, **({name: caches[0]} if caches else {})}


def cache_name(model: Any) -> str:
    """Return the name under which a model's forward takes its cache."""
    return next((name for name in CACHES if name in inspect.signature(model.forward).parameters), CACHES[-1])


def plain_inputs(inputs: dict[str, Any], prompt: Tensor) -> bool:
    """Return True where generation is given the prompt's own tokens [1, L] and nothing before them."""
    return inputs.keys() <= PLAIN and torch.equal(inputs["input_ids"], prompt)


def _batch_of(ids: Tensor) -> Batch:
    """Return a prompt [L] as a batch that nothing of is supervised."""
    places = torch.arange(len(ids), device=ids.device)
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, -100),
        position_ids=places,
        document_starts=torch.tensor([0, len(ids)]),
        token_weights=torch.ones(len(ids), device=ids.device),
        previous=places - 1,
        continues=torch.tensor([-1]),
        unit_of=torch.tensor([0]),
        index=torch.tensor([0]),
    )
