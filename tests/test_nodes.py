"""Test ranks that wait for others, fail alone or share no folder, and two machines, played by two torchrun agents."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from jobs import ROOT, Job, environment, records, run, same, small, succeeded, torchrun, weights
from torch.distributed.run import get_args_parser

from lead_fast.learner import checkpoint
from lead_fast.runtime.ranks import host_threads

# ------------------------------------------------------------------------------------------------------ ranks that wait

WAITING = """
import json, os, sys, time
from pathlib import Path
from lead_fast.learner import checkpoint
from lead_fast.runtime import ranks as module
from lead_fast.runtime.ranks import complaint, start
from lead_fast.runtime.watchdog import Watchdog

module.ALONE_S = 1.0

ranks, out = start(), {}
out["faults"] = ranks.first_fault(""), ranks.first_fault("no engine" if ranks.rank else "")
began = time.monotonic()
if ranks.rank:  # the first rank does not come
    out["alone"] = ranks.first_fault("nobody comes"), time.monotonic() - began
    ranks.barrier()
else:
    ranks.barrier()
    out["later"] = ranks.first_fault("the other one left")

def refused(folder):
    try:
        checkpoint.check_shared(folder, ranks)
    except ValueError as e:
        return str(e)

here = Path(sys.argv[1])
try:
    ranks.check_same(f"steps = 5\\nseed = {ranks.rank}")
except ValueError as e:
    out["other settings"] = str(e)
ranks.check_same("steps = 5")
os.cpu_count, os.sched_getaffinity = lambda: 16, lambda pid: range(16)
out["threads"] = module.host_threads()  # OMP_NUM_THREADS=1 is the test's own
mistake = ValueError("no such file on this machine")
out["alone says"] = complaint(mistake) if ranks.rank else None
ranks.barrier()
out["both say"] = complaint(mistake)
out["one machine"] = refused(here / str(ranks.rank))
os.environ["LOCAL_WORLD_SIZE"] = "1"
checkpoint.SEEN_S = 1.0
if ranks.main:
    (here / "0").mkdir()
out["shared"], out["not shared"] = refused(here), refused(here / str(ranks.rank))
ranks.barrier()
out["left"] = sorted(p.name for p in here.rglob(".seen*"))

dog = Watchdog(2.0, ranks)
if ranks.rank:
    for _ in range(12):  # works six seconds, while the other waits
        time.sleep(0.5)
        dog.beat("rollout", 3)
ranks.barrier()
dog.beat("reward", 3)
print(json.dumps({"rank": ranks.rank, **out}), flush=True)
if ranks.rank:
    time.sleep(60)  # now it hangs
