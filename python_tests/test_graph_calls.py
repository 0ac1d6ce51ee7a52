"""adpdm.graph: what of a call, of the mode it is made in and of the denoiser's settings a replay respects."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from test_graph import RECORDERS, Denoiser, Rerun
from torch import Tensor, nn

from adpdm import AdpdmConfig, QuantConfig, graph, quantize
from adpdm.testing import ddim_scheduler, tiny_conditional_unet, tiny_unet

SAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def denoiser() -> Denoiser:
    RECORDERS.clear()
    return Denoiser()


# ---- threads -----------------------------------------------------------------------------------------------


class SlowRerun(Rerun):
    """Lets other threads run between the copying of inputs, the work and the copying of results."""

    def record(self, work: Callable[[], Any]) -> Any:
        time.sleep(0.005)
        return super().record(work)

    def replay(self) -> None:
        time.sleep(0.005)
        super().replay()
        time.sleep(0.005)


def test_threads_share_a_graph_and_not_its_memory(denoiser: Denoiser) -> None:
    graph.capture(denoiser, make_recorder=SlowRerun)

    @torch.no_grad()
    def call(timestep: int) -> float:
        return float(denoiser(torch.zeros(1, 1), timestep)["sample"])

    timesteps = [10, 900] * 8
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, timesteps)) == timesteps
    assert len(RECORDERS) == 1


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded")
def test_a_forked_process_does_not_wait_for_a_call_that_is_not_there(denoiser: Denoiser) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Held(Rerun):
        def replay(self) -> None:
            super().replay()
            if threading.current_thread() is not threading.main_thread():
                entered.set()
                leave.wait()

    graphed = graph.capture(denoiser, make_recorder=Held)

    @torch.no_grad()
    def call(timestep: int) -> float:
        return float(denoiser(torch.zeros(1, 1), timestep)["sample"])

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(call, 7)
        entered.wait()
        child = os.fork()
        if child == 0:
            os._exit(0 if len(graphed) == 0 and call(9) == 9 else 1)
        _, status = os.waitpid(child, 0)
        leave.set()
        assert done.result() == 7
    assert status == 0
    assert len(graphed) == 1


def test_threads_share_the_tape_of_a_unet() -> None:
    unet = tiny_unet()

    @torch.no_grad()
    def call(timestep: int) -> Tensor:
        output: Tensor = unet(SAMPLE, timestep).sample
        return output

    wanted = {timestep: call(timestep) for timestep in (10, 900)}
    graph.capture(unet)
    with ThreadPoolExecutor(2) as pool:
        for timestep, got in zip([10, 900] * 10, pool.map(call, [10, 900] * 10), strict=True):
            assert torch.equal(got, wanted[timestep])


def test_a_forward_may_call_its_denoiser_for_parts_of_the_batch(denoiser: Denoiser) -> None:
    def forward(sample: Tensor, timestep: Tensor) -> Tensor:
        if len(sample) == 1:
            return sample + timestep.reshape(-1, 1)
        parts = [denoiser(sample[i : i + 1], timestep[i : i + 1]) for i in range(len(sample))]
        return torch.cat(parts)

    denoiser.forward = forward  # type: ignore[method-assign]
    graphed = graph.capture(denoiser, make_recorder=Rerun)
    results: list[Any] = []

    @torch.no_grad()
    def call() -> None:
        results.append(denoiser(torch.ones(2, 1), torch.tensor([1, 2])).tolist())

    thread = threading.Thread(target=call, daemon=True)  # which would wait for itself for ever
    thread.start()
    thread.join(timeout=20)
    assert results == [[[2.0], [3.0]]]
    assert len(graphed) == 2


# ---- timesteps ---------------------------------------------------------------------------------------------


def loaded(folder: Path) -> nn.Module:
    tiny_unet().save_pretrained(folder)
    config = AdpdmConfig(weight_bits=8, activation_bits=8)
    unet: nn.Module = UNet2DModel.from_pretrained(folder, quantization_config=config)
    return unet


@torch.no_grad()
@pytest.mark.parametrize("kind", ["float", "loaded"])
def test_images_of_a_batch_keep_their_timesteps(kind: str, tmp_path: Path) -> None:
    unet = tiny_unet() if kind == "float" else loaded(tmp_path)
    mixed = [torch.tensor(pair) for pair in ([10, 900], [900, 10], [500, 500])]
    timesteps = [700, torch.tensor(300), torch.tensor([300]), torch.tensor(300).expand(2), *mixed]
    wanted = [unet(SAMPLE, timestep).sample for timestep in timesteps]
    graphed = graph.capture(unet)
    for timestep, output in zip(timesteps, wanted, strict=True):
        assert torch.equal(unet(SAMPLE, timestep).sample, output)
    assert len(graphed) == 1


@torch.no_grad()
def test_tokens_keep_their_timesteps(denoiser: Denoiser) -> None:
    def forward(sample: Tensor, timestep: Tensor) -> Tensor:
        return sample + timestep

    denoiser.forward = forward  # type: ignore[method-assign]
    graph.capture(denoiser, make_recorder=Rerun)
    for timesteps in (torch.arange(6).reshape(2, 3), 10 * torch.arange(6).reshape(2, 3)):
        assert torch.equal(denoiser(torch.zeros(2, 3), timesteps), timesteps.float())


@torch.no_grad()
def test_a_calibrated_denoiser_refuses_mixed_timesteps() -> None:
    unet = tiny_unet()
    config = QuantConfig(num_inference_steps=4, grouping="uniform", num_groups=2, histogram_images=2)
    quantize(unet, config, scheduler=ddim_scheduler())
    wanted = unet(SAMPLE, 900).sample
    graph.capture(unet)
    for timestep in (900, torch.tensor([900, 900]), torch.tensor(900).expand(2)):
        assert torch.equal(unet(SAMPLE, timestep).sample, wanted)
    with pytest.raises(ValueError, match="the batch mixes timesteps"):
        unet(SAMPLE, torch.tensor([10, 900]))


@torch.no_grad()
def test_calls_without_a_sample_or_a_timestep_are_type_errors(denoiser: Denoiser) -> None:
    def call(**given: Any) -> None:
        with pytest.raises(TypeError):
            denoiser(**given)  # as it is
        graph.capture(denoiser, make_recorder=Rerun)
        missing = ({"sample", "timestep"} - given.keys()).pop()
        with pytest.raises(TypeError, match=rf"arguments sample and timestep, got no \['{missing}'\]"):
            denoiser(**given)
        graph.release(denoiser)

    call(sample=torch.ones(1, 2))
    call(timestep=1)


# ---- modes of the call -------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [(True, False), (False, True)], ids=["inference first", "inference second"])
def test_inference_mode_and_no_grad_share_a_graph(modes: tuple[bool, bool]) -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    graphed = graph.capture(unet)
    for mode in (*modes, *modes):
        sample = SAMPLE * (1 + mode)
        with torch.inference_mode(mode), torch.no_grad():
            assert torch.equal(unet(sample, 10).sample, plain(sample, 10).sample)
    assert len(graphed) == 1


@torch.no_grad()
def test_autocast_has_graphs_of_its_own() -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    graphed = graph.capture(unet)
    for dtype in (torch.bfloat16, None, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            got, wanted = unet(SAMPLE, 10).sample, plain(SAMPLE, 10).sample
        assert got.dtype == (dtype or torch.float32)
        assert torch.equal(got, wanted)
    assert len(graphed) == 3


# ---- settings of the denoiser ------------------------------------------------------------------------------


class Doubled(AttnProcessor):  # type: ignore[misc]
    """Attention twice as strong."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().__call__(*args, **kwargs)
        return 2 * output


