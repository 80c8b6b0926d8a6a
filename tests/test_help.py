"""`--help` of every verb says what it is for, what each option means, and gives a command to start from."""

from __future__ import annotations

import shlex

import pytest
import typer

from growth_ds.cli import app

ROOT = typer.main.get_command(app)
VERBS = sorted(ROOT.commands)  # type: ignore[attr-defined]


def verb(name: str):
    return ROOT.commands[name]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_says_what_it_is_for(name):
    purpose = verb(name).help.strip().split("\n\n")[0]
    assert purpose[0].isupper()
    assert purpose.endswith(".")
    assert len(purpose.split()) >= 5


@pytest.mark.parametrize("name", VERBS)
def test_its_example_is_a_command_that_it_takes(name):
    given = verb(name).epilog
    assert given.startswith(f"Example: growth-ds {name}")
    _, called, *options = shlex.split(given.removeprefix("Example: "))
    verb(called).make_context(called, options)


@pytest.mark.parametrize("name", VERBS)
def test_every_option_has_a_sentence(name):
    for parameter in verb(name).params:
        if parameter.name == "help":
            continue
        text = getattr(parameter, "help", None) or ""
        assert text.endswith("."), f"{name} {parameter.name}: {text!r}"
        assert len(text.split()) >= 4, f"{name} {parameter.name}: {text!r}"


@pytest.mark.parametrize("name", VERBS)
def test_what_is_not_given_is_told(name):
    """An option without a default says in words what happens without it; switches and repeated ones need not."""
    for parameter in verb(name).params:
        optional = not parameter.required and parameter.default is None and not parameter.multiple
        if optional and not getattr(parameter, "is_flag", False):
            text = parameter.help.lower()
            told = ("default", "instead", "for --", "with --", "of --")
            assert any(word in text for word in told), f"{name} {parameter.name}: {parameter.help!r}"


def test_the_exit_codes_are_there():
    assert all(f"{code} " in (ROOT.epilog or "") for code in (0, 1, 2, 75))
