# SPDX-License-Identifier: Apache-2.0
"""Gains are those of a sampling with rounded weights, calculated apart; and whatever repeats must repeat exactly."""

import logging
import math
from types import SimpleNamespace

import collecting
import comfy.model_management
import comfy.model_sampling
import numpy as np
import pytest
import tiny
import torch
from gguf_kit import collector
from gguf_kit.host import collect_calls
from gguf_kit.host.collect_calls import CallRecorder
from gguf_kit.host.collect_gains import dense_weight, make_meter, rounding_error
from gguf_kit.quantize.imatrix import read_imatrix

STEPS = 3
LAYERS = (
    "img_in",
    "time_in.in_layer",
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.img_mod.lin",
    "single_blocks.2.linear2",
    "final_layer.linear",
)


@pytest.fixture
def only_some_layers(monkeypatch):
    """Record LAYERS alone, to be quick."""
    linear_layers = collector.linear_layers
    monkeypatch.setattr(
        collector, "linear_layers", lambda network: {n: m for n, m in linear_layers(network).items() if n in LAYERS}
    )


def gains_of(patcher, path, n_steps=STEPS, **options):
    """Gains by layer after one sampling of a model."""
    file = collector.ImatrixFile(lambda: path, fresh=False)
    collecting.sample(collector.collect(patcher, file, 4, n_steps), **({"steps": STEPS} | options))
    entries = read_imatrix(path).entries
    return {name.removesuffix(".weight"): entry.gain for name, entry in entries.items()}


def rounded(weight, bits):
    """A weight in blocks of 32, each on a grid of 2**bits values between its ends; float32, for many are half-way."""
    values, block = weight.numpy(), np.empty_like(weight.numpy())
    for at in range(0, values.shape[1], 32):
        part = values[:, at : at + 32]
        low, high = part.min(1, keepdims=True), part.max(1, keepdims=True)
        step = (high - low) / np.float32(2**bits - 1)
        block[:, at : at + 32] = np.round((part - low) / step) * step + low
    return torch.from_numpy(block)


class Expected:
    """The same by other means: Euler steps along the path of an undisturbed model, of models with rounded weights."""

    def __init__(self, patcher, rows, seeds):
        comfy.model_management.load_models_gpu([patcher])
        self.model = patcher.model
        self.sigmas = comfy.samplers.calculate_sigmas(self.model.model_sampling, "simple", STEPS)
        self.conditions = {
            "c_crossattn": collecting.PROMPTS["context"][list(rows)],
            "y": collecting.PROMPTS["y"][list(rows)],
        }
        self.path = [collecting.noise(*seeds)]
        for i in range(STEPS):
            self.path.append(self.path[-1] + self.move(i))
        self.moves = [self.move(i) for i in range(STEPS)]

    def move(self, i):
        sigma = self.sigmas[i]
        x = self.path[i]
        denoised = self.model.apply_model(x, sigma.expand(len(x)), **self.conditions)
        return (x - denoised) / sigma * (self.sigmas[i + 1] - sigma)

    def gain(self, name):
        module = self.model.diffusion_model.get_submodule(name)
        weight, found = module.weight.data, []
        for bits in (2, 3):
            change = rounded(weight, bits).double() - weight.double()
            squares = []
            hook = module.register_forward_pre_hook(
                lambda m, args, change=change, squares=squares: squares.append(
                    (args[0].double().reshape(-1, args[0].shape[-1]) @ change.T).square().sum(1)
                )
            )
            module.weight.data = (weight.double() + change).float()
            moved = sum(self.move(i) - self.moves[i] for i in range(STEPS))
            module.weight.data = weight
            hook.remove()
            error = moved.double().square().sum() / self.path[-1].double().square().sum()
            found.append(float(error / torch.cat(squares).mean()))
        return math.sqrt(found[0] * found[1])


def test_gains_are_those_of_a_model_with_rounded_weights(tmp_path, only_some_layers):
    rows, seeds = (3, 30), (5, 6)
    patcher = collecting.dense_model()
    found = gains_of(patcher, tmp_path / "x.gguf", rows=rows, seeds=seeds)
    with torch.no_grad():
        reference = Expected(patcher, rows, seeds)
        expected = {name: reference.gain(name) for name in LAYERS}
    assert found.keys() == expected.keys()
    differences = {name: abs(math.log(found[name] / expected[name])) for name in LAYERS}
    assert max(differences.values()) < 0.01, differences
    order = [sorted(LAYERS, key=gains.get) for gains in (found, expected)]
    assert order[0] == order[1]
    assert max(found.values()) > 20 * min(found.values())


def test_gains_of_quantized_weights_are_those_of_the_same_weights_dense(tmp_path, tiny_flux, only_some_layers):
    path = tiny_flux("Q4_K_S")
    quantized = gains_of(tiny.quantized_model(path), tmp_path / "a.gguf", 1)
    dense = gains_of(tiny.float_model(path), tmp_path / "b.gguf", 1)
    assert {name: pytest.approx(gain, rel=1e-3) for name, gain in dense.items()} == quantized


