"""The two adapters. Each trains one table, `prompt.weight`, that hangs on the model, so that it is spread with it."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
from luthier import Adapter, Batch, Context, Group, LuthierError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier_outside_prompt import Prefix, Prompt


class _Table(Adapter):
    """What both adapters share: a table of `num_virtual_tokens` rows on the model, and its files."""

    method = ""  # PEFT's name

    def __init__(self, options: Prompt | Prefix) -> None:
        self.rows = options.num_virtual_tokens
        self.model: Any = None

    @property
    def weight(self) -> nn.Parameter:
        """[N, width], read from the model each time: where weights are sharded the parameter is another."""
        return self.model.prompt.weight

    @abstractmethod
    def width(self) -> int:
        """Numbers of one row."""

    def attach(self, model: Any, context: Context) -> Any:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model = model
        model.prompt = nn.Module()
        start = torch.empty(
            (self.rows, self.width()), device=context.device, dtype=torch.promote_types(context.dtype, torch.float32)
        )
        model.prompt.weight = nn.Parameter(nn.init.normal_(start, std=0.5))
        return model

    def groups(self) -> list[Group]:
        return [Group(parameters=[self.weight], names=["prompt.weight"], role="adapter")]

    def disabled(self) -> AbstractContextManager[None]:
        return nullcontext()  # the engine asks for no prompt of an adapter that is off

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight.detach()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.weight.copy_(state["weight"])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weight = self.weight.detach().to("cpu", torch.float32).contiguous()
        save_file({"prompt_embeddings": weight}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = self.model.config.get_text_config()
        config = {
            "peft_type": self.method,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": getattr(self.model.config, "_name_or_path", None) or None,
            "num_virtual_tokens": self.rows,
            "num_transformer_submodules": 1,
            "num_layers": text.num_hidden_layers,
            "inference_mode": True,
            **self.sizes(),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """What PEFT's configuration says of the rows' width."""

    def load(self, folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        if found.shape != self.weight.shape:
            problem = f"the file holds a table of {list(found.shape)}, and the adapter one of {list(self.weight.shape)}"
            raise LuthierError(
                "part-invalid", problem, where=str(folder), remedy="Use the options it was trained with."
            )
        with torch.no_grad():
            self.weight.copy_(found)


class PromptTuning(_Table):
    """Learnt embeddings of virtual tokens."""

    method = "PROMPT_TUNING"

    def width(self) -> int:
        return self.model.get_input_embeddings().weight.shape[1]

    def sizes(self) -> dict[str, int]:
        return {
            "token_dim": self.width(),
            "num_attention_heads": self.model.config.get_text_config().num_attention_heads,
        }

    def virtual_tokens(self) -> int:
        return self.rows

    def prepare(self, batch: Batch) -> Batch:
        prepared = batch.insert_virtual(self.rows)
        known = self.model.get_input_embeddings()(prepared.input_ids)
        count = int((prepared.origin < 0).sum()) // self.rows
        places = (prepared.origin < 0).nonzero().squeeze(1)
        prompts = self.weight.to(known.dtype).repeat(count, 1)
        return attrs.evolve(prepared, embeddings=known.index_copy(0, places, prompts))


class PrefixTuning(_Table):
    """Learnt keys and values of every layer."""

    method = "PREFIX_TUNING"

    def heads(self) -> tuple[int, int]:
        """Return the number of key-value heads and their dimension."""
        text = self.model.config.get_text_config()
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, size

    def width(self) -> int:
        heads, size = self.heads()
        return 2 * self.model.config.get_text_config().num_hidden_layers * heads * size

    def sizes(self) -> dict[str, int]:
        heads, size = self.heads()
        return {"token_dim": heads * size, "num_attention_heads": heads, "prefix_projection": False}

    def prefixes(self, layer: int) -> tuple[Tensor, Tensor]:
        heads, size = self.heads()
        pair = self.weight.view(self.rows, -1, 2, heads, size)[:, layer]
        return pair[:, 0], pair[:, 1]
