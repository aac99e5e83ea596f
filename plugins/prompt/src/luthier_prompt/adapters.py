"""The prompt adapters. A prompt is an attribute of the model, so that it is sharded with it; no layer changes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from luthier import Adapter, Batch, Context, Group, LuthierError, get_logger
from torch import Tensor, nn

from luthier_prompt import PrefixTuning, PromptTuning, PTuningV2, files
from luthier_prompt.tables import EncodedTable, PromptTable

PLACE: Final = "learnt_prompt"  # name of the attribute of the model


class _Prompt(Adapter):
    """The base of the adapters: a table on the model, its state and its files."""

    kinds: Collection[str] = ()  # PEFT's types that can be loaded, first the one that is saved

    def __init__(self, options: PromptTuning | PrefixTuning) -> None:
        self.rows = options.num_virtual_tokens
        self.model: Any = None

    @property
    def table(self) -> PromptTable | EncodedTable:
        """The table, read from the model each time, because sharding replaces parameters."""
        return getattr(self.model, PLACE)

    def attach(self, model: Any, context: Context) -> Any:
        if hasattr(model, PLACE):
            remedy = "Load the model again."
            raise LuthierError("part-unsupported", "this model has a prompt already", remedy=remedy)
        places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if places and self.rows >= places:
            problem, remedy = (
                f"the model has {places} positions, and documents need some of them",
                "Give a smaller number.",
            )
            raise LuthierError(
                "recipe-out-of-range", problem, where="num_virtual_tokens", found=self.rows, remedy=remedy
            )
        model.requires_grad_(False)
        self.model = model
        self._hang(self.first_table(context))
        size = sum(p.numel() for p in self.table.parameters())
        get_logger().info("adapter_attached", virtual_tokens=self.rows, trainable=size)
        return model

    @abstractmethod
    def first_table(self, context: Context) -> PromptTable | EncodedTable:
        """Return the initial table, drawn on the CPU."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the entries of adapter_config.json that only this method has."""

    def groups(self) -> list[Group]:
        named = self._named()
        return [Group(parameters=list(named.values()), names=list(named), role="adapter")]

    def disabled(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing, because the core asks a disabled adapter for no prompt."""
        return nullcontext()

    def state(self) -> dict[str, Any]:
        return {name: parameter.detach() for name, parameter in self._named().items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state`. Raises `checkpoint-corrupt` if names or shapes differ."""
        whole = f"{PLACE}.weight"
        if state.keys() == {whole} and isinstance(self.table, EncodedTable):
            self._fold(torch.zeros(state[whole].shape))  # the run began from a saved prompt, without its encoder
        tensors = self.state()
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in state.items()}:
            problem = f"these are {_shapes(state)}, but the adapter has {_shapes(tensors)}"
            raise LuthierError("checkpoint-corrupt", problem, where="adapter state", remedy=files.FITS)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state[name])

    def save(self, folder: Path) -> None:
        """Write a folder that plain PEFT loads. It holds the table alone, without an encoder."""
        text = self.model.config.get_text_config()
        config = {
            "peft_type": next(iter(self.kinds)),
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": getattr(self.model.config, "_name_or_path", None) or None,
            "revision": None,
            "inference_mode": True,
            "num_virtual_tokens": self.rows,
            "num_transformer_submodules": 1,
            "num_layers": text.num_hidden_layers,
            **self.describe(),
        }
        files.save_table(Path(folder), self.table.whole(), config)

    def load(self, folder: Path) -> None:
        """Read a folder of ours or PEFT's. An error changes nothing. An encoder is replaced by the table."""
        with torch.no_grad():
            shape = self.table.whole().shape
            table = files.load_table(Path(folder), self.kinds, shape)
            if isinstance(self.table, EncodedTable):
                self._fold(table)
            self.table.weight.copy_(table)  # type: ignore[operator]

    def _fold(self, whole: Tensor) -> None:
        """Replace the encoder by a plain table, because it cannot be recovered from its result."""
        like = self.table.embedding.weight  # type: ignore[union-attr]
        self._hang(PromptTable(whole.to(like.device, like.dtype)))  # type: ignore[arg-type]

    def _hang(self, table: PromptTable | EncodedTable) -> None:
        setattr(self.model, PLACE, table)

    def _named(self) -> dict[str, nn.Parameter]:
        return {f"{PLACE}.{name}": parameter for name, parameter in self.table.named_parameters()}


