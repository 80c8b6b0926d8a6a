"""The run in one paragraph of plain words."""

from __future__ import annotations

from collections.abc import Sequence

from growth_ds.report import units
from growth_ds.report.compare import Comparison
from growth_ds.report.rows import GrowthRow, StageRow, Summary

EVEN = 0.0005
"""Nats below which two losses are called the same: what three digits show."""


def in_plain_words(
    run: Summary, stages: Sequence[StageRow], growths: Sequence[GrowthRow], others: Sequence[tuple[str, Comparison]]
) -> str:
    """What was trained, for how much, how well, and against what."""
    sentences = [_trained(run, stages, growths), _quality(run), *(_against(*other) for other in others)]
    return " ".join(sentence for sentence in sentences if sentence)


def _trained(run: Summary, stages: Sequence[StageRow], growths: Sequence[GrowthRow]) -> str:
    cost = f"{units.count(run.tokens)} tokens, {units.flops(run.flops)} FLOPs and {units.duration(run.seconds)}"
    if growths:
        times = {1: "once", 2: "twice"}.get(len(growths), f"{len(growths)} times")
        what = f"A BERT that grew {times} while it trained, from {units.count(stages[0].parameters)} to "
        what += f"{units.count(run.parameters)} parameters"
    else:
        what = f"A BERT of {units.count(run.parameters)} parameters, trained from scratch at its full size"
    ended = "" if run.finished else f" It has not finished: {run.steps:,} of {run.planned_steps:,} steps are done."
    return f"{what}, for {cost} of training.{ended}"


def _quality(run: Summary) -> str:
    if run.valid_loss is None:
        return "It has not been validated yet."
    text = f"It {'ended' if run.finished else 'stands'} at a validation loss of {units.nats(run.valid_loss)} nats"
    if run.valid_accuracy is not None:
        text += f" and guesses {units.percent(run.valid_accuracy)} of the masked tokens"
    if run.unigram_entropy is None:
        return text + "."
    apart = run.valid_loss - run.unigram_entropy
    side = "below" if apart < 0 else "above"
    return f"{text}; that is {units.nats(abs(apart))} nats {side} guessing by token frequency alone."


def _against(name: str, found: Comparison) -> str:
    if found.difference is None:
        return f'It cannot be compared with "{name}" at equal compute: their validations do not overlap.'
    if abs(found.difference) < EVEN:
        verdict = f'is as good as "{name}"'
    else:
        side = "better" if found.difference > 0 else "worse"
        verdict = f'is {units.nats(abs(found.difference))} nats {side} than "{name}"'
    text = f"At equal compute ({units.flops(found.flops)} FLOPs) it {verdict}"
    if found.share_to_match is None:
        return f"{text}; it has not reached that run's final loss."
    return f"{text}; it reached that run's final loss with {units.percent(found.share_to_match, 0)} of its compute."
