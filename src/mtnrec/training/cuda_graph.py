"""CUDA graphs: the forward and backward pass of a batch, captured once and replayed."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mtnrec.batch import Batch


def can_be_captured(network: nn.Module) -> bool:
    """Return whether the passes of a network can be captured as CUDA graphs.

    It must be on a GPU and have ``supports_cuda_graphs = True``: for every batch of the same size
    it launches the same kernels, whatever the batch holds and however often it was called. Sparse
    gradients, which have as many rows as the batch has tokens, cannot be captured; nor can several
    processes, which average gradients while computing them.
    """
    sparse = any(isinstance(part, nn.Embedding) and part.sparse for part in network.modules())
    on_gpu = all(parameter.is_cuda for parameter in network.parameters())
    supported = getattr(network, "supports_cuda_graphs", False)
    return supported and on_gpu and not sparse and not dist.is_initialized()


class CudaGraphLoss:
    """Loss of a batch, with forward and backward passes replayed from CUDA graphs.

    A step of these networks launches hundreds of kernels of a few microseconds each, less than the
    overhead of a launch: launched one by one, they keep a GPU busy for a tenth of the time. A graph
    is launched at once. It is captured as soon as two consecutive batches have the same number of
    rows; a batch of another size, or with bags, whose tokens vary in number, is computed eagerly.

    The gradients of a replay lie in the graph's own memory, which the next replay overwrites: they
    cannot be accumulated over batches.

    Args:
        network: Network that :func:`can_be_captured` accepts. Its device and the storage of its
            parameters must not change.
        loss: Computes the loss of a batch with the network.
    """

    def __init__(self, network: nn.Module, loss: Callable[[Batch], Tensor]) -> None:
        self._network = network
        self._loss = loss
        self._rows = 0  # of the previous batch
        self._captured_rows = 0
        self._captured: Callable[..., Tensor] | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss, a scalar."""
        rows, before = len(batch), self._rows
        self._rows = rows
        if batch.bags or batch.labels is None:
            return self._loss(batch)
        if self._captured is None and rows == before:
            self._captured, self._captured_rows = self._capture(batch), rows
        if self._captured is None or rows != self._captured_rows:
            return self._loss(batch)
        # A copy, since the next replay overwrites it.
        return self._captured(batch.categorical, batch.numerical, batch.labels).clone()

    def _capture(self, batch: Batch) -> Callable[..., Tensor]:
        """Capture the passes; restore the buffers and the random state that the warm-up changes."""
        assert batch.labels is not None
        # The graph reads its batches from these.
        own = tuple(part.clone() for part in (batch.categorical, batch.numerical, batch.labels))
        random_state = torch.cuda.get_rng_state(own[0].device)
        buffers = [buffer.clone() for buffer in self._network.buffers()]
        captured = _TensorLoss(self._network, self._loss)
        torch.cuda.make_graphed_callables(captured, own, allow_unused_input=True)  # in place
        torch.cuda.set_rng_state(random_state, own[0].device)
        with torch.no_grad():
            for buffer, before in zip(self._network.buffers(), buffers, strict=True):
                buffer.copy_(before)
        _silence_stream_warning()
        return captured


class _TensorLoss(nn.Module):
    """Loss as a module with tensor inputs, which torch can capture."""

    def __init__(self, network: nn.Module, loss: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.network = network
        self._loss = loss

    def forward(self, categorical: Tensor, numerical: Tensor, labels: Tensor) -> Tensor:
        return self._loss(Batch(categorical, numerical, labels))


def _silence_stream_warning() -> None:
    """Silence torch's warning that gradients come from the capture stream."""
    graph = torch.autograd.graph
    if hasattr(graph, "set_warn_on_accumulate_grad_stream_mismatch"):  # only newer versions warn
        graph.set_warn_on_accumulate_grad_stream_mismatch(enabled=False)
