"""What runs an operation, chosen by device and dtype alone, and what is said when it can't."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch

from hart_infer import ops
from hart_infer.errors import BackendError, InputError
from hart_infer.ops import registry
from hart_infer.ops.registry import OPS, Backend, Op, Where, use_backend
from hart_infer.pipelines.describe import operations

CUDA = Where("cuda", torch.bfloat16, (9, 0))


@pytest.fixture(autouse=True)
def on_the_gpu():
    """What is chosen for the CPU is tested on the CPU, wherever that is."""


def double(x):
    """The reference."""
    return x * 2


@pytest.fixture
def declared(monkeypatch):
    """An operation with a kernel that works in bf16 on CUDA and, when forced, on the CPU; it says so by adding a half."""
    module = types.ModuleType("fake_kernels")
    module.refusal = lambda where: None if where.dtype == torch.bfloat16 else f"{where.dtype} is not supported"
    module.double = lambda x: x * 2 + 0.5
    monkeypatch.setitem(sys.modules, "fake_kernels", module)
    return Op(double, {"triton": Backend("fake_kernels:double"), "cuda": Backend("no_such_module:double")})


def test_the_cpu_runs_the_reference(declared):
    assert declared(torch.ones(1, dtype=torch.bfloat16)).item() == 2
    assert declared.choose(Where("cpu", torch.float32)).backend == "torch"


def test_the_first_backend_that_takes_it_is_chosen_and_the_others_say_why(declared, caplog):
    with caplog.at_level(logging.WARNING):
        choice = declared.choose(CUDA)
    assert choice.backend == "triton" and not caplog.records
    assert list(choice.refusals) == ["cuda"] and "can't be imported" in choice.refusals["cuda"]


def test_a_missing_kernel_falls_back_and_the_first_call_says_so(declared, caplog, monkeypatch):
    where = Where("cuda", torch.float64, (9, 0))
    monkeypatch.setattr(registry, "_told", set())
    monkeypatch.setattr(Where, "of", lambda x: where)
    with caplog.at_level(logging.WARNING):
        assert declared.choose(where).backend == "torch"
        assert not caplog.records, "asking is not using"
        for operation in (declared, declared, Op(double, declared.backends)):  # one that shares the reason is not worth a line
            assert operation(torch.ones(1, device="meta", dtype=torch.float64)).shape == (1,)
    (record,) = caplog.records
    assert "double and operations like it run on PyTorch on cuda sm_90 in float64" in record.message
    assert "triton: torch.float64 is not supported" in record.message and "cuda: it can't be imported" in record.message


def test_a_forced_backend_runs_or_fails(declared):
    with use_backend("triton"):
        assert declared(torch.ones(1, dtype=torch.bfloat16)).item() == 2.5
        with pytest.raises(BackendError, match="double can't run by triton on cpu in float32: torch.float32 is not supported"):
            declared(torch.ones(1))
    with use_backend("cuda"), pytest.raises(BackendError, match="can't be imported"):
        declared(torch.ones(1, dtype=torch.bfloat16))
    with use_backend("triton"), use_backend("torch"):
        assert declared(torch.ones(1, dtype=torch.bfloat16)).item() == 2
    assert declared(torch.ones(1, dtype=torch.bfloat16)).item() == 2


def test_what_is_beyond_a_kernel_runs_on_the_reference_and_that_is_said_once(declared, caplog, monkeypatch):
    class LimitExceeded(Exception):
        pass

    def narrow(x):
        if len(x) > 2:
            raise LimitExceeded("double's kernel takes two numbers.")
        return x * 2 + 0.5

    monkeypatch.setattr(registry, "_told", set())
    monkeypatch.setattr(sys.modules["fake_kernels"], "double", narrow)
    monkeypatch.setattr(sys.modules["fake_kernels"], "LimitExceeded", LimitExceeded, raising=False)
    with use_backend("triton"), pytest.raises(BackendError, match="takes two numbers. Leave the choice to the library."):
        declared(torch.ones(3, dtype=torch.bfloat16))
    monkeypatch.setattr(Where, "of", lambda x: CUDA)
    few, many = (torch.ones(n, device="meta", dtype=torch.bfloat16) for n in (2, 3))
    with caplog.at_level(logging.WARNING):
        assert declared.choose(CUDA).backend == "triton" and declared(few).shape == (2,)
        assert not caplog.records
        assert declared(many).shape == declared(many).shape == (3,)
    assert [record.message for record in caplog.records] == ["double runs on PyTorch: double's kernel takes two numbers."]


def test_where_gradients_flow_the_reference_runs(declared):
    x = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    with use_backend("triton"):
        assert declared(x).item() == 2 and declared(x).requires_grad
        with torch.no_grad():
            assert declared(x).item() == 2.5


def test_an_operation_without_the_forced_backend_is_not_concerned():
    plain = Op(double, {})
    with use_backend("triton"):
        assert plain(torch.ones(1)).item() == 2


def test_the_choice_is_made_once(declared, monkeypatch):
    with use_backend("triton"):
        declared(torch.ones(1, dtype=torch.bfloat16))
        monkeypatch.setattr(Backend, "refusal", lambda *_: pytest.fail("asked again"))
        declared(torch.ones(7, dtype=torch.bfloat16))


def test_an_unknown_backend_is_refused():
    with pytest.raises(InputError, match="no backend 'rocm'; cuda, triton, cpu, torch are"), use_backend("rocm"):
        pass


def test_every_kernel_that_is_declared_exists():
    pytest.importorskip("triton")
    assert {"attention", "rope_cache", "swiglu"} <= set(OPS)
    for operation in OPS.values():
        assert getattr(ops, operation.name) is operation and operation.__doc__
        for backend in operation.backends.values():
            assert callable(backend.function())


@pytest.fixture
def with_a_table(declared):
    """The same, which by its table runs on the reference unless a call asks for what that lacks."""

    def scaled(x, *, more=1, parts=None):
        return x * 2

    sys.modules["fake_kernels"].scaled = lambda x, *, more=1, parts=None: x * 2 + 0.5
    rows = (registry.Default("triton", "it has more", uses=("more", "parts")), registry.Default("torch", "it was timed"))
    return Op(scaled, {"triton": Backend("fake_kernels:scaled")}, rows)


def test_a_table_of_defaults_decides_by_what_a_call_uses(with_a_table, caplog, monkeypatch):
    monkeypatch.setattr(registry, "_told", set())
    monkeypatch.setattr(Where, "of", lambda x: CUDA)
    plain = with_a_table.choose(CUDA)
    assert (plain.backend, plain.why) == ("torch", "it was timed")
    assert with_a_table.choose(CUDA, more=1, parts=None).backend == "torch", "the arguments' own defaults"
    assert with_a_table.choose(CUDA, more=2).backend == with_a_table.choose(CUDA, parts=[0, 1]).backend == "triton"
    with use_backend("triton"):
        assert with_a_table.choose(CUDA).backend == "triton", "forced"
    meta = torch.ones(1, device="meta", dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        with_a_table(meta), with_a_table(meta, more=2), with_a_table(meta, more=1)
    assert not caplog.records and {key[3].backend for key in with_a_table._chosen} == {"torch", "triton"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_on_a_gpu_is_pytorchs_until_ours_was_timed(dtype, monkeypatch):
    monkeypatch.setattr(Backend, "refusal", lambda *_: None)
    pytest.importorskip("triton")
    where = Where("cuda", dtype, (8, 0))
    assert ops.attention.choose(where).backend == "torch"
    assert ops.attention.choose(where, multiplicity=300, ranges=[0, 1, 300, 400]).backend == "triton"
    told = operations(where)["attention"]
    assert told.startswith("PyTorch; its own kernels") and "; with ranges or multiplicity triton: " in told


def test_what_runs_is_told_with_its_limits():
    pytest.importorskip("triton")
    with use_backend("triton"):
        told = operations(Where("cpu", torch.float32))
    assert told["attention"] == "triton, for head_dim up to 128 and a scale above 0"
    assert told["guided_sample"] == "triton, for up to 16384 codes"
    assert told["swiglu"] == "triton" and told["rms_norm"].startswith("PyTorch; not cuda")


def test_compilers_know_every_operation():
    """Schema, fake implementation and the arguments written to, checked by PyTorch's own test."""
    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 5, 5))
    table, slots = torch.randn(1, 1, 3, 8), torch.randn(2, 1, 2, 3, 8)
    rows, row, width = torch.randn(3, 8), torch.randn(1, 1, 8), torch.randn(8)
    settings = ops.draw_settings(guidance=1.5, logit_gain=1.2, temperature=0.3, top_k=4, top_p=0.9)
    step = {"x0_from_x": 1.1, "x0_from_noise": 0.5, "mean_from_x0": 0.4, "mean_from_x": 0.6}
    step |= {"log_variance_min": -3.0, "log_variance_max": -1.0, "adds_noise": True}
    drawn = {"top_k": True, "top_p": True, "more_smooth": True}
    logits, codebook, seeds = torch.randn(2, 3, 9), torch.randn(9, 4), torch.tensor([5])
    calls = {
        "add_rms_norm": ((rows, rows + 1, width, 1e-6), {}),
        "attention": ((q, k, v), {"scale": 0.3, "multiplicity": 3, "ranges": [0, 1, 2, 5]}),
        "diffusion_step": ((rows, *torch.randn(2, 6, 8), rows, settings), step),
        "drop_unlikely": ((torch.randn(2, 3000), 0, 0.9), {}),
        "exponential": ((torch.Generator().get_state(), 5), {}),
        "gated_layer_norm_modulate": ((rows, rows + 1, rows, width, None, rows, rows, 1e-6), {}),
        "gelu_tanh": ((q,), {}),
        "group_norm_silu": ((torch.randn(1, 4, 2, 3), torch.ones(4), torch.zeros(4), 2, 1e-6), {"silu": True}),
        "guided_sample": ((logits, codebook, seeds, torch.tensor([0]), settings), drawn),
        "int8_linear": ((rows, torch.ones(1, 2, 32, 4).char(), width, torch.full((8,), 8).int(), None), {}),
        "layer_norm_modulate": ((rows, width, width, rows, rows, 1e-6), {}),
        "normal_noise": ((seeds,), {"step": 2, "tokens": 3, "channels": 4}),
        "rms_norm": ((rows, width, 1e-6), {}),
        "rms_norm_modulate": ((rows[None], width, row, row, 1e-6), {}),
        "rms_norm_quantized": ((rows, width, 1e-6, torch.int8), {}),
        "rope_cache": ((torch.randn(1, 3, 3, 2, 8), table, table, *slots.clone(), None), {}),
        "swiglu": ((q, q + 1), {}),
    }
    assert set(calls) == set(OPS)
    turned = torch.randn(8, 3).T  # as dense, but not contiguous
    calls |= {"rms_norm ": ((turned, width, 1e-6), {}), "swiglu ": ((turned, turned), {})}
    for name, (args, options) in calls.items():
        torch.library.opcheck(OPS[name.strip()].traced, args, options)


