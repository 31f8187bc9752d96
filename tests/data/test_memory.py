"""Memory does not grow with the texts: many tiny documents and one huge one through source, cache and packing.

`ZMAJ_TINY_DOCUMENTS` and `ZMAJ_HUGE_MB` choose other sizes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
ROOT = Path(__file__).parents[2]
TINY = int(os.environ.get("ZMAJ_TINY_DOCUMENTS", "300000"))
HUGE_MB = int(os.environ.get("ZMAJ_HUGE_MB", "50"))

THROUGH = """
import json, re, sys, time
from pathlib import Path
from data.cache import TokenCache
from data.rows import PackedRows
from data.sources import open_source
from data.tokenizer import Tokenizer

def peak_mb():
    # Not ru_maxrss: a new process has that of the one it was forked from.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

report = {"imports_mb": peak_mb()}
began = time.time()
def done(what):
    report[what + "_mb"], report[what + "_s"] = round(peak_mb()), round(time.time() - began, 1)

source = open_source(sys.argv[1])
done("source")
tokenizer = Tokenizer.train((source.train[i]["text"] for i in range(min(1000, len(source.train)))), 400)
done("tokenizer")
cache = TokenCache.build_or_open(source.train, tokenizer, sys.argv[2], source_digest=source.record["sha256"], split="train")
done("cache")
for packing in ("concat", "best_fit"):
    rows = PackedRows(cache, seq=512, seed=0, packing=packing)
    for g in range(0, 3 * rows.rows_per_epoch, rows.rows_per_epoch // 7 + 1):
        rows[g]
    done(packing)
    report[packing + "_fill"] = rows.describe()["fill_fraction"]
print(json.dumps({"documents": len(cache), "tokens": cache.total_tokens, **report}))
"""


def through(file: Path, folder: Path) -> dict:
    done = subprocess.run([sys.executable, "-c", THROUGH, file, folder], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(report)
    return report


@pytest.mark.heavy
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_tiny_documents_take_a_few_numbers_each(tmp_path: Path, suffix: str) -> None:
    import gzip

    with gzip.open(tmp_path / f"tiny{suffix}", "wt", 1) if suffix == ".jsonl.gz" else (tmp_path / f"tiny{suffix}").open("w") as out:
        for i in range(TINY):
            out.write(f'{{"text": "number {i} of many tiny texts"}}\n')
    report = through(tmp_path / f"tiny{suffix}", tmp_path / "cache")
    assert report["source_mb"] - report["imports_mb"] < 20 + TINY * 2 / 1e6  # the numbers of those held out, nothing else a document
    assert report["best_fit_mb"] - report["tokenizer_mb"] < 300 + TINY * 300 / 1e6  # lengths and two epochs' plans: arrays of numbers


@pytest.mark.heavy
def test_one_huge_document_takes_some_times_its_size(tmp_path: Path) -> None:
    line = "It was the best of times, it was the worst of times, 1859; the age of wisdom, the age of foolishness.\n"
    (tmp_path / "huge.txt").write_text(line * (HUGE_MB * 1_000_000 // len(line)))
    report = through(tmp_path / "huge.txt", tmp_path / "cache")
    assert report["best_fit_mb"] - report["imports_mb"] < 300 + 12 * HUGE_MB
