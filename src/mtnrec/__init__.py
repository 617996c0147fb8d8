"""Multi-task recommendation models trained with the multi-layer tensor trace norm (MTN).

Notation used in every docstring:

======  =====================================================================
``B``   rows in a batch
``F``   categorical fields
``N``   numerical features
``D``   embedding width
``T``   tasks, or towers: one per label
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

Glossary:

run
    One training: a model on a data set with a seed. Its folder holds its record, ``result.json``.
arm
    All runs that differ only in their seed and the keys derived from it.
treatment
    What an arm has and its baseline lacks: MTN, a regulariser, or both.
baseline
    The arm with the same settings without the treatment.
variant
    A treatment with certain settings, for example MTN on the experts.
sweep
    A folder of runs that one command trained.
task
    A predicted and measured probability: CTR, CVR and CTCVR on a funnel, otherwise one per label.
field
    A categorical feature: a vocabulary and a table of embeddings.
tower
    The layers of a network that belong to one task.
stack
    The weights of the towers' layers at one depth, a tensor ``(T, O, I)``.
unfolding
    A stack laid out as a matrix whose rows are one of its modes: task, output or input.
noise
    Features of a share of the rows replaced by other values of the same field, and positive labels
    that became negative.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtnrec.data.ali_ccp import AliCcp
    from mtnrec.data.aliexpress import AliExpress
    from mtnrec.data.census_income import CensusIncome
    from mtnrec.data.kuairand import KuaiRand
    from mtnrec.data.noise import Noise
    from mtnrec.data.synthetic import Synthetic
    from mtnrec.data.table import Table
    from mtnrec.model.adatt import AdaTT
    from mtnrec.model.aitm import AITM
    from mtnrec.model.dcmt import DCMT
    from mtnrec.model.escm2 import ESCM2
    from mtnrec.model.esmm import ESMM
    from mtnrec.model.heac import HEAC
    from mtnrec.model.mmoe import MMoE
    from mtnrec.model.naive_cvr import NaiveCVR
    from mtnrec.model.omoe import OMoE
    from mtnrec.model.ple import PLE
    from mtnrec.model.shared_bottom import SharedBottom
    from mtnrec.model.single_task import SingleTask
    from mtnrec.model.stem import STEM
    from mtnrec.mtn.callback import MTN
    from mtnrec.optimizer.lazy_adam import LazyAdam
    from mtnrec.regularizer.callback import Regularizer
    from mtnrec.reporting.runs import read_runs
    from mtnrec.serving.scorer import load_checkpoint
    from mtnrec.training.api import fit
    from mtnrec.training.module import MultiTaskModule

__all__ = [
    "AITM",
    "DCMT",
    "ESCM2",
    "ESMM",
    "HEAC",
    "MTN",
    "PLE",
    "STEM",
    "AdaTT",
    "AliCcp",
    "AliExpress",
    "CensusIncome",
    "KuaiRand",
    "LazyAdam",
    "MMoE",
    "MultiTaskModule",
    "NaiveCVR",
    "Noise",
    "OMoE",
    "Regularizer",
    "SharedBottom",
    "SingleTask",
    "Synthetic",
    "Table",
    "fit",
    "load_checkpoint",
    "read_runs",
]

_MODULES = {
    "AITM": "model.aitm",
    "AdaTT": "model.adatt",
    "AliCcp": "data.ali_ccp",
    "AliExpress": "data.aliexpress",
    "CensusIncome": "data.census_income",
    "KuaiRand": "data.kuairand",
    "DCMT": "model.dcmt",
    "ESCM2": "model.escm2",
    "ESMM": "model.esmm",
    "HEAC": "model.heac",
    "LazyAdam": "optimizer.lazy_adam",
    "MMoE": "model.mmoe",
    "MTN": "mtn.callback",
    "MultiTaskModule": "training.module",
    "NaiveCVR": "model.naive_cvr",
    "Noise": "data.noise",
    "OMoE": "model.omoe",
    "PLE": "model.ple",
    "Regularizer": "regularizer.callback",
    "SharedBottom": "model.shared_bottom",
    "SingleTask": "model.single_task",
    "STEM": "model.stem",
    "Synthetic": "data.synthetic",
    "Table": "data.table",
    "fit": "training.api",
    "load_checkpoint": "serving.scorer",
    "read_runs": "reporting.runs",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, since half of the commands do not need torch.
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
