"""Half products against float64; Triton's kernel runs in its interpreter, which wants a process of its own."""

import itertools
import sys

import pytest
import torch
import torch.multiprocessing as mp

from optim import kernels
from optim.kernels import symmetric_product

ALPHA, BETA = 0.7, -1.3
LAYOUTS = ("wide", "tall", "strided", "aliased", "circulant")
SIZES = list(itertools.product((1, 7, 63, 64, 65, 130), (1, 5, 64, 100)))
# Side of the kernel's tiles; then layout, n, p, matrices, dtype.
CASES = [(64, "wide", n, p, 1, torch.float32) for n, p in SIZES]
CASES += [(64, layout, 65, 40, 2, torch.float32) for layout in LAYOUTS]
CASES += [(64, layout, 33, 40, 3, torch.float16) for layout in LAYOUTS]
CASES += [(16, "wide", n, 5, 1, torch.float32) for n in (70, 90)]
CASES += [(16, "wide", *shape, torch.float32) for shape in [(5, 0, 2), (5, 3, 0), (0, 3, 2)]]
# Strides of 2^30 elements, which int32 holds, times an index of 2, which it does not.
FAR = {"batch": ((3, 5, 7), (2**30, 7, 1)), "row": ((1, 3, 5), (1, 2**30, 1)), "column": ((1, 5, 3), (1, 1, 2**30))}


