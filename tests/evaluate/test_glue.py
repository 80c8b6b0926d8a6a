"""GLUE through `datasets`: the examples that its own files give, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from growth_ds.errors import UserError
from growth_ds.evaluate.glue import TEXTS
from growth_ds.evaluate.read import Examples, read_task
from growth_ds.evaluate.tasks import TASKS, find_task

HUB = Path("hf:nyu-mll/glue")
MNLI = ["entailment", "neutral", "contradiction"]


class Rows(list):
    """Rows whose label has names, as the package gives them."""

    def __init__(self, rows, names=None):
        super().__init__(rows)
        self.features = {"label": SimpleNamespace(names=names)}


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`: (configuration, split) -> rows."""
    tables: dict[tuple[str, str], Rows] = {}
    fake = SimpleNamespace(load_dataset=lambda name, config, split, streaming: tables[config, split])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return tables


def test_every_task_of_the_table_has_its_columns():
    assert set(TEXTS) == set(TASKS)
    assert all(len(TEXTS[name]) == len(task.texts) for name, task in TASKS.items())


def test_classes_go_by_their_names(hub):
    row = {"premise": "It rains. ", "hypothesis": "It is dry.", "idx": 0}
    hub["mnli", "train"] = Rows([{**row, "label": at} for at in (0, 1, 2)], MNLI)
    for split in ("validation_matched", "validation_mismatched"):
        hub["mnli", split] = Rows([{**row, "label": 2}], MNLI)
    task, train, valid = read_task(TASKS["mnli"], HUB)
    assert [task.classes[label] for label in train.labels] == MNLI
    assert train.texts[0] == ("It rains.", "It is dry.")
    assert {suffix: each.labels for suffix, each in valid.items()} == {"": [0], "_mismatched": [0]}


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("cola", ["unacceptable", "acceptable"]),
        ("mrpc", ["not_equivalent", "equivalent"]),
        ("wnli", ["not_entailment", "entailment"]),
        ("sst2", None),
    ],
)
def test_what_the_files_write_as_0_and_1_stays_so(hub, name, names):
    rows = [{**dict.fromkeys(TEXTS[name], "words"), "label": at} for at in (0, 1)]
    hub[name, "train"], hub[name, "validation"] = Rows(rows, names), Rows(rows[:1], names)
    _, train, valid = read_task(TASKS[name], HUB, limit=2)
    assert (train.labels, valid[""].labels) == ([0, 1], [0])


def test_scores_are_numbers_and_the_limit_holds(hub):
    rows = Rows([{"sentence1": "a", "sentence2": "b", "label": 3.8}] * 3)
    hub["stsb", "train"] = hub["stsb", "validation"] = rows
    assert read_task(TASKS["stsb"], HUB, limit=1)[1] == Examples([("a", "b")], [3.8])


def test_what_cannot_be_is_one_line(hub, tmp_path):
    (tmp_path / "mine.tsv").write_text("a\t1\n")
    hub["cola", "train"] = Rows([{"text": "a", "label": 1}])
    hub["rte", "train"] = Rows([{"sentence1": "a", "sentence2": "b", "label": -1}], ["entailment", "not_entailment"])
    for task, words in [
        (find_task(str(tmp_path / "mine.tsv")), "hf:nyu-mll/glue: has GLUE's tasks, and"),
        (TASKS["cola"], "hf:nyu-mll/glue: cola has no column 'sentence'"),
        (TASKS["rte"], "rte, train row 0: label '-1' is none of entailment, not_entailment"),
        (TASKS["qnli"], "hf:nyu-mll/glue: cannot be loaded (KeyError"),
    ]:
        with pytest.raises(UserError) as caught:
            read_task(task, HUB)
        assert words in str(caught.value)


def test_a_folder_of_the_real_package(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["unacceptable", "acceptable"])}
    )
    rows = [{"sentence": "The river runs.", "label": 1}, {"sentence": "Runs the.", "label": 0}]
    table = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(train=table, validation=table).save_to_disk(str(tmp_path / "glue/cola"))
    _, train, valid = read_task(TASKS["cola"], Path(f"hf:{tmp_path}/glue"))
    assert train == valid[""] == Examples([("The river runs.",), ("Runs the.",)], [1, 0])