ranks.barrier()
"""


@pytest.fixture(scope="module")
def waiting(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("waiting")
    (folder / "script.py").write_text(WAITING)
    (folder / "run").mkdir()
    began = time.monotonic()
    job = Job(2, str(folder / "script.py"), str(folder / "run"))
    out = job.wait(timeout=120)
    rows = [json.loads(line) for line in out.splitlines() if line.startswith('{"rank"')]
    seconds = time.monotonic() - began
    return SimpleNamespace(ranks={r["rank"]: r for r in rows}, out=out, job=job, left=job.alive(), seconds=seconds)


def test_a_rank_that_waits_for_one_that_works_is_not_ended_and_a_job_that_hangs_is(waiting):
    assert sorted(waiting.ranks) == [0, 1], waiting.out[-3000:]  # both reached the barrier after 6 s; the limit is 2
    assert waiting.job.code != 0 and not waiting.left and waiting.seconds < 60
    assert "rank 0 made no progress" in waiting.out and "rank 1 made no progress" in waiting.out
    assert "phase reward, step 3, waiting in barrier. Its stacks" in waiting.out  # rank 0 and the call that waits


def test_the_rank_that_failed_is_quoted_on_every_rank_and_waits_for_no_one_for_ever(waiting):
    assert [waiting.ranks[r]["faults"] for r in (0, 1)] == [["", "no engine"]] * 2
    fault, seconds = waiting.ranks[1]["alone"]
    assert fault == "nobody comes" and seconds < 5
    assert waiting.ranks[0]["later"] == "nobody comes"  # not an error that followed from it


def test_a_mistake_that_only_another_rank_meets_is_not_silent(waiting):
    assert waiting.ranks[1]["alone says"] == "error: on rank 1: no such file on this machine"
    assert [waiting.ranks[r]["both say"] for r in (0, 1)] == ["error: no such file on this machine", 1]


def test_ranks_that_were_started_with_other_settings_are_refused_in_one_sentence(waiting):
    for rank in (0, 1):
        sentence = waiting.ranks[rank]["other settings"]
        assert sentence == "Rank 1 was started with seed = 1 and rank 0 with seed = 0: use the same command everywhere."


def test_machines_that_do_not_share_the_run_directory_are_refused_in_one_sentence(waiting):
    first, second = waiting.ranks[0], waiting.ranks[1]
    assert first["one machine"] is None is first["shared"] is second["shared"]
    assert first["not shared"] == second["not shared"] and "\n" not in first["not shared"]
    assert "do not share the run directory" in first["not shared"] and "(rank 1)" in first["not shared"]
    assert first["left"] == second["left"] == []


THREADS = """
import os
os.cpu_count, os.sched_getaffinity = lambda: 16, lambda pid: range(16)
from lead_fast.runtime.ranks import host_threads
print(f"threads {host_threads()}\\n", end="")
"""


def test_a_rank_takes_its_part_of_the_cores_unless_the_user_said_how_many(waiting, tmp_path):
    """torchrun sets OMP_NUM_THREADS=1 for its ranks if the user set nothing."""
    assert [waiting.ranks[r]["threads"] for r in (0, 1)] == [1, 1]  # jobs.py sets one
    (tmp_path / "script.py").write_text(THREADS)
    env = environment()
    env.pop("OMP_NUM_THREADS")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(tmp_path / "script.py")], env=env, cwd=ROOT, capture_output=True, text=True)
    assert succeeded(done).stdout.count("threads 8\n") == 2, done.stdout


def test_threads_that_the_user_set_are_kept(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for value, threads in (("3", 3), ("1", 1), ("", 6)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert host_threads() == threads


# ------------------------------------------------------------------------------------------------------ two machines


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Agent(Job):
    """One of two torchrun agents that simulate two machines with two ranks each, over the loopback interface."""

    def __init__(self, port: int, *args: str, cwd: Path = ROOT):
        self.mark = os.urandom(8).hex()
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2"]
        command += ["--rdzv_backend=c10d", "--rdzv_id=two", "--local_addr=127.0.0.1"]
        self.process = subprocess.Popen(
            [*command, f"--rdzv_endpoint=127.0.0.1:{port}", *args], env=environment(LEAD_TEST_MARK=self.mark),
            cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def kill(self) -> None:
        """Kill the agent and its ranks at once, as if the machine lost power."""
        for pid in [self.process.pid, *self.ranks()]:
            os.kill(pid, signal.SIGKILL)


# Both set-ups run this: the gradient of one pack per rank for two layouts of the mesh, then a training run.
BOTH = """
import json, sys, torch
from lead_fast import train
from lead_fast.cli import load_config
from lead_fast.learner.memory import worst_pack
from lead_fast.learner.loss import policy_loss
from lead_fast.learner.policy import load_policy
from lead_fast.runtime.ranks import start

out, *args = sys.argv[1:]
grads = {}
for copies in (1, 2):
    c = load_config([f"--parallel.replicate={copies}"])
    ranks = start(c.parallel)
    policy = load_policy(c.model, c.parallel, ranks)
    pack, o = worst_pack(60 + ranks.rank, 20, ranks)
    policy_loss(policy, pack, o, c).loss.backward()
    policy.to_shards()
    grads[copies] = torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()])
if ranks.main:
    torch.save(grads, out)
