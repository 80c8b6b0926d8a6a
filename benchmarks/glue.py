"""GLUE on a model that growth_ds has pre-trained: our fine-tuning beside transformers' Trainer, and grown models.

python benchmarks/glue.py RUN --data ../shared/data/glue --limit 1000 --seeds 5 --json benchmarks/results/glue.json

RUN is any checkpoint or run folder, its size and steps are in the record. All ways start from one exported folder with
the same seeds, rows, hyper-parameters and padding. The peer is `transformers.Trainer`, which needs `accelerate`
(`pip install --no-deps accelerate`); nothing of growth_ds does.

Growth is `zero-pad` to half as many FFN units more, and no step of pre-training after it, in two orders: "tuned, then
grown" grows each fine-tuned model and scores it as it stands, with how far its logits have moved; "grown, then tuned"
grows the pre-trained model and fine-tunes the result. One process with one thread for each core (`--jobs`). Tasks that
are not named keep what an earlier call has written to the JSON, if model, way and seeds are the same.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import about, median_and_spread, said, table, write_json
from growth_ds import offline
from growth_ds.config import Grow, Model
from growth_ds.doctor import cores
from growth_ds.downstream import huggingface_folder
from growth_ds.evaluate.fine_tune import (
    FineTune,
    encode,
    fine_tune,
    load,
    load_classifier,
    load_tokenizer,
    longest,
    predict,
    score_logits,
)
from growth_ds.evaluate.read import Examples, read_task
from growth_ds.evaluate.scores import baseline
from growth_ds.evaluate.tasks import TASKS, Task
from growth_ds.folders import Folder, grow_folder
from growth_ds.model.cost import parameters

Data = tuple[Task, Examples, dict[str, Examples]]
Scores = dict[str, dict[str, float]]
"""Way -> metric -> score."""
OURS, AFTER, BEFORE, TRAINER = "ours", "tuned, then grown", "grown, then tuned", "trainer"
MOVED = "logits moved"
"""Beside the scores of `AFTER`: the largest difference of a logit, over the largest logit."""


def wider(model: Model) -> Model:
    """What the benchmark grows to."""
    return model.model_copy(update={"ffn": model.ffn * 3 // 2})


def by_us(way: str, folder: Path, data: Data, how: FineTune, seed: int, grown_after: bool = False) -> Scores:
    """Our fine-tuning; with `grown_after`, the same model's scores again as it has grown."""
    task, train, valid = data
    model, tokenizer = fine_tune(folder, task, train, how, seed)
    logits = predict(model, tokenizer, valid[""], how)
    found = {way: score_logits(task, logits, valid[""])}
    if grown_after:
        again = predict(grown(folder, model, tokenizer), tokenizer, valid[""], how)
        moved = ((again - logits).abs().max() / logits.abs().max()).item()
        found[AFTER] = score_logits(task, again, valid[""]) | {MOVED: moved}
    return found


def grown(folder: Path, model: Any, tokenizer: Any) -> Any:
    """A model fine-tuned from `folder`, its encoder grown as `growth-ds grow` does a Hugging Face folder; its own head.

    The encoder goes as the body of a model for pre-training, the only kind whose pooler a growth takes along.
    """
    with tempfile.TemporaryDirectory() as temporary:
        before, after = Path(temporary) / "before", Path(temporary) / "after"
        whole = load("PreTraining", folder, 0)
        whole.base_model.load_state_dict(model.base_model.state_dict())
        whole.save_pretrained(before)
        tokenizer.save_pretrained(before)
        source = Folder(before)
        grow_folder(source, wider(source.model), Grow(recipe="zero-pad"), after, False)
        larger = load("SequenceClassification", after, 0, num_labels=model.num_labels)
    larger.classifier.load_state_dict(model.classifier.state_dict())
    return larger


