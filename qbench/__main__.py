"""python -m qbench +format=nf4 block=64: where Hydra ends and typed arguments begin."""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from qbench import groups, jobs, messages
from qbench.jobs import CONF, HERE, stderr

EXPERIMENTS = HERE / "experiments" if (HERE / "experiments").is_dir() else HERE.parent / "experiments"


def main() -> int:
    """Run what the command line says. 0: done; 1: a run failed; 2: bad input; 130: interrupted."""
    messages.printable()
    if "--formats" in sys.argv[1:]:
        from qbench import catalog

        return catalog.show()
    modules: dict[str, Any] = sys.modules
    modules.setdefault("bitsandbytes", None)  # PEFT would import it: 3 s, and CUDA would start before the runs' forks
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that to ask whether there is a GPU does not start it either
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing several lines of its own
    jobs.codes.clear()
    groups.store()
    sweep = sweep_folder(sys.argv[1:])
    # keys of a format come with it, and before a sweep has chosen one there is none: hence `++`
    sys.argv[1:] = [f"++{argument}" if argument.startswith("format.") else argument for argument in sys.argv[1:]]
    first = next((i for i, argument in enumerate(sys.argv) if i and "=" in argument), len(sys.argv))  # side by side
    ours = [f"hydra.searchpath=[file://{EXPERIMENTS.parent}]", *([f"hydra.sweep.dir={sweep}"] if sweep else [])]
    sys.argv[first:first] = ours
    try:
        with messages.aside():
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(jobs.job)()
    except (HydraException, OmegaConfBaseException) as error:
        stderr.print(f"qbench: {jobs.one_line(error)}")
        return 2
    except KeyboardInterrupt:
        stderr.print("qbench: interrupted; what was measured is in result.json; the same command goes on from there")
        return 130
    return summary(sweep) if sweep and sweep.is_dir() else max(jobs.codes, default=0)


def sweep_folder(arguments: list[str]) -> Path | None:
    """Where the runs of a sweep lie: one folder for the same command, so that it goes on where it ended.

    None where the arguments ask for no sweep.
    """
    named = [argument.removeprefix("+experiments=") for argument in arguments if argument.startswith("+experiments=")]
    if not named and not {"-m", "--multirun"} & set(arguments):
        return None
    for argument in arguments:
        if argument.startswith("hydra.sweep.dir="):
            return Path(argument.removeprefix("hydra.sweep.dir="))
    decisive = sorted(
        a for a in arguments if "=" in a and not a.lstrip("+").startswith(("hydra", "timeout=", "track="))
    )
    return Path("sweeps") / f"{'-'.join(named) or 'sweep'}-{hashlib.sha256(repr(decisive).encode()).hexdigest()[:8]}"


def summary(folder: Path) -> int:
    """Say how many runs of a sweep are done, and which are not and why. 0 if all are, else 1."""
    from qbench import baseline, record

    baseline.clear(folder / jobs.BASELINES)
    results, unreadable = record.collect(folder)
    missing = [f"{path}: {reason}" for path, reason in unreadable.items()]
    for path, result in results.items():
        if result["status"] != "done":
            why = result["error"] or {"type": "unfinished", "message": "the process ended before the run did"}
            missing.append(f"{path.parent}: {result['status']}, {why['type']}: {why['message']}")
    done = sum(result["status"] == "done" for result in results.values())
    stderr.print(f"\n{done} of {done + len(missing)} runs are done in {folder}")
    for line in missing:
        stderr.print(f"  {line}")
    if done:
        stderr.print(f"python -m qbench.report {folder} sets them side by side")
    return 1 if missing or not done else 0


if __name__ == "__main__":
    sys.exit(main())
