"""Copies, pickles, replicas, processes, meta tensors and the functional forms of the network."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import networks
from effnet_fast import use_backend
from effnet_fast.models import EfficientNet, EfficientNetFeatures
from inference_process import infer
from networks import TINY, assert_alike, pair, random_images, run_network

X = random_images(4, 48)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def network(training: bool = False) -> EfficientNet:
    """After a forward and a backward pass, so that whatever these keep is there."""
    model = pair().train(training).actual
    assert isinstance(model, EfficientNet)
    state = copy.deepcopy(model.state_dict())
    run_network(model, X)
    with torch.no_grad():
        model(X)
    model.zero_grad()
    model.load_state_dict(state)
    return model


def by_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_state_dict(model: nn.Module) -> nn.Module:
    """Through a file that needs no code, strictly, onto a network made on the meta device."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    with torch.device("meta"):
        other = EfficientNet(TINY)
    other.load_state_dict(state, strict=True, assign=True)
    return other.train(model.training)


def by_to_empty(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        other = EfficientNet(TINY)
    other = other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch_save": by_torch_save,
    "state_dict": by_state_dict,
    "to_empty": by_to_empty,
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m).module.train(m.training),
}


@pytest.mark.slow
@MODES
@pytest.mark.parametrize("name", COPIES)
def test_copy(name: str, training: bool) -> None:
    """The same results to the bit, from memory of its own."""
    model = network(training)
    other = COPIES[name](model)
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert not own & {t.data_ptr() for t in other.state_dict().values()}
    actual, expected = (run_network(m, X) for m in (other, model))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in actual.items())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    again = run_network(model.eval(), X)["y"]
    assert again.abs().max() > 0


def test_settings_travel_with_copies() -> None:
    model = EfficientNet(TINY, backend="reference", memory="lean", num_classes=3).freeze(2)
    model.set_grad_checkpointing()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), by_torch_save(model)):
        assert (other.backend, other.memory, other.num_classes) == ("reference", "lean", 3)
        assert other.grad_checkpointing
        assert other.feature_info.channels() == model.feature_info.channels()
        assert not other.train().features[1][0].block[0][1].training


def test_whole_pickles_are_refused_with_weights_only() -> None:
    buffer = io.BytesIO()
    torch.save(EfficientNet(TINY), buffer)
    buffer.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(buffer, weights_only=True)


def replicate(model: nn.Module) -> nn.Module:
    """What DataParallel makes for a device: shallow copies whose parameters are plain tensors."""
    modules = list(model.modules())
    copies = {id(m): m._replicate_for_data_parallel() for m in modules}
    for module in modules:
        replica = copies[id(module)]
        replica._former_parameters = {}
        for key, child in module._modules.items():
            setattr(replica, key, None if child is None else copies[id(child)])
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
                continue
            tensor = parameter * 1  # no leaf, as after broadcasting
            setattr(replica, key, tensor)
            replica._former_parameters[key] = tensor
        for key, buffer in module._buffers.items():
            setattr(replica, key, None if buffer is None else buffer.clone())
    return copies[id(model)]


@pytest.mark.slow
@MODES
def test_data_parallel_replicas(training: bool) -> None:
    """Two replicas, a part of the batch each: torchvision's results, gradients in the original."""
    results = []
    for model in pair().train(training).models:
        torch.manual_seed(0)
        replicas = [replicate(model) for _ in range(2)]
        y = torch.cat([r(part) for r, part in zip(replicas, X.chunk(2), strict=True)])
        y.square().mean().backward()
        named = {f"grad {k}": p.grad for k, p in model.named_parameters()}
        named |= {f"buffer {k}": b for r in replicas for k, b in r.named_buffers()}
        results.append({"y": y.detach(), **named})
    assert results[0]["grad features.0.0.weight"].abs().max() > 0
    assert_alike(*results)


def test_replicas_keep_what_is_frozen_and_recomputed() -> None:
    model = network(training=True).freeze(2)
    model.set_grad_checkpointing()
    replica = replicate(model)
    before = {k: v.clone() for k, v in replica.named_buffers()}
    replica(X).sum().backward()
    moved = [k for k, v in replica.named_buffers() if not torch.equal(v, before[k])]
    assert min(int(k.split(".")[1]) for k in moved) == 3
    counts = {int(v) for k, v in replica.named_buffers() if "num_batches" in k and k in moved}
    assert counts == {1}


def test_data_parallel_wrapper() -> None:
    models = pair()
    wrapped = nn.DataParallel(models.actual)
    assert_alike({"y": wrapped(X).detach()}, {"y": models.stock(X).detach()})
    assert next(iter(wrapped.state_dict())) == "module.features.0.0.weight"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_other_processes(method: str) -> None:
    """Sent to a fresh process, or there from before it split off."""
    model = EfficientNet(TINY).eval()
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=infer, args=(model, X, results))
    process.start()
    y = torch.from_numpy(results.get(timeout=60))
    process.join(timeout=60)
    assert process.exitcode == 0
    with torch.no_grad():
        torch.testing.assert_close(model(X), y)


