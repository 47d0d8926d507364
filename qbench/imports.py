"""What follows the import of another library's module, so that a library which takes seconds to import need not be."""

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, requires
from types import ModuleType
from typing import Any

DISTRIBUTION = "qbench-formats"  #: as pip knows qbench


def install(extra: str) -> str:
    """What to type for the packages of an extra: their own names, which are right wherever qbench was installed from."""
    from packaging.requirements import Requirement

    try:
        found = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:  # a checkout that nothing installed
        found = []
    needed = [f"'{r.name}{r.specifier}'" for r in found if f'extra == "{extra}"' in str(r.marker)]
    return f"pip install {' '.join(needed or [extra])}"


class _Follow:
    """A finder of modules, which finds what others find, and once that has been imported, imports what is to follow it."""

    def __init__(self) -> None:
        self.followers: dict[str, str] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.followers:
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, found), None)
        loader: Any = spec and spec.loader  # none of a folder without an __init__
        if loader is not None:
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if follower := self.followers.pop(module.__name__, None):
                    import_module(follower)

            loader.exec_module = exec_module
        return spec


_follow = _Follow()
sys.meta_path.insert(0, _follow)


def after(name: str, follower: str) -> None:
    """Import the module `follower` once the module `name` has been imported, now if it is."""
    if name in sys.modules:
        import_module(follower)
    else:
        _follow.followers[name] = follower


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C inside is a KeyboardInterrupt, even where a library that is being imported takes it for an error, or for
    nothing."""
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt
