"""Writes a packed checkpoint one file and one tensor at a time, and resumes after an interruption.

After each file, quantize.json records what the file was made of (its origin) and the digest of the result. A later call
keeps a file if both still match. It writes any other file again, with the same bytes.
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
from qbench.checkpoint.safetensors_io import Contents, TensorSpec
from qbench.errors import InputError
from qbench.model.quant_linear import QuantLinear
from qbench.model.selection import weight_of
from qbench.results import json_files, provenance
from qbench.system import files

from .source import Source

PROGRESS = "quantize.json"
#: suffixes of the files of tokenizers and of generation
_TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")


def quantize_checkpoint(
    source: Source,
    recipe: Recipe,
    out: Path,
    advance: Callable[[int], None] = lambda n: None,
    report: Callable[[str], None] = lambda line: None,
) -> Contents:
    """Quantize `source` into the folder `out`, or resume an earlier call. Returns the contents of `out`.

    advance: called with the bytes read, for a progress bar. report: called with a line after each file.

    Raises InputError if `out` holds something else, or a tensor of the source holds NaN or Inf. Raises files.Busy if
    another process writes to `out`, OSError naming a file that could not be written. After any of these, the same call
    resumes.
    """
    recipe = dataclasses.replace(recipe, coverage=source.coverage.to_json())
    _check_folders(out, source.folder)
    out.mkdir(parents=True, exist_ok=True)
    with files.locked(out):
        count = len(source.contents)
        targets = {file: out / safetensors_io.shard_name(i, count) for i, file in enumerate(source.contents, 1)}
        job = _describe_job(source, recipe)
        origins = {target.name: _describe_origin(file, recipe) for file, target in targets.items()}
        done = _claim_folder(out, job, origins)
        contents = {}
        for file, target in targets.items():
            started = time.perf_counter()
            plan = _plan_tensors(source, recipe, file)
            contents[target] = {name: spec for specs in plan.values() for name, spec in specs.items()}
            before = sum(spec.nbytes for spec in source.contents[file].values())
            if target.name in done and done[target.name]["sha256"] == _digest(target):
                advance(before)
                report(f"{target.name}  as it was")
                continue
            safetensors_io.write(target, contents[target], _quantized_tensors(source, recipe, file, plan, advance))
            done[target.name] = {"origin": origins[target.name], "sha256": _digest(target)}
            json_files.write_json(out / PROGRESS, {"job": job, "done": dict(sorted(done.items()))})
            after = sum(spec.nbytes for spec in contents[target].values())
            report(f"{target.name}  {decimal(before)} to {decimal(after)}  {time.perf_counter() - started:.1f} s")
        _copy_text_files(source.folder, out)
        packed_checkpoint.write_config_and_index(out, source.config, recipe, contents)
    return contents


def _describe_job(source: Source, recipe: Recipe) -> dict:
    """The job that a folder is written for. A later call resumes it only if it has the same job."""
    return {
        "model": hashlib.sha256(json.dumps(source.config).encode()).hexdigest(),
        "format": recipe.arguments,
        "layout": recipe.to_json(),
        "files": [file.name for file in source.contents],
    }


def _check_folders(out: Path, folder: Path) -> None:
    """Raises InputError if `out` cannot be written to. Nothing in it is changed."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file; accepted: a new or empty folder")
    if out.resolve() == folder.resolve():
        raise InputError(f"out: {out} is the checkpoint itself; accepted: a new or empty folder")
    present = sorted(file.name for file in out.iterdir() if file.name != ".lock") if out.is_dir() else []
    if PROGRESS not in present and any(not name.startswith(f".{PROGRESS}.") for name in present):
        more = f" and {len(present) - 3} more" if len(present) > 3 else ""
        raise InputError(f"out: {out} holds {', '.join(present[:3])}{more}; accepted: a new or empty folder")


