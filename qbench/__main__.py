"""python -m qbench +format=nf4 block=64: where Hydra ends and typed arguments begin."""

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench import messages
from qbench.imports import interruptible

if TYPE_CHECKING:
    from qbench.arguments import Check, Job


def main() -> int:
    """Run what the command line says. 0: done; 1: a run failed; 2: bad input; 130: interrupted."""
    messages.printable()
    modules: dict[str, Any] = sys.modules
    modules.setdefault("bitsandbytes", None)  # PEFT would import it: 3 s, and CUDA would start before the runs' forks
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # so that to ask whether there is a GPU does not start it either
    codes: list[int] = []

    def load() -> tuple["Job", "Check"]:
        from qbench import groups, jobs, places

        def check(config: dict) -> None:
            path = jobs.settings_of(config).model.path
            if not (path and places.is_hub_id(path)):  # else it may be a download, which a run has to begin
                places.locate(path)

        groups.store()
        jobs.codes = codes
        return jobs.job, check

    try:
        if "--formats" in sys.argv[1:]:
            from qbench import catalog

            return catalog.show()
        with interruptible():
            from qbench import arguments  # Hydra, which takes a while to import

        sweep = sweep_folder(sys.argv[1:])
        told = [f"hydra.sweep.dir={arguments.quoted(str(sweep))}"] if sweep else []
        with messages.aside():
            if code := arguments.start(arguments.RUN, load, told):
                return code
        return summary(sweep) if sweep and sweep.is_dir() else max(codes, default=0)
    except KeyboardInterrupt:
        begun = "what was measured is in result.json; the same command goes on from there"
        sys.stderr.write(f"qbench: interrupted; {begun if codes else 'no run had begun'}\n")
        return 130


def sweep_folder(arguments: list[str]) -> Path | None:
    """Where the runs of a sweep lie: one folder for the same command, so that it goes on where it ended.

    None where the arguments ask for no sweep.
    """
    from qbench.arguments import text_of

    named = [argument.removeprefix("+experiments=") for argument in arguments if argument.startswith("+experiments=")]
    if not named and not {"-m", "--multirun"} & set(arguments):
        return None
    for argument in arguments:
        if argument.startswith("hydra.sweep.dir="):
            return Path(text_of(argument.removeprefix("hydra.sweep.dir=")))
    decisive = sorted(
        a for a in arguments if "=" in a and not a.lstrip("+").startswith(("hydra", "timeout=", "track="))
    )
    return Path("sweeps") / f"{'-'.join(named) or 'sweep'}-{hashlib.sha256(repr(decisive).encode()).hexdigest()[:8]}"


def summary(folder: Path) -> int:
    """Say how many runs of a sweep are done, and which are not and why. 0 if all are, else 1."""
    from qbench import baseline, jobs, record
    from qbench.arguments import stderr

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
