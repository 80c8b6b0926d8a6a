"""The parts of the engine that need no second process: states, configuration, places, threads, signals, imports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from growth_ds.engine import distributed, ds_config, processes, signals
from growth_ds.engine.reports import STATUS_ENV, read_reports
from growth_ds.engine.state import DictStore, TensorState
from growth_ds.errors import UserError
from tests.engine.distributed_cases import ROOT


def _state(shape, step=0, **changes):
    parts = {"weight": torch.ones(shape), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
    return TensorState(**{**parts, **changes}, step=step)


def test_dict_store_keeps_order_and_states():
    store = DictStore({"b": (2, 3), "a": (1,)})
    assert list(store.shapes()) == ["b", "a"]
    store.write("a", _state((1,), step=4))
    assert store.read("a").step == 4
    with pytest.raises(KeyError):
        store.read("b")
    with pytest.raises(KeyError):
        store.write("c", _state((1,)))
    with pytest.raises(ValueError, match="given None"):
        store.write("a", None)
    again = DictStore.from_states({"a": _state((5,))})
    assert again.shapes() == {"a": (5,)}
    assert again.read("a") is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(3)}, "weight has shape"),
        ({"exp_avg": torch.zeros(2, dtype=torch.float64)}, "exp_avg is torch.float64"),
        ({"exp_avg": None}, "both moments or neither"),
        ({"step": -1}, "step -1"),
    ],
)
def test_dict_store_refuses(changes, message):
    step = changes.pop("step", 0)
    with pytest.raises(ValueError, match=message):
        DictStore({"a": (2,)}).write("a", _state((2,), step=step, **changes))


def _build(zero=None, precision="fp32", extra=None, clip=1.0):
    return ds_config.build(zero or {"stage": 2}, precision, 4, 2, clip, extra or {})


def test_config_accumulates_and_communicates_in_fp32():
    for precision in ("fp32", "bf16", "fp16"):
        config = _build(precision=precision)
        assert config["data_types"]["grad_accum_dtype"] == "fp32"
        assert config["communication_data_type"] == "fp32"
        assert config["gradient_clipping"] == 1.0
    assert _build(extra={"communication_data_type": "bf16"})["communication_data_type"] == "bf16"
    assert _build(extra={"bf16": {"immediate_grad_update": True}}, precision="bf16")["bf16"]["enabled"] is True
    assert _build({"zero_optimization": {"stage": 3, "sub_group_size": 7}})["zero_optimization"]["sub_group_size"] == 7


@pytest.mark.parametrize(
    "extra",
    [
        {"optimizer": {"type": "Adam"}},
        {"gradient_clipping": 2.0},
        {"bf16": {"enabled": True}},
        {"data_types": {"grad_accum_dtype": "bf16"}},
        {"zero_optimization": {"stage": 1}},
        {"train_batch_size": 8},
    ],
)
def test_config_names_the_contradicting_key(extra):
    key = next(iter(extra))
    with pytest.raises(UserError, match=rf"engine\.deepspeed\.{key}"):
        _build(extra=extra)


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"stage": 4}, "stage"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
        ({"stage": 3, "zero_quantized_weights": True}, "zero_quantized_weights"),
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients"),
    ],
)
def test_config_refuses_what_cannot_be_grown(zero, key):
    with pytest.raises(UserError, match=rf"engine\.zero\.{key}"):
        _build(zero)


def test_precision(monkeypatch):
    monkeypatch.setattr(ds_config, "supports_bf16", lambda: True)
    assert ds_config.resolve_precision("auto") == "bf16"
    monkeypatch.setattr(ds_config, "supports_bf16", lambda: False)
    assert ds_config.resolve_precision("auto") == "fp32"
    with pytest.raises(UserError, match="fp8"):
        ds_config.resolve_precision("fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU"):
        ds_config.resolve_precision("fp16")


def test_place_from_variables():
    env = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1", "LOCAL_SIZE": "2"}
    assert distributed.find_rank(env) == distributed.RankInfo(3, 1, 4, "env", 2)
    del env["MASTER_ADDR"]
    with pytest.raises(UserError, match="MASTER_ADDR not set"):
        distributed.find_rank(env)


def test_place_of_a_single_process():
    env: dict[str, str] = {}
    assert distributed.find_rank(env) == distributed.RankInfo(0, 0, 1, "single")
    assert env["WORLD_SIZE"] == "1"
    assert int(env["MASTER_PORT"]) > 0


@pytest.mark.parametrize(
    ("env", "local", "threads"),
    [
        ({}, 1, 8),
        ({}, 2, 4),
        ({}, 16, 1),
        ({"OMP_NUM_THREADS": "3"}, 2, 3),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 2, 4),
        ({"OMP_NUM_THREADS": "1"}, 2, 1),
        ({"SLURM_CPUS_PER_TASK": "3"}, 2, 3),
        ({"SLURM_CPUS_PER_TASK": "6"}, 2, 4),
        ({"SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "2"}, 1, 2),
    ],
)
def test_threads(env, local, threads):
    assert distributed.thread_count(local, env, cores=8) == threads


@pytest.mark.parametrize(
    ("command", "launcher"),
    [
        (["/v/bin/python", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["/v/bin/python", "/v/bin/deepspeed", "train.py"], True),
        (["mpirun", "-n", "2", "python", "x.py"], True),
        (["/v/bin/python", "/v/bin/torchrun", "--nproc_per_node", "2"], True),
        (["/v/bin/python", "-m", "growth_ds", "train"], True),
        (["/bin/bash", "-c", "deepspeed train.py"], False),
        (["/bin/bash", "deepspeed"], False),
        (["python", "-m", "pytest"], False),
        ([], False),
    ],
)
def test_launchers_are_recognised(command, launcher):
    assert processes.is_launcher(command) is launcher


def test_flag_is_set_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with signals.StopFlag(watch_ancestors=False) as flag:
        assert not flag
        os.kill(os.getpid(), signal.SIGINT)
        assert flag
        assert flag.reason == "SIGINT"
        flag.request("later")
        assert flag.reason == "SIGINT"
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # a stopped rank is not killed while it leaves
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


CHILD = """
import os, signal, sys, time
from datetime import timedelta
from growth_ds.engine import signals

