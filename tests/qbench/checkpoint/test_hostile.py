"""Every entry answers a tampered checkpoint with one line of error, or with a model whose numbers are finite.

Each case is a random mutation, with a seed, of a checkpoint. It runs in its own process, whose standard input says yes to
everything. The process records each file that it opens to write, each program that it starts and each connection.
"""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import qbench
from qbench import checkpoint
from qbench.checkpoint import loading, packed_checkpoint  # here, so that no child has to import them
from qbench.checkpoint.recipe import Recipe
from qbench.checkpoint.streaming import source, stream
from qbench.cli import api  # here, so that no child has to import it
from qbench.errors import InputError
from qbench.model.selection import packed_layers

CPU = torch.device("cpu")
NF4 = {"name": "nf4", "block": 64, "dq": True}
PROGRAMS = "git", "uname"  # the commit of the checkout, and the processor
SECONDS, BYTES = 20, 2 * 2**30
WEIGHTS, CONFIG = "model.safetensors", "config.json"
CODE = (
    "import pathlib; pathlib.Path({marker!r}).touch()\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
)

# values that a mutation gives to keys of JSON files
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**4, 10**7, 10**9, 2**63, 10**30, 0.5, -1e30, float("inf"), float("nan"), "",
    "x", "../../x", "/etc/passwd", "evil/kernel", "code.Model", "a\u0000b", "\ud800", "é" * 2000, [], [[]], {}, {"": {}},
    {"a": 1}, [1, 2, 3], ["x"] * 50, "{{ 1/0 }}", "nf4", "float16", "llama", "mamba", "bert", "gpt2", "mixtral", "gemma2",
]  # fmt: skip


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def edit_json(file: Path, change: Callable[[Any], Any]) -> None:
    if file.exists():
        file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")


def draw_place(draw: random.Random, tree: Any) -> tuple[Any, Any]:
    """Draw a dict or list within a JSON tree, and one of its keys."""
    while True:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if not isinstance(tree[key], dict | list) or not tree[key] or draw.random() < 0.3:
            return tree, key
        tree = tree[key]


def change_a_value(draw: random.Random, tree: Any) -> Any:
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        where, key = draw_place(draw, tree)
        match draw.randrange(6):
            case 0:
                del where[key]
            case 1 if isinstance(where, dict):
                where[f"{key}x"] = where.pop(key)
            case _:
                where[key] = draw.choice(VALUES)
        if not tree:
            break
    return tree


