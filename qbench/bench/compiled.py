"""What the compiler makes of every kernel configuration, for GPUs that need not be there: registers, spills, shared
memory and instructions a weight, read from the machine code."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from qbench.ops import choices, launches
from qbench.ops.launches import Launch

#: compute capability: multiprocessors, bytes of shared memory a program can have (CUDA C++ Programming Guide, table of
#: technical specifications per compute capability)
DEVICES = {80: (108, 163 << 10), 90: (132, 227 << 10), 100: (148, 227 << 10)}


@dataclass(frozen=True)
class Configuration:
    """One kernel as one device would get it. bits, stored: of the weight; dtype: of x or of the result."""

    name: str
    capability: int
    launch: Launch
    dtype: str
    nested: bool = False
    shifted: bool = False


@dataclass(frozen=True)
class Compiled:
    """spills: instructions that read or write registers' overflow. shared: bytes a program. instructions: a weight, of the
    longest loop, or of the whole where there is none."""

    name: str
    capability: int
    registers: int
    spills: int
    shared: int
    instructions: float


def configurations(capability: int) -> list[Configuration]:
    """Every kernel that the choices for an untuned device lead to, for a plain weight, and for a double-quantized one with
    a shift, whose sizes fill tiles and do not."""
    chosen = choices.default(capability // 10)
    processors, _ = DEVICES[capability]
    found = []

    def add(name: str, launch: Launch, dtype: str = "bf16", /, **stored: bool) -> None:
        found.append(Configuration(name, capability, launch, dtype, **stored))

    for bits in (4, 8):
        for dtype, given in ("fp32", False), ("bf16", False), ("fp32", True):
            launch = launches.quantize(chosen["quantize"], bits, 1 << 18, 64, given, False, bits == 4)
            add(f"quantize {bits} bits, {dtype}{', scales given' * given}", launch, dtype, shifted=given)
    add("quantize 4 bits, fp32, tail", launches.quantize(chosen["quantize"], 4, 1, 33, False, True, True), "fp32")
    both = {"nested": True, "shifted": True}
    for bits, block, (n, k), stored in (
        (4, 64, (4096, 4096), {}),
        (4, 64, (4096, 4096), both),
        (4, 64, (4095, 4160), both),
        (8, 64, (4096, 4096), {}),
        (8, 4096, (4095, 11008), both),
        (3, 64, (4096, 4096), both),
    ):
        words = f"{bits} bits, block {block}, {n} × {k}{', dq, shift' if stored else ''}"
        for dtype in ("fp32", "bf16"):
            launch = launches.dequantize(chosen["dequantize"], bits, block, n * k, True)
            add(f"dequantize {words}, {dtype}", launch, dtype, **stored)
        for op in ("linear", "linear_dx"):
            for choice in chosen[op]:
                if choice["path"] != "decode" and launches.unit(bits, block, k):
                    launch = launches.product(op, choice, choice["up_to"], n, k, bits, block, True, processors)
                    add(f"{op} M ≤ {choice['up_to']}, {words}", launch, **stored)
    return found


def compile_all(capabilities: Iterable[int], advance: Callable[[], None] = lambda: None) -> list[Compiled]:
    """Compile every configuration for every capability, a process a CPU."""
    jobs = [job for capability in capabilities for job in configurations(capability)]
    found = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for compiled in pool.map(compile_one, jobs):
            found.append(compiled)
            advance()
    return found


def compile_one(job: Configuration) -> Compiled:
    """Raises RuntimeError where Triton interprets its kernels instead of compiling them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qbench.ops import kernels

    kernel = getattr(kernels, job.launch.kernel)
    if not hasattr(kernel, "arg_names") or triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and there is nothing to compile")
    constants = job.launch.constants
    signature = {n: "constexpr" if n in constants else _type(n, job) for n in kernel.arg_names}
    # every pointer and size of these weights is a multiple of 16, as a launch would find
    multiples: dict[tuple[int, ...], list] = {}
    for i, type in enumerate(signature.values()):
        places = [(i, j) for j in range(len(type))] if isinstance(type, tuple) else [(i,)]
        if type in ("constexpr", "fp32"):
            continue
        multiples |= {place: [["tt.divisibility", 16]] for place in places}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, multiples)
    built = triton.compile(source, GPUTarget("cuda", job.capability, 32), options=job.launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None  # which are told of every kernel
    threads = 32 * built.metadata.num_warps
    return Compiled(
        name=job.name,
        capability=job.capability,
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=built.metadata.shared,
        instructions=longest(code) * threads / weights(job.launch),
    )


def _type(name: str, job: Configuration) -> str | tuple[str, ...]:
    """The type of a kernel's argument, as Triton writes it."""
    if name in ("scale", "shift"):
        if job.launch.kernel == "quantize":
            return "*fp32" if name == "scale" else ("*fp32",) * job.shifted
        stored = ("*u8", "*fp32", "*fp32", "*fp32") if job.nested else ("*fp32",)
        return stored if name == "scale" or job.shifted else ()
    if name in ("x", "g", "y", "dx", "out", "w"):
        parts = name in ("y", "dx") and job.launch.grid[2:] > (1,)
        return "*fp32" if parts else f"*{job.dtype}"
    pointers = {"codes": "*u8", "order": "*u8", "levels": "*fp32", "boundaries": "*fp32", "parts": "*fp32"}
    return pointers.get(name) or {"smallest": "fp32"}.get(name, "i32")


def _tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA programs that come with Triton."""
    import triton.backends.nvidia as nvidia

    program = Path(nvidia.__file__).parent / "bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def weights(launch: Launch) -> int:
    """The weights that a program handles at a time."""
    c = launch.constants
    return {
        "quantize": lambda: c["ROWS"] * c["WIDTH"],
        "dequantize": lambda: c["TILE"],
        "dequantize_elements": lambda: c["TILE"],
        "multiply_row": lambda: c["ROWS"] * c["COLUMNS"],
        "matmul": lambda: c["ROWS"] * c["COLUMNS"],
        "matmul_dx": lambda: c["ROWS"] * c["COLUMNS"],
    }[launch.kernel]()


def longest(code: str) -> int:
    """The instructions of the longest loop in disassembled code; of all the code where it has no loop."""
    count, labels, loops = 0, {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+(/\*[0-9a-f]+\*/\s+)?[@A-Z].*;", line):
            count += 1
            jump = re.search(r"BRA.*`\((\.L_x?_?\w+)\)", line)
            if jump and jump[1] in labels:
                loops.append(count - labels[jump[1]])
    return max((n for n in loops if n > 1), default=count)
