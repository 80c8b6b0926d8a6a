"""The guard layer over DeepSpeed: build an engine, step it, read and write its whole training state.

    distributed.py  start and end the process group; small agreements between ranks
    state.py        TensorState and StateStore: what a parameter's training state is
    ds_config.py    our options -> DeepSpeed's JSON, with refusals that name the key
    fragments.py    where each ZeRO stage keeps a parameter's master and moments
    zero_state.py   StateStore over a live engine
    scrub.py        what DeepSpeed leaves on a module, removed
    zero.py         ZeroEngine: step, evaluate, state, close
    signals.py      stop requests: SIGTERM, SIGINT, a dead launcher
    launch.py       `deepspeed` as a child process, with honest exit codes

Nothing here imports deepspeed when it is imported: the first start pays for it, `--help` does not.
"""
