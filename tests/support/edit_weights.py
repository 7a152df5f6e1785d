"""The kinds of edit that write, replace or tie parameters and buffers, see `edit_kinds`."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from edit_session import Kind, Session


def _weights(change: Callable[[Session, Tensor], object]) -> Kind:
    """Changes one parameter or statistic in place."""

    def edit(s: Session) -> None:
        module, name = s.statistic() if s.draw.random() < 0.2 else s.parameter()
        change(s, getattr(module, name))

    return edit


def _entry(s: Session, flat: Tensor) -> None:
    flat[s.draw.randrange(flat.numel())] += 0.5


def _in_place(s: Session, t: Tensor) -> None:
    with torch.no_grad():
        t.mul_(s.factor())


def _bytes(s: Session, t: Tensor) -> None:
    """Through the storage, which knows no version."""
    storage = t.untyped_storage()
    size = t.element_size()
    place = s.draw.randrange(len(storage) // size) * size
    value = torch.tensor(0.75, dtype=t.dtype).view(torch.uint8)
    for index in range(size):
        storage[place + index] = int(value[index])


def _threaded(s: Session, t: Tensor) -> None:
    worker = threading.Thread(target=lambda: t.data.mul_(1.25))
    worker.start()
    worker.join()


def _inference(s: Session, t: Tensor) -> None:
    with torch.inference_mode():
        t.mul_(s.factor())


def replace_parameter(s: Session) -> None:
    module, name = s.parameter()
    value = getattr(module, name)
    like = value.detach() * s.factor()
    if value.dim() == 4 and s.draw.random() < 0.5:  # other strides
        like = like.to(memory_format=torch.channels_last)
    parameter = nn.Parameter(like, value.requires_grad)
    roads = (
        lambda: setattr(module, name, parameter),
        lambda: module._parameters.__setitem__(name, parameter),
        lambda: setattr(module, "_parameters", {**module._parameters, name: parameter}),
        lambda: module.__dict__.update(_parameters={**module._parameters, name: parameter}),
        lambda: setattr(value, "data", parameter.data),
        lambda: torch.utils.swap_tensors(value, parameter),
    )
    s.draw.choice(roads)()


def replace_buffer(s: Session) -> None:
    module, name = s.statistic()
    value = getattr(module, name) * s.factor()
    roads = (
        lambda: setattr(module, name, value),
        lambda: module._buffers.__setitem__(name, value),
        lambda: setattr(module, "_buffers", {**module._buffers, name: value}),
    )
    s.draw.choice(roads)()


def tie(s: Session) -> None:
    """One tensor for two parameters of the same shape."""
    module, name = s.parameter()
    tensor = getattr(module, name)
    twins = [
        (m, n)
        for m in s.model.modules()
        for n, t in m._parameters.items()
        if t is not None and t is not tensor and t.shape == tensor.shape
    ]
    if twins:
        other, twin = s.draw.choice(twins)
        setattr(other, twin, tensor)


def load_state(s: Session) -> None:
    state = {k: v.clone() for k, v in s.model.state_dict().items()}
    name = s.draw.choice([k for k, v in state.items() if v.is_floating_point()])
    state[name] = state[name] * s.factor()
    s.model.load_state_dict(state, assign=s.draw.random() < 0.5)


def step(s: Session) -> None:
    """A step of an optimiser after a forward and backward."""
    training = s.model.training
    s.model.train()
    optimizer = torch.optim.SGD(s.model.parameters(), lr=1e-3)
    y = s.model(torch.randn(2, s.model.in_chans, 32, 32))
    (y[-1] if isinstance(y, list) else y).square().mean().backward()
    optimizer.step()
    s.model.train(training)


def average(s: Session) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(s.model, use_buffers=True)
    with torch.no_grad():
        for parameter in s.model.parameters():
            parameter.data.mul_(1.05)
    averaged.update_parameters(s.model)
    s.model.load_state_dict(averaged.module.state_dict())


def vector(s: Session) -> None:
    parameters = [p for p in s.model.parameters() if p.requires_grad]
    flat = nn.utils.parameters_to_vector(parameters).detach() * 1.02
    nn.utils.vector_to_parameters(flat, parameters)


WEIGHT_KINDS: dict[str, Kind] = {
    "in_place": _weights(_in_place),
    "init": _weights(lambda s, t: nn.init.normal_(t.data, 1.0, 0.02) if t.dim() < 2 else None),
    "foreach": _weights(lambda s, t: torch._foreach_mul_([t.data], 1.25)),
    "data_whole": _weights(lambda s, t: t.data.mul_(s.factor())),
    "data_entry": _weights(lambda s, t: _entry(s, t.data.view(-1))),
    "numpy_entry": _weights(lambda s, t: _entry(s, t.detach().numpy().reshape(-1))),
    "storage_entry": _weights(_bytes),
    "thread": _weights(_threaded),
    "inference_mode": _weights(_inference),
    "parameter": replace_parameter,
    "buffer": replace_buffer,
    "tie": tie,
    "load_state": load_state,
    "optimizer": step,
    "average": average,
    "vector": vector,
}
