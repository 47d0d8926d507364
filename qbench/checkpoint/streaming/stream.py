"""A checkpoint to a packed one: a file at a time, of it a tensor at a time, and on from where it was interrupted.

What has been done is told by quantize.json beside it, which is written after each file: what the file was made of, and
the digest of what came of it. A file of which both still hold is kept; any other is made again, to the same bytes.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.filesize import decimal
from torch import Tensor

from formats import QuantizedTensor
from qbench.checkpoint import empty_model, packed_checkpoint, safetensors_io
from qbench.checkpoint.recipe import CONFIG, Recipe
from qbench.checkpoint.safetensors_io import Contents, Spec
from qbench.errors import InputError
from qbench.model.quant_linear import QuantLinear
from qbench.model.selection import weight_of
from qbench.results import json_files, provenance
from qbench.system import files

from .source import Source

PROGRESS = "quantize.json"
_ALONG = (".json", ".txt", ".model", ".jinja", ".tiktoken")  #: endings of the files of tokenizers and of generation


def run(
    source: Source,
    recipe: Recipe,
    out: Path,
    advance: Callable[[int], None] = lambda n: None,
    tell: Callable[[str], None] = lambda line: None,
) -> Contents:
    """Quantize `source` into the folder `out`; where that was begun before, go on.

    advance: is told the bytes read; tell: a line for each file. Returns what `out` holds. Raises InputError where `out`
    holds something else, or a tensor of the source holds NaN or Inf; files.Busy where another process is at it; OSError
    naming the file that could not be written. Whatever is raised, the same call goes on from there.
    """
    recipe = dataclasses.replace(recipe, coverage=source.coverage.plain())
    _look(out, source.folder)
    out.mkdir(parents=True, exist_ok=True)
    with files.locked(out):
        targets = {
            file: out / safetensors_io.name(i, len(source.contents)) for i, file in enumerate(source.contents, 1)
        }
        model = hashlib.sha256(json.dumps(source.config).encode()).hexdigest()
        job = {
            "model": model,
            "format": recipe.arguments,
            "layout": recipe.plain(),
            "files": [file.name for file in source.contents],
        }
        origins = {target.name: _origin(file, recipe) for file, target in targets.items()}
        done = _claim(out, job, origins)
        contents = {}
        for file, target in targets.items():
            started = time.perf_counter()
            plan = _plan(source, recipe, file)
            contents[target] = {name: spec for specs in plan.values() for name, spec in specs.items()}
            before = sum(spec.nbytes for spec in source.contents[file].values())
            if target.name in done and done[target.name]["sha256"] == _digest(target):
                advance(before)
                tell(f"{target.name}  as it was")
                continue
            safetensors_io.write(target, contents[target], _tensors(source, recipe, file, plan, advance))
            done[target.name] = {"origin": origins[target.name], "sha256": _digest(target)}
            json_files.write_json(out / PROGRESS, {"job": job, "done": dict(sorted(done.items()))})
            after = sum(spec.nbytes for spec in contents[target].values())
            tell(f"{target.name}  {decimal(before)} to {decimal(after)}  {time.perf_counter() - started:.1f} s")
        _copy_along(source.folder, out)
        packed_checkpoint.finish(out, source.config, recipe, contents)
    return contents


def _look(out: Path, folder: Path) -> None:
    """Raises InputError where `out` is no folder for this, before anything in it is touched."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; accepted: a new or empty folder")
    if out.resolve() == folder.resolve():
        raise InputError(f"out: {out} is the checkpoint itself; accepted: a new or empty folder")
    held = sorted(file.name for file in out.iterdir() if file.name != ".lock") if out.is_dir() else []
    if PROGRESS not in held and any(not name.startswith(f".{PROGRESS}.") for name in held):
        more = f" and {len(held) - 3} more" if len(held) > 3 else ""
        raise InputError(f"out: {out} holds {', '.join(held[:3])}{more}; accepted: a new or empty folder")


