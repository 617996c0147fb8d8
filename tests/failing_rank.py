"""``mtnrec.train`` with a rank that ends in its third step; run by a test.

``FAILING_RANK=1 FAILURE=raise|kill python failing_rank.py OVERRIDES``
"""

import os
import signal
from unittest import mock

import torch.distributed as dist

from mtnrec.model.module import MultiTaskModule
from mtnrec.train import main

training_step = MultiTaskModule.training_step


def fail(self, batch, batch_idx):
    if batch_idx == 2 and dist.get_rank() == int(os.environ["FAILING_RANK"]):
        if os.environ["FAILURE"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("so it goes")
    return training_step(self, batch, batch_idx)


if __name__ == "__main__":
    with mock.patch.object(MultiTaskModule, "training_step", fail):
        main()