def gaussian(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def symmetric(k, n, dtype, seed=1):
    s = gaussian(k, n, n, seed=seed)
    return (s + s.mT).to(dtype)


def circulant(k, n, dtype, seed):
    """Symmetric, and it commutes with every other circulant, rounded entries or not."""
    index = torch.arange(n)
    distance = (index - index[:, None]).abs()
    return gaussian(k, n, seed=seed).to(dtype)[:, torch.minimum(distance, n - distance)]


def operands(layout, n, p, k, dtype):
    if layout == "aliased":
        return (symmetric(k, n, dtype),) * 3
    if layout == "circulant":
        return tuple(circulant(k, n, dtype, seed) for seed in range(3))
    if layout == "wide":
        x = gaussian(k, n, p, dtype=dtype)
    elif layout == "tall":
        x = gaussian(k, p, n, dtype=dtype).mT
    else:
        x = gaussian(k + 1, 2 * n, 2 * p + 3, dtype=dtype)[1:, ::2, 3::2]
    return x, x.mT, symmetric(k, n, dtype).mT


def both_products(product, a, b, c):
    """Without c and with it."""
    return product(a, b, None, 1.0, 0.0), product(a, b, c, ALPHA, BETA)


def assert_products(products, a, b, c, block=0):
    """One rounding to the dtype on top of sums in float32 (float64 for float64).

    Symmetric to the last bit outside the blocks of this size on the diagonal, or everywhere.
    """
    wide_a, wide_b, wide_c = a.double(), b.double(), c.double()
    ab, size = wide_a @ wide_b, wide_a.abs() @ wide_b.abs()
    references = (ab, size), (ALPHA * ab + BETA * wide_c, ALPHA * size + abs(BETA) * wide_c.abs())
    unit = torch.finfo(a.dtype).eps
    for product, (reference, size) in zip(products, references, strict=True):
        assert product.shape == reference.shape and product.dtype == a.dtype
        rounding = unit * reference.abs() + (a.size(-1) + 3) * min(unit, torch.finfo(torch.float32).eps) * size
        assert ((product.double() - reference).abs() <= rounding + torch.finfo(a.dtype).tiny).all()
        index = torch.arange(product.size(-1)) // max(block, 1)
        off = index[:, None] != index
        assert torch.equal(product * off, product.mT * off)


# ---- Triton ---------------------------------------------------------------------------------------------------------


def interpret(_, directory):
    """All products of CASES and FAR by the kernel, with the operands as they are afterwards."""
    import triton
    from triton.runtime.interpreter import GridExecutor

    from optim import _triton_symmetric

    torch.set_num_threads(1)

    def products(side, a, b, c):
        _triton_symmetric.multiply_lower.configs = [triton.Config({"BLOCK": side, "BLOCK_K": 32, "GROUP": 2})]
        return both_products(_triton_symmetric.half_product, a, b, c)

    results = {}
    GridExecutor._restore_args_dev = lambda *_: None  # copies whole storages onto themselves, here of 4 GiB
    for name, (shape, strides) in FAR.items():
        x = torch.empty(2**31 + 2**10, dtype=torch.float16).as_strided(shape, strides)  # memory only where touched
        x.copy_(gaussian(*shape))
        c = symmetric(shape[0], shape[1], torch.float16)
        results[name] = (x.clone(), x.mT.clone(), c), products(16, x, x.mT, c)
    torch.use_deterministic_algorithms(True)  # new memory holds NaN, so an element left unwritten shows
    for side, *case in CASES:
        a, b, c = operands(*case)
        results[side, *case] = (a, b, c), products(side, a, b, c)
    torch.save(results, directory / "products.pt")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton", "3.7", reason="the interpreter of older Tritons fails with NumPy 2.4")
    directory = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        mp.spawn(interpret, args=(directory,))
    return torch.load(directory / "products.pt")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(interpreted, case):
    after, products = interpreted[case]
    before = operands(*case[1:])
    assert all(map(torch.equal, after, before))
    assert_products(products, *before)


@pytest.mark.parametrize("name", FAR)
def test_kernel_offsets_beyond_32_bits(interpreted, name):
    after, products = interpreted[name]
    assert_products(products, *after)


@pytest.mark.parametrize("arch, instruction", [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_kernel_compiles_for_tensor_cores(arch, instruction, tmp_path, monkeypatch):
    """In bfloat16, which the interpreter lacks: x x^T + c, for a GPU that need not be there."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from optim._triton_symmetric import CONFIGS, multiply_lower

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, config = multiply_lower.fn, CONFIGS[-1]
    constants = {"a_col": 1, "b_row": 1, "c_col": 1, "ADD": True, "PRECISION": "ieee", "GROUP": 8, **config.kwargs}
    kinds = {"alpha": "fp32", "beta": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "*bf16" if "ptr" in name else "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind in ("*bf16", "i32")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert instruction in compiled.asm["ptx"]
    assert "st.global.v4" in compiled.asm["ptx"]  # the mirror image too is written 16 bytes at a time


# ---- CPU ------------------------------------------------------------------------------------------------------------


def by_keyword(a, b, c, alpha, beta):
    return symmetric_product(a, b, c, alpha=alpha, beta=beta)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 16)
    monkeypatch.setitem(kernels.SHORTEST, "cpu", 0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_block_rows(small_blocks, layout, n, dtype):
    a, b, c = operands(layout, n, 20, 2, dtype)
    products = both_products(by_keyword, a, b, c)
    assert all(map(torch.equal, (a, b, c), operands(layout, n, 20, 2, dtype)))
    assert_products(products, a, b, c, block=kernels.BLOCK_ROWS)


@pytest.mark.parametrize("n, p, k", [(20, 0, 2), (0, 20, 2), (20, 20, 0)])
def test_block_rows_of_nothing(small_blocks, n, p, k):
    a, b, c = operands("wide", n, p, k, torch.float32)
    assert_products(both_products(by_keyword, a, b, c), a, b, c)


@pytest.mark.parametrize("n, p", [(5, 0), (130, 64), (383, 400), (384, 384), (385, 400), (513, 390)])
def test_product_around_the_shortest_side(n, p):
    a, b, c = operands("tall", n, p, 1, torch.float32)
    halved = min(n, p) >= kernels.SHORTEST["cpu"]
    assert_products(both_products(by_keyword, a, b, c), a, b, c, block=kernels.BLOCK_ROWS if halved else n)


def test_compiles_to_one_graph_a_shape():
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import

    def gram(x):
        g = symmetric_product(x, x.mT)
        return symmetric_product(g, g, g, alpha=ALPHA, beta=BETA)

    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gram, backend=backend, fullgraph=True, dynamic=False)
    for shape in [(2, 8, 9), (1, 390, 400), (2, 8, 9), (1, 390, 400)]:
        x = gaussian(*shape)
        torch.testing.assert_close(compiled(x), gram(x), rtol=0, atol=0)
    assert backend.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_is_registered_as_it_behaves(layout):
    a, b, c = operands(layout, 20, 30, 2, torch.float32)
    torch.library.opcheck(kernels._half, (a, b, c, ALPHA, BETA))
    torch.library.opcheck(kernels._half, (a, b, None, 1.0, 0.0))


def test_without_triton(monkeypatch):
    monkeypatch.delitem(sys.modules, "optim._triton_symmetric", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert kernels._triton_product.__wrapped__() is None


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [[(2, 3), (3, 2)], [(1, 2, 3), (1, 2, 3)], [(1, 2, 3), (2, 3, 2)], [(1, 2, 3), (1, 3, 2), (1, 2, 1)]],
    ids=str,
)
def test_shapes_must_match(shapes):
    with pytest.raises(ValueError, match=r"takes a \(k, n, p\), b \(k, p, n\) and c \(k, n, n\), not \("):
        symmetric_product(*(torch.zeros(shape) for shape in shapes))


def test_dtypes_must_match():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"one dtype on one device, not torch.float32 on cpu, torch.float64 on cpu"):
        symmetric_product(x, x.mT.double())