def wait():
    time.sleep(60)

def wait_in_torch():
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print("ready", flush=True)
    store.wait(["never"], timedelta(seconds=60))

def asked_twice(rest_s, between=lambda: None):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.7)
    between()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(rest_s)
    sys.exit(75)

def forked():
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(not flag)
    assert os.waitpid(child, 0)[1] == 0 and not flag
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    sys.exit(75)

signals.ECHO_S = float(sys.argv[1])
with signals.StopFlag(watch_ancestors=False) as flag:
    if "wait()" == sys.argv[2]:
        print("ready", flush=True)
    eval(sys.argv[2])
"""


def _child(echo_s: float, action: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(echo_s), action]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("action", ["wait()", "wait_in_torch()"])
def test_second_signal_ends_at_once(action, tmp_path):
    """Also in a C call of torch, where Python runs no handler; what it was is reported."""
    base = tmp_path / "status"
    child = _child(0.2, action, RANK="0", **{STATUS_ENV: str(base)})
    assert child.stdout.readline() == "ready\n"
    end = time.monotonic() + 50
    child.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert child.poll() is None  # one request, however often Python looks at it, ends nothing
    while child.poll() is None and time.monotonic() < end:
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
    child.kill()
    assert child.wait() == 128 + signal.SIGINT
    [report] = read_reports(base, 1)
    assert report["code"] == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("echo_s", "action", "code"),
    [
        (0.1, "asked_twice(50)", 143),
        (60.0, "asked_twice(0.5)", 75),  # an echo
        (0.1, "asked_twice(0.5, flag.settle)", 75),  # all is saved
        (0.0, "forked()", 75),  # a child's signals are not its parent's
    ],
)
def test_what_is_a_second_request(echo_s, action, code):
    child = _child(echo_s, action, **{STATUS_ENV: "/nowhere/status", "RANK": "no number"})
    assert child.wait(timeout=60) == code


def _wait_until(condition) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_flag_sees_its_owner_die_whatever_the_clock_says(child, monkeypatch):
    monkeypatch.setenv(processes.OWNER_ENV, f"{child.pid} {processes.start_of(child.pid)}")
    flag = signals.StopFlag(interval_s=0.0)
    begun, now = psutil.Process(child.pid).create_time(), time.time()
    for module in ("psutil", "psutil._pslinux"):
        monkeypatch.setattr(f"{module}.boot_time", lambda: begun - 86400.0, raising=False)
    monkeypatch.setattr(time, "time", lambda: now - 86400.0)
    assert not flag
    child.kill()  # a zombie then: nobody waits for it yet
    _wait_until(lambda: bool(flag))
    assert flag.reason == "the launcher died"
    assert signals.StopFlag().reason == ""
    assert signals.StopFlag(interval_s=0.0), "an owner that died before the rank looked"


def test_an_owner_that_cannot_be_read_is_none(monkeypatch):
    for text in ("", "7", "a b"):
        monkeypatch.setenv(processes.OWNER_ENV, text)
        assert processes.owner() == []


def test_identity_of_a_process(child, tmp_path):
    start = processes.start_of(child.pid)
    assert processes.is_alive(child.pid, start)
    assert not processes.is_alive(child.pid, start + 1)  # a later owner of the pid
    child.kill()
    _wait_until(lambda: not processes.is_alive(child.pid, start))
    child.wait()
    assert processes.start_of(child.pid) == processes.GONE
    assert not processes.is_alive(child.pid, processes.GONE)


def test_a_name_with_brackets_does_not_hide_the_start(tmp_path):
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to(sys.executable)
    sleeper = subprocess.Popen([program, "-c", "import time; time.sleep(60)"])
    try:
        _wait_until(lambda: "a) Z 1 (b" in Path(f"/proc/{sleeper.pid}/stat").read_text())
        ours = processes.start_of(os.getpid())
        assert processes.start_of(sleeper.pid) >= ours > 0
    finally:
        sleeper.kill()
        sleeper.wait()


def test_without_proc_psutil_decides(child, monkeypatch):
    monkeypatch.setattr(processes, "_PROC", False)
    start = processes.start_of(child.pid)
    assert processes.is_alive(child.pid, start)
    child.kill()
    _wait_until(lambda: not processes.is_alive(child.pid, start))
    processes._handle.cache_clear()


def test_a_process_that_cannot_be_seen_is_taken_for_alive(monkeypatch):
    def refuse(*_: object, **__: object) -> str:
        raise OSError("too many open files")

    monkeypatch.setattr(processes.Path, "read_text", refuse)
    assert processes.is_alive(1, 1)


def test_importing_the_engine_does_not_import_deepspeed():
    names = [
        "state",
        "ds_config",
        "fragments",
        "zero_state",
        "scrub",
        "zero",
        "distributed",
        "signals",
        "processes",
        "reports",
        "launch",
    ]
    code = "import sys; " + "; ".join(f"import growth_ds.engine.{name}" for name in names)
    code += "; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


_MPI = """
import os
from growth_ds.engine import distributed
info = distributed.init_distributed(60)
total = distributed.reduce_integers([info.rank + 1])
os.write(1, f"RESULT {info.source} {info.world_size} {info.local_rank} {total}\\n".encode())  # one piece
distributed.shutdown()
"""


def test_mpirun_and_the_silence_of_a_start():
    """Two ranks under mpirun find each other; a start prints nothing of its own and leaves no warning at exit."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "RANK", "WORLD"))}
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", _MPI]
    try:
        run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("no mpirun on this machine")
    lines = sorted(run.stdout.splitlines())
    assert lines == [f"RESULT mpi 2 {rank} [3]" for rank in (0, 1)], run.stdout + run.stderr
    assert (run.stderr.strip(), run.returncode) == ("", 0), run.stderr