def _claim(out: Path, job: dict, origins: dict[str, dict]) -> dict[str, dict]:
    """What is done of a job in its folder, by file, and made of what is still there; the folder is then this job's.

    Raises InputError where the folder is another's. What is finished is never replaced by something else.
    """
    kept = json_files.read_json(out / PROGRESS) if (out / PROGRESS).is_file() else {"job": job, "done": {}}
    if not isinstance(kept, dict) or kept.keys() != {"job", "done"}:
        raise InputError(f"out: the {PROGRESS} of {out} is of something else; accepted: a new or empty folder")
    if differing := [key for key in job if kept["job"].get(key) != job[key]]:
        raise InputError(f"out: {out} holds what is of another {differing[0]}; accepted: a new or empty folder")
    files.clear_partial(out)
    json_files.write_json(out / PROGRESS, kept)
    valid = {name: one for name, one in kept["done"].items() if one["origin"] == origins[name]}
    if (out / safetensors_io.INDEX).is_file() and len(valid) < len(origins):
        other = next(name for name in origins if name not in valid)
        raise InputError(
            f"out: {out} is finished, and {other} is of other weights or by other code; accepted: a new or empty folder"
        )
    return valid


def _origin(file: Path, recipe: Recipe) -> dict:
    """What a file is made of: size, time and header tell an input from others without reading all of it."""
    status = file.stat()
    with file.open("rb") as stream:
        head = hashlib.sha256(stream.read(int.from_bytes(stream.read(8), "little"))).hexdigest()
    origin = {"name": file.name, "bytes": status.st_size, "modified": status.st_mtime_ns, "header": head}
    return {"source": origin, "code": provenance.code_digest(), "format": provenance.format_digest(recipe.format)}


def _digest(file: Path) -> str:
    """SHA-256 of a file; of one that is missing, that of nothing."""
    if not file.is_file():
        return hashlib.sha256().hexdigest()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plan(source: Source, recipe: Recipe, file: Path) -> dict[str, dict[str, Spec]]:
    """What comes of each tensor of a file, by name in the new one."""
    plan = {}
    for tensor, spec in source.contents[file].items():
        if tensor in source.layers:
            shape = weight_of(source.layers[tensor]).shape
            packed = _packed(source, recipe, tensor, recipe.format.empty(shape, spec.dtype))
            plan[tensor] = {name: Spec.of(part) for name, part in packed.items()}
        else:
            plan[tensor] = {source.names[tensor]: spec}
    return plan


def _packed(source: Source, recipe: Recipe, tensor: str, packed: QuantizedTensor) -> dict[str, Tensor]:
    return recipe.tensors(source.layer_name(tensor), QuantLinear(packed), fixed=True)


def _tensors(
    source: Source, recipe: Recipe, file: Path, plan: dict[str, dict[str, Spec]], advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a new file under their names, as the old ones are read; no old one outlives its turn."""
    for tensor in plan:
        values = safetensors_io.read(file, tensor)
        size = values.nbytes
        if tensor in source.layers:
            weight = weight_of(source.layers[tensor], values)
            try:
                packed = recipe.format.quantize(weight, name=f"{file}: {tensor}")
            except ValueError as error:
                raise InputError(str(error)) from error
            yield from _packed(source, recipe, tensor, packed).items()
            del weight, packed
        else:
            if not empty_model.finite(values):
                raise InputError(f"{file}: {tensor} holds NaN or Inf; finite weights are accepted")
            yield source.names[tensor], values
        del values
        advance(size)


def _copy_along(folder: Path, out: Path) -> None:
    """The files of the tokenizer and of generation; no code, and no weights of another kind."""
    for file in sorted(folder.iterdir()):
        left = file.name in (CONFIG, PROGRESS) or file.name.endswith(".index.json") or file.name.startswith(".")
        if file.is_file() and file.suffix in _ALONG and not left:
            with file.open("rb") as old, files.replaced(out / file.name) as new:
                shutil.copyfileobj(old, new)
