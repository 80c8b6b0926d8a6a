"""Every launcher's variables, and what contradicts them; nothing here starts a process."""

from __future__ import annotations

import pytest

from growth_ds.engine import places
from growth_ds.engine.hosts import PORTS
from growth_ds.engine.places import PlaceError, RankInfo, find_rank, first_guess, is_rank
from growth_ds.errors import UserError

TORCH = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29412"}
JOB = {
    "SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_JOB_NUM_NODES": "4",
    "SLURM_TASKS_PER_NODE": "1(x4)", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip
"""A batch script's."""
STEP = JOB | {
    "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[2-3]", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
"""One task of a step of four on two hosts."""
OMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.fixture(autouse=True)
def _no_interface(monkeypatch):
    monkeypatch.setattr(places, "interface_towards", lambda host: f"to-{host}")


def test_torchrun_and_deepspeed():
    env = TORCH | {"LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
    found = find_rank(env)
    assert found == RankInfo(3, 1, 4, "env", 2)
    assert found.line() == "ranks: 4 on 2 hosts, by the environment, master n1:29412"
    assert find_rank(TORCH | {"LOCAL_SIZE": "2", "CROSS_SIZE": "2"}).hosts == 2
    assert find_rank(dict(TORCH)).line() == "ranks: 4, by the environment, master n1:29412"


def test_a_slurm_step():
    env = dict(STEP)
    found = find_rank(env)
    assert found == RankInfo(3, 1, 4, "slurm", 2)
    assert found.line() == f"ranks: 4 on 2 hosts, by Slurm, master n2:{env['MASTER_PORT']}"
    assert [env[key] for key in places.VARIABLES[:4]] == ["3", "1", "4", "n2"]
    assert int(env["MASTER_PORT"]) in PORTS
    assert env["GLOO_SOCKET_IFNAME"] == "to-n2"


def test_what_a_batch_script_chose_holds():
    env = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5", "WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "ib0"}
    assert find_rank(env).master == "10.0.0.1:5"
    assert env["GLOO_SOCKET_IFNAME"] == "ib0"
    exported = STEP | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n2", "MASTER_PORT": "5"}
    assert find_rank(exported) == RankInfo(3, 1, 4, "env", 2)  # and SLURM_LOCALID for the missing LOCAL_RANK


def test_slurm_ports_are_one_for_a_step_and_others_for_its_neighbours():
    def port(job: int, step: int, task: str = "0") -> str:
        env = STEP | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_PROCID": task}
        find_rank(env)
        return env["MASTER_PORT"]

    assert port(77, 0) == port(77, 0, task="3")
    assert len({port(job, step) for job in range(1000, 1050) for step in range(40)}) == 50 * 40


def test_one_host_needs_no_name():
    env = STEP | {"SLURM_STEP_NODELIST": "n2", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"}
    assert find_rank(env).master.startswith("127.0.0.1:")
    assert "GLOO_SOCKET_IFNAME" not in env


def test_a_task_that_sees_one_gpu_takes_it():
    assert find_rank(STEP | {"CUDA_VISIBLE_DEVICES": "1"}).local_rank == 0
    assert find_rank(STEP | {"CUDA_VISIBLE_DEVICES": "0,1"}).local_rank == 1


SINGLE = {
    "nothing": {},
    "a batch script": JOB,
    "a batch script that is called a step": JOB | {"SLURM_STEP_ID": "4294967291"},
    "a shell of salloc": {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]"},
    "an interactive step": JOB | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
    "srun -n 1": JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    "srun -n 1 --mpi=pmix": JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "PMIX_RANK": "0"},
}


@pytest.mark.parametrize("name", SINGLE)
def test_single(name):
    env = dict(SINGLE[name])
    assert not is_rank(env)
    assert first_guess(env) == "0"
    found = find_rank(env)
    assert found == RankInfo(0, 0, 1, "single")
    assert found.line() == "ranks: 1 on 1 host, no launcher"
    assert env["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("env", [TORCH, STEP, OMPI, {"PMIX_RANK": "3"}, {"PMI_SIZE": "4", "PMI_RANK": "3"}])
def test_a_rank_is_known_before_anything_is_checked(env):
    assert is_rank(env)
    assert first_guess(env) == "3"


ALLOWED = {
    "torchrun numbers its hosts as it likes": (STEP, {"RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, 0),
    "deepspeed's launcher, one task for each host": (
        STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        {"RANK": "2", "LOCAL_RANK": "0", "CROSS_SIZE": "2", "LOCAL_SIZE": "2"},
        2,
    ),
    "a script that starts two ranks in each of two tasks": (
        STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
        {"RANK": "1"},
        1,
    ),
    "each task alone": (STEP, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, 0),
    "mpirun -x RANK": (OMPI, {}, 3),
    "ranks of a launcher in a batch script": (JOB, {}, 3),
    "ranks of a launcher in srun -n 1": (JOB | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, {}, 3),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(name):
    around, changes, rank = ALLOWED[name]
    assert find_rank(around | TORCH | changes).rank == rank


REFUSED = {
    "half set": ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
    "no number": (TORCH | {"RANK": "x"}, "RANK='x' is not a number"),
    "negative": (TORCH | {"RANK": "-1"}, "RANK='-1'"),
    "no ranks": (TORCH | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a number from 1 up"),
    "rank beyond": (TORCH | {"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
    "local rank beyond": (TORCH | {"LOCAL_RANK": "2", "LOCAL_SIZE": "2"}, "LOCAL_RANK=2 is not below the 2 ranks"),
    "more here than in all": (TORCH | {"LOCAL_WORLD_SIZE": "8"}, "8 ranks on this host are more than WORLD_SIZE=4"),
    "RANK exported by the batch script": (STEP | TORCH | {"RANK": "0"}, "RANK=0 but SLURM_PROCID=3; unset RANK"),
    "tasks and ranks": (STEP | TORCH | {"WORLD_SIZE": "6"}, "WORLD_SIZE=6 but Slurm's number of tasks is 4"),
    "fewer ranks than tasks": (STEP | TORCH | {"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2"),
    "WORLD_SIZE of the job": (STEP | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8 but srun started 4 tasks"),
    "mpirun's rank": (OMPI | TORCH | {"RANK": "1"}, "RANK=1 but OMPI_COMM_WORLD_RANK=3"),
    "a task beyond": (STEP | {"SLURM_PROCID": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
    "a host list": (STEP | {"SLURM_STEP_NODELIST": "n[1-"}, "host list 'n\\[1-'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    env, words = REFUSED[name]
    with pytest.raises(UserError, match=words) as caught:
        find_rank(dict(env))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, PlaceError) or name == "a host list"


def test_mpirun_inside_a_job_is_mpirun(monkeypatch):
    """Its daemons are the tasks of a step: Slurm's numbers are those of hosts."""
    monkeypatch.setattr(places, "_from_mpi", lambda env: "mpi")
    assert find_rank(STEP | OMPI) == "mpi"
    assert find_rank({"PMIX_RANK": "0"}) == "mpi"
    assert find_rank({"PMI_SIZE": "2", "PMI_RANK": "0"}) == "mpi"


@pytest.mark.parametrize(
    ("text", "host", "tasks"),
    [("2(x2),1", 0, 2), ("2(x2),1", 1, 2), ("2(x2),1", 2, 1), ("2(x2),1", 3, 1), ("4", 0, 4), ("", 0, 1)],
)
def test_tasks_of_a_host(text, host, tasks):
    assert places._tasks_here({"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": str(host)}) == tasks