def in_header(draw: random.Random, folder: Path) -> None:
    """Change the header of a file of tensors: its JSON, length or bytes; or truncate the file."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    match draw.randrange(5):
        case 0:
            raw = raw[: draw.randrange(len(raw))]
        case 1:
            raw = draw.choice([0, 1, size - 1, size + 8, 2**40, 2**63]).to_bytes(8, "little") + raw[8:]
        case 2:
            changed = bytearray(raw)
            for _ in range(draw.choice((1, 4, 50))):
                changed[draw.randrange(min(len(raw), size + 8))] = draw.randrange(256)
            raw = bytes(changed)
        case 3:
            raw = (size + 2000).to_bytes(8, "little") + nested(1000).encode() + raw[8:]
        case _:
            head = change_a_value(draw, json.loads(raw[8 : 8 + size]))
            text = json.dumps(head).encode()
            raw = len(text).to_bytes(8, "little") + text + raw[8 + size :]
    file.write_bytes(raw)


def in_values(draw: random.Random, folder: Path) -> None:
    """Change bytes of the tensors."""
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(draw.choice((1, 10, 1000))):
        place = draw.randrange(start, len(raw))
        raw[place] = draw.choice((0, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    file.write_bytes(raw)


def in_index(draw: random.Random, folder: Path) -> None:
    names = [WEIGHTS, "../x.safetensors", "/etc/passwd", "missing.safetensors", "", 5, None, "config.json"]
    index = {"metadata": {}, "weight_map": {f"a{i}": draw.choice(names) for i in range(draw.randrange(4))}}
    if draw.random() < 0.5:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    (folder / f"{WEIGHTS}.index.json").write_text(
        draw.choice([json.dumps(change_a_value(draw, index)), nested(5000), "", "[]", '{"weight_map": 3}'])
    )


def in_config(draw: random.Random, folder: Path) -> None:
    def change(config: dict) -> dict:
        match draw.randrange(8):
            case 0:
                names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
                return config | {"auto_map": names, "model_type": draw.choice(["theirs", "llama"])}
            case 1:
                return config | {draw.choice(["attn_implementation", "_attn_implementation"]): "evil/kernel"}
            case 2:
                key = draw.choice(["transformers_weights", "quantization_config", "kernel_config", "fusion_config"])
                return config | {key: draw.choice(VALUES)}
            case 3:
                return config | {draw.choice(list(config)): draw.choice((10**7, 10**9, 10**12))}
            case _:
                return change_a_value(draw, config)

    if draw.random() < 0.1:
        text = [nested(5000), "", "\ufeff{}", "[]", "{", '{"model_type": "llama"}', "é" * 10]
        (folder / CONFIG).write_bytes(draw.choice(text).encode("utf-16" if draw.random() < 0.3 else "utf-8"))
    else:
        edit_json(folder / CONFIG, change)


def in_recipe(draw: random.Random, folder: Path) -> None:
    """Change how the weights are packed; claim it of a 16-bit checkpoint."""

    def change(config: dict) -> dict:
        recipe = config.get("quantization_config", {"quant_method": draw.choice(["qbench", "bitsandbytes", "gptq"])})
        return config | {"quantization_config": change_a_value(draw, recipe)}

    edit_json(folder / CONFIG, change)


def in_tokenizer(draw: random.Random, folder: Path) -> None:
    settings, file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    match draw.randrange(6):
        case 0:
            raw = bytearray(file.read_bytes())
            for _ in range(draw.choice((1, 20))):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            file.write_bytes(raw[: draw.choice((len(raw), len(raw) // 2))])
        case 1:
            names = {
                "AutoTokenizer": draw.choice([["code.Tokenizer", None], [None, "code.Tokenizer"], "code.Tokenizer"])
            }
            edit_json(settings, lambda content: content | {"auto_map": names, "tokenizer_class": "Theirs"})
        case 2:
            draw.choice((settings, file)).write_text(draw.choice((nested(5000), "", "[]", "{}")))
        case 3:
            edit_json(file, lambda content: change_a_value(draw, content))
        case _:
            edit_json(settings, lambda content: change_a_value(draw, content))


def in_pickle(draw: random.Random, folder: Path) -> None:
    """Replace safetensors with PyTorch's file, and add other files that could be run or loaded."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    evil = pickle.dumps(Evil(folder / "ran"))
    content = draw.choice([evil, evil[:20], b"PK\x03\x04" + evil, b""])
    for name in ("pytorch_model.bin", "adapter_model.bin", "spiece.model", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.marker),))


PARTS = [in_header, in_values, in_index, in_config, in_config, in_recipe, in_tokenizer, in_pickle]


def check_finite(model: PreTrainedModel) -> None:
    """Check that weights are finite. Logits may still overflow; the scores then report it."""
    for name, tensor in model.dequantize().state_dict().items() if packed_layers(model) else model.named_parameters():
        assert tensor.isfinite().all(), f"loaded, and {name} is not finite"
    with torch.no_grad():
        model(torch.arange(8)[None])


def load(folder: Path, out: Path) -> None:
    check_finite(loading.load(str(folder), torch.float32, CPU).model)


def load_packed(folder: Path, out: Path) -> None:
    check_finite(packed_checkpoint.load(folder, CPU, torch.float32).model)


def quantize(folder: Path, out: Path) -> None:
    checkpoint = source.read_source(str(folder))
    stream.quantize_checkpoint(checkpoint, Recipe.of(NF4, checkpoint.dtypes), out / "packed")


def run(folder: Path, out: Path) -> None:
    keys = {"path": str(folder), "dtype": "float32"}
    data = {"seq": 16}
    api.run("nf4", model=keys, data=data, tune=None, eval={"tokens": 30}, device="cpu", out=out / "run")


ENTRIES = {"load": load, "quantize": quantize, "run": run, "packed": load_packed, "bitsandbytes": load_packed}


@pytest.fixture(scope="module")
def sources(tiny_llama, tmp_path_factory) -> dict[str, Path]:
    """A valid checkpoint for each entry."""
    root = tmp_path_factory.mktemp("sources")
    loaded = loading.load(str(tiny_llama), torch.float32, CPU)
    packed = qbench.pack(loaded.model, **{"format": "nf4", "dq": True})
    for layout in ("qbench", "bitsandbytes"):
        checkpoint.save(packed, root / layout, loaded.tokenizer, layout=layout)
    return dict.fromkeys(("load", "quantize", "run"), tiny_llama) | {
        "packed": root / "qbench",
        "bitsandbytes": root / "bitsandbytes",
    }