def process(unet: Any) -> None:
    unet.set_attn_processor(Doubled())


def process_one(unet: Any) -> None:
    processors = unet.attn_processors
    processors[next(reversed(processors))] = Doubled()
    unet.set_attn_processor(processors)


def enable_freeu(unet: Any) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def change_freeu(unet: Any) -> None:
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.8)


def disable_freeu(unet: Any) -> None:
    unet.disable_freeu()


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [[process], [process_one], [enable_freeu, change_freeu, disable_freeu]],
    ids=["all", "one", "FreeU"],
)
def test_capture_records_again_when_diffusers_sets_something_else(
    changes: list[Callable[[Any], None]],
) -> None:
    unet = tiny_conditional_unet()
    plain = copy.deepcopy(unet)
    graphed = graph.capture(unet)
    generator = torch.Generator().manual_seed(0)
    call = (torch.randn(1, 4, 8, 8, generator=generator), 10, torch.randn(1, 3, 8, generator=generator))
    before = unet(*call).sample
    for change in changes:
        change(unet)
        change(plain)
        wanted = plain(*call).sample
        assert not torch.equal(wanted, before), "the change must matter for this test to say anything"
        for _ in range(2):
            assert torch.equal(unet(*call).sample, wanted)
        assert len(graphed) == 1
        before = wanted


