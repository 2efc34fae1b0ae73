"""Ranks from torchrun's variables, and the sharing out of work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longlive import distributed

ROOT = Path(__file__).parents[1]
WORKER = """
from pathlib import Path
import sys
from longlive import distributed as d
lines = d.shard(["a", "b", "c", "d", "e"], d.rank(), d.world_size())
Path(sys.argv[1], f"rank{d.rank()}").write_text(f"{d.local_rank()} {d.world_size()} {d.is_main()} {''.join(lines)}")
"""


def test_one_process_is_rank_0_of_1(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    assert distributed.is_main()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_items", [0, 1, 5, 16])
def test_shards_hold_each_item_once_and_evenly(num_items: int, world_size: int) -> None:
    shards = [distributed.shard(range(num_items), rank, world_size) for rank in range(world_size)]
    assert sorted(item for shard in shards for item in shard) == list(range(num_items))
    sizes = [len(shard) for shard in shards]
    assert max(sizes) - min(sizes) <= 1
    assert all(shard == sorted(shard) for shard in shards)


def test_torchrun_shares_out_work(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, tmp_path]
    subprocess.run(
        command, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert (tmp_path / "rank0").read_text() == "0 2 True ace"
    assert (tmp_path / "rank1").read_text() == "1 2 False bd"
