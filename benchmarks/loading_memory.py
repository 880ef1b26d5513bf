"""What each rank of a run holds while a model is loaded: whole, as without ZeRO-3, and sharded as it is read.

    MALLOC_MMAP_THRESHOLD_=65536 PYTHONPATH=.:kernels torchrun --nproc-per-node 2 --standalone \\
        benchmarks/loading_memory.py [--out benchmarks/results/loading_memory.jsonl]

A random Llama of 95 million bf16 weights (191 MB in four files) is loaded on a CPU in its own dtype and in float32.
``own`` is memory of the process alone (RssAnon), ``mapped`` the pages of the files that stand in its address space,
which all processes share and the system may drop; both are the most that was seen every two milliseconds, less what
was there before. The variable makes glibc give freed weights back at once, so that what is seen is what is held.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import tempfile
import threading
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from gpu_suite_report import commit, versions
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from inverseq.config import ModelConfig
from inverseq.config_loading import load_config
from inverseq.distributed import Ranks, init_ranks
from inverseq.model import load_model
from inverseq.zero_loading import load_sharded

SHAPE = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 8}
COMMAND = "MALLOC_MMAP_THRESHOLD_=65536 torchrun --nproc-per-node 2 --standalone benchmarks/loading_memory.py"


class Watch:
    """The most that this process holds in the block, beyond what it held before."""

    def __enter__(self) -> Watch:
        gc.collect()
        self.before, self.peak, self.over = resident(), {}, threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.thread.join()

    def _run(self) -> None:
        while not self.over.wait(0.002):
            self.peak = {key: max(self.peak.get(key, 0), size - self.before[key]) for key, size in resident().items()}


def resident() -> dict[str, int]:
    status = Path("/proc/self/status").read_text()
    names = {"own_bytes": "RssAnon", "mapped_bytes": "RssFile"}
    return {key: 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1]) for key, name in names.items()}


def measure(path: Path, dtype: str, way: str, ranks: Ranks) -> list[dict]:
    """One row for each rank."""
    config = ModelConfig(path=str(path), device="cpu", dtype=dtype)
    ranks.barrier()
    with Watch() as watch:
        model = load_model(path, config) if way == "whole" else load_sharded(path, config, ranks=ranks)
    del model
    rows = ranks.gather({"loaded": way, "dtype": dtype, "rank": ranks.rank, **watch.peak})
    gc.collect()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    disable_progress_bar()
    ranks = init_ranks(load_config("demo", ["model.device=cpu", "run_dir=none"]))
    with ranks.failing_together(), tempfile.TemporaryDirectory() as folder:
        path = ranks.broadcast(Path(folder) / "model")
        if ranks.is_main:
            model = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()
            model.save_pretrained(path, max_shard_size="60MB")
        rows = [
            row
            for dtype in ("bfloat16", "float32")
            for way in ("sharded", "whole", "sharded")  # the first of all also loads code
            for row in measure(path, dtype, way, ranks)
        ][2:]
        found = versions() | {name: version(name) for name in ("transformers", "deepspeed", "safetensors")}
        common = {"op": "loading_memory", "device": f"{platform.machine()} CPU", "measured": True, "command": COMMAND}
        common |= {"commit": commit(), "versions": found, "date": datetime.now(timezone.utc).date().isoformat()}
        for row in rows if ranks.is_main else ():
            print(*(f"{key}={value}" for key, value in row.items()))
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(common | {"num_parameters": model.num_parameters()} | row) + "\n")
        ranks.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
