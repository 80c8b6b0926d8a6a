"""What the hosts of the lab read: ssh's and Slurm's settings, as text.

Two of Slurm's are not for a real site: `cred_expire=5` (a requeued job would wait for two minutes) and the short
time-outs after which a host counts as lost.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

HEAD, NODES = "head", ("n1", "n2")
HOSTS = (HEAD, *NODES)
ADDRESS = {"head": "10.113.0.1", "n1": "10.113.0.11", "n2": "10.113.0.12"}
NETWORK = "10.113.0.0/24"
PRIVATE = "/run/growth-ds-host"
"""A folder that each host has for itself; all others are shared, as on a cluster with one file system."""

SSHD = """
Port 22
HostKey {folder}/ssh/hostkey
AuthorizedKeysFile {folder}/ssh/id.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
MaxStartups 100
PrintMotd no
"""

SSH = """
Host *
  IdentityFile {folder}/ssh/id
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
  BatchMode yes
"""

SLURM = """
ClusterName=lab
SlurmctldHost=head({head})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/slurm/state
SlurmdSpoolDir={folder}/slurm/spool-%n
SlurmctldPidFile={folder}/slurm/slurmctld.pid
SlurmdPidFile={folder}/slurm/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/slurm/jobcomp.txt
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=5
MinJobAge=300
MailProg=/bin/true
GresTypes=gpu
NodeName=n1 NodeAddr={n1} CPUs=2 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
NodeName=n2 NodeAddr={n2} CPUs=2 RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high Nodes=ALL Default=NO MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""

SMALL = {
    # In a network namespace /sys is mounted anew, without cgroups; slurmd only wants to know which kind it is.
    "cgroup.conf": "CgroupPlugin=cgroup/v1\n",
    "mpi.conf": f"PMIxCliTmpDirBase={PRIVATE}\n",
    "gres.conf": f"AutoDetect=off\nNodeName=n[1-2] Name=gpu File={PRIVATE}/gpu[0-1]\n",
}


def write_all(folder: Path, netns_etc: dict[str, Path]) -> None:
    """Keys and files below `folder`; `netns_etc` names per host the folder whose files lie over those of /etc."""
    for name in ("ssh", "log", "slurm/state"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for key in ("id", "hostkey"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ssh" / key)]
        subprocess.run(command, check=True, timeout=20)
    (folder / "ssh/sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "slurm/slurm.conf").write_text(SLURM.format(folder=folder, **ADDRESS))
    for name, text in SMALL.items():
        (folder / "slurm" / name).write_text(text)
    names = "".join(f"{address} {host}\n" for host, address in ADDRESS.items())
    for place in netns_etc.values():
        shutil.rmtree(place, ignore_errors=True)
        (place / "ssh").mkdir(parents=True)
        (place / "ssh/ssh_config").write_text(SSH.format(folder=folder))
        (place / "hosts").write_text("127.0.0.1 localhost\n" + names)
        (place / "resolv.conf").write_text("# no name server: hosts has all there are\n")
