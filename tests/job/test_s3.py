"""Source and target on two real S3 servers, each with credentials and an endpoint of its own."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from dask_batchinv import inverse, invert_store, verify_store
from dask_batchinv.cli import main
from dask_batchinv.outcome import SourceError
from tests.campaign.s3 import environment, install, swift_server
from tests.support.stacks import assert_same_bits, conditioned

pytestmark = pytest.mark.slow
A = conditioned(200, 3, 10)


def options_of(server, **more):
    return {"key": server.key, "secret": server.secret, "endpoint_url": server.endpoint, **more}


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install .[remote]")
    # An environment with the server in it, which takes a minute to make, may be there already.
    folder = tmp_path_factory.mktemp("s3")
    python = install(Path(os.environ.get("SWIFT_ENVIRONMENT", folder / "swift")))
    with swift_server(python, folder / "one") as one, swift_server(python, folder / "two") as two:
        yield one, two


@pytest.fixture
def nothing_in_the_environment(monkeypatch, servers):
    for name, value in environment(servers[0]).items():
        if name.startswith("AWS") and ("KEY" in name or "ENDPOINT" in name or "TOKEN" in name):
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("nothing_in_the_environment")
def test_two_servers(servers, tmp_path, capfd):
    one, two = servers
    source, target = f"s3://{one.bucket}/s", f"s3://{two.bucket}/t"
    store = zarr.storage.FsspecStore.from_url(source, storage_options=options_of(one))
    zarr.create_array(store, shape=A.shape, chunks=(20, 3, 3), dtype="f8")[...] = A
    places = {"source_options": options_of(one), "target_options": options_of(two)}
    report = invert_store(source, target, tile_size=1440, compress="zstd", workers=2, **places)
    assert report.complete
    made = zarr.open_group(zarr.storage.FsspecStore.from_url(target, storage_options=options_of(two)), mode="r")
    assert_same_bits(made["inverse"][...], inverse(A))
    assert verify_store(target, source=source, **places).ok
    assert invert_store(source, target, tile_size=1440, compress="zstd", workers=2, **places).tiles_now == 0
    # In place of it, by copies within the store.
    invert_store(source, target, tile_size=1440, keep="diagonal", overwrite=True, workers=2, **places)
    names = zarr.storage.FsspecStore.from_url(target, storage_options=options_of(two))
    group = zarr.open_group(names, mode="r")
    np.testing.assert_array_equal(group["diagonal"][...], np.einsum("tii->ti", inverse(A)))
    assert "inverse" not in group
    # One account's credentials are nobody else's.
    with pytest.raises(SourceError) as refused:
        invert_store(source, target, **places | {"source_options": options_of(one) | {"secret": "not-this-one"}})
    for text in (str(refused.value), str(report), json.dumps(report.to_json(), default=str), *capfd.readouterr()):
        assert one.secret not in text.replace(one.endpoint, "")
        assert "not-this-one" not in text


@pytest.mark.usefixtures("nothing_in_the_environment")
def test_on_the_command_line(servers):
    one, two = servers
    source, target = f"s3://{one.bucket}/c", f"s3://{two.bucket}/d"
    store = zarr.storage.FsspecStore.from_url(source, storage_options=options_of(one))
    zarr.create_array(store, shape=A.shape, chunks=(20, 3, 3), dtype="f8")[...] = A
    run = ["run", source, target, "--quiet", "--source-options", json.dumps(options_of(one)), "--target-options",
           json.dumps(options_of(two))]  # fmt: skip
    assert CliRunner().invoke(main, run).exit_code == 0
    status = ["status", target, *run[4:]]
    assert CliRunner().invoke(main, status).exit_code == 0