def test_gains_are_the_same_in_every_run_and_change_no_latent(tmp_path, only_some_layers, inference_mode):
    patcher = collecting.dense_model()
    first, second = (gains_of(patcher, tmp_path / name, 1) for name in ("a.gguf", "b.gguf"))
    assert first == second
    file = collector.ImatrixFile(lambda: tmp_path / "c.gguf", fresh=False)
    found = collecting.sample(collector.collect(patcher, file, 0, 1), steps=2)
    assert torch.equal(found, collecting.sample(patcher, steps=2))


def test_prompt_and_negative_apart_give_what_they_give_in_one_batch(tmp_path, only_some_layers, monkeypatch):
    patcher = collecting.dense_model()
    together = gains_of(patcher, tmp_path / "a.gguf", 2, cfg=2.0)
    monkeypatch.setattr(patcher.model, "memory_required", lambda *args, **kwargs: float("inf"))
    apart = gains_of(patcher, tmp_path / "b.gguf", 2, cfg=2.0)
    assert {name: pytest.approx(gain, rel=1e-3) for name, gain in together.items()} == apart
    calls = [read_imatrix(tmp_path / name).entries["img_in.weight"].gain_calls for name in ("a.gguf", "b.gguf")]
    assert calls == [2, 4]


def test_of_two_collectors_in_a_row_none_records_what_the_other_measures(tmp_path, only_some_layers):
    patcher, paths = collecting.dense_model(), [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    for path in paths:
        patcher = collector.collect(patcher, collector.ImatrixFile(lambda path=path: path, fresh=False), 0, 1)
    collecting.sample(patcher, steps=1)
    a, b = (read_imatrix(path).entries for path in paths)
    assert a.keys() == b.keys()
    assert len(a) == len(LAYERS)
    for name in a:
        assert torch.equal(a[name].counts, b[name].counts), name
        assert torch.equal(a[name].sums, b[name].sums), name
        assert (a[name].gain, a[name].gain_calls) == (b[name].gain, 1), name


def test_gains_average_over_samplings(tmp_path, only_some_layers):
    patcher = collecting.dense_model()
    one = gains_of(patcher, tmp_path / "a.gguf", 1, rows=(3,))
    two = gains_of(patcher, tmp_path / "b.gguf", 2, rows=(9,))
    gains_of(patcher, tmp_path / "ab.gguf", 1, rows=(3,))
    both = gains_of(patcher, tmp_path / "ab.gguf", 2, rows=(9,))
    assert both == {name: pytest.approx((one[name] + 2 * two[name]) / 3, rel=1e-5) for name in LAYERS}


def test_a_model_with_a_lora_is_measured_with_it(tmp_path, tiny_flux, only_some_layers):
    plain = tiny.quantized_model(tiny_flux("Q4_K_S"))
    found = gains_of(tiny.with_patches(plain, tiny.lora()), tmp_path / "a.gguf", 1)
    assert found.keys() == set(LAYERS)
    without = gains_of(plain, tmp_path / "b.gguf", 1)
    assert all(found[name] != without[name] for name in LAYERS)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_2s_ancestral"])
def test_each_step_is_recorded_once(sampler):
    patcher = collecting.dense_model()
    sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "simple", 6).tolist()
    with CallRecorder(patcher.model.diffusion_model, sigmas, 3, lambda sigma: 1.0) as recorder:
        collecting.sample(patcher, steps=6, sampler=sampler)
    assert [call.step for call in recorder.calls] == [1, 3, 5]
    assert sum(recorder.weights()) == pytest.approx(sigmas[-1] - sigmas[0])


def test_without_sigmas_calls_are_counted_and_weigh_the_same():
    network = torch.nn.Linear(2, 2)
    with CallRecorder(network, [1.0, 0.7, 0.5, 0.1, 0.0], 2, lambda sigma: 1.0) as recorder:
        for i in range(5):
            network(torch.full((1, 2), float(i)))
    assert [call.step for call in recorder.calls] == [1, 3]
    assert recorder.weights() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("large", [0, 1 << 30], ids=["on the CPU", "where it is"])
def test_a_call_is_repeated_exactly_whatever_the_network_does_to_its_arguments(monkeypatch, large):
    monkeypatch.setattr(collect_calls, "LARGE", large)

    class Network(torch.nn.Module):
        def forward(self, x, control=None, transformer_options=None):
            transformer_options["n"] += 1
            x += control["output"].pop()
            return (x * transformer_options["n"], x.flatten(1)[:, :3])

    network = Network()
    with CallRecorder(network, [1.0, 0.0], 1, lambda sigma: 1.0) as recorder:
        x, options = torch.ones(2, 4, 2), {"sigmas": torch.tensor([1.0]), "n": 1}
        first = network(x, control={"output": [torch.ones(2, 4, 2)]}, transformer_options=options)
    (call,) = recorder.calls
    expected = torch.cat([part.flatten(1) for part in first], dim=1)
    assert expected.shape == (2, 8 + 3)
    assert torch.equal(call.repeat(network), expected)
    assert torch.equal(call.repeat(network), expected)


