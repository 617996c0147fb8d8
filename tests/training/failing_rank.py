"""``mtnrec.train`` with a rank that ends in its third step, or diverges there; run by a test.

``FAILING_RANK=1 FAILURE=raise|kill|diverge [FAILING_BATCH=2] python failing_rank.py OVERRIDES``
"""

import math
import os
import signal
from unittest import mock

import torch.distributed as dist

from mtnrec.train import main
from mtnrec.training.module import MultiTaskModule

training_step = MultiTaskModule.training_step


def fail(self, batch, batch_idx):
    failing_batch = int(os.environ.get("FAILING_BATCH", "2"))
    if batch_idx == failing_batch and dist.get_rank() == int(os.environ["FAILING_RANK"]):
        if os.environ["FAILURE"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["FAILURE"] == "diverge":
            return training_step(self, batch, batch_idx) * math.nan
        raise ArithmeticError("so it goes")
    return training_step(self, batch, batch_idx)


if __name__ == "__main__":
    with mock.patch.object(MultiTaskModule, "training_step", fail):
        main()
