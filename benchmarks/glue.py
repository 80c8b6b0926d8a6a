"""GLUE on a model that growth_ds has pre-trained: our fine-tuning beside transformers' Trainer, and a grown model.

python benchmarks/glue.py RUN --data ../shared/data/glue --limit 500 --json benchmarks/results/glue.json

RUN is any checkpoint or run folder, its size and steps are in the record. Both ways start from one exported folder with
the same seeds, rows, hyper-parameters and padding. The peer is `transformers.Trainer`, which needs `accelerate`
(`pip install --no-deps accelerate`); nothing of growth_ds does. The grown model is RUN with half as many FFN units more
by `zero-pad`, which keeps the function, not trained any further.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import about, median_and_spread, said, table, write_json
from growth_ds import offline
from growth_ds.config import Grow
from growth_ds.downstream import huggingface_folder
from growth_ds.evaluate.fine_tune import FineTune, classify, encode, load, load_tokenizer
from growth_ds.evaluate.read import read_task
from growth_ds.evaluate.scores import baseline, score
from growth_ds.evaluate.tasks import TASKS
from growth_ds.model.cost import parameters


def by_trainer(folder: Path, task: Any, train: Any, valid: Any, how: FineTune, seed: int) -> dict[str, float]:
    """The same fine-tuning by transformers' Trainer, as its run_glue example does it."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = load_tokenizer(folder)
    classes = 1 if task.classes is None else len(task.classes)
    kind = "regression" if task.classes is None else "single_label_classification"
    model = load("SequenceClassification", folder, seed, num_labels=classes, problem_type=kind)
    length = min(how.length, model.config.max_position_embeddings)

    def rows(examples: Any) -> list[dict[str, Any]]:
        encoded = encode(tokenizer, examples.texts, length)
        return [row | {"label": label} for row, label in zip(encoded, examples.labels, strict=True)]

    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out, learning_rate=how.lr, num_train_epochs=how.epochs, weight_decay=how.weight_decay,
            per_device_train_batch_size=how.batch, per_device_eval_batch_size=64, warmup_steps=how.warmup,
            seed=seed, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        collator = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=rows(train))
        trainer.train()
        logits = torch.from_numpy(trainer.predict(rows(valid[""])).predictions)
    predicted = logits[:, 0].tolist() if task.classes is None else logits.argmax(1).tolist()
    return score(task.metrics, predicted, valid[""].labels)


def measured(way: Any, folder: Path, data: tuple[Any, ...], how: FineTune, seeds: int) -> dict[str, Any]:
    """Metric -> median and spread over the seeds; seconds of one fine-tuning."""
    started = time.perf_counter()
    scores = [way(folder, *data, how, seed) for seed in range(seeds)]
    seconds = (time.perf_counter() - started) / seeds
    return {name: median_and_spread(each[name] for each in scores) for name in scores[0]} | {"seconds": seconds}


def overlap(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether the spreads of two ways meet in every metric."""
    return all(
        ours[name]["min"] <= theirs[name]["max"] and theirs[name]["min"] <= ours[name]["max"]
        for name in ours
        if name != "seconds"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="cola,sst2,mrpc,rte,stsb")
    parser.add_argument("--peer", default="cola,sst2,mrpc,rte,stsb", help="tasks that the Trainer is run on as well")
    parser.add_argument("--grown", default="sst2,mrpc,stsb", help="tasks that the grown model is run on as well")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="the first so many training examples of every task")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    how = FineTune(lr=args.lr, epochs=args.epochs, length=args.length, limit=args.limit)
    source = offline.find_checkpoint(args.run)
    record: dict[str, Any] = {
        **about(),
        "libraries": {name: metadata.version(name) for name in ("accelerate", "scikit-learn", "scipy")},
        "model": source.model.model_dump() | {"parameters": parameters(source.model), "steps": source.facts["step"]},
        "how": how.model_dump(),
        "tasks": {},
    }
    with tempfile.TemporaryDirectory() as temporary, huggingface_folder(args.run) as folder:
        target = source.model.model_copy(update={"ffn": source.model.ffn * 3 // 2})
        offline.grow_checkpoint(source, target, Grow(recipe="zero-pad"), Path(temporary) / "grown", False)
        with huggingface_folder(Path(temporary) / "grown") as grown:
            for name in args.tasks.split(","):
                data = read_task(TASKS[name], args.data, args.limit)
                task, train, valid = data
                found = {"ours": measured(classify, folder, data, how, args.seeds)}
                if name in args.grown.split(","):
                    found["grown"] = measured(classify, grown, data, how, args.seeds)
                if name in args.peer.split(","):
                    found["trainer"] = measured(by_trainer, folder, data, how, args.seeds)
                meets = {way: overlap(found["ours"], found[way]) for way in found if way != "ours"}
                base = baseline(task.metrics, train.labels, valid[""].labels)
                facts = {"baseline": base, "train": len(train), "valid": len(valid[""]), "spreads_meet": meets}
                record["tasks"][name] = facts | found
                for metric in task.metrics:
                    row = {"task": name, "metric": metric, "baseline": base[metric]}
                    print(table([row | {way: said(values[metric]) for way, values in found.items()}]), flush=True)
                if args.json:
                    write_json(args.json, record)  # after every task, so that a stopped one says what it has


if __name__ == "__main__":
    main()