def test_an_undisturbed_model_repeats_itself_exactly():
    patcher = collecting.dense_model()
    sigmas = comfy.samplers.calculate_sigmas(patcher.model.model_sampling, "simple", STEPS).tolist()
    network = patcher.model.diffusion_model
    with CallRecorder(network, sigmas, STEPS, lambda sigma: 1.0) as recorder:
        latent = collecting.sample(patcher, steps=STEPS, cfg=2.0)
    meter = make_meter(network, recorder.calls, recorder.weights(), latent)
    assert meter.latent_error() == 0.0
    network.img_in.weight.data.mul_(2)
    assert not meter.repeats()


def test_a_model_that_does_not_repeat_itself_is_not_measured(tmp_path, only_some_layers, caplog):
    patcher = collecting.dense_model()
    network, calls = patcher.model.diffusion_model, []
    network.img_in.register_forward_hook(lambda m, args, output: calls.append(1) or output * (1 + 0.1 * len(calls)))
    with caplog.at_level(logging.WARNING, "gguf_kit"):
        found = gains_of(patcher, tmp_path / "a.gguf", 1)
    assert set(found.values()) == {None}
    assert "Sensitivity is not measured: the model gives other results" in caplog.text


def test_without_memory_for_gains_the_rest_is_recorded(tmp_path, only_some_layers, monkeypatch, caplog):
    def fail(*args):
        raise comfy.model_management.OOM_EXCEPTION("no memory")

    monkeypatch.setattr(collector, "measure_gains", fail)
    with caplog.at_level(logging.WARNING, "gguf_kit"):
        found = gains_of(collecting.dense_model(), tmp_path / "a.gguf", 1)
    assert found
    assert set(found.values()) == {None}
    assert "no memory to measure sensitivity" in caplog.text


def test_measuring_can_be_cancelled_between_layers_and_records_nothing_then(tmp_path, only_some_layers, monkeypatch):
    patcher = collecting.dense_model()

    def cancel():
        raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        gains_of(patcher, tmp_path / "a.gguf", 1)
    assert list(tmp_path.iterdir()) == []
    assert not any(m._forward_hooks for m in patcher.model.diffusion_model.modules())


# -- parts --


def test_dense_weights_of_every_kind_are_what_they_stand_for(tiny_flux):
    name = "double_blocks.0.img_mlp.0"
    path = tiny_flux("Q4_K_S")
    expected = tiny.float_weights(path)[f"{name}.weight"]
    patcher = tiny.quantized_model(path)
    assert torch.equal(dense_weight(patcher.model.diffusion_model.get_submodule(name), tiny.CPU), expected)

    fp8, scale = (expected * 100).to(torch.float8_e4m3fn), torch.tensor(0.01)

    def scaled(state):
        mark = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), f"{name}.scale_weight": scale}
        return state | {f"{name}.weight": fp8} | mark

    module = collecting.dense_model(scaled).model.diffusion_model.get_submodule(name)
    assert tiny.relative(dense_weight(module, tiny.CPU), fp8.float() * scale) < 3e-3  # in the dtype that it claims
    plain = torch.nn.Linear(4, 3, dtype=torch.bfloat16)
    weight = dense_weight(plain, tiny.CPU)
    assert torch.equal(weight, plain.weight.float())
    assert not weight.requires_grad


@pytest.mark.parametrize("shape", [(4, 96), (3, 33)], ids=["blocks of 32", "whole rows"])
def test_rounding_reaches_both_ends_of_a_block_with_few_values(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = weight + rounding_error(weight, 2)
    block = 32 if shape[1] % 32 == 0 else shape[1]
    for before, after in zip(weight.reshape(-1, block), result.reshape(-1, block), strict=True):
        assert len(np.unique(after.numpy().round(5))) <= 4
        assert (after.min(), after.max()) == (pytest.approx(before.min()), pytest.approx(before.max()))
        assert (after - before).abs().max() <= (before.max() - before.min()) / 6 * 1.0001
    assert torch.equal(rounding_error(torch.full((2, 32), 3.0), 3), torch.zeros(2, 32))


@pytest.mark.parametrize("kind", ["CONST", "EPS", "V_PREDICTION", "EDM", "X0"])
def test_an_output_moves_the_latent_as_an_euler_step_does(kind):
    sampling = getattr(comfy.model_sampling, kind)()
    sampling.sigma_data = 0.7
    x, output, change = torch.randn(3, 1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    sigma = 0.6

    def move(out):
        denoised = sampling.calculate_denoised(torch.tensor([sigma]), out, x)
        return (x - denoised) / sigma

    scale = collector.output_scale(SimpleNamespace(model_sampling=sampling), sigma)
    assert torch.allclose(move(output + change) - move(output), change * scale, atol=1e-5)
    assert collector.output_scale(SimpleNamespace(model_sampling=sampling), 0.0) == 0.0
