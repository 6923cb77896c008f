"""What may be shown: no credential in any form, nothing that a terminal would obey."""

import json
import pickle
from urllib.parse import quote, quote_plus

import fsspec.config
import pytest

from dask_batchinv import ClusterError, DeviceError, PlanError, RefusedError, SourceError
from dask_batchinv.job.results import TileResult
from dask_batchinv.location import Location, TakenOverError, raised_as
from dask_batchinv.storage import MissingChunkError
from dask_batchinv.text import clean, clean_lines, clean_values, harmless, printable, redact

#: As Amazon makes them.
SECRET = "CANARY7/f3a+Kq=="
FORGED = "a\x1b]0;pwned\x07b\u202ec\r\nd\u2028e\udc80"


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Whatever a test lets be known is not known to the next."""
    monkeypatch.setattr("dask_batchinv.text._remembered", set())


def forms(secret):
    return [
        secret, quote(secret), quote(secret, safe=""), quote_plus(secret), quote(secret, safe="").lower(),
        json.dumps({"a": secret}), repr({"a": secret}), secret.replace("/", r"\/"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAEXAMPLE:{}@bucket/x",
        "simplecache::s3://AKIAEXAMPLE:{}@bucket/x",
        "zip://inner/y::s3://AKIAEXAMPLE:{}@bucket/x.zip",
        "https://host/x?AccountKey={}&other=1",
        "ftp://me:{}@host/a@b",
    ],
)
@pytest.mark.parametrize("secret", [SECRET, 'quote"d\\CANARY', "ümläutCANARY", quote(SECRET, safe="")])
def test_a_credential_of_a_location_is_in_no_text(url, secret):
    there = Location.parse(url.format(secret))
    for text in forms(secret):
        assert "CANARY" not in redact(f"Invalid bucket name <{text}> there")
    for part in (there, there / "inverse"):
        assert "CANARY" not in part.name + repr(part)
        assert part.name.endswith(part.url.rpartition("/")[2]) or "?" in part.url


def test_what_file_systems_complain_of_when_a_secret_has_a_slash():
    Location.parse("s3://AKIAEXAMPLE:CANARY7/f3a/CANARY8@bucket/x")
    assert redact('Invalid bucket name "AKIAEXAMPLE:CANARY7": no') == 'Invalid bucket name "***": no'
    assert "CANARY" not in redact("NoSuchKey: f3a/CANARY8@bucket/x")


@pytest.mark.parametrize("secret", ["7/CANARY", "/CANARY", "a//CANARY", "12/34@CANARY"])
def test_a_secret_with_a_slash_is_understood(secret):
    there = Location.parse(f"s3://AKIAEXAMPLE:{secret}@bucket/x")
    assert "CANARY" not in there.name
    assert "CANARY" not in redact(f"s3://AKIAEXAMPLE:{secret}@bucket/x")


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b.zarr",
        "http://host:8080/a@b",
        "http://[2001:db8::1]:8080/a@b",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/mine/a@b",
        "s3://bucket/x?versionId=4",
        "/home/me/a@b:c/d",
    ],
)
def test_what_is_no_credential_stays(url):
    assert redact(f"{url} is there") == f"{url} is there"
    Location.parse(url)
    assert redact("a@b host 8080 bucket mine accesspoint") == "a@b host 8080 bucket mine accesspoint"


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "GITHUB_TOKEN", "PGPASSWORD", "AZURE_STORAGE_KEY", "MY_API_KEY",
     "AZURE_STORAGE_CONNECTION_STRING", "SMB_PWD"],
)  # fmt: skip
def test_credentials_of_the_environment(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    for text in forms(SECRET):
        assert "CANARY" not in redact(text)
    monkeypatch.delenv(name)
    assert redact(SECRET) == SECRET


def test_the_user_of_a_proxy_is_a_credential(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://me:CANARY7f3a@proxy:3128")
    assert redact("proxy said no to CANARY7f3a") == "proxy said no to ***"


def test_what_only_has_the_name_of_a_credential_is_not_one(monkeypatch, tmp_path):
    for name, value in {"MY_KEY": str(tmp_path), "X_TOKEN": "false", "Y_SECRET": "1"}.items():
        monkeypatch.setenv(name, value)
    text = f"{tmp_path} is false, 1"
    assert redact(text) == text
    monkeypatch.setenv("PASSWORD", "matrix")  # a word of the language hides no other
    assert redact("matrix, matrices, matrix1") == "***, matrices, ***1"


def test_credentials_of_options(monkeypatch):
    monkeypatch.setitem(fsspec.config.conf, "s3", {"client_kwargs": {"aws_secret_access_key": SECRET}, "anon": "never"})
    chain = {"fo": "/x", "target_options": {"password": "CANARY9z", "proxy": "http://u:CANARY8z@h"}}
    monkeypatch.setitem(fsspec.config.conf, "simplecache", chain)
    assert redact(f"{SECRET} CANARY9z CANARY8z never /x") == "*** *** *** never /x"


def test_credentials_are_known_where_a_location_arrives(monkeypatch):
    sent = pickle.dumps(Location.parse(f"s3://AKIAEXAMPLE:{SECRET}@bucket/x"))
    monkeypatch.setattr("dask_batchinv.text._remembered", set())
    assert SECRET in redact(SECRET)
    pickle.loads(sent)
    assert SECRET not in redact(SECRET)


def test_what_a_terminal_would_obey_is_escaped():
    assert printable(FORGED) == r"a\x1b]0;pwned\x07b\u202ec\r\nd\u2028e\udc80"
    assert printable(printable(FORGED)) == printable(FORGED)
    assert printable("naïve ‖A‖₁ 数") == "naïve ‖A‖₁ 数"
    assert clean_lines("one\ntwo\r\n\x1b[2J") == "one\ntwo\\r\n\\x1b[2J"


@pytest.mark.parametrize(
    "kind", [RefusedError, SourceError, ClusterError, PlanError, MissingChunkError, DeviceError, TakenOverError]
)
def test_our_errors_are_clean(kind):
    error = kind(f"variable {FORGED} of s3://me:CANARY7f3a@host/x")
    assert str(error) == rf"variable {printable(FORGED)} of s3://***@host/x"
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))


def test_the_error_of_a_tile_is_clean():
    assert TileResult(1, None, f"{FORGED} token=CANARY").error == rf"{printable(FORGED)} token=***"


def raised(*errors):
    """Raise each from the one before."""
    cause = None
    for error in errors:
        error.__cause__, cause = cause, error
    with raised_as(SourceError, "no"):
        raise cause


def test_a_cause_that_may_not_be_shown_is_not():
    with pytest.raises(SourceError) as caught:
        raised(KeyError("a"), OSError("later"))
    assert isinstance(caught.value.__cause__, OSError)
    for bad in ("s3://me:CANARY7f3a@host/x", "\x1b[2J"):
        with pytest.raises(SourceError) as caught:
            raised(ValueError(bad), OSError("later"))
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
    noted = OSError("fine")
    noted.add_note("token=CANARY")
    assert harmless(noted) is None
    dropped = OSError("fine")
    dropped.__context__, dropped.__suppress_context__ = noted, True  # raised from None: no traceback shows it
    assert harmless(dropped) is dropped


def test_values_for_json():
    value = {"cause": "token=CANARY", "tiles": [{"cause": None, "number": 1}], "first": ((1, 2),)}
    assert clean_values(value) == {"cause": "token=***", "tiles": [{"cause": None, "number": 1}], "first": [[1, 2]]}
    assert clean("a\nb") == r"a\nb"
