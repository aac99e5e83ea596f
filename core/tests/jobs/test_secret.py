"""A key appears in no text: not printed, copied, serialised, logged or raised."""

import copy
import json
import logging
import pickle

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from luthier import LuthierError, ProviderError, Secret
from luthier.jobs.secret import check_reference, hold_secret, read_secret, redact_link, redact_text, redact_value
from luthier.jobs.transport.http_log import guard_loggers

CANARY = "canary-7c1d/9f+3e=="


@attrs.frozen
class Holder:
    key: Secret


def test_no_rendering_of_a_secret_shows_it():
    secret = Secret(CANARY)
    holder = Holder(secret)
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret!r:>10}",
        f"{secret}",
        repr(holder),
        str(attrs.asdict(holder)),
    ]
    assert all(CANARY not in text for text in shown)
    assert not hasattr(secret, "__dict__")
    for act in (copy.copy, copy.deepcopy, pickle.dumps, json.dumps):
        with pytest.raises(TypeError):
            act(secret)
    assert secret == Secret(CANARY) and secret != Secret("other")
    assert secret.reveal() == CANARY


@given(st.text(min_size=0, max_size=20), st.text(min_size=0, max_size=20))
def test_a_known_key_is_masked_wherever_it_stands(before, after):
    secret = Secret(CANARY)
    assert CANARY not in redact_text(f"{before}{secret.reveal()}{after}")
    assert "canary-7c1d%2F9f%2B3e%3D%3D" not in redact_text(f"{before}canary-7c1d%2F9f%2B3e%3D%3D{after}")


def test_signed_links_lose_their_queries_and_passwords():
    link = "https://user:pw@bucket.example/f.tar?X-Amz-Signature=abc&X-Amz-Expires=9"
    assert redact_link(link) == "https://bucket.example/f.tar?****"
    assert redact_text(f"to {link} at once") == "to https://bucket.example/f.tar?**** at once"
    assert redact_link("https://a.example/x?limit=3") == "https://a.example/x?limit=3"


def test_fields_that_are_named_like_keys_are_masked():
    assert redact_value({"wandbConfig": {"apiKey": "k"}, "hf_api_token": "h", "tokens": 3, "n": ["x"]}) == {
        "wandbConfig": {"apiKey": "****"}, "hf_api_token": "****", "tokens": 3, "n": ["x"]}  # fmt: skip


def test_errors_and_the_librarys_logs_are_redacted(caplog):
    secret = Secret(CANARY)
    assert secret.reveal() not in str(ProviderError("invalid", f"wrong key {CANARY}"))
    guard_loggers()
    logger = logging.getLogger("httpcore.http11")
    with caplog.at_level(logging.DEBUG, logger="httpcore.http11"):
        logger.debug("headers %s", {"authorization": f"Bearer {CANARY}"})
    assert "Bearer ****" in caplog.text


def test_a_key_is_read_from_where_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", f"{CANARY}\n")
    (tmp_path / "key").write_text(CANARY)
    places = ("env:SOME_KEY", f"file:{tmp_path / 'key'}", f"cmd:cat {tmp_path / 'key'}", hold_secret(CANARY))
    for place in places:
        assert read_secret(place, "p.api_key").reveal() == CANARY


@pytest.mark.parametrize("place", ["env:NO_SUCH_KEY", "file:/no/such/file", "cmd:false", "held:999"])
def test_a_key_that_is_not_there_is_missed_by_name(place):
    with pytest.raises(LuthierError) as caught:
        read_secret(place, "p.api_key")
    assert caught.value.code == "credential-missing"


def test_a_key_in_the_place_of_its_source_is_refused_without_showing_it():
    with pytest.raises(LuthierError) as caught:
        check_reference(CANARY, "p.api_key")
    assert caught.value.code == "credential-literal"
    assert CANARY not in str(caught.value)