def by_trainer(way: str, folder: Path, data: Data, how: FineTune, seed: int) -> Scores:
    """The same fine-tuning by transformers' Trainer, as its run_glue example does it."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    task, train, valid = data
    tokenizer = load_tokenizer(folder)
    model = load_classifier(folder, task, seed)

    def rows(examples: Examples) -> list[dict[str, Any]]:
        encoded = encode(tokenizer, examples.texts, longest(model, how))
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
    return {way: score_logits(task, logits, valid[""])}


def timed(job: Callable[[int], Scores], seed: int) -> Scores:
    """The scores of one job, with the seconds it took beside those of its first way."""
    started = time.perf_counter()
    found = job(seed)
    next(iter(found.values()))["seconds"] = time.perf_counter() - started
    return found


def measured(pool: Executor, jobs: Sequence[Callable[[int], Scores]], seeds: int) -> dict[str, Any]:
    """Way -> metric -> median and spread over the seeds."""
    waiting = [[pool.submit(timed, job, seed) for seed in range(seeds)] for job in jobs]
    found: dict[str, Any] = {}
    for every in waiting:
        scores = [future.result() for future in every]
        for way in scores[0]:
            names = scores[0][way]
            found[way] = {name: median_and_spread(each[way][name] for each in scores) for name in names}
    return found


def overlap(metrics: Sequence[str], ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether the spreads of two ways meet in every metric."""
    return all(
        ours[name]["min"] <= theirs[name]["max"] and theirs[name]["min"] <= ours[name]["max"] for name in metrics
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default="cola,sst2,mrpc,rte,stsb")
    parser.add_argument("--peer", default="cola,sst2,mrpc,rte,stsb", help="tasks that the Trainer is run on as well")
    parser.add_argument("--grown", default="cola,sst2,mrpc,rte,stsb", help="tasks that grown models are run on as well")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, help="the first so many training examples of every task")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parsed()
    how = FineTune(lr=args.lr, epochs=args.epochs, length=args.length, limit=args.limit)
    source = offline.find_checkpoint(args.run)
    record: dict[str, Any] = {
        **about(),
        "libraries": {name: metadata.version(name) for name in ("accelerate", "scikit-learn", "scipy")},
        "model": source.model.model_dump() | {"parameters": parameters(source.model), "steps": source.facts["step"]},
        "how": how.model_dump(),
        "seeds": args.seeds,
        "jobs": args.jobs,
    }
    record["tasks"] = measured_before(args.json, record)
    spawn = multiprocessing.get_context("spawn")  # torch's threads do not live through a fork
    with (
        tempfile.TemporaryDirectory() as temporary,
        huggingface_folder(args.run) as folder,
        ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (1,)) as pool,
    ):
        offline.grow_checkpoint(source, wider(source.model), Grow(recipe="zero-pad"), Path(temporary) / "grown", False)
        with huggingface_folder(Path(temporary) / "grown") as larger:
            for name in args.tasks.split(","):
                data = read_task(TASKS[name], args.data, args.limit)
                growing = name in args.grown.split(",")
                jobs = [partial(by_us, OURS, folder, data, how, grown_after=growing)]
                if growing:
                    jobs.append(partial(by_us, BEFORE, larger, data, how))
                if name in args.peer.split(","):
                    jobs.append(partial(by_trainer, TRAINER, folder, data, how))
                record["tasks"][name] = told(data, measured(pool, jobs, args.seeds))
                if args.json:
                    write_json(args.json, record)  # after every task, so that a stopped one says what it has


def measured_before(path: Path | None, record: dict[str, Any]) -> dict[str, Any]:
    """Tasks that the record at `path` has of the same model, way and seeds; `--tasks` adds to them."""
    if path is None or not path.exists():
        return {}
    before = json.loads(path.read_text("utf-8"))
    same = all(before.get(key) == record[key] for key in ("model", "how", "seeds", "versions"))
    return dict(before["tasks"]) if same else {}


def told(data: Data, found: dict[str, Any]) -> dict[str, Any]:
    """Print the scores of a task; its entry of the record."""
    task, train, valid = data
    base = baseline(task.metrics, train.labels, valid[""].labels)
    for metric in task.metrics:
        row = {"task": task.name, "metric": metric, "baseline": base[metric]}
        print(table([row | {way: said(values[metric]) for way, values in found.items()}]), flush=True)
    if AFTER in found:
        print(f"{task.name}: {AFTER}: logits moved by {found[AFTER][MOVED]['max']:.1e} of the largest", flush=True)
    meets = {way: overlap(task.metrics, found[OURS], found[way]) for way in found if way != OURS}
    return {"baseline": base, "train": len(train), "valid": len(valid[""]), "spreads_meet": meets} | found


if __name__ == "__main__":
    main()
