"""Write an Ollama Modelfile: the path of the weights, the chat template, the tokens that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import attrs
from luthier import get_logger

from luthier_gguf.vocabulary import Vocabulary

MARKS: Final = {
    role: f"\ue000{role}\ue001" for role in ("system", "user", "assistant")
}  # characters of private use, which no template contains
CHATS: Final = (
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
log = get_logger()


@attrs.frozen(kw_only=True)
class Pieces:
    """A chat template in pieces: one for each role, and `opening`, which replaces a missing system message."""

    opening: str
    roles: dict[str, str]
    prompt: str

    def render(self, roles: tuple[str, ...]) -> str:
        opening = "" if roles[0] == "system" else self.opening
        return opening + "".join(self.roles[role] for role in roles) + self.prompt


def write_modelfile(path: Path, weights: str, tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Write a Modelfile. A template that is not a sequence of messages is left out, with a warning and a note."""
    lines = [f"FROM ./{weights}"]
    pieces = find_pieces(tokenizer) if vocabulary.template else None
    if pieces is not None:
        begin = vocabulary.tokens[vocabulary.begin] if vocabulary.adds_begin and vocabulary.begin is not None else ""
        lines.append(f'TEMPLATE """{write_template(pieces, begin)}"""')
    elif vocabulary.template:
        log.warning("Modelfile without TEMPLATE", reason="the chat template is not a sequence of messages")
        lines.append("# The chat template is in the file of the weights. Ollama's template language cannot express it.")
    lines += [f'PARAMETER stop "{vocabulary.tokens[stop]}"' for stop in vocabulary.stops]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def find_pieces(tokenizer: Any) -> Pieces | None:
    """Return the pieces of a chat template, or None if conversations are not a sequence of such pieces."""

    def rendered(*roles: str, prompt: bool = False) -> str:
        messages = [{"role": role, "content": MARKS[role]} for role in roles]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))

    try:
        one, two, three = rendered("user"), rendered("user", "assistant"), rendered("user", "assistant", "user")
        alone = rendered("system", "user")
        user = three.removeprefix(two)
        roles = {"system": alone.removesuffix(user), "user": user, "assistant": two.removeprefix(one)}
        prompt = rendered("user", prompt=True).removeprefix(one)
        pieces = Pieces(opening=one.removesuffix(user), roles=roles, prompt=prompt)
        same = all(pieces.render(chat) == rendered(*chat, prompt=True) for chat in CHATS)
    except Exception as error:  # a template may raise anything for a chat that it does not allow
        log.info("chat template not taken apart", error=str(error))
        return None
    texts = [pieces.opening, *roles.values(), prompt]
    return pieces if same and not any('"""' in text or "{{" in text for text in texts) else None


def write_template(pieces: Pieces, begin: str) -> str:
    """Return the pieces in Ollama's template language, without `begin`, which Ollama adds to every text."""
    opening = pieces.opening.removeprefix(begin)
    roles = {role: piece.replace(MARKS[role], "{{ .Content }}") for role, piece in pieces.roles.items()}
    roles["system"] = roles["system"].removeprefix(begin)
    text = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{opening}{{{{ end }}}}' if opening else ""
    branches = [f'if eq .Role "{role}" }}}}{piece}' for role, piece in roles.items()]
    return text + "{{ range .Messages }}{{ " + "{{ else ".join(branches) + "{{ end }}{{ end }}" + pieces.prompt