class TestMeta:
    @pytest.mark.slow
    def test_shapes_without_memory(self) -> None:
        with torch.device("meta"):
            model = EfficientNet("b7")
            x = torch.empty(2, 3, 600, 600)
        assert model.eval()(x).shape == (2, 1000)
        assert model.train()(x).is_meta

    @pytest.mark.slow
    def test_encoder(self) -> None:
        with torch.device("meta"):
            model = EfficientNetFeatures("b7", out_indices=(1, 4)).eval()
            maps = model(torch.empty(1, 3, 640, 640))
        assert [m.shape[1:] for m in maps] == [(48, 160, 160), (640, 20, 20)]

    @pytest.mark.slow
    def test_fake_tensors(self) -> None:
        from torch._subclasses import FakeTensorMode

        with FakeTensorMode():
            assert EfficientNet(TINY).eval()(torch.empty(2, 3, 48, 48)).shape == (2, 1000)


class TestStrictLoading:
    @pytest.mark.parametrize("key", ["features.1.0.block.0.0.weight", "classifier.1.bias"])
    def test_missing_and_unexpected_keys(self, key: str) -> None:
        model = network()
        state = model.state_dict()
        tensor = state.pop(key)
        with pytest.raises(RuntimeError, match=rf"Missing key.*{key}"):
            model.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*extra\.weight"):
            model.load_state_dict({**state, key: tensor, "extra.weight": tensor})
        with pytest.raises(RuntimeError, match=rf"size mismatch for {key}"):
            model.load_state_dict({**state, key: tensor[:-1]})


@pytest.mark.slow
@MODES
def test_parametrized_and_pruned(training: bool) -> None:
    def change(model: nn.Module) -> None:
        parametrize.register_parametrization(model.features[2][0].block[1][0], "weight", Halved())
        prune.l1_unstructured(model.features[3][0].block[0][0], "weight", 0.5)
        prune.ln_structured(model.features[5][0].block[1][0], "weight", 0.25, n=2, dim=0)

    models = pair().apply(change).train(training)
    models.assert_alike(X)
    models.apply(lambda m: prune.remove(m.features[3][0].block[0][0], "weight"))
    models.apply(
        lambda m: parametrize.remove_parametrizations(m.features[2][0].block[1][0], "weight")
    )
    models.assert_alike(X)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class TestFunctional:
    def test_functional_call(self) -> None:
        """Parameters and statistics passed in; those of the module stay."""
        models = pair().train()
        results = []
        for model in models.models:
            own = copy.deepcopy(model.state_dict())
            state = {k: v.clone() for k, v in networks.calibrated_state(TINY).items()}
            state["features.3.0.block.1.0.weight"] *= 2
            torch.manual_seed(0)
            y = torch.func.functional_call(model, state, (X,))
            results.append({"y": y.detach()} | {f"buffer {k}": v for k, v in state.items()})
            assert all(torch.equal(v, own[k]) for k, v in model.state_dict().items())
        assert_alike(*results)
        assert results[0]["buffer features.0.1.num_batches_tracked"] == 1

    def test_functional_call_differentiates_in_plain_tensors(self) -> None:
        grads = []
        for model in pair().models:
            # Smaller ones: with larger ones stock itself errs by 1.5%.
            parameters = {k: p.detach() * 0.9 for k, p in model.named_parameters()}
            leaves = {k: p.requires_grad_() for k, p in parameters.items()}
            torch.func.functional_call(model, leaves, (X,)).square().mean().backward()
            grads.append({f"grad {k}": p.grad for k, p in leaves.items()})
        assert_alike(*grads)

    def test_grad_and_vmap(self) -> None:
        """Per-sample gradients, as torch.func has them."""
        results = []
        for model in pair().models:
            parameters = {k: p.detach() for k, p in model.named_parameters()}
            buffers = dict(model.named_buffers())

            def loss(
                parameters: dict[str, Tensor],
                x: Tensor,
                model: nn.Module = model,
                buffers: dict[str, Tensor] = buffers,
            ) -> Tensor:
                y = torch.func.functional_call(model, (parameters, buffers), (x[None],))
                return y.square().mean()

            grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
            results.append({f"grad {k}": g for k, g in grads.items()})
        assert results[0]["grad classifier.1.weight"].shape == (4, 1000, 320)
        assert_alike(*results)

    def test_ensembles_by_stacked_state(self) -> None:
        models = [EfficientNet(TINY).eval() for _ in range(2)]
        parameters, buffers = torch.func.stack_module_state(models)
        base = copy.deepcopy(models[0]).to("meta")

        def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(base, (p, b), (X,))

        stacked = torch.func.vmap(call)(parameters, buffers)
        with use_backend("reference"):
            expected = torch.stack([model(X) for model in models])
        torch.testing.assert_close(stacked, expected, rtol=1e-3, atol=1e-4)


def test_threads_share_a_network() -> None:
    """Inference from several threads at once, each with its own scratch memory."""
    from concurrent.futures import ThreadPoolExecutor

    model = network()
    images = [random_images(2, 48, seed=i) for i in range(8)]

    def infer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    expected = [infer(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        for actual, y in zip(pool.map(infer, images * 4), expected * 4, strict=True):
            assert torch.equal(actual, y)
