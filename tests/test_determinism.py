"""The same input, seed and number of threads give the same files, byte for byte, in another process too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import demo
import train

ROOT = Path(__file__).parent.parent
PIPELINE = """
import sys
sys.path.insert(0, sys.argv[2])
import torch, ingest, stratify, train, eval as evaluate
torch.set_num_threads(1)
ingest.main(["--model-dir", sys.argv[1], "--output", "a.parquet"])
stratify.main(["--input", "a.parquet", "--output", "b.parquet"])
model = ["--epochs", "2", "--scale-dim", "4", "--device", "cpu"]
train.main(["--input", "b.parquet", "--output", "b.pt", *model])
train.main(["--input", "b.parquet", "--output", "p.pt", "--recipe", "published", *model])
evaluate.main(["--model-path", "b.pt", "--input", "b.parquet", "--json", "b.json", "--device", "cpu"])
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(release: Path, tmp_path: Path):
    runs = []
    for seed in ("1", "2"):  # of Python's hashes, which decide the order of sets
        folder = tmp_path / seed
        folder.mkdir()
        argv = [sys.executable, "-c", PIPELINE, str(release), str(ROOT)]
        runs.append((folder, subprocess.Popen(argv, cwd=folder, env=os.environ | {"PYTHONHASHSEED": seed})))
    written = []
    for folder, process in runs:
        assert process.wait() == 0
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert sorted(written[0]) == ["a.hierarchy.tsv", "a.parquet", "b.json", "b.parquet", "b.pt", "p.pt"]
    assert [name for name in written[0] if written[0][name] != written[1][name]] == []


@pytest.mark.slow
def test_the_demo_prints_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    full_length = train.main
    monkeypatch.setattr(demo, "CELLS", 2_000)
    monkeypatch.setattr(demo, "DEMO", tmp_path / "demo")
    monkeypatch.setattr(train, "main", lambda words: full_length([*words, "--epochs", "1"]))
    printed = []
    for _ in range(2):
        demo.main([])
        printed.append(re.sub(r" *\d+(\.\d)? s\b", "", capsys.readouterr().out))  # all but the seconds that it took
    assert printed[0] == printed[1]
    assert printed[0].count("| full ") >= 1
