"""DCN-v2's cross network (R. Wang et al., DCN V2, WWW 2021), with matrices of low rank."""

from torch import Tensor, nn


class CrossNetwork(nn.Module):
    """``x_(l+1) = x_0 * (U_l V_l^T x_l + c_l) + x_l``, elementwise products of the input's columns.

    Layer ``l`` multiplies by the input once more, so that without ``c`` the output is a polynomial
    of degree ``layers + 1`` of the input.

    Args:
        width: Columns of the input, ``I``.
        layers: Number of layers.
        rank: Columns of ``U`` and ``V``. If it is ``I`` and ``V`` the identity, ``U`` is DCN-v2's
            full matrix.
    """

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(layers))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the crossed rows, ``(B, I)``."""
        crossed = rows
        for down, up in zip(self.down, self.up, strict=True):
            crossed = rows * up(down(crossed)) + crossed
        return crossed
