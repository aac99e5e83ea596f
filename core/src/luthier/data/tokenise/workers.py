"""Workers: processes that make examples of rows in parallel, with the result and order of one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Final

import attrs

from luthier.data.formats.bad_rows import Found
from luthier.data.formats.forms import Form
from luthier.data.line_rows import LineRows, Part, make_part
from luthier.data.read.content_hash import tokenizer_hash
from luthier.data.read.packed_rows import PackedRows
from luthier.data.tokenise.examples_of_rows import CHUNK, Made, Maker
from luthier.errors import LuthierError, show_value
from luthier.logs import get_logger
from luthier.recipe.schema import Data

log = get_logger()
ROWS_EACH: Final = 1000  # rows that justify a further process if it can be forked
ROWS_FRESH: Final = 10_000  # rows that justify one if it must be started, which takes seconds
MOST: Final = 16
AHEAD: Final = 3  # chunks per process that are under way or wait for their turn
FRESH: Final = "import sys; from luthier.data.tokenise.workers import join; join(int(sys.argv[1]))"


def count_processes(rows: int, asked: int | None) -> int:
    """Return how many processes tokenise so many rows: the number asked for, else one chosen by rows and cores."""
    if asked is not None:
        return max(1, min(asked, -(-rows // CHUNK)))
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    mine //= int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return max(1, min(mine, rows // (ROWS_EACH if can_fork() else ROWS_FRESH), MOST))


def can_fork() -> bool:
    """Return True if forking is safe: no other Python thread may hold a lock, and there is no CUDA context."""
    torch = sys.modules.get("torch")
    return sys.platform == "linux" and threading.active_count() == 1 and not (torch and torch.cuda.is_initialized())


def cut_chunks(forms: Sequence[Form]) -> Iterator[Sequence[Form]]:
    """Yield the forms in chunks. Packed ones stay packed until the process that makes examples of them unpacks them."""
    if isinstance(forms, PackedRows):
        return forms.blocks()
    return (forms[start : start + CHUNK] for start in range(0, len(forms), CHUNK))


class Workers:
    """A pool of `count` processes with one maker: a context manager, at whose end they are gone.

    A process that dies is replaced, once for each chunk; after that, `data-worker` names the rows that it had.
    """

    def __init__(self, maker: Maker, count: int, start: Callable[[Sequence[Connection]], Hand]) -> None:
        self._maker, self._count, self._start = maker, count, start
        self._hands: list[Hand] = []

    def __enter__(self) -> Workers:
        try:
            while len(self._hands) < self._count:
                self._hands.append(self._begun())
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for hand in self._hands:
            hand.end()

    def made(self, parts: Iterable[Part]) -> Iterator[Made]:
        """Yield what `make_part` returns for each part, in order. An error comes where it would in one process."""
        waiting, turn = enumerate(_with_error(parts)), 0
        answers: dict[int, Any] = {}
        while True:
            self._hand_out(waiting, answers)
            if turn in answers:
                yield _opened(answers.pop(turn))
                turn += 1
            elif not (busy := {hand.connection: hand for hand in self._hands if hand.task is not None}):
                return
            else:
                for connection in wait(list(busy)):
                    self._collect(busy[connection], answers)  # type: ignore[index]

    def _begun(self) -> Hand:
        return self._start([hand.connection for hand in self._hands])

    def _hand_out(self, waiting: Iterator[tuple[int, Any]], answers: dict[int, Any]) -> None:
        idle = [hand for hand in self._hands if hand.task is None]
        busy = len(self._hands) - len(idle)
        for hand in idle[: max(self._count * AHEAD - len(answers) - busy, 0)]:
            number, forms = next(waiting, (0, None))
            if forms is None:
                return
            if isinstance(forms, Exception):
                answers[number] = forms
                return
            hand.give(Task(number, forms))

    def _collect(self, hand: Hand, answers: dict[int, Any]) -> None:
        task = hand.task
        assert task is not None
        try:
            answers[task.number], hand.task = hand.connection.recv(), None
        except (EOFError, OSError):
            how = hand.end()
            if task.tries:
                raise _lost(task, how) from None
            log.warning("a process that tokenises died, its rows are done again", rows=task.rows, because=how)
            self._hands[self._hands.index(hand)] = fresh = self._begun()
            fresh.give(attrs.evolve(task, tries=1))


@attrs.frozen
class Task:
    """A chunk of rows that a worker is making."""

    number: int
    forms: Part
    tries: int = 0

    @property
    def rows(self) -> str:
        """Return where its first and its last row come from."""
        first, last = (
            self.forms.ends if isinstance(self.forms, LineRows) else (self.forms[0].where, self.forms[-1].where)
        )
        return f"{first} to {last}"


@attrs.define(eq=False)
class Hand:
    """One process, and the tasks that it has."""

    connection: Connection
    process: Forked | subprocess.Popen[bytes]
    task: Task | None = None
    ended: int | None = None  # as `subprocess.Popen.returncode`

    def give(self, task: Task) -> None:
        self.task = task
        with suppress(OSError):  # a dead process is noticed where its answer is waited for
            self.connection.send(task.forms)

    def end(self) -> str:
        """Make sure that the process is gone, and return how it ended."""
        if self.ended is None:
            self.connection.close()
            self.process.kill()
            self.ended = self.process.wait()
        return f"signal {-self.ended}" if self.ended < 0 else f"exit status {self.ended}"


@attrs.frozen
class Forked:
    """A forked copy of this process, with the methods of `subprocess.Popen`."""

    pid: int

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def forked(maker: Maker, others: Sequence[Connection]) -> Hand:
    """Fork a copy of this process that serves. `others` are our ends of its siblings' pipes."""
    ours, theirs = _pair()
    pid = os.fork()
    if pid:
        theirs.close()
        return Hand(ours, Forked(pid))
    try:
        for other in (*others, ours):  # so that the pipe closes when the parent dies
            other.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _serve(theirs, maker)
    finally:
        os._exit(0)


