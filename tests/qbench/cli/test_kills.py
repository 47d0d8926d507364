"""Sweeps are killed at twenty moments, and a finished one is started again while something is wrong with it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.thorough,
    pytest.mark.skipif(sys.platform != "linux", reason="runs have processes of their own on Linux"),
]

# One process imports what takes seconds, and forks one that runs the command, which forks one for each run.
STARTER = '''
import contextlib, io, json, os, random, resource, shutil, signal, sys, time
from pathlib import Path

import psutil

sys.modules["bitsandbytes"] = None
from qbench.checkpoint import loading
from qbench.cli import command_line, commands, format_group, jobs, overrides
from qbench.cli import run as command
from qbench.report.run import terminal
from qbench.runs import experiment, isolated, trackers

model, folder = Path("model"), Path("sweep")
LINE = ["qbench", "-m", "+format=nf4,int8,none", "dq=false,true", "block=64", "hydra.sweep.dir=sweep", "eval.tokens=100",
        "data.seq=32", "tune.steps=2", "tune.batch=2", "tune.rank=2"]

said = None  # what the last command wrote, as a pipe holds it

def start(*arguments, before=lambda: None):
    """The command, in a process and a group of its own."""
    global said
    if said is not None:
        os.close(said)
    said, into = os.pipe()
    os.set_blocking(said, False)
    if pid := os.fork():
        os.close(into)
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(into, 1), os.dup2(into, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [*LINE, f"model.path={model}", *arguments]
        before()
        code = command.main()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run(*arguments, **options):
    return wait(start(*arguments, **options))

def output():
    """What the last command wrote, once it has ended."""
    try:
        return os.read(said, 1 << 20).decode()
    except BlockingIOError:
        return ""

def done():
    """When each finished run began, by its folder."""
    started_at = {}
    for file in folder.glob("*/result.json"):
        result = json.loads(file.read_text())
        if result["status"] == "done":
            started_at[file.parent.name] = result["run"]["started"], file.stat().st_mtime_ns
    return started_at

def members(group):
    """The processes of a command: it, and its child."""
    ids = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                ids.append(process.pid)
    return ids

def gone(group):
    """Whether all processes of a command end, soon: a child whose parent was killed is killed by the system."""
    until = time.monotonic() + 20
    while members(group) and time.monotonic() < until:
        time.sleep(0.02)
    return not members(group)

def stray():
    """What is in the sweep's folder and of no use to it."""
    kept = {".hydra", ".lock", "result.json", "report.md", "adapter", "warnings.log"}
    names = [p.name for f in folder.iterdir() if f.is_dir() for p in f.iterdir() if p.name not in kept]
    return [n for n in names if not n.endswith(".png")] + [f.name for f in folder.iterdir() if f.name == "baselines"]

started = time.monotonic()
assert run() == 0, output()
whole = time.monotonic() - started
printed = output()
runs = len(done())
reference = {f.parent.name: json.loads(f.read_text())["metrics"]["quality"] for f in folder.glob("*/result.json")}
assert "5 of 5" in printed and runs == 5 and not stray(), (printed, stray())
'''

KILLS = """
generator = random.Random(int(sys.argv[1]))
shutil.rmtree(folder)
before, kills, killed, most = {}, 0, {"group": 0, "parent": 0, "child": 0}, 0
while kills < 20:
    whom = ("group", "parent", "child")[kills % 3]
    pid = start()
    time.sleep(generator.uniform(0, whole / 3))
    until = time.monotonic() + 5
    while whom == "child" and len(members(pid)) == 1 and time.monotonic() < until:
        time.sleep(0.01)
    if whom == "child":
        for child in set(members(pid)) - {pid}:
            os.kill(child, signal.SIGKILL)
        time.sleep(generator.uniform(0, whole / 6))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL) if whom == "parent" else os.killpg(pid, signal.SIGKILL)
    wait(pid)
    assert gone(pid), f"{whom}: a process lives on"
    kills += 1
    killed[whom] += 1
    now = done()
    assert before.items() <= now.items(), f"{whom}: a finished run was lost, or done again"
    most = max(most, len(now))
    if len(now) == runs:  # all are done: again from the beginning
        shutil.rmtree(folder)
        now = {}
    before = now
assert run() == 0, output()
now = done()
assert before.items() <= now.items() and len(now) == runs and not stray(), stray()
quality = {f.parent.name: json.loads(f.read_text())["metrics"]["quality"] for f in folder.glob("*/result.json")}
assert quality == reference
print("kills", killed, most)
"""

WRONG = '''
def snapshot():
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.glob("*/result*.json")}

