"""What luthier-outside-prompt offers: `outside.prompt`, learnt embeddings, and `outside.prefix`, learnt keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from luthier import AdapterRecord, hookimpl, option


@attrs.frozen(kw_only=True)
class Prompt:
    """Options of `outside.prompt`."""

    num_virtual_tokens: int = option(8, help="Virtual tokens before each document that continues none.", low=1)


@attrs.frozen(kw_only=True)
class Prefix:
    """Options of `outside.prefix`."""

    num_virtual_tokens: int = option(8, help="Keys and values before each document that continues none.", low=1)


@hookimpl
def luthier_adapters() -> Sequence[AdapterRecord]:
    """Return both adapters; neither leaves the outputs as they are at the start, and neither can be merged."""
    return [
        AdapterRecord(
            name="outside.prompt",
            summary="Prompt tuning: learnt embeddings before each prompt.",
            options=Prompt,
            build="luthier_outside_prompt.adapters:PromptTuning",
            provides="reference",
            mergeable=False,
            tolerance=float("inf"),
        ),
        AdapterRecord(
            name="outside.prefix",
            summary="Prefix tuning: learnt keys and values before each document, in every layer.",
            options=Prefix,
            build="luthier_outside_prompt.adapters:PrefixTuning",
            provides="reference",
            mergeable=False,
            tolerance=float("inf"),
        ),
    ]