def _claim_folder(out: Path, job: dict, origins: dict[str, dict]) -> dict[str, dict]:
    """Mark the folder as this job's. Returns the entries of quantize.json, by file, whose origins still match.

    Raises InputError if the folder is another job's, or if it is finished and its origins have changed: a finished
    checkpoint is never replaced.
    """
    progress = json_files.read_json(out / PROGRESS) if (out / PROGRESS).is_file() else {"job": job, "done": {}}
    if not isinstance(progress, dict) or progress.keys() != {"job", "done"}:
        raise InputError(f"out: the {PROGRESS} of {out} belongs to something else; accepted: a new or empty folder")
    if differing := [key for key in job if progress["job"].get(key) != job[key]]:
        raise InputError(f"out: {out} was begun with another {differing[0]}; accepted: a new or empty folder")
    files.remove_partial(out)
    json_files.write_json(out / PROGRESS, progress)
    valid = {name: entry for name, entry in progress["done"].items() if entry["origin"] == origins[name]}
    if (out / safetensors_io.INDEX).is_file() and len(valid) < len(origins):
        other = next(name for name in origins if name not in valid)
        raise InputError(
            f"out: {out} is finished, and {other} was made from other weights or code; accepted: a new or empty folder"
        )
    return valid


def _describe_origin(file: Path, recipe: Recipe) -> dict:
    """What a file is made of: source, code and format. Size, time and header identify the source."""
    status = file.stat()
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        head = hashlib.sha256(stream.read(header_bytes)).hexdigest()
    origin = {"name": file.name, "bytes": status.st_size, "modified": status.st_mtime_ns, "header": head}
    return {"source": origin, "code": provenance.code_digest(), "format": provenance.format_digest(recipe.format)}


def _digest(file: Path) -> str:
    """SHA-256 of a file. A missing file counts as an empty one."""
    if not file.is_file():
        return hashlib.sha256().hexdigest()
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plan_tensors(source: Source, recipe: Recipe, file: Path) -> dict[str, dict[str, TensorSpec]]:
    """For each tensor of a file: the specs of the tensors that replace it, by their names in the new file."""
    plan = {}
    for tensor, spec in source.contents[file].items():
        if tensor in source.layers:
            shape = weight_of(source.layers[tensor]).shape
            stored = _stored_tensors(source, recipe, tensor, recipe.format.empty(shape, spec.dtype))
            plan[tensor] = {name: TensorSpec.of(part) for name, part in stored.items()}
        else:
            plan[tensor] = {source.names[tensor]: spec}
    return plan


def _stored_tensors(source: Source, recipe: Recipe, tensor: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors that are stored for a quantized weight, by name in the new file."""
    return recipe.tensors_of(source.layer_name(tensor), QuantLinear(weight), fixed=True)


def _quantized_tensors(
    source: Source, recipe: Recipe, file: Path, plan: dict[str, dict[str, TensorSpec]], advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a new file by name. Reads one old tensor at a time and frees it before the next."""
    for tensor in plan:
        values = safetensors_io.read(file, tensor)
        size = values.nbytes
        if tensor in source.layers:
            weight = weight_of(source.layers[tensor], values)
            try:
                quantized = recipe.format.quantize(weight, name=f"{file}: {tensor}")
            except ValueError as error:
                raise InputError(str(error)) from error
            yield from _stored_tensors(source, recipe, tensor, quantized).items()
            del weight, quantized
        else:
            if not empty_model.is_finite(values):
                raise InputError(f"{file}: {tensor} holds NaN or Inf; finite weights are accepted")
            yield source.names[tensor], values
        del values
        advance(size)


def _copy_text_files(folder: Path, out: Path) -> None:
    """Copy the files of the tokenizer and of generation, but neither code nor other weights."""
    for file in sorted(folder.iterdir()):
        excluded = file.name in (CONFIG, PROGRESS) or file.name.endswith(".index.json") or file.name.startswith(".")
        if file.is_file() and file.suffix in _TEXT_SUFFIXES and not excluded:
            with file.open("rb") as old, files.atomic_write(out / file.name) as new:
                shutil.copyfileobj(old, new)