def interrupted(after):
    pid = start()
    time.sleep(after)
    os.killpg(pid, signal.SIGINT)
    return wait(pid)

def killed(after):
    pid = start()
    time.sleep(after)
    os.killpg(pid, signal.SIGKILL)
    return wait(pid)

def full():
    """A disk on which nothing can be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

def read_only():
    def another():
        if os.geteuid() == 0:  # whom no mode keeps out
            os.seteuid(65534)
    paths = [Path(), folder, *folder.glob("*/")]
    try:
        for path in paths:
            path.chmod(0o555)
        return run(before=another)
    finally:
        for path in paths:
            path.chmod(0o755)

def without(path):
    path.rename("away")
    try:
        return run()
    finally:
        Path("away").rename(path)

def broken(file):
    content = file.read_bytes()
    file.write_bytes(content[:100])
    try:
        return run()
    finally:
        file.write_bytes(content)

def busy():
    """The finished sweep's runs are in use by another process."""
    from qbench.system import files
    with contextlib.ExitStack() as stack:
        for file in folder.glob("*/result.json"):
            stack.enter_context(files.locked(file.parent))
        return run()

each = whole / runs
cases = {
    "Ctrl-C at once": lambda: interrupted(0.05),
    "Ctrl-C while it looks": lambda: interrupted(min(each, 1)),
    "Ctrl-C later": lambda: interrupted(min(2 * each, 2)),
    "killed while it looks": lambda: killed(min(each, 1)),
    "timeout=0.01": lambda: run("timeout=0.01"),
    "track=nonsense": lambda: run("track=nonsense"),
    "tracker not installed": lambda: run("track=wandb"),
    "model gone": lambda: without(model),
    "config of the model broken": lambda: broken(model / "config.json"),
    "disk full": lambda: run(before=full),
    "folder read-only": read_only,
    "busy": busy,
}
before = snapshot()
assert len(before) == runs
outcomes = {}
for name, case in cases.items():
    outcomes[name] = case(), output()
    assert snapshot() == before, f"{name}: something was undone"
    assert "Traceback" not in outcomes[name][1], (name, outcomes[name][1])
assert run() == 0 and snapshot() == before and not stray()
print(json.dumps({name: (code, said.strip().splitlines()[-1:]) for name, (code, said) in outcomes.items()}, indent=1))
'''


def script(body: str, model: Path, folder: Path, *arguments: str) -> str:
    shutil.copytree(model, folder / "model")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    line = [sys.executable, "-c", STARTER + body, *arguments]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_at_twenty_moments_nothing_is_lost_or_doubled_or_left(tiny_llama, tmp_path):
    """The group of its processes, the parent alone, the child alone."""
    seed = int.from_bytes(os.urandom(2), "little")
    assert "kills" in script(KILLS, tiny_llama, tmp_path, str(seed)), seed


def test_a_finished_sweep_is_undone_by_nothing_that_is_wrong(tiny_llama, tmp_path):
    outcomes = json.loads(script(WRONG, tiny_llama, tmp_path))
    assert len(outcomes) >= 10
    wrong = {name: code for name, (code, _) in outcomes.items() if not name.startswith(("Ctrl-C", "killed"))}
    assert all(code in (1, 2) for code in wrong.values()), outcomes
