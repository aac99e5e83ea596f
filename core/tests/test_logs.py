"""Logging: where lines go, what they carry, and that other programs' structlog is left alone."""

import errno
import io
import json
import warnings

import pytest
import structlog
from luthier import logs
from luthier.errors import LuthierError


@pytest.fixture(autouse=True)
def fresh():
    yield
    logs.set_up("warning")


def test_lines_below_the_level_are_left_out(capsys):
    logs.set_up("warning")
    logs.get_logger().info("quiet")
    logs.get_logger().warning("loud", share=0.5)
    shown = capsys.readouterr()
    assert "quiet" not in shown.err
    assert "loud" in shown.err
    assert "share=0.5" in shown.err
    assert shown.out == ""


def test_json_lines_are_one_object_each(capsys):
    logs.set_up("debug", "json")
    logs.get_logger().debug("event_name", path=logs.Path("x"), count=3)
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["path"], line["count"]) == ("event_name", "debug", "x", 3)
    assert line["timestamp"].endswith("Z")


def test_lines_go_to_the_file_as_well(tmp_path, capsys):
    logs.set_up("info", "console", tmp_path / "new" / "x.log")
    logs.get_logger().info("attached", adapter="lora")
    text = (tmp_path / "new" / "x.log").read_text()
    assert "attached adapter=lora" in text
    assert "\x1b" not in text
    assert "attached" in capsys.readouterr().err


def test_within_a_run_each_line_carries_its_id_and_reaches_its_own_log(tmp_path, capsys):
    logs.set_up("error")
    log = logs.get_logger()
    with logs.run_log("run-1", tmp_path / "log.jsonl"):
        log.info("inside")
        log.debug("fine")
    log.error("outside")
    lines = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["event"], line["run"]) for line in lines] == [("inside", "run-1"), ("fine", "run-1")]
    assert "run-1" not in capsys.readouterr().err


def test_a_runs_log_is_continued_not_replaced(tmp_path):
    for number in range(2):
        with logs.run_log("run-1", tmp_path / "log.jsonl"):
            logs.get_logger().info("part", number=number)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_an_exception_is_logged_with_its_traceback(capsys):
    logs.set_up("info", "json")
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        logs.get_logger().exception("failed")
    assert "ZeroDivisionError" in json.loads(capsys.readouterr().err)["exception"]


def test_structlogs_own_configuration_is_left_as_it_is(tmp_path, capsys):
    before = structlog.get_config()
    with logs.run_log("run-1", tmp_path / "log.jsonl"):
        logs.get_logger().info("ours")
    assert structlog.get_config() == before
    assert not structlog.is_configured()


def test_a_file_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LuthierError) as caught:
        logs.set_up(file=tmp_path / "file" / "x.log")
    assert caught.value.code == "path-unwritable"


def test_a_line_that_cannot_be_written_stops_neither_the_others_nor_the_run(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    logs.set_up("info")
    monkeypatch.setattr("sys.stderr", Full())
    with logs.run_log("run-1", tmp_path / "log.jsonl"):
        logs.get_logger().warning("kept")
    assert json.loads((tmp_path / "log.jsonl").read_text())["event"] == "kept"


def test_nothing_is_said_while_the_log_is_muted_and_everything_after(capsys):
    logs.set_up("info")
    with logs.muted_logs():
        logs.get_logger().warning("unheard")
    logs.get_logger().info("heard")
    said = capsys.readouterr().err
    assert "unheard" not in said
    assert "heard" in said


def test_captured_lines_have_their_fields_and_are_not_shown(capsys):
    logs.set_up("info")
    with logs.captured_logs() as lines:
        logs.get_logger().debug("taken", share=0.5)
    logs.get_logger().info("shown")
    assert [(line["event"], line["level"], line["share"]) for line in lines] == [("taken", "debug", 0.5)]
    said = capsys.readouterr().err
    assert "taken" not in said
    assert "shown" in said


def test_what_other_libraries_warn_of_is_logged_and_not_printed(tmp_path):
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter("always")
        before = warnings.showwarning
        with logs.run_log("run-1", tmp_path / "log.jsonl"):
            warnings.warn("`old` is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("look here", UserWarning, stacklevel=1)
        assert warnings.showwarning is before
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    told = [(line["event"], line["message"], line["level"]) for line in lines]
    assert told == [("deprecation", "`old` is deprecated", "info"), ("UserWarning", "look here", "warning")]
    assert printed == []
