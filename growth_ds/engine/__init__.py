"""The guard layer over DeepSpeed: build an engine, step it, read and write its whole training state.

    places.py hosts.py    who this process is, by its launcher's variables; lists of hosts, addresses
    distributed.py  start and end the process group; small agreements between ranks
    state.py        TensorState and StateStore: what a parameter's training state is
    ds_config.py    our options -> DeepSpeed's JSON, with refusals that name the key
    fragments.py    where each ZeRO stage keeps a parameter's master and moments
    zero_state.py   StateStore over a live engine
    scrub.py        what DeepSpeed leaves on a module, removed
    zero.py         ZeroEngine: step, evaluate, state, close
    unfilled.py     engines whose weights come later, built without touching memory
    loss_scale.py   the dynamic scale of fp16, which is state
    watch.py        the death of one rank, noticed by all
    checksum.py     a sum over bits that slices add up to
    memory.py       what this process may take, and holds
    cgroup.py       what control groups leave it
    rigid.py universal.py ds_files.py unnamed.py    DeepSpeed's own checkpoint folders
    archive.py      a stranger's file of torch.save, opened without memory for what it claims
    processes.py    who a process is, whatever the clock says; launchers above it
    reports.py      how ranks say how they ended
    signals.py      stop requests: SIGTERM, SIGINT, a dead launcher
    launch.py       `deepspeed` as a child process, with honest exit codes
    fleet.py remote.py    the same on several hosts over ssh, and what runs on each of them
    child.py        srun or mpirun as a child process

Nothing here imports deepspeed when it is imported: the first start pays for it, `--help` does not.
"""
