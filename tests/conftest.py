"""Settings of every test: one thread, fixed seeds, no network, and a reason where a device is missing."""

import os
import random
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hugging Face libraries are imported

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and sums keep one order on every machine

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # under nohup, or behind &: what tests start would ignore it too
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Each test starts from the same random state, whichever tests run before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
