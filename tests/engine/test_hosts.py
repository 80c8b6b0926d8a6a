"""Host lists, hostfiles, addresses."""

from __future__ import annotations

import pytest

from growth_ds.engine import hosts
from growth_ds.errors import UserError

LISTS = {
    "n1": ["n1"],
    "n[1-3,7]": ["n1", "n2", "n3", "n7"],
    "a,n[1-2,07],b-3": ["a", "n1", "n2", "n07", "b-3"],
    "n[08-11]": ["n08", "n09", "n10", "n11"],
    "r[1-2]n[1-2]": ["r1n1", "r1n2", "r2n1", "r2n2"],
    "n[1-2].site": ["n1.site", "n2.site"],
    " n[5] ": ["n5"],
}


@pytest.mark.parametrize("text", LISTS)
def test_host_list(text):
    assert hosts.expand_hosts(text) == LISTS[text]


@pytest.mark.parametrize(
    "text", ["", "n[1-3", "n1]", "n[[1]]", "n[3-1]", "n[a-b]", "n[]", "a,,b", "n[1-9999999]", "n["]
)
def test_no_host_list(text):
    with pytest.raises(UserError, match="host list"):
        hosts.expand_hosts(text)


def test_hostfile(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two\n\nn1 slots=2\n  n2   slots=4   # the larger\n")
    assert hosts.read_hostfile(path) == [("n1", 2), ("n2", 4)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n1\n", "hosts:1: 'n1' is not a line"),
        ("n1 slots=2\nn2 slots=0\n", "hosts:2:"),
        ("n1 slots=2\nn1 slots=1\n", "hosts:2: host n1 is named twice"),
        ("-oProxyCommand=x slots=1\n", "hosts:1:"),
        ("# none\n", "names no host"),
        (None, "cannot be read"),
    ],
)
def test_bad_hostfile(tmp_path, text, words):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=words):
        hosts.read_hostfile(tmp_path / "hosts")


def test_addresses(monkeypatch):
    assert hosts.is_loopback("127.0.1.1")
    assert hosts.is_loopback("::1")
    assert not hosts.is_loopback("n1")
    assert hosts.address_of_first(["localhost"]) == "127.0.0.1"
    assert hosts.interface_towards("127.0.0.1") is None
    monkeypatch.setattr(hosts, "resolve", {"n1": "127.0.1.1", "n2": "10.0.0.2", "n3": "10.0.0.3"}.get)
    monkeypatch.setattr(hosts, "own_address", {"n2": "10.0.0.9", "n3": "127.0.0.1"}.get)
    assert hosts.address_of_first(["n2", "n1"]) == "10.0.0.2"
    assert hosts.address_of_first(["n1", "n2"]) == "10.0.0.9"  # launched on n1, whose name means loopback there
    with pytest.raises(UserError, match="n3 cannot reach; give --master-addr"):
        hosts.address_of_first(["n1", "n3"])
    with pytest.raises(UserError, match="no address is known"):
        hosts.address_of_first(["n9", "n2"])
