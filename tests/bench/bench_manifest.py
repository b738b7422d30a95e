"""Opening a cache of 100,000 shards × 20 fields: seconds and peak memory, of the manifest alone and with the reader.

Run it:  python -m tests.bench.bench_manifest [SHARDS] [FIELDS]
The wanted: under 1 s and under 500 MB. Each figure is the median of 5 fresh processes.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SHARDS, FIELDS, ROWS = 100_000, 20, 4096

_MEASURE = """
import sys, time
from pathlib import Path
from tests.bench.bench_manifest import peak
if sys.argv[1] == "manifest":
    from softlabels.cache.format import read_manifest as read
else:
    from softlabels.cache.reader import open_cache as read
before, started = peak(), time.perf_counter()
opened = read(Path(sys.argv[2]))
seconds = time.perf_counter() - started
manifest = getattr(opened, "manifest", opened)
print(seconds, before, peak(), len(manifest.shard_rows), manifest.shards["examples"].size(0))
"""


def peak() -> int:
    """Bytes of memory that this process had at most."""
    try:  # Linux counts what the parent had until exec into ru_maxrss, but not into this
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def manifest_of(shards: int, fields: int) -> dict[str, Any]:
    """A finished manifest with sizes and hashes from a random generator; there are no shards behind it."""
    draw = random.Random(0)
    names = [*(f"hidden.{layer:02d}" for layer in range(fields - 1)), "logits"]
    specs = {name: {"kind": "token", "type": "float16", "width": 768, "heads": None} for name in names[:-1]}
    tables = {
        name: {
            "clipped": 0,
            "sizes": "".join(f"{draw.randrange(10**8, 2 * 10**8):012x}" for _ in range(shards)),
            "xxh3_128": draw.randbytes(16 * shards).hex(),
        }
        for name in ("examples", *names)
    }
    return {
        "format": "softlabels-cache",
        "version": 1,
        "complete": True,
        "teacher": {
            "name": "made",
            "weights_hash": "0",
            "task": "sequence-classification",
            "label_names": ["no", "yes"],
            "vocab_size": 30_522,
            "pad_token_id": 0,
            "unk_token_id": 100,
            "token_types": True,
        },
        "tokenizer_hash": "0",
        "corpus": {"source": "made", "split": None, "hash": "0", "rows": ROWS * shards, "labelled": 0, "truncated": 0},
        "dump": {"max_length": 128, "shard_rows": ROWS, "batch_tokens": 8192, "dtype": "float32", "text": True},
        "fields": specs | {"logits": {"kind": "row", "type": "float32", "width": 2, "heads": None}},
        "shard_rows": [ROWS] * shards,
        "shard_tokens": [draw.randrange(10**5, 2 * 10**5) for _ in range(shards)],
        "join": draw.randbytes(16 * shards).hex(),
        "shards": tables,
        "versions": {},
    }


def write_manifest(folder: Path, *, shards: int = SHARDS, fields: int = FIELDS) -> Path:
    """The manifest's file, in the shape in which caches have it."""
    whole = sorted(manifest_of(shards, fields).items())
    lines = [f" {json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in whole]
    path = folder / "manifest.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return path


def measure(folder: Path, what: str) -> dict[str, float]:
    """Seconds and peak bytes of one fresh process that opens `folder`; `what` is 'manifest' or 'cache'."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, what, str(folder)], check=True, cwd=ROOT, capture_output=True, text=True
    )
    seconds, before, peak, shards, size = map(float, done.stdout.split())
    return {"seconds": seconds, "before": before, "peak": peak, "shards": shards, "size": size}


def main() -> None:
    given = [int(word) for word in sys.argv[1:3]]
    shards, fields = given + [SHARDS, FIELDS][len(given) :]
    with tempfile.TemporaryDirectory() as name:
        path = write_manifest(Path(name), shards=shards, fields=fields)
        print(f"{shards:,} shards × {fields} fields: {path.stat().st_size / 1e6:.0f} MB of manifest")
        print(f"{'':<28}{'seconds':>9}{'peak MB':>9}{'of it imports':>15}")
        for what, words in (("manifest", "read_manifest"), ("cache", "open_cache, torch imported")):
            runs = [measure(Path(name), what) for _ in range(5)]
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(f"{words:<28}{middle['seconds']:>9.2f}{middle['peak'] / 1e6:>9.0f}{middle['before'] / 1e6:>15.0f}")


if __name__ == "__main__":
    main()
