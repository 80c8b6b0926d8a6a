"""Readers of downstream files: what is odd about GLUE's, and what is refused by file and line."""

from __future__ import annotations

import json

import pytest

from growth_ds.errors import UserError
from growth_ds.evaluate.read import Examples, read_squad, read_task
from growth_ds.evaluate.tasks import TASKS, find_task


def write(folder, text, name="train.tsv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(text.encode())


def both(folder, text):
    write(folder, text)
    write(folder, text, "dev.tsv")


def test_cola_has_no_header_and_its_quotes_are_letters(tmp_path):
    both(tmp_path / "CoLA", 'gj04\t1\t\t"Never closed\ngj04\t0\t*\tWords\u2028 go so" .\r\n')
    _, train, valid = read_task(TASKS["cola"], tmp_path)
    assert train == Examples([('"Never closed',), ('Words\u2028 go so" .',)], [1, 0])
    assert valid == {"": train}


def test_mrpc_columns_go_by_name_behind_a_byte_order_mark(tmp_path):
    both(tmp_path / "MRPC", '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tHe said " so .\tSo .\n')
    assert read_task(TASKS["mrpc"], tmp_path)[1] == Examples([('He said " so .', "So .")], [1])


def test_labels_are_classes_or_numbers(tmp_path):
    both(tmp_path / "RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n")
    both(tmp_path / "STS-B", "sentence1\tsentence2\tscore\na\tb\t3.800\n")
    assert read_task(TASKS["rte"], tmp_path)[1].labels == [1, 0]
    assert read_task(TASKS["stsb"], tmp_path)[1].labels == [3.8]
    assert len(read_task(TASKS["rte"], tmp_path, limit=1)[1]) == 1


def test_short_rows_are_left_out_of_qqp_and_named_elsewhere(tmp_path):
    both(tmp_path / "QQP", "id\tquestion1\tquestion2\tis_duplicate\n0\ta\tb\t1\n1\tonly\n")
    assert len(read_task(TASKS["qqp"], tmp_path)[1]) == 1
    both(tmp_path / "SST-2", "sentence\tlabel\nfine\t1\nshort\n")
    with pytest.raises(UserError, match=r"SST-2/train\.tsv:3: has 1 columns, 2 are needed"):
        read_task(TASKS["sst2"], tmp_path)


def test_mnli_is_scored_on_both_validation_files(tmp_path):
    text = "sentence1\tsentence2\tgold_label\na\tb\tneutral\n"
    write(tmp_path / "MNLI", text)
    write(tmp_path / "MNLI", text, "dev_matched.tsv")
    write(tmp_path / "MNLI", text * 1 + "c\td\tentailment\n", "dev_mismatched.tsv")
    valid = read_task(TASKS["mnli"], tmp_path)[2]
    assert {suffix: examples.labels for suffix, examples in valid.items()} == {"": [2], "_mismatched": [2, 1]}


def test_a_file_of_the_user_holds_every_fifth_row_out(tmp_path):
    write(tmp_path, "".join(f"text {at}\t{'ham' if at % 2 else 'egg'}\n" for at in range(10)), "mine.tsv")
    task, train, valid = read_task(find_task(str(tmp_path / "mine.tsv")), None)
    assert task.classes == ("egg", "ham")
    assert valid[""] == Examples([("text 4",), ("text 9",)], [0, 1])
    assert len(train) == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sentence\tlabel\nfine\t7\n", r"train\.tsv:2: label '7' is none of 0, 1"),
        ("text\tlabel\nfine\t1\n", r"train\.tsv:1: has no column 'sentence'"),
        ("sentence\tlabel\n", r"train\.tsv: has no rows"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, words):
    both(tmp_path / "SST-2", text)
    with pytest.raises(UserError, match=words):
        read_task(TASKS["sst2"], tmp_path)


def test_missing_data_says_where_it_comes_from(tmp_path):
    with pytest.raises(UserError, match=r"--data: sst2 needs .* gluebenchmark"):
        read_task(TASKS["sst2"], None)
    with pytest.raises(UserError, match=r"SST-2/.*\.tsv: no such file; .* gluebenchmark"):
        read_task(TASKS["sst2"], tmp_path)
    with pytest.raises(UserError, match=r"'sst3' is no task and no file; there are cola, sst2, .*, squad"):
        find_task("sst3")


def test_squad_of_both_versions(tmp_path):
    asked = [
        {"id": "a", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 4}]},
        {"id": "b", "question": "When?", "is_impossible": True, "answers": []},
    ]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Say Ann.", "qas": asked}]}]}))
    first, second = read_squad(path)
    assert (first.answers, first.start, second.answers) == (("Ann",), 4, ())
    path.write_text('{"data": [{}]}')
    with pytest.raises(UserError, match=r"dev\.json: not SQuAD's JSON"):
        read_squad(path)