class PromptAdapter(_Prompt):
    """Trained embeddings of virtual tokens (Lester et al. 2021, arXiv 2104.08691)."""

    kinds = files.PROMPTS

    def __init__(self, options: PromptTuning) -> None:
        super().__init__(options)
        self.init, self.text = options.init, options.init_text or ""

    def first_table(self, context: Context) -> PromptTable:
        """Draw what the embedding has for tokens, or numbers with its mean and deviation; or look up a text's."""
        embedding = self.model.get_input_embeddings()
        known = embedding.weight.detach()  # [V, H]
        dtype = torch.promote_types(context.dtype, torch.float32)
        drawn = torch.randn(self.rows, known.shape[1], dtype=dtype)
        if not context.has_values:
            return PromptTable(drawn.to(known.device))
        if self.init == "random":
            scale = getattr(embedding, "embed_scale", 1.0)  # Gemma 3 multiplies within the module
            return PromptTable((drawn.to(known.device) * known.to(dtype).std() + known.to(dtype).mean()) * scale)
        opens = self.init == "vocab" or context.purpose == "open"  # then files bring another table, and no text
        places = torch.randint(len(known), (self.rows,)) if opens else self._text_ids(context)
        return PromptTable(embedding(places.to(known.device)).detach().to(dtype, copy=True))

    def _text_ids(self, context: Context) -> Tensor:
        """Return [N] token ids of the text, again and again or cut."""
        ids = context.encode(self.text)
        if not ids:
            problem, remedy = "the tokenizer makes no token of it", "Give other words."
            raise LuthierError("recipe-out-of-range", problem, where="init_text", found=self.text, remedy=remedy)
        if len(ids) > self.rows:
            get_logger().warning("init_text was cut", tokens=len(ids), num_virtual_tokens=self.rows)
        return torch.tensor([ids[row % len(ids)] for row in range(self.rows)])

    def describe(self) -> dict[str, Any]:
        heads = self.model.config.get_text_config().num_attention_heads
        width = self.table.whole().shape[1]
        return {"token_dim": width, "num_attention_heads": heads, "prompt_tuning_init": "RANDOM"}

    def virtual_tokens(self) -> int:
        return self.rows

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with the prompt's embeddings before each document that does not continue another."""
        prepared = batch.insert_virtual(self.rows)
        known = self.model.get_input_embeddings()(prepared.input_ids)  # [T', H]
        assert prepared.origin is not None  # `insert_virtual` has set it
        places = (prepared.origin < 0).nonzero().squeeze(1)
        prompts = self.table.whole().to(known.dtype).repeat(len(places) // self.rows, 1)
        return attrs.evolve(prepared, embeddings=known.index_copy(0, places, prompts))


class PrefixAdapter(_Prompt):
    """Trained keys and values of every layer, from a plain table or an encoder."""

    kinds = files.PREFIXES

    def __init__(self, options: PrefixTuning) -> None:
        super().__init__(options)
        self.options = options

    def first_table(self, context: Context) -> PromptTable | EncodedTable:
        """Draw a table, or an encoder whose result has the same deviation, or is zero."""
        heads, size = self._heads()
        layers = self.model.config.get_text_config().num_hidden_layers
        own, width = heads * size, 2 * layers * heads * size
        options, dtype = self.options, torch.promote_types(context.dtype, torch.float32)
        std = 0.0 if options.init_weights == "zero" else options.init_std
        if not (isinstance(options, PTuningV2) and options.prefix_projection):
            return PromptTable((torch.randn(self.rows, width) * std).to(context.device, dtype))
        hidden = options.encoder_hidden_size or own
        table = EncodedTable(self.rows, own, hidden, width)
        nn.init.normal_(table.outer.weight, std=std / hidden**0.5)
        nn.init.zeros_(table.outer.bias)
        return table.to(context.device, dtype)

    def describe(self) -> dict[str, Any]:
        heads, size = self._heads()
        return {"token_dim": heads * size, "num_attention_heads": heads, "prefix_projection": False}

    def prefixes(self, layer: int) -> tuple[Tensor, Tensor]:
        heads, size = self._heads()
        width = 2 * heads * size
        pair = self.table.columns(layer * width, (layer + 1) * width).unflatten(1, (2, heads, size))
        return pair[:, 0], pair[:, 1]

    def _heads(self) -> tuple[int, int]:
        """Return the number of key-value heads and their dimension."""
        text = self.model.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, size


def _shapes(state: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