def test_compiled_code_on_a_gpu_holds_one_operation_and_no_break():
    found = []

    def backend(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 5, 5))
    compiled = torch.compile(lambda *args: ops.attention.traced(*args, scale=0.3) + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(q, k, v), ops.attention(q, k, v, scale=0.3) + 1)
    assert found[0] == "hart_infer.attention.default" and len(found) == 2
    found.clear()
    torch.compile(lambda *args: ops.attention(*args, scale=0.3), backend=backend, fullgraph=True)(q, k, v)
    assert found and "hart_infer" not in " ".join(found), "on the CPU the compiler sees into the reference"
    found.clear()
    elsewhere = torch.randn(2, 8, device="meta")
    torch.compile(lambda x: ops.swiglu(x, ops.gelu_tanh(x)), backend=backend, fullgraph=True)(elsewhere)
    assert sum("hart_infer" in name for name in found) == 1 < len(found), "and so where there is a kernel for CPUs alone"


def test_where_autocast_mixes_dtypes_the_reference_runs(monkeypatch):
    """Kernels want one."""
    module = types.ModuleType("fake_kernels")
    module.refusal, module.add = lambda where: None, lambda x, y: x + y + 0.5
    monkeypatch.setitem(sys.modules, "fake_kernels", module)

    def add(x, y):
        return x + y

    declared = Op(add, {"triton": Backend("fake_kernels:add")})
    x, y = torch.ones(1, dtype=torch.bfloat16), torch.ones(1)
    with use_backend("triton"):
        with torch.autocast("cpu", torch.bfloat16):
            assert declared(x, y).item() == 2
            assert declared(x, x).item() == 2.5
        assert declared(x, y).item() == 2.5
        assert declared(y.to("meta"), y.to("meta")).shape == (1,)  # a device without autocast
