"""Models with adapters as one graph: torch.compile and adpdm.graph.capture."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_models import relative, run
from lora_models import FOUR_BITS, SMALL, adapt, load_adapter, quantized, saved

from adpdm import graph


@pytest.fixture(params=FOUR_BITS)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A small model with 4-bit weights and integer products."""
    return quantized(request.param, tmp_path / "float", **SMALL)


@pytest.fixture
def no_recompiles() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def test_compiles_to_one_graph_for_all_timesteps(packed: Any, no_recompiles: None) -> None:
    adapt(packed)
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    outputs = [run(compiled, timestep=torch.tensor(t)) for t in (750, 250, 0)]
    assert not torch.equal(outputs[0], outputs[2])
    for got, t in zip(outputs, (750, 250, 0), strict=True):
        assert torch.equal(got, run(packed, timestep=torch.tensor(t)))


def test_hotswap_to_another_rank_needs_no_new_graph(packed: Any, tmp_path: Path, no_recompiles: None) -> None:
    paths = [saved(tmp_path, 1, SMALL, r=2), saved(tmp_path, 2, SMALL, r=6, lora_alpha=3)]
    wanted = []
    for path in paths:
        fresh = copy.deepcopy(packed)
        load_adapter(fresh, path)
        wanted.append(run(fresh))
    packed.enable_lora_hotswap(target_rank=8)
    load_adapter(packed, paths[0])
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    got = [run(compiled)]
    load_adapter(packed, paths[1], hotswap=True)
    got.append(run(compiled))
    for a, b in zip(got, wanted, strict=True):
        # Ranks are padded with zeros: sums of other lengths, which may round a code the other way.
        assert relative(a, b) < 0.02
    assert relative(got[0], got[1]) > 0.1


def test_compiled_model_notices_fusing(packed: Any) -> None:
    torch._dynamo.reset()
    adapt(packed, targets=["to_k"])
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    beside = run(compiled)
    packed.fuse_lora()
    fused = run(compiled)
    assert torch.equal(fused, run(packed))
    assert not torch.equal(fused, beside)
    packed.unfuse_lora()
    assert torch.equal(run(compiled), beside)
    torch._dynamo.reset()


def test_captured_model_notices_adapters(packed: Any, tmp_path: Path) -> None:
    second = saved(tmp_path, 1, SMALL)
    plain = copy.deepcopy(packed)
    graph.capture(packed)
    steps = [
        lambda m: adapt(m),
        lambda m: load_adapter(m, second, "second"),
        lambda m: m.set_adapters(["default", "second"], [1.0, 0.5]),
        lambda m: load_adapter(m, saved(tmp_path, 2, SMALL), "second", hotswap=True),
        lambda m: load_adapter(m, saved(tmp_path, 3, SMALL, r=6, lora_alpha=12), "second", hotswap=True),
        lambda m: m.disable_lora(),
        lambda m: m.enable_lora(),
        lambda m: m.fuse_lora(),
        lambda m: m.unfuse_lora(),
        lambda m: m.unload_lora(),
    ]
    seen = [run(packed)]
    for number, step in enumerate(steps):
        for m in (plain, packed):
            step(m)
        for t in (750, 0):
            seen.append(run(packed, timestep=torch.tensor(t)))
            assert torch.equal(seen[-1], run(plain, timestep=torch.tensor(t))), number