# ---- release -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_release_gives_back_what_another_library_had_put_there(denoiser: Denoiser) -> None:
    """As the hooks of accelerate, which replace the forward of the instance."""
    calls = []

    def hooked(sample: Tensor, timestep: Tensor) -> Any:
        calls.append(timestep)
        return Denoiser.forward(denoiser, sample, timestep)

    denoiser.forward = hooked  # type: ignore[method-assign]
    graph.capture(denoiser, make_recorder=Rerun)
    graph.release(denoiser)
    denoiser(torch.ones(1, 2), torch.tensor([1]))
    assert len(calls) == 1


def test_is_captured_between_capture_and_release(denoiser: Denoiser) -> None:
    assert not graph.is_captured(denoiser)
    graph.capture(denoiser, make_recorder=Rerun)
    assert graph.is_captured(denoiser)
    graph.release(denoiser)
    assert not graph.is_captured(denoiser)
    assert "forward" not in denoiser.__dict__


def test_adapters_may_take_residuals_off_the_list_of_a_call() -> None:
    class Adapted(Denoiser):
        def forward(self, sample: Tensor, timestep: Tensor, residuals: list[Tensor]) -> Any:
            return super().forward(sample, timestep, condition=residuals.pop(0))

    adapted = Adapted()
    graph.capture(adapted)
    with torch.no_grad():
        for residual in (3.0, 4.0):
            result = adapted(torch.zeros(1, 1), 10, residuals=[torch.full((1, 1), residual)])["sample"]
            assert float(result) == 10 + residual


@torch.no_grad()
@pytest.mark.parametrize("read", ["tolist", "numpy", "__array__"])
def test_values_read_without_an_operator_are_refused(denoiser: Denoiser, read: str) -> None:
    def forward(sample: Tensor, timestep: Tensor) -> Tensor:
        return sample * float(getattr(timestep, read)()[0])

    denoiser.forward = forward  # type: ignore[method-assign]
    graph.capture(denoiser)
    with pytest.raises(RuntimeError, match=rf"reads a value of a tensor \(`.{read}\(\)`\)"):
        denoiser(torch.ones(2, 2), 3)
    assert timestep_of(denoiser) == 3


def timestep_of(denoiser: Denoiser) -> float:
    """Values may be read again after a refusal."""
    graph.release(denoiser)
    return float(denoiser(torch.ones(1, 1), torch.tensor([3])))


@torch.no_grad()
def test_biases_that_are_edited_in_place_are_captured_again() -> None:
    unet = tiny_unet()
    quantize(
        unet, QuantConfig(num_inference_steps=2, num_groups=2, histogram_images=2), scheduler=ddim_scheduler()
    )
    plain = copy.deepcopy(unet)
    graphed = graph.capture(unet)
    before = unet(SAMPLE, 500).sample
    for model in (unet, plain):
        for name, module in model.named_modules():
            if name.endswith("to_v"):  # joined with those of queries and keys: a copy
                module.bias.add_(1.0)
    after = unet(SAMPLE, 500).sample
    assert not torch.equal(after, before)
    assert torch.equal(after, plain(SAMPLE, 500).sample)
    assert len(graphed) == 1
