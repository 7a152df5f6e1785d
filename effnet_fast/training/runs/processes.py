"""The processes that train together, on Hugging Face Accelerate: one alone, or torchrun's.

Accelerate starts the process group, names the device, and has the precision's autocast and scaler.
Data parallel training is PyTorch's DistributedDataParallel; "fsdp" is its fully_shard (FSDP2).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from effnet_fast.training.extras import require
from effnet_fast.training.runs.settings import PRECISIONS

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(Exception):
    """A signal ended the run after a whole step; its state is saved.

    Attributes:
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def restarts() -> int:
    """How often torchrun has started this group of processes anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Processes:
    """This process among those that train.

    Args:
        device: "auto", "cpu" or "cuda".
        precision: a key of `settings.PRECISIONS`.
        strategy: one of `settings.STRATEGIES`.

    Attributes:
        rank, world: this process's number, of how many.
        device: where its network and batches are.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: "fsdp" with one process, fp16 on a CPU, or no such device.
    """

    def __init__(self, device: str, precision: str, strategy: str) -> None:
        accelerate = require("accelerate", "train")
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        if device == "cuda" and on_cpu:
            raise ValueError("device is cuda, but there is no CUDA device")
        if precision == "fp16" and on_cpu:
            raise ValueError("precision fp16 needs a CUDA device; a CPU trains in fp32 or bf16")
        self._own_group = not dist.is_initialized()
        if self._own_group:
            _begin_again("gloo" if on_cpu else "nccl")
        _forget_accelerate()
        self.accelerator: Any = accelerate.Accelerator(
            cpu=on_cpu, mixed_precision=PRECISIONS[precision]
        )
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main = self.rank == 0
        self.is_sharded = strategy == "fsdp"
        if self.is_sharded and self.world == 1:
            self.close()
            raise ValueError("strategy fsdp needs several processes: start them with torchrun")

    def prepare(self, model: nn.Module, *, sync_bn: bool = False) -> nn.Module:
        """The network as it is trained: wrapped for several processes, or sharded in place.

        Args:
            sync_bn: whether its BatchNorms share their statistics between processes.
        """
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        if self.is_sharded:
            if sync_bn:
                convert(model)  # in place: a network is no BatchNorm itself
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.world,))
            fully_shard(model, mesh=mesh)
            return model
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        # Accelerate sets a forward that enters autocast. Here the caller enters it: with a forward
        # of its own a network would not run by its plan, and copies would share the original's.
        vars(model).pop("forward", None)
        if sync_bn and self.world > 1:
            convert(model)  # now: on CPUs DistributedDataParallel refuses what is converted before
        return wrapped

    def prepare_optimizer(self, optimizer: Optimizer) -> Any:
        """The optimizer, whose steps the scaler of fp16 may leave out."""
        return self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    @property
    def scaler(self) -> Any:
        """fp16's scaler of gradients, else None."""
        return self.accelerator.scaler

    def synchronising(self, model: nn.Module, is_last: bool) -> Any:
        """A context in which backward sums gradients over the processes, if `is_last`."""
        return contextlib.nullcontext() if is_last else self.accelerator.no_sync(model)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def add_up(self, array: NDArray[Any]) -> NDArray[Any]:
        """The sum over all processes of an array that each has."""
        return self.sum(torch.from_numpy(array.copy()).to(self.device)).cpu().numpy()

    def gather(self, item: Any) -> list[Any]:
        """The items of all processes, by rank; each has the whole list."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def from_main(self, make: Any) -> Any:
        """make() of the first process, in all of them; its error is raised in all of them."""
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except Exception as error:  # whatever it is, all processes raise it
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        return box[0]

    @torch.no_grad()
    def share(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the tensors of the first, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def close(self) -> None:
        """Ends the process group, if it was begun here."""
        del self.accelerator
        if self._own_group and dist.is_initialized():
            dist.destroy_process_group()
        _forget_accelerate()


def _begin_again(backend: str) -> None:
    """Begins the process group of processes that torchrun has started anew.

    torchrun's agent keeps its store: without a prefix a process could find the address of one that
    was killed, and fail to connect (torch 2.13).
    """
    if not restarts() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    stores: Any = dist  # which PyTorch's annotations do not export
    store = stores.TCPStore(address, port, world, is_master=False)
    store = stores.PrefixStore(f"restart_{restarts()}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)


def _forget_accelerate() -> None:
    """Accelerate's settings are the process's: a second run may want others."""
    state = require("accelerate.state", "train")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


class StopRequest:
    """Notes SIGTERM and SIGINT instead of ending the process; a second one ends it.

    In another thread than the main one it notes nothing.

    Attributes:
        number: of the signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.number = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Notes signals within the block."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
