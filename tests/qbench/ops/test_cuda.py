"""The CUDA ops against float64 and the PyTorch reference, on a GPU or in Triton's interpreter."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
from formats import blockwise
from formats.format import Codebook, QuantizedTensor
from qbench.ops import choices, cuda, launches
from qbench.testing.cases import within
from tests.formats.tensors import weights

QUANTIZED = [name for name in formats.names() if name != "none"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TILE = {"path": "matmul", "tokens": 16, "rows": 16, "columns": 32, "fill": 8, "num_warps": 4, "num_stages": 1}
ROW = {"path": "multiply_row", "rows": 4, "columns": 64, "num_warps": 1}


def arguments(q: QuantizedTensor) -> tuple:
    return q.codes, q.levels, list(q.scale), list(q.shift), q.bits, q.block


def packed(name: str, block: int, dq: bool, n: int, k: int, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    return formats.get(name, block=block, dq=dq).quantize(torch.randn(n, k, generator=generator).to(DEVICE))


def check_products(q: QuantizedTensor, m: int, dtype: torch.dtype, choice: dict | None, stride: int = 0) -> None:
    """Compare both products with float64, on the path of `choice` or the default one. x has `stride` unused columns."""
    n, k = q.shape
    choice = choice if launches.unit(q.bits, q.block, k) else None
    w = q.dequantize(torch.float32).double()
    for op, inner, matrix in (("linear", k, w.t()), ("linear_dx", n, w)):
        if choice and choice["path"] == "multiply_row" and op == "linear_dx":
            continue
        x = torch.randn(m, inner + stride).to(DEVICE, dtype)[:, :inner]
        y = cuda.product(op, x, *arguments(q), n, k, choice=choice)
        expected = x.double() @ matrix
        assert y.dtype == dtype and y.shape == expected.shape
        # terms of a small result can cancel; then use the norm without cancellation
        size = max(expected.norm(), (x.double().abs() @ matrix.abs()).norm() / inner**0.5)
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * size
        assert torch.equal(y, cuda.product(op, x, *arguments(q), n, k, choice=choice)), "not the same twice"


@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=12, deadline=None)
@given(
    w=weights(),
    block=st.sampled_from([1, 3, 16, 17, 32, 64, 100, 128, 4096]),
    dq=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_quantize_and_dequantize_equal_the_reference(name, w, block, dq, dtype):
    f = formats.get(name, block=block, dq=dq)
    w = within(f, w)
    flat = w.to(DEVICE).reshape(-1)
    book = f.codebook(flat)
    given_scale, shift = f.scale_and_shift(flat)
    recipe = flat, book.boundaries, book.order, f.bits, block, given_scale, shift
    codes, scale = cuda.quantize(*recipe)
    expected_codes, expected_scale = blockwise.quantize_reference(*recipe)
    assert torch.equal(codes, expected_codes) and torch.equal(scale, expected_scale)
    q = f.quantize(w.to(DEVICE))
    values = cuda.dequantize(*arguments(q), q.shape, dtype)
    expected = blockwise.dequantize_reference(*arguments(q), q.shape, dtype)
    assert torch.equal(values.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_of_every_format(name, dq, dtype):
    q = packed(name, 32, dq, 19, 64)
    for choice in (TILE, ROW, None):
        check_products(q, 3, dtype, choice)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["nf4", "int4_asym", "int8"]),
    block=st.sampled_from([5, 16, 64, 100, 4096]),
    dq=st.booleans(),
    n=st.integers(1, 70),
    k=st.integers(1, 200),
    m=st.integers(1, 20),
    stride=st.sampled_from([0, 1, 8]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 2**32),
)
def test_matmul_of_any_shape(name, block, dq, n, k, m, stride, dtype, seed):
    torch.manual_seed(seed)
    check_products(packed(name, block, dq, n, k, seed), m, dtype, TILE, stride)


@pytest.mark.thorough
@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["nf4", "int4_asym", "int8"]),
    block=st.sampled_from([16, 64, 128]),
    blocks=st.integers(1, 5),
    dq=st.booleans(),
    n=st.integers(1, 30),
    m=st.integers(1, 3),
    stride=st.sampled_from([0, 1, 8]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_multiply_row_of_any_shape(name, block, blocks, dq, n, m, stride, dtype):
    check_products(packed(name, block, dq, n, block * blocks), m, dtype, ROW, stride)


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(1, 8), seed=st.integers(0, 2**32), n=st.integers(1, 40), k=st.integers(1, 60))
def test_any_table_of_2_to_256_levels(bits, seed, n, k):
    generator = torch.Generator().manual_seed(seed)
    book = Codebook.of(torch.rand(2**bits, generator=generator) * 2 - 1)
    w = torch.randn(n * k, generator=generator).to(DEVICE)
    book = book.to(DEVICE)
    recipe = w, book.boundaries, book.order, bits, 16, None, None
    codes, scale = cuda.quantize(*recipe)
    expected = blockwise.quantize_reference(*recipe)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
    q = QuantizedTensor("any", bits, 16, torch.Size((n, k)), w.dtype, codes, book.levels, (scale,))
    expected = blockwise.dequantize_reference(*arguments(q), q.shape, torch.float32)
    assert torch.equal(cuda.dequantize(*arguments(q), q.shape, torch.float32), expected)
    check_products(q, 2, torch.float16, TILE)


@pytest.mark.parametrize("name", ["nf4", "int4_asym", "int8"])
@pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 65, 129])
def test_the_path_that_is_chosen(name, m):
    check_products(packed(name, 64, True, 64, 128), m, torch.float16, None)


@pytest.mark.parametrize("block", [64, 1024])
def test_a_split_sum(block):
    q = packed("nf4", block, True, 64, 1024)
    launch = launches.product("linear", TILE, 3, *q.shape, q.bits, q.block, False, 2)
    assert launch.grid[2] > 1 and launch.constants["EVEN"]
    check_products(q, 3, torch.float16, TILE)


@pytest.mark.parametrize("name", ["nf4", "int4_asym"])
@pytest.mark.parametrize(("block", "k"), [(48, 96), (4096, 96), pytest.param(1024, 1536, marks=pytest.mark.thorough)])
def test_blocks_that_do_not_divide_the_row(name, block, k):
    assert launches.unit(4, block, k) >= 16
    for dtype in (torch.float16, torch.float32):
        for choice in (TILE, ROW):
            check_products(packed(name, block, True, 5, k), 2, dtype, choice)


def test_a_float64_input_is_decoded_for():
    q = packed("nf4", 64, False, 16, 64)
    x = torch.randn(3, 64, dtype=torch.float64, device=DEVICE)
    assert torch.equal(cuda.linear(x, *arguments(q), 16, 64), x @ q.dequantize(torch.float64).t())


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_an_empty_input_gives_an_empty_result(shape):
    q = packed("nf4", 64, False, 16, 64)
    assert cuda.linear(torch.empty(shape, device=DEVICE), *arguments(q), 16, 64).shape == (*shape[:-1], 16)


@settings(max_examples=200, deadline=None)
@given(
    op=st.sampled_from(["linear", "linear_dx"]),
    capability=st.sampled_from([8, 9, 10, 12]),
    m=st.integers(1, 128),
    n=st.integers(1, 30000),
    k=st.integers(1, 2000).map(lambda units: 16 * units),
    block=st.sampled_from([16, 48, 64, 4096]),
)
def test_every_product_has_a_launch_that_covers_it(op, capability, m, n, k, block):
    choice = choices.choose(choices.default(capability)[op], m, {"multiply_row", "matmul"})
    launch = launches.product(op, choice, m, n, k, 4, block, True, 132)
    c = launch.constants
    assert block % (c["UNIT"] * c["UNITS"]) == 0 and k % c["UNIT"] == 0 and c["COLUMNS"] % c["UNIT"] == 0
    if launch.kernel == "multiply_row":
        assert launch.grid[0] * c["ROWS"] >= n and launch.grid[1] == m
        return
    side, width = (n, c["ROWS"]) if op == "linear" else (k, c["COLUMNS"])
    assert launch.grid[0] * c["TOKENS"] >= m and launch.grid[1] * width >= side


def test_tuned_choices_are_read_and_a_broken_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "tuned.json"
    monkeypatch.setenv("QBENCH_TUNED", str(file))
    choices.choices.cache_clear()
    with pytest.raises(RuntimeError, match=r"tuned\.json"):
        choices.choices("some device", 9)
    rules = [{"up_to": None, "path": "decode"}]
    file.write_text(json.dumps({"choices": {"linear": rules}}))
    by_op = choices.choices("some device", 9)
    assert by_op["linear"] == rules and by_op["linear_dx"] == choices.default(9)["linear_dx"]
    choices.choices.cache_clear()
