"""What a run has to show for itself: tables for the terminal, curves, and one self-contained HTML file.

    config.yaml, ledger.jsonl, metrics.jsonl ─ rows (typed) ─┬─ tables      terminal
                                             └ series ───────┼─ curves      SVG, PNG
                                                             └─ compare ─── html

Everything reads a run folder and nothing writes into a run; `units` is the one place that formats a number.
"""
