from __future__ import annotations

import os
import py_compile
import re
from pathlib import Path

import pytest

from growth_ds import __version__, doctor, image, surroundings
from growth_ds.image import contents
from tests.cluster.images import local_folders, pip_settings

DIGITS = "0123456789abcdef" * 4
DOCKER = Path(__file__).resolve().parent.parent / "docker"


@pytest.fixture
def told(tmp_path):
    """`image` with a seal, a containerenv and an environment of one's own; what is not given is not there."""

    def ask(seal=None, containerenv=None, **environ):
        for name, text in (("seal", seal), ("containerenv", containerenv)):
            if text is not None:
                (tmp_path / name).write_text(text)
        return image.image(environ, tmp_path / "seal", tmp_path / "containerenv")

    return ask


SEAL = f"contents=sha256:{DIGITS}\nrevision=0123abcd\n"


def test_outside_of_an_image_there_is_none(told):
    assert told() == {}
    assert told(GROWTH_DS_IMAGE="/shared/growth-ds.sqsh") == {}


def test_the_seal_is_told(told):
    assert told(SEAL) == {"contents": f"sha256:{DIGITS}", "revision": "0123abcd"}
    assert told(SEAL, GROWTH_DS_IMAGE="growth-ds.sqsh")["name"] == "growth-ds.sqsh"


@pytest.mark.parametrize("given", [DIGITS, f"sha256:{DIGITS}"])
def test_the_id_that_a_person_gives(told, given):
    assert told(GROWTH_DS_IMAGE_ID=given) == {"id": f"sha256:{DIGITS}"}


def test_an_id_of_another_kind_stays_as_it_is(told):
    assert told(GROWTH_DS_IMAGE_ID="sif:17")["id"] == "sif:17"


def test_the_engines_word_counts_more(told):
    containerenv = f'engine="podman-4.3.1"\nname="n"\nimage="localhost/growth-ds:cpu"\nimageid="{DIGITS}"\nrootless=0\n'
    found = told(SEAL, containerenv, GROWTH_DS_IMAGE_ID="f" * 64, GROWTH_DS_IMAGE="other")
    assert (found["id"], found["name"]) == (f"sha256:{DIGITS}", "localhost/growth-ds:cpu")


def test_an_empty_containerenv_tells_nothing(told):
    assert told(None, "") == {}


@pytest.mark.parametrize("name", ["APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"])
def test_apptainer_names_its_file(told, name):
    assert told(**{name: "/shared/growth-ds.sif"}) == {"name": "/shared/growth-ds.sif"}


def test_contents_are_names_and_bytes(tmp_path):
    tree, single = tmp_path / "tree", tmp_path / "single"
    (tree / "package").mkdir(parents=True)
    (tree / "package/a.py").write_text("x = 1\n")
    (tree / "link").symlink_to("package/a.py")
    single.write_text("one\n")
    seen = [contents([tree], [single])]
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", seen[0])
    (tree / "package/a.py").write_text("x = 2\n")
    seen.append(contents([tree], [single]))
    (tree / "package/a.py").rename(tree / "package/b.py")
    seen.append(contents([tree], [single]))
    (tree / "link").unlink()
    (tree / "link").symlink_to("package/b.py")
    seen.append(contents([tree], [single]))
    single.write_text("two\n")
    seen.append(contents([tree], [single]))
    assert len(set(seen)) == len(seen)


def test_contents_know_no_times_and_no_byte_code(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    first = contents([tmp_path])
    py_compile.compile(str(tmp_path / "a.py"))
    os.utime(tmp_path / "a.py", (1, 1))
    assert contents([tmp_path], [tmp_path / "missing"]) == first


def test_what_is_printed_can_be_read(tmp_path, monkeypatch, capsys, told):
    (tmp_path / "env").mkdir()
    (tmp_path / "env/a.py").write_text("x = 1\n")
    monkeypatch.setattr(image.sys, "prefix", str(tmp_path / "env"))
    image.main("0123abcd")
    found = told(capsys.readouterr().out)
    assert found["revision"] == "0123abcd"
    image.main("unknown")
    assert told(capsys.readouterr().out) == {"contents": found["contents"]}


def test_the_ledgers_last_word(monkeypatch):
    here = {"id": "sha256:1"}
    monkeypatch.setattr(surroundings, "image", lambda: here)
    start, growth = {"event": "start", "ranks": 1, "image": {"id": "sha256:1"}}, {"event": "growth"}
    moved = {"event": "image", "image": {"id": "sha256:2"}}
    assert surroundings.changes([start, growth]) == []
    assert surroundings.changes([start, moved, growth]) == [("image", {"image": here})]
    assert surroundings.changes([{"event": "start"}]) == [("image", {"image": here})]
    here = {}
    assert surroundings.changes([start]) == [("image", {"image": {}})]
    assert surroundings.changes([{"event": "start"}]) == []


def test_other_ranks_and_a_lost_host_are_told(monkeypatch):
    monkeypatch.setattr(surroundings, "image", dict)
    start, later = {"event": "start", "ranks": 4}, {"event": "ranks", "ranks": 1}
    assert surroundings.changes([start]) == [("ranks", {"ranks": 1, "before": 4})]
    assert surroundings.changes([start, later]) == []
    monkeypatch.setenv("GROWTH_DS_LOST", "n2,n3")
    assert surroundings.changes([start, later]) == [("ranks", {"ranks": 1, "before": 1, "lost": ["n2", "n3"]})]


def test_doctor_tells_the_image(monkeypatch):
    found = {"contents": "sha256:1", "revision": "a"}
    record = {"versions": {}, "machine": doctor.machine(), "ops": [], "image": found}
    assert "image: contents sha256:1, revision a" in doctor.lines(record)
    assert not any("image" in line for line in doctor.lines(record | {"image": {}}))


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_the_images_have_this_version_and_a_seal(name):
    text = (DOCKER / name).read_text()
    assert re.findall(r"^ARG VERSION=(.+)$", text, re.MULTILINE) == [__version__]
    assert f">{image.SEAL}" in text


LISTED = """:env:.cert='/etc/ssl/ca.crt'
:env:.default-timeout='180'
global.cert='/etc/ssl/other.crt'
global.extra-index-url='file:///srv/index/simple https://pip.example/simple'
global.find-links='\\n/srv/wheels'
"""


def test_pips_settings_go_into_a_build():
    settings = pip_settings(LISTED)
    assert settings == {
        "cert": "/etc/ssl/ca.crt",
        "extra-index-url": "file:///srv/index/simple https://pip.example/simple",
        "find-links": "/srv/wheels",
    }
    assert local_folders(settings) == ["/etc/ssl/ca.crt", "/srv/index", "/srv/wheels"]
