"""Number formats: what a step computes in, and Muon against PyTorch's."""

import math

import pytest
import torch
from conftest import made_of
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    """Keeps (operation, formats of its tensors) for everything that PyTorch computes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        leaves, _ = torch.utils._pytree.tree_flatten((args, kwargs, result))
        formats = {leaf.dtype for leaf in leaves if torch.is_tensor(leaf)}
        self.seen |= {(function.overloadpacket.__name__, dtype) for dtype in formats}
        return result


PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"}
HALF = {torch.bfloat16, torch.float16}


def formats_of_a_step(nb, small_model, dtype, **training) -> set:
    """(operation, format) of everything in one training step of a small RoPE model."""
    machine = nb.Machine(torch.device("cpu"), dtype, "test")
    model = small_model(rope=True)
    run = made_of(nb, machine, model, 2, **training)
    x, y = torch.randint(400, (2, 4, 16))
    with Recorder() as recorder:
        nb.training_step(run, x, y, 1e-3)
    return recorder.seen


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_float32_step_computes_nothing_in_16_bits(nb, small_model, optimizer):
    seen = formats_of_a_step(nb, small_model, torch.float32, optimizer=optimizer)
    assert {name for name, _ in seen} & PRODUCTS  # the recorder does see the products
    assert not {(name, dtype) for name, dtype in seen if dtype in HALF}


def test_a_bfloat16_step_computes_its_products_in_bfloat16_muons_too(nb, small_model):
    seen = formats_of_a_step(nb, small_model, torch.bfloat16, optimizer="muon")
    products = {(name, dtype) for name, dtype in seen if name in PRODUCTS}
    assert products and {dtype for _, dtype in products} == {torch.bfloat16}


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)], ids=str)
def test_orthogonalize_changes_singular_values_alone(nb, shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    a, s, b = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(nb.orthogonalize(matrix, torch.float64), a @ torch.diag(s) @ b)
    assert s.min() > 0.05 and s.max() < 1.3  # most between 0.7 and 1.2; tiny ones come later


def test_16_bits_change_muons_direction_by_a_few_percent(nb):
    matrix = 1e-6 * torch.randn(192, 768)  # as small as gradients are
    exact = nb.orthogonalize(matrix.double(), torch.float64)
    for dtype, limit in ((torch.float32, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.05)):
        error = (nb.orthogonalize(matrix, dtype).double() - exact).norm() / exact.norm()
        assert error < limit, dtype


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch 2.9 has the first Muon")
def test_muon_goes_step_by_step_where_pytorchs_goes(nb):
    """PyTorch's computes in bfloat16, so they may differ by its rounding, not more."""
    torch.manual_seed(0)
    start = [torch.randn(24, 48), torch.randn(48, 24), torch.randn(32, 32)]
    ours, theirs = ([torch.nn.Parameter(m.clone()) for m in start] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = (
        nb.Muon(ours, **options, dtype=torch.bfloat16),
        torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(8):
        gradients = [torch.randn_like(m) for m in start]
        for parameters, optimizer in zip((ours, theirs), optimizers):
            for p, gradient in zip(parameters, gradients):
                p.grad = gradient.clone()
            optimizer.step()
        for a, b, before in zip(ours, theirs, start):
            moved = (b.detach() - before).norm()
            assert moved > 0.02 * math.sqrt(b.numel()) * 0.1  # they do move
            assert (a - b).norm() < 0.03 * moved
    for a, b in zip(ours, theirs):  # the same averages, exactly: no products in them
        one, two = optimizers[0].state[a], optimizers[1].state[b]
        assert torch.equal(one["momentum_buffer"], two["momentum_buffer"])