def watch(allowed: Path, events: list[str]) -> None:
    """Record forbidden events: writes outside of `allowed`, programs, connections."""

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            place = os.path.realpath(os.fsdecode(path))
            inside = place.startswith((str(allowed), "/dev/", "/proc/")) or "__pycache__" in place
            if writes and not inside:
                events.append(f"writes {place}")
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.symlink"):
            place = os.path.realpath(os.fsdecode(arguments[0]))
            if not place.startswith(str(allowed)) and "__pycache__" not in place:
                events.append(f"{event} {place}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "socket.connect") and arguments[0] not in PROGRAMS:
            events.append(f"{event} {arguments}")

    sys.addaudithook(hook)


def attempt(entry: str, folder: Path, scratch: Path) -> str:
    """Run an entry in a child of this process. Returns "ok", "refused: …", or what went wrong."""
    answer = scratch / "answer"
    child = os.fork()
    if not child:
        code = 1
        try:
            yes = os.open(scratch / "yes", os.O_RDWR | os.O_CREAT)
            os.write(yes, b"y\n" * 1000)
            os.lseek(yes, 0, os.SEEK_SET)
            os.dup2(yes, 0)
            sys.stdin = open(0, encoding="utf-8", closefd=False)
            quiet = os.open(scratch / "printed", os.O_RDWR | os.O_CREAT)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os.chdir(scratch)
            events: list[str] = []
            watch(scratch, events)
            try:
                ENTRIES[entry](folder, scratch)
                outcome = "ok"
            except InputError as error:
                outcome = f"refused: {error}" if "\n" not in str(error) else f"several lines: {error}"
            except BaseException as error:
                outcome = f"raised {type(error).__name__}: {error}"
            answer.write_text("; ".join([outcome, *events]), errors="backslashreplace")
            code = 0
        finally:
            os._exit(code)
    started = time.monotonic()
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() - started > 6 * SECONDS:  # of a busy machine
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return f"took longer than {SECONDS} s"
        time.sleep(0.01)
    if usage.ru_utime + usage.ru_stime > SECONDS:
        return f"took {usage.ru_utime + usage.ru_stime} s"
    if usage.ru_maxrss * 1024 > BYTES + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024:
        return f"took {usage.ru_maxrss} kB"
    if not answer.exists():
        return f"ended by {status}"
    if (folder / "ran").exists():
        return f"ran its code; {answer.read_text()}"
    return answer.read_text()


def case(entry: str, number: int, sources: dict[str, Path], tmp_path: Path) -> tuple[str, str]:
    """Returns the mutation and the answer of the entry."""
    draw = random.Random(f"{entry} {number}")
    scratch = tmp_path / str(number)
    folder = Path(shutil.copytree(sources[entry], scratch / "model"))
    (folder / "code.py").write_text(CODE.format(marker=str(folder / "ran")))
    part = PARTS[number % len(PARTS)]
    part(draw, folder)
    outcome = attempt(entry, folder, scratch)
    shutil.rmtree(scratch)
    return part.__name__, outcome


#: the last is a run that fails with its reason: weights may be finite and yet so large that no likelihood is
ANSWERS = ("refused: ", "ok", "raised FloatingPointError: the model gives ")


def judge(entry: str, numbers: range, sources: dict[str, Path], tmp_path: Path) -> None:
    torch.set_num_threads(1)  # so that a child computes
    answers = {number: case(entry, number, sources, tmp_path) for number in numbers}
    wrong = {n: f"{part}: {outcome}" for n, (part, outcome) in answers.items() if not outcome.startswith(ANSWERS)}
    wrong |= {
        n: f"{part}: {outcome}"
        for n, (part, outcome) in answers.items()
        if "; " in outcome and outcome.startswith("ok")
    }
    assert not wrong, "\n".join(f"{entry} {number} {line}" for number, line in wrong.items())
    assert sum(end.startswith("refused") for _, end in answers.values()) > 0.3 * len(numbers), "a fuzzer that bites"


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads what the system tells of a child")


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_few_tampered_checkpoints(entry, sources, tmp_path):
    judge(entry, range(8), sources, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("entry", ENTRIES)
def test_many_tampered_checkpoints(entry, sources, tmp_path):
    judge(entry, range(8, 308), sources, tmp_path)