train.main(args)
"""


@pytest.fixture(scope="module")
def machines(tmp_path_factory) -> SimpleNamespace:
    """Run six steps on two agents with two ranks each, and on one agent with four ranks."""
    folder = tmp_path_factory.mktemp("machines")
    script = folder / "both.py"
    script.write_text(BOTH)
    layout = ("--parallel.replicate=2", "--steps=6", "--checkpoint_every=3", "--evaluate.every=0")
    port, runs = free_port(), {}
    two = small(folder, f"--output={folder / 'two'}", *layout)
    agents = [Agent(port, str(script), str(folder / "two.pt"), *two) for _ in range(2)]
    outs = [agent.wait(timeout=400) for agent in agents]
    assert [agent.code for agent in agents] == [0, 0], "\n".join(o[-2000:] for o in outs)
    one = small(folder, f"--output={folder / 'one'}", *layout)
    job = Job(4, str(script), str(folder / "one.pt"), *one)
    out = job.wait(timeout=400)
    assert job.code == 0, out[-3000:]
    runs = {name: torch.load(folder / f"{name}.pt") for name in ("one", "two")}
    return SimpleNamespace(folder=folder, grads=runs, outs=outs)


@pytest.mark.slow
def test_two_machines_train_to_the_weights_of_one(machines):
    one, two = (machines.folder / name for name in ("one", "two"))
    assert same(weights(one), weights(two))
    assert sum(r["grad_norm"] > 0 for r in records(two, "train")) >= 2, "the weights hardly move"
    assert [r["grad_norm"] for r in records(one, "train")] == [r["grad_norm"] for r in records(two, "train")]
    assert [p.name for p in checkpoint.finished(two)] == ["step-6", "step-3"]


@pytest.mark.slow
def test_a_copy_on_each_machine_gives_the_gradient_of_one_sharded_over_both(machines):
    grads = machines.grads
    for copies in (1, 2):
        assert torch.equal(grads["one"][copies], grads["two"][copies]) and grads["one"][copies].norm() > 0
    off = (grads["two"][1] - grads["two"][2]).norm() / grads["two"][1].norm()
    assert off <= 1e-6, off


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 0], ids=["a machine", "the machine of the rendezvous"])
def test_a_lost_machine_ends_the_other_within_a_minute_and_one_machine_resumes(lost, tmp_path):
    port, run_folder = free_port(), tmp_path / "run"
    args = small(tmp_path, f"--output={run_folder}", "--steps=400", "--parallel.replicate=2", "--resume")
    agents = [Agent(port, "-m", "lead_fast.train", *args)]
    time.sleep(2)  # the first agent to arrive hosts the rendezvous
    agents.append(Agent(port, "-m", "lead_fast.train", *args))
    other = agents[1 - lost]
    try:
        until = time.monotonic() + 240
        while not checkpoint.finished(run_folder) and time.monotonic() < until:
            time.sleep(0.1)
        assert checkpoint.finished(run_folder) and [a.process.poll() for a in agents] == [None, None]
        agents[lost].kill()
        killed = time.monotonic()
        out = other.wait(timeout=60)
        seconds = time.monotonic() - killed
    finally:
        for agent in agents:
            agent.process.kill()
            left = agent.pids()
            agent.process.wait()
            for pid in left:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
    assert other.code not in (0, None) and seconds < 60 and not other.alive(), out[-3000:]
    done = checkpoint.number(checkpoint.finished(run_folder)[0])
    again = small(tmp_path, f"--output={run_folder}", f"--steps={done + 2}", "--parallel.replicate=1", "--resume")
    succeeded(torchrun(2, "-m", "lead_fast.train", *again, timeout=300))
    steps = [r["step"] for r in records(run_folder, "train")]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) >= done + 2


@pytest.mark.slow
def test_two_machines_with_folders_of_their_own_are_refused(tmp_path):
    """The same command in two working directories: a relative --output is a different folder on each machine."""
    port, agents = free_port(), []
    args = small(tmp_path, "--output=run", "--parallel.replicate=2")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        agents.append(Agent(port, "-m", "lead_fast.train", *args, cwd=tmp_path / name))
    outs = [agent.wait(timeout=200) for agent in agents]
    assert all(agent.code for agent in agents), outs
    errors = {
        line for out in outs for line in out.splitlines() if "share the run directory" in line and "error:" in line
    }
    (sentence,) = errors
    assert "--output=FOLDER on a file system that all of them mount" in sentence
    assert not [*tmp_path.rglob("checkpoints")] and not [*tmp_path.rglob(".seen*")]


# ------------------------------------------------------------------------------------------------------ launch files

SRUN = """#!/bin/bash
# Starts the command once per node, as srun does with one task per node; ends with the worst exit code.
while [[ $1 == -* ]]; do shift; done
pids=()
for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


