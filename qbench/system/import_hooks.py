"""Hooks on Python's imports. This is the one place where qbench changes how modules are found.

FOLLOWERS: importing a library also imports the module of qbench that plugs into it. So `import qbench` is fast, and the
order of imports does not matter.
MAINS: `python -m qbench.plan` runs the command that `python -m qbench plan` runs.
MOVED (`moved.py`): a module's old name still works, and one line says its new name.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .messages import OURS
from .moved import MOVED

#: the library's module, and the module of qbench that is imported after it
FOLLOWERS = {
    "transformers.quantizers.auto": "qbench.checkpoint.transformers_plugin",
    "transformers.modeling_utils": "qbench.model.parameter_count",
    "peft": "qbench.training.lora_layer",
    "torch.distributed.fsdp._fully_shard._fsdp_param": "qbench.model.fsdp",
}
#: the first word of a command line, and the module of its command
COMMANDS = {name: f"qbench.cli.{name}" for name in ("run", "report", "plan", "quantize", "bench", "runs")}
#: what Python looks for after `python -m qbench.plan`, and the module of the command; only `quantize` is no room
MAINS = {
    f"qbench.{name}" if name == "quantize" else f"qbench.{name}.__main__": module
    for name, module in COMMANDS.items()
    if name != "run"
}


class _Follow:
    """A finder that imports the follower of a library once the other finders have imported the library."""

    def __init__(self) -> None:
        self.waiting: dict[str, str] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        loader: Any = spec and spec.loader  # a folder without an __init__ has none
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if follower := self.waiting.pop(module.__name__, None):
                    import_module(follower)

            loader.exec_module = exec_module
        return spec


class _Command(InspectLoader):
    """Loads a module that runs a command when it is the main module."""

    def get_source(self, fullname: str) -> str:
        command = MAINS[fullname]
        return (
            "import sys\nfrom qbench.cli.main import run_command\n"
            f"if __name__ == '__main__':\n    sys.exit(run_command({command!r}))\n"
        )

    def is_package(self, fullname: str) -> bool:
        return False


class _Moved(InspectLoader):
    """Loads a module under its old name: its attributes are those of the modules that replaced it."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        places = [f"qbench.{place}" for place in MOVED[name.removeprefix("qbench.")].split()]
        warnings.warn(f"{OURS}{name} is now {' and '.join(places)}", FutureWarning, stacklevel=2)
        if len(places) == 1:
            sys.modules[name] = import_module(places[0])
            return

        def find(attribute: str) -> Any:
            for place in () if attribute.startswith("__") else map(import_module, places):
                if hasattr(place, attribute):
                    return getattr(place, attribute)
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")

        vars(module)["__getattr__"] = find

    def get_source(self, fullname: str) -> None:
        return None

    def is_package(self, fullname: str) -> bool:
        return any(name.startswith(f"{fullname.removeprefix('qbench.')}.") for name in MOVED)


class _Names:
    """Finds the commands, and the old names of modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in MAINS:
            return ModuleSpec(name, _Command(), origin=name)  # the origin becomes sys.argv[0]
        if name.removeprefix("qbench.") in MOVED and name.startswith("qbench."):
            return ModuleSpec(name, _Moved())
        return None


_follow = _Follow()


def after(name: str, follower: str) -> None:
    """Import the module `follower` as soon as the module `name` is imported; at once if it already is."""
    if name in sys.modules:
        import_module(follower)
    else:
        _follow.waiting[name] = follower


def install() -> None:
    """Add the hooks to Python's imports."""
    sys.meta_path[:0] = [_follow, _Names()]
    for name, follower in FOLLOWERS.items():
        after(name, follower)
