"""Ali-CCP click and conversion logs (X. Ma et al., SIGIR 2018)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mtnrec.checks import InputError
from mtnrec.data.datamodule import DataModule
from mtnrec.data.store import Manifest


@dataclass(kw_only=True, eq=False, repr=False)
class AliCcp(DataModule):
    """Ali-CCP.

    This version trains on a prepared Ali-CCP and cannot prepare one from the raw files.

    Args:
        raw_dir: Folder of the raw files.
    """

    origin: ClassVar[str] = (
        "The raw logs are Tianchi data set 408 (https://tianchi.aliyun.com/dataset/408): "
        "sample_train.tar.gz and sample_test.tar.gz."
    )

    raw_dir: str | Path | None

    def prepare(self) -> Manifest:
        """Refuse.

        Raises:
            InputError: Always; the reader of the raw files is not in this version.
        """
        raise InputError(
            "this version of mtnrec has no reader of Ali-CCP's raw files; data=synthetic_ali_ccp "
            "has the same shape and makes itself"
        )