def stub(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def slurm(tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    stub(tmp_path / "bin", "srun", SRUN)
    stub(tmp_path / "bin", "scontrol", "#!/bin/bash\nprintf 'localhost\\nlocalhost\\n'\n")
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    job = str(free_port() - 10000)  # the port is derived from the job number
    variables = {"PATH": path, "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "two", "SLURM_JOB_ID": job}
    return run(["bash", str(ROOT / "docs" / "launch" / "slurm.sh"), *args], **variables, **env)


def test_the_slurm_script_starts_torchrun_once_per_node_with_the_same_rendezvous(tmp_path):
    stub(tmp_path / "venv" / "bin", "torchrun", '#!/bin/bash\nprintf "%s\\n" "node $SLURM_NODEID: $*"\n')
    done = succeeded(slurm(tmp_path, "--recipe=tiny", VENV=str(tmp_path / "venv")))
    lines = sorted(line for line in done.stdout.splitlines() if line.startswith("node "))
    commands = [line.partition(": ")[2].split() for line in lines]
    assert [line[:6] for line in lines] == ["node 0", "node 1"] and commands[0] == commands[1]
    parsed = get_args_parser().parse_args(commands[0])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    assert (
        parsed.rdzv_endpoint.startswith("localhost:") and parsed.module and parsed.training_script == "lead_fast.train"
    )
    wanted = {"--parallel.replicate=2", "--resume", "--recipe=tiny"}
    assert wanted <= {*parsed.training_script_args} and any(
        a.startswith("--output=") for a in parsed.training_script_args
    )


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes(tmp_path):
    args = small(tmp_path, "--steps=1", "--recipe=tiny")
    done = succeeded(slurm(tmp_path, *args, NPROC_PER_NODE="2", RUN=str(tmp_path / "run"), VENV=sys.prefix))
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file(), done.stdout[-3000:]
    assert "4 CPU ranks" in done.stdout


def test_the_skypilot_file_is_a_task_whose_commands_parse(tmp_path):
    task = yaml.safe_load((ROOT / "docs" / "launch" / "skypilot.yaml").read_text())
    assert {"resources", "num_nodes", "setup", "run", "workdir", "volumes"} <= {*task}
    assert re.fullmatch(r"H200:8|H100:8", task["resources"]["accelerators"]) and task["num_nodes"] == 2
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0
    stub(tmp_path / "bin", "torchrun", '#!/bin/bash\nprintf "%s\\n" "torchrun $*"\n')
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
             "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "sky-1", "PATH": path}  # fmt: skip
    script = task["run"].replace(".venv/bin/torchrun", "torchrun")
    envs = {k: str(v) for k, v in task.get("envs", {}).items()}
    done = succeeded(run(["bash", "-euc", script], **nodes, **envs))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("torchrun ")]
    parsed = get_args_parser().parse_args(line.split()[1:])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_endpoint) == ("2", "8", "10.0.0.1:29500")
    assert parsed.training_script == "lead_fast.train" and "--parallel.replicate=2" in parsed.training_script_args
    (mount,) = task["volumes"]
    assert any(a.startswith(f"--output={mount}") for a in parsed.training_script_args)  # a folder that the nodes share
