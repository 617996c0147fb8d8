"""Passes of the training that a GPU records once and replays."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtnrec.batch import Batch


def can_be_replayed(network: nn.Module) -> bool:
    """Say whether a GPU may record the passes of a network.

    It must be on a GPU and say that it is ``replayable``: that on each batch of as many rows it
    launches the same kernels, whatever is in the batch and however often it was called. A sparse
    gradient has as many rows as the batch has tokens, and several processes average gradients while
    they are computed: neither is recorded.
    """
    sparse = any(isinstance(part, nn.Embedding) and part.sparse for part in network.modules())
    on_gpu = all(parameter.is_cuda for parameter in network.parameters())
    replayable = getattr(network, "replayable", False)
    return replayable and on_gpu and not sparse and not dist.is_initialized()


class Replay:
    """The loss of a batch; its passes, forward and backward, are replays of CUDA graphs.

    A step of these networks is some hundreds of kernels that take a few microseconds each, less
    than it takes to start one: a GPU that is given them one by one computes for a tenth of the
    time. A graph is started at once. It is recorded as soon as two batches in a row have as many
    rows; a batch of another size, and one with bags, whose tokens are as many as they are, are
    computed as they are.

    The gradients of a replay lie in the graph's own memory, which the next replay overwrites: they
    cannot be accumulated over batches.

    Args:
        network: For which :func:`can_be_replayed`. Where it is and where its parameters lie must
            not change.
        loss: Computes the loss of a batch by it.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Batch], Tensor]) -> None:
        self._network = network
        self._loss = loss
        self._rows = 0  # of the batch before
        self._recorded_rows = 0
        self._recorded: Callable[..., Tensor] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss, a scalar from which the backward pass goes as ever."""
        rows, before = len(batch), self._rows
        self._rows = rows
        if batch.bags or batch.labels is None:
            return self._loss(batch)
        if self._recorded is None and rows == before:
            self._recorded, self._recorded_rows = self._record(batch), rows
        if self._recorded is None or rows != self._recorded_rows:
            return self._loss(batch)
        # A copy, since the next replay writes the next loss there.
        return self._recorded(batch.categorical, batch.numerical, batch.labels).clone()

    def _record(self, batch: Batch) -> Callable[..., Tensor]:
        """Record the passes; what the passes before that change and draw is put back."""
        assert batch.labels is not None
        # The graph reads its batch from these.
        own = tuple(part.clone() for part in (batch.categorical, batch.numerical, batch.labels))
        random_state = torch.cuda.get_rng_state(own[0].device)
        buffers = [buffer.clone() for buffer in self._network.buffers()]
        recorded = _LossOfTensors(self._network, self._loss)
        torch.cuda.make_graphed_callables(recorded, own, allow_unused_input=True)  # in place
        torch.cuda.set_rng_state(random_state, own[0].device)
        with torch.no_grad():
            for buffer, before in zip(self._network.buffers(), buffers, strict=True):
                buffer.copy_(before)
        _expect_another_stream()
        return recorded


class _LossOfTensors(nn.Module):
    """The loss as a module of tensors, as torch records it."""

    def __init__(self, network: nn.Module, loss: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.network = network
        self._loss = loss

    def forward(self, categorical: Tensor, numerical: Tensor, labels: Tensor) -> Tensor:
        return self._loss(Batch(categorical, numerical, labels))


def _expect_another_stream() -> None:
    """Spare the user torch's warning that gradients come from the stream that was recorded."""
    graph = torch.autograd.graph
    if hasattr(graph, "set_warn_on_accumulate_grad_stream_mismatch"):  # where it warns of it
        graph.set_warn_on_accumulate_grad_stream_mismatch(enabled=False)