def started(folder: str, data: Data, others: Sequence[Connection]) -> Hand:
    """Start a new process that reads the tokenizer from its files in `folder`, and serves."""
    ours, theirs = _pair()
    command = [sys.executable, "-c", FRESH, str(theirs.fileno())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL)
    theirs.close()
    ours.send((folder, data))
    return Hand(ours, process)


@contextmanager
def working_processes(maker: Maker, count: int) -> Iterator[Workers | None]:
    """Yield `count` workers; None, with a warning, if they could not have the same tokenizer as this process."""
    if can_fork():
        with Workers(maker, count, lambda others: forked(maker, others)) as workers:
            yield workers
        return
    tokenizer = maker.encoder.tokenizer
    with tempfile.TemporaryDirectory(prefix="luthier-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        if not _reads_back(tokenizer, folder):
            log.warning("one process tokenises", because="its tokenizer is another when read back from its files")
            yield None
            return
        with Workers(maker, count, lambda others: started(folder, maker.data, others)) as workers:
            yield workers


def _reads_back(tokenizer: Any, folder: str) -> bool:
    import transformers

    try:
        again = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        return False
    return tokenizer_hash(again) == tokenizer_hash(tokenizer)


def _pair() -> tuple[Connection, Connection]:
    """Return two ends of a pipe that works in both directions and can be inherited by another program."""
    one, other = socket.socketpair()
    return Connection(one.detach()), Connection(other.detach())


def _with_error(parts: Iterable[Part]) -> Iterator[Part | Exception]:
    """Yield the parts, and at the end the error of reading them, which must not precede the parts read earlier."""
    try:
        yield from parts
    except Exception as error:
        yield error


def _lost(task: Task, how: str) -> LuthierError:
    return LuthierError("data-worker", f"a process that tokenised these rows died twice ({how})", where=task.rows)


def join(descriptor: int) -> None:
    """Run a process that was started anew: receive tokenizer and options, and make examples."""
    import transformers

    connection = Connection(descriptor)
    folder, data = connection.recv()
    _serve(connection, Maker.of(data, transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)))


def _serve(connection: Connection, maker: Maker) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        try:
            forms = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(_answer(maker, forms))


def _answer(maker: Maker, part: Part) -> Any:
    try:
        return make_part(maker, part)
    except LuthierError as error:
        value = None if error.found is None else show_value(error.found)
        return (error.code, error.problem, error.where, value, error.remedy)
    except Exception:
        return traceback.format_exc()


def _opened(answer: Any) -> Made:
    if isinstance(answer, Made):
        return answer
    if isinstance(answer, Exception):
        raise answer
    if isinstance(answer, str):
        raise RuntimeError(f"in a process that tokenises:\n{answer}")
    code, problem, where, value, remedy = answer
    raise LuthierError(code, problem, where=where, found=None if value is None else Found(value), remedy=remedy)
