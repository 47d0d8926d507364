"""Compiles every kernel configuration for GPUs that need not be present, and reads the machine code.

It reports registers, spills, shared memory and instructions a weight.
"""

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

#: compute capability: multiprocessors, bytes of shared memory that a program can have (CUDA C++ Programming Guide, table
#: of technical specifications per compute capability)
DEVICES = {80: (108, 163 << 10), 90: (132, 227 << 10), 100: (148, 227 << 10)}


@dataclass(frozen=True)
class Configuration:
    """A kernel for one device. dtype: of x or of the result. nested: double-quantized scales. shifted: with a shift."""

    name: str
    capability: int
    launch: Launch
    dtype: str
    nested: bool = False
    shifted: bool = False


@dataclass(frozen=True)
class Compiled:
    """The machine code of a kernel, measured.

    spills: instructions that load or store spilled registers. shared: bytes of shared memory of a program. instructions:
    for each weight, in the longest loop, or in the whole kernel if it has no loop.
    """

    name: str
    capability: int
    registers: int
    spills: int
    shared: int
    instructions: float


def configurations(capability: int) -> list[Configuration]:
    """Every kernel that an untuned device uses.

    The weights are plain or double-quantized with a shift, and their sizes are multiples of the tiles or not.
    """
    chosen = choices.default(capability // 10)
    processors, _ = DEVICES[capability]
    kernels = []

    def add(name: str, launch: Launch, dtype: str = "bf16", /, **stored: bool) -> None:
        kernels.append(Configuration(name, capability, launch, dtype, **stored))

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
        weights = f"{bits} bits, block {block}, {n} × {k}{', dq, shift' if stored else ''}"
        for dtype in ("fp32", "bf16"):
            launch = launches.dequantize(chosen["dequantize"], bits, block, n * k, True)
            add(f"dequantize {weights}, {dtype}", launch, dtype, **stored)
        for op in ("linear", "linear_dx"):
            for choice in chosen[op]:
                if choice["path"] != "decode" and launches.unit(bits, block, k):
                    launch = launches.product(op, choice, choice["up_to"], n, k, bits, block, True, processors)
                    add(f"{op} M ≤ {choice['up_to']}, {weights}", launch, **stored)
    return kernels


def compile_all(capabilities: Iterable[int], advance: Callable[[], None] = lambda: None) -> list[Compiled]:
    """Compile every configuration for every capability, in as many processes as there are CPUs."""
    jobs = [job for capability in capabilities for job in configurations(capability)]
    results = []
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for compiled in pool.map(compile_kernel, jobs):
            results.append(compiled)
            advance()
    return results


def compile_kernel(job: Configuration) -> Compiled:
    """Compile one configuration. Raises RuntimeError if Triton interprets its kernels instead of compiling them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qbench.ops import kernels

    kernel = getattr(kernels, job.launch.kernel)
    if not hasattr(kernel, "arg_names") or triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and there is nothing to compile")
    constants = job.launch.constants
    signature = {n: "constexpr" if n in constants else _triton_type(n, job) for n in kernel.arg_names}
    # as in a launch, every pointer and size of these weights is a multiple of 16
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
        usage = _run_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _run_tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, "cuobjdump reports them for every kernel"
    threads = 32 * built.metadata.num_warps
    return Compiled(
        name=job.name,
        capability=job.capability,
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=built.metadata.shared,
        instructions=longest_loop(code) * threads / weights_at_once(job.launch),
    )


def _triton_type(name: str, job: Configuration) -> str | tuple[str, ...]:
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


def _run_tool(name: str, *arguments: str) -> str:
    """The output of a CUDA program that comes with Triton."""
    import triton.backends.nvidia as nvidia

    program = Path(nvidia.__file__).parent / "bin" / name
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def weights_at_once(launch: Launch) -> int:
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


def longest_loop(code: str) -> int:
    """The number of instructions of the longest loop in disassembled code, or of all code if it has no loop."""
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
