"""Names of formats: those of this package, those of installed packages, and `module.Class` for any other class.

A name stands for a `Format` class together with some of its options. Every module of this package is imported, and so is
every entry point of the group "qbench.formats" of an installed package; each registers its own names. If a package
cannot be loaded, asking for one of its formats raises an error that says why; the others work.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import Parameter, isclass, ismodule, signature
from pkgutil import iter_modules
from typing import Any, TypeGuard, TypeVar

from . import contract
from .contract import BrokenContract, first_line
from .format import Format

HOUSE = __name__.partition(".")[0]
_Class = TypeVar("_Class", bound=type[Format])
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Entry:
    """A registered name: a class and the options that the name fixes, `given`. package: the package that registered it."""

    cls: type[Format]
    given: dict[str, Any] = field(default_factory=dict)
    package: str = ""

    def make(self, **arguments: Any) -> Format:
        """Make the format. Options in `given`, and block and dq if the class has them `fixed`, replace the arguments."""
        return self.cls(**arguments | self.given | self.cls.fixed)

    @property
    def options(self) -> dict[str, object]:
        """The options besides block and dq, with their defaults; `Parameter.empty` if an option has none."""
        settled = (*_WORDS, *self.given)
        return {p.name: p.default for p in self._parameters if p.kind not in _VARIABLE and p.name not in settled}

    @property
    def takes_any(self) -> bool:
        """Whether the class takes options of any name."""
        return any(p.kind is Parameter.VAR_KEYWORD for p in self._parameters)

    @property
    def path(self) -> str:
        return f"{self.cls.__module__}.{self.cls.__qualname__}"

    @property
    def _parameters(self) -> list[Parameter]:
        return list(signature(self.cls).parameters.values())


@dataclass(frozen=True)
class _Lent(Entry):
    fmt: Format = field(kw_only=True)

    def make(self, **arguments: Any) -> Format:
        return self.fmt


_WORDS = ("name", "block", "dq", "target")  #: keys with a meaning of their own, so never options of a format
_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
_entries: dict[str, Entry] = {}
_problems: dict[str, str] = {}
_discovered = False


def register(*names: str, **options: Any) -> Callable[[_Class], _Class]:
    """Decorate a `Format` class: register it under each of `names`, with these options.

    Raises ValueError for a name that another class has taken. The same class may register again, such as when its
    notebook cell runs again. Also raises ValueError for a name with other characters than letters, digits, _ and -.
    """

    def add(cls: _Class) -> _Class:
        for name in names:
            if not _NAME.fullmatch(name):
                raise ValueError(f"format name {name!r}: letters, digits, _ and - are accepted")
            entry = Entry(cls, options, "qbench" if ours(cls) else cls.__module__.partition(".")[0])
            if name in _entries and _entries[name].path != entry.path:
                raise ValueError(f"format name {name!r} is taken, by {_entries[name].path}")
            _entries[name] = entry
        return cls

    return add


def get(name: str, block: int = 64, dq: bool = False, **options: Any) -> Format:
    """Make the format `name`, with a block size, with or without double quantization, and options of its own.

    name: a registered name or `module.Class`. If the format has block or dq `fixed`, those values are used. Options that
    the format's name does not show are added to it, so that results can be told apart.

    Raises KeyError, which lists the names, for an unknown name; ValueError or TypeError for a bad argument. Raises
    BrokenContract, a ValueError, if a format of another package violates the contract (`contract`).
    """
    entry = find(name)
    known = entry.options
    for option in options:
        if option not in known and not entry.takes_any:
            raise TypeError(f"{option!r} is no option of {name}; accepted: {', '.join(['block', 'dq', *known])}")
    try:
        fmt = entry.make(block=block, dq=dq, **options)
    except ValueError as error:
        raise ValueError(first_line(error)) from error
    except Exception as error:
        raise BrokenContract(f"{name} cannot be made: {type(error).__name__}: {first_line(error)}") from error
    fmt.arguments = {"name": name, "block": block, "dq": dq, **options}
    if ours(type(fmt)):
        return fmt
    chosen = {option: value for option, value in options.items() if value != known.get(option)}
    _check_name(entry, fmt, None if chosen or "." in name else name)
    contract.glance(fmt, name)
    if chosen and fmt.name == getattr(entry.cls, "name", None):
        fmt.name += "".join(f"_{option}{value}" for option, value in chosen.items())
    return fmt


def _check_name(entry: Entry, fmt: Format, expected: str | None) -> None:
    own = getattr(fmt, "name", None)
    other = _entries.get(own) if isinstance(own, str) else None
    why = f"; expected {expected!r}" if expected and own != expected else ""
    if other and other.path != entry.path:
        why = f", which is taken, by {other.path}"
    if why:
        raise BrokenContract(f"{entry.path} breaks the contract of a format: naming: name is {own!r}{why}")


def find(name: str) -> Entry:
    """Returns the entry of a name.

    Raises KeyError, which lists the names, for an unknown name. Raises ValueError if the package or module cannot be
    loaded, or if the class is not a format.
    """
    _discover()
    if name in _entries:
        return _entries[name]
    if name in _problems:
        raise ValueError(_problems[name])
    if "." in name:
        return _target(name)
    raise KeyError(f"unknown format {name!r}; there are: {', '.join(names())}")


def names() -> list[str]:
    """Every registered name, sorted."""
    _discover()
    return sorted(_entries)


def problems() -> dict[str, str]:
    """Returns the names of formats whose packages cannot be loaded, each with the reason."""
    _discover()
    return dict(_problems)


def ours(cls: type) -> bool:
    """Whether a class belongs to this package, whose own tests check the contract."""
    return cls.__module__.partition(".")[0] == HOUSE


@contextmanager
def lent(fmt: Format) -> Iterator[None]:
    """Inside the context, the name of `fmt` stands for `fmt` itself."""
    _discover()  # otherwise formats discovered inside would be forgotten
    before, arguments = dict(_entries), fmt.arguments
    _entries[fmt.name] = _Lent(type(fmt), fmt=fmt)
    try:
        yield
    finally:
        _entries.clear()
        _entries.update(before)
        fmt.arguments = arguments


def _target(name: str) -> Entry:
    module, _, attribute = name.rpartition(".")
    if not all(map(str.isidentifier, name.split("."))):
        raise ValueError(f"{name!r} names no class; accepted: module.Class, such as my_module.MyFormat")
    try:
        imported = import_module(module)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        why = "there is no such module here" if missing else f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{name}: {module} cannot be imported: {why}") from error
    cls = getattr(imported, attribute, None)
    if not _is_format(cls):
        there = [key for key, value in vars(imported).items() if _is_format(value) and value.__module__ == module]
        problem = f"has no {attribute}" if cls is None else f"has {attribute}, which is none"
        raise ValueError(f"{name}: {module} {problem}; accepted: {', '.join(there) or 'a subclass of formats.Format'}")
    return Entry(cls, {}, module.partition(".")[0])


def _is_format(value: object) -> TypeGuard[type[Format]]:
    return isclass(value) and issubclass(value, Format) and value is not Format


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    _discovered = True
    for module in iter_modules(import_module(HOUSE).__path__):
        import_module(f"{HOUSE}.{module.name}")
    for point in entry_points(group="qbench.formats"):
        before = set(_entries)
        package = point.dist.name if point.dist else point.value
        try:
            _load(point)
        except (Exception, SystemExit) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            _problems[point.name] = f"{point.name}, of {package}, cannot be loaded: {why}"
        for name in _entries.keys() - before:
            _entries[name] = replace(_entries[name], package=package)


def _load(point: EntryPoint) -> None:
    """Load an entry point: a class, which may have registered itself, or a module that registers its own names."""
    loaded = point.load()
    if _is_format(loaded):
        if point.name not in _entries or _entries[point.name].path != Entry(loaded).path:
            register(point.name)(loaded)
    elif not ismodule(loaded) and point.name not in _entries:
        raise TypeError(f"{point.value} is no subclass of formats.Format")
