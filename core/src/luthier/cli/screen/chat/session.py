"""The conversation itself: it reads lines, runs commands and answers messages until the input ends."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from luthier.cli.screen.answers import make_console, print_error, translate_error
from luthier.cli.screen.chat.answer_views import Columns, ending_note, show_stream
from luthier.cli.screen.chat.piped_text import decode_text, read_piped_lines
from luthier.cli.screen.chat.slash_commands import Leave, run_command
from luthier.errors import LuthierError

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.model.generation.conversation import Conversation, Reply
    from luthier.model.generation.generate import Sampling

PROMPT = "> "


@attrs.define(kw_only=True, eq=False)
class ChatSession:
    """A chat with one model, `tuned`, or with two.

    `tell` prints a document for each turn; None means a view for people.
    """

    talks: Mapping[str, Conversation]
    sampling: Sampling
    title: str
    tell: Callable[[Mapping[str, Any]], None] | None = None
    turn: int = 0
    status: int = 0
    typed: bool = attrs.field(init=False)
    screen: Console = attrs.field(init=False, factory=make_console)

    @typed.default
    def _is_typed(self) -> bool:
        return sys.stdin.isatty()

    def hold(self) -> int:
        """Talk until the input ends or /quit. Return the exit status of the last error, 0 for none."""
        if self.typed or not self.talks["tuned"].is_chat:  # who asks in a pipe must know that nothing is remembered
            self._say(self.title)
        with contextlib.suppress(Leave):
            for line in self._typed_lines() if self.typed else read_piped_lines():
                self._answer_line(line)
        return 0 if self.typed else self.status

    def _typed_lines(self) -> Iterator[str]:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - editing and a history of lines, where the system has it
        while True:
            try:
                yield self._ask_line()
            except EOFError:
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D leaves")

    def _ask_line(self) -> str:
        """Return a typed line. Where answers go to a file or a pipe, the prompt is on standard error."""
        if self.screen.is_terminal:
            return input(PROMPT)
        print(PROMPT, end="", file=sys.stderr, flush=True)
        return input()

    def _answer_line(self, line: str | bytes) -> None:
        text = ""
        try:
            text = (line if isinstance(line, str) else decode_text(line)).strip()
            if not text:
                return
            if text.startswith("/") and not text.startswith("//"):
                run_command(text, list(self.talks.values()), self._say)
            else:
                self._take_turn(text.removeprefix("/") if text.startswith("//") else text)
        except LuthierError as error:
            self._complain(text, error)
        except KeyboardInterrupt:
            if not self.typed:
                raise
            self._say("(stopped)")

    def _take_turn(self, text: str) -> None:
        self.turn += 1
        sampling = attrs.evolve(self.sampling, seed=self.sampling.seed + self.turn - 1)
        began = time.perf_counter()
        with self._whole_turn(), stopping_answers() if self.typed else contextlib.nullcontext(None) as leave:
            replies = self._ask_all(text, sampling, leave)
        if self.tell is not None:
            answers = {name: attrs.asdict(reply) for name, reply in replies.items()}
            seconds = round(time.perf_counter() - began, 3)
            self.tell(
                {"turn": self.turn, "prompt": text, **answers["tuned"], "base": answers.get("base"), "seconds": seconds}
            )

    @contextlib.contextmanager
    def _whole_turn(self) -> Iterator[None]:
        """Undo the turn for both models if one fails or is interrupted, so that their conversations stay alike."""
        before = {name: talk.messages for name, talk in self.talks.items()}
        try:
            yield
        except BaseException:
            for name, talk in self.talks.items():
                talk.messages = before[name]
            raise

    def _ask_all(self, text: str, sampling: Sampling, leave: Callable[[], bool] | None) -> dict[str, Reply]:
        if self.tell is not None:
            return {name: talk.ask(text, sampling, leave=leave) for name, talk in self.talks.items()}
        if len(self.talks) > 1 and self.screen.is_terminal:
            return self._ask_both(text, sampling, leave)
        replies = {}
        for name, talk in self.talks.items():
            with show_stream(self.screen) as on_text:
                replies[name] = reply = talk.ask(text, sampling, on_text, leave)
            if on_text is None:
                self.screen.out(f"{name}: {reply.text}" if len(self.talks) > 1 else reply.text, highlight=False)
                self.screen.file.flush()
            self._remark(reply)
        return replies

    def _ask_both(self, text: str, sampling: Sampling, leave: Callable[[], bool] | None) -> dict[str, Reply]:
        replies = {}
        with Columns(self.screen).shown() as columns:
            for name, talk in self.talks.items():
                with columns.column(name) as on_text:
                    replies[name] = talk.ask(text, sampling, on_text, leave)
        self._remark(replies["tuned"])
        return replies

    def _remark(self, reply: Reply) -> None:
        note = ending_note(reply)
        if note is not None and self.typed:
            self._say(note)

    def _complain(self, text: str, error: LuthierError) -> None:
        """Print an error, after which the chat goes on."""
        self.status = translate_error(error).exit_status
        if self.tell is not None:
            self.tell({"prompt": text, "error": error.to_dict()})
        else:
            print_error(error)

    def _say(self, text: str) -> None:
        """Write a remark: among the answers on a terminal, else to standard error."""
        from rich.text import Text

        make_console(stderr=not (self.typed and self.screen.is_terminal) or self.tell is not None).print(
            Text(text, style="dim"), soft_wrap=True
        )


@contextlib.contextmanager
def stopping_answers() -> Iterator[Callable[[], bool]]:
    """Yield a function that says if Ctrl-C was pressed once. A second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
