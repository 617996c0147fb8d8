"""Multi-task recommendation models trained with the multi-layer tensor trace norm (MTN).

Notation used in every docstring:

======  =====================================================================
``B``   rows in a batch
``F``   categorical fields
``N``   numerical features
``D``   embedding width
``T``   tasks, or towers: one for each label
``E``   experts
``O``   outputs of a linear layer
``I``   inputs of a linear layer
``L``   depths that the penalty acts on
``S``   distinct unfoldings of a stack; three for a stack of matrices
======  =====================================================================

``y`` is the click label and ``z`` the conversion label, with ``z <= y`` on a funnel.
``||M||_*`` is the trace norm (sum of singular values), ``||M||_F`` the Frobenius norm.

"MTN" and "the paper": B. Dai et al., *Enhancing Multi-Task Models for Recommendation with Tensor
Trace Norm*; equation numbers are its own.
"""

from typing import Any

__all__ = ["load_checkpoint"]


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: half of the commands do without torch.
    if name == "load_checkpoint":
        from mtnrec.serving.scorer import load_checkpoint

        return load_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
