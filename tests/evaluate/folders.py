"""A tiny random BERT of transformers with a tokenizer, and toy tasks that it can learn."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path


def random_bert(folder: Path, store: Path, hidden: int = 32) -> Path:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    shutil.copytree(store / "tokenizer", folder)
    sizes = {"hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vocab = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=vocab, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder


def separable(path: Path, rows: int = 200) -> Path:
    """`text<TAB>label`: the label says which of two letters occurs."""
    draw = random.Random(0)
    lines = []
    for _ in range(rows):
        label = draw.randrange(2)
        words = ["e", "t", "n"] * 2
        words[draw.randrange(len(words))] = "as"[label]
        lines.append(f"{' '.join(words)}\t{('first', 'second')[label]}\n")
    path.write_text("".join(lines))
    return path


def squad(folder: Path, rows: int = 4) -> Path:
    folder.mkdir()
    for split in ("train", "dev"):
        asked = []
        for at in range(rows):
            answers = [{"text": "nose", "answer_start": 4}] if at % 2 else []
            asked.append({"id": f"{at}", "question": "on it?", "is_impossible": not at % 2, "answers": answers})
        paragraphs = [{"context": "See nose it is so. " * 20, "qas": asked}]
        (folder / f"{split}-v2.0.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return folder
