"""The encoder against a plain torch network of the same layers, fed with dense, aligned, log-normalised counts."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch import nn

import fractal
from fractal.base.errors import InputError
from fractal.commands import annotate as annotate_command
from fractal.commands import embed as embed_command
from fractal.commands import encode as encode_command
from fractal.commands import fit as fit_command
from fractal.data.encoder import open_encoded, read_encoder

GENES = [f"GENE{i}" for i in range(300)]


class PlainNetwork(nn.Module):
    """As SCimilarity's package builds it; batch norms and PReLUs of random numbers, so that each of them counts."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.ModuleList()
        for a, b in zip(widths[:-2], widths[1:-1], strict=True):
            norm, relu = nn.BatchNorm1d(b), nn.PReLU()
            norm.load_state_dict({name: torch.rand_like(t.float()) + 0.5 for name, t in norm.state_dict().items()})
            nn.init.uniform_(relu.weight, -0.5, 0.5)
            self.network.append(nn.Sequential(nn.Dropout(0.5), nn.Linear(a, b), norm, relu))
        self.network.append(nn.Linear(widths[-2], widths[-1]))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.network:
            x = layer(x)
        return nn.functional.normalize(x, dim=1)


def write_model(folder: Path, widths: tuple[int, ...] = (300, 64, 32, 16)) -> nn.Module:
    """The three files of an encoder -> the network behind them."""
    folder.mkdir(parents=True, exist_ok=True)
    network = PlainNetwork(list(widths))
    state = network.state_dict()
    torch.save({"state_dict": state}, folder / "encoder.ckpt")
    (folder / "layer_sizes.json").write_text(json.dumps({name: list(tensor.shape) for name, tensor in state.items()}))
    (folder / "gene_order.tsv").write_text("\n".join(GENES[: widths[0]]) + "\n")
    return network


def expected(network: nn.Module, aligned: np.ndarray) -> np.ndarray:
    """aligned (n, genes): counts in the order of the model's genes."""
    x = torch.from_numpy(np.log1p(aligned / aligned.sum(1, keepdims=True) * 1e4).astype(np.float32))
    with torch.inference_mode():
        return network(x).numpy()


def counts(n: int = 40, genes: int = 300, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(0.3, 3, (n, genes))).astype(np.float32) + np.eye(n, genes, dtype=np.float32)


def encoded(adata: anndata.AnnData, folder: Path, force: bool = False) -> tuple[str, np.ndarray]:
    with open_encoded(adata, read_encoder(folder), force) as (found, line):
        return line, np.concatenate([vectors for _, vectors in found.chunks()])


def cells(x: Any, names: list[str] | None = None) -> anndata.AnnData:
    return anndata.AnnData(x, var=pd.DataFrame(index=names or GENES[: x.shape[1]]))


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix, lambda x: sp.csr_matrix(x, dtype=np.int64)])
def test_vectors_are_those_of_the_plain_network(tmp_path: Path, kind):
    network, x = write_model(tmp_path), counts()
    line, vectors = encoded(cells(kind(x)), tmp_path)
    assert np.abs(vectors - expected(network, x)).max() < 1e-5
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    assert "counts" in line
    assert "300 of the model's 300 genes" in line


def test_one_layer_is_a_network_too(tmp_path: Path):
    network, x = write_model(tmp_path, (300, 16)), counts()
    assert np.abs(encoded(cells(x), tmp_path)[1] - expected(network, x)).max() < 1e-5


def test_genes_are_aligned_missing_ones_zero_and_repeated_ones_summed(tmp_path: Path):
    network, x = write_model(tmp_path), counts(genes=200)
    order = np.random.default_rng(1).permutation(200)
    names = [GENES[i] for i in order] + [GENES[7], "ELSEWHERE"]
    more = counts(genes=2, seed=3)
    line, vectors = encoded(cells(np.hstack([x[:, order], more]), names), tmp_path)
    aligned = np.hstack([x, np.zeros((len(x), 100), np.float32)])
    aligned[:, 7] += more[:, 0]
    assert np.abs(vectors - expected(network, aligned)).max() < 1e-5
    assert "200 of the model's 300 genes" in line
    assert "1 columns of the same symbol summed" in line


def test_symbols_stand_where_most_of_them_are(tmp_path: Path):
    network, x = write_model(tmp_path), counts()
    adata = cells(x, [f"ENSG{i:011}" for i in range(300)])
    with pytest.raises(InputError, match="Ensembl ids alone.*feature_name"):
        encoded(adata, tmp_path)
    adata.var["feature_name"] = pd.Categorical(GENES)
    line, vectors = encoded(adata, tmp_path)
    assert np.abs(vectors - expected(network, x)).max() < 1e-5
    assert "by var 'feature_name'" in line


def test_log_normalised_values_give_the_same_vectors_and_are_named(tmp_path: Path):
    network, x = write_model(tmp_path), counts()
    logged = np.log1p(x / x.sum(1, keepdims=True) * 3_000)
    line, vectors = encoded(cells(sp.csr_matrix(logged)), tmp_path)
    assert np.abs(vectors - expected(network, x)).max() < 1e-4
    assert "log-normalised already, to 3,000 a cell" in line


def test_a_cell_without_counts_has_no_vector(tmp_path: Path):
    write_model(tmp_path)
    x = counts()
    x[3] = 0
    assert np.flatnonzero(np.isnan(encoded(cells(x), tmp_path)[1]).any(1)).tolist() == [3]


def test_another_organism_and_too_few_genes(tmp_path: Path):
    network, x = write_model(tmp_path), counts()
    mouse = cells(x, [gene.capitalize() for gene in GENES])
    with pytest.raises(InputError, match="as of mouse"):
        encoded(mouse, tmp_path)
    line, vectors = encoded(mouse, tmp_path, force=True)
    assert np.abs(vectors - expected(network, x)).max() < 1e-5
    assert "as of mouse" in line
    few = cells(x[:, :20])
    with pytest.raises(InputError, match="has 20 of the model's 300 genes"):
        encoded(few, tmp_path)
    assert encoded(few, tmp_path, force=True)[1].shape == (40, 16)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_damaged_models_are_refused(tmp_path: Path, capsys):
    write_model(tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    sizes = json.loads(whole["layer_sizes.json"])

    def refused(match: str, **files: bytes | None) -> None:
        for name, content in {**whole, **{key.replace("__", "."): value for key, value in files.items()}}.items():
            path = tmp_path / name
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        with pytest.raises(InputError, match=match):
            read_encoder(tmp_path)

    refused("lacks gene_order.tsv", gene_order__tsv=None)
    refused("do not fit each other", gene_order__tsv=b"A\nB\n")
    refused("not a table of shapes", layer_sizes__json=b"[" * 100_000)
    refused("not a table of shapes", layer_sizes__json=b'{"network.0.1.weight": "x"}')
    large = {**sizes, "network.1.1.weight": [10**9, 64], "network.2.weight": [16, 10**9]}
    refused("layer_sizes.json says", layer_sizes__json=json.dumps(large).encode())
    refused("not a checkpoint", encoder__ckpt=whole["encoder.ckpt"][:-5_000])
    torch.save({"state_dict": Evil()}, tmp_path / "evil")
    refused("not a checkpoint", encoder__ckpt=(tmp_path / "evil").read_bytes())
    assert "code ran" not in capsys.readouterr().out


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_files_give_the_same_vectors(tmp_path: Path, monkeypatch, kind, suffix: str):
    network, x = write_model(tmp_path / "model"), counts(200)
    monkeypatch.setattr("fractal.data.expression.NUMBERS", 300 * 23)  # pieces of 23 rows, or of 6,900 stored numbers
    monkeypatch.setattr("fractal.data.expression.CSC_ROWS", 30)
    adata, path = cells(kind(x)), tmp_path / f"cells{suffix}"
    adata.write_h5ad(path) if suffix == ".h5ad" else adata.write_zarr(path)
    with open_encoded(path, read_encoder(tmp_path / "model")) as (found, _):
        vectors = np.concatenate([vectors for _, vectors in found.chunks()])
        assert np.abs(vectors - expected(network, x)).max() < 1e-5
        assert found.names is not None
        assert found.names.tolist() == adata.obs_names.tolist()


def test_the_command_and_python_agree(tmp_path: Path, capsys):
    write_model(tmp_path / "model")
    adata, path = cells(sp.csr_matrix(counts())), tmp_path / "cells.h5ad"
    adata.write_h5ad(path)
    encode_command.main([str(path), "--model", str(tmp_path / "model"), "--output", str(path), "--device", "cpu"])
    assert "300 of the model's 300 genes" in capsys.readouterr().out
    fractal.encode(adata, tmp_path / "model")
    there = anndata.read_h5ad(path)
    assert np.array_equal(there.obsm["X_scimilarity"], adata.obsm["X_scimilarity"])
    assert np.array_equal(there.X.toarray(), adata.X.toarray())


def test_a_failed_encode_leaves_the_input_as_it_was(tmp_path: Path):
    write_model(tmp_path / "model")
    x = counts(3_000)
    x[2_900, 0] = -1
    cells(x).write_h5ad(path := tmp_path / "cells.h5ad")
    before = path.read_bytes()
    with pytest.raises(InputError, match="cell 2900 holds -1"):
        encode_command.main([str(path), "--model", str(tmp_path / "model"), "--output", str(path), "--device", "cpu"])
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cells.h5ad", "model"]


# --- from counts to labels -------------------------------------------------------------------------------------------


def labelled(n: int, seed: int) -> anndata.AnnData:
    """Cells of four types, each with 60 genes of its own."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, n)
    mean = np.full((4, 300), 0.3)
    for i in range(4):
        mean[i, 60 * i : 60 * i + 60] = 6
    adata = cells(sp.csr_matrix(rng.poisson(mean[kind]).astype(np.float32)))
    adata.obs["cell_type"] = np.array(["B cell", "T cell", "neuron", "fibroblast"])[kind]
    return adata


def test_from_counts_to_labels(tmp_path: Path, monkeypatch, capsys):
    """The reference encodes new cells itself, in Python and in the shell, and says when its encoder has gone."""
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"))
    adata, new = labelled(300, 0), labelled(80, 1)
    ref = fractal.fit(adata, labels="cell_type", model="model", epochs=1, device="cpu")
    assert "X_scimilarity" not in adata.obsm
    ref.annotate(new)
    assert (new.obs["fractal_subtype"].astype(str) == new.obs["cell_type"]).mean() > 0.9
    ref.save("ref")
    labelled(80, 1).write_h5ad("new.h5ad")
    flags = ["--output", "labels.h5ad", "--truth", "cell_type", "--device", "cpu"]
    annotate_command.main(["new.h5ad", "--reference", "ref", *flags])
    assert "encoded from new.h5ad: X: counts, 300 of the model's 300 genes" in capsys.readouterr().out
    there = anndata.read_h5ad("labels.h5ad")
    assert there.obs["fractal_label"].astype(str).tolist() == new.obs["fractal_label"].astype(str).tolist()

    Path("model").rename("moved")
    with pytest.raises(InputError, match="model: lacks encoder.ckpt"):
        fractal.load("ref").annotate(labelled(80, 1))
    fractal.load("ref", model="moved").annotate(again := labelled(80, 1))
    assert again.obs["fractal_label"].astype(str).tolist() == new.obs["fractal_label"].astype(str).tolist()
    embed_command.main(["new.h5ad", "--reference", "ref", "--model", "moved", "--output", "v.npy", "--device", "cpu"])
    assert np.load("v.npy").shape[0] == 80
    torch.manual_seed(5)
    write_model(Path("other"), (300, 32, 32, 16))
    with pytest.raises(InputError, match="another encoder than that of the reference"):
        fractal.load("ref", model="other").annotate(labelled(80, 1))


@pytest.mark.slow
def test_the_shell_fits_counts_as_python_does(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"))
    labelled(300, 0).write_h5ad("cells.h5ad")
    ref = fractal.fit(labelled(300, 0), labels="cell_type", model="model", epochs=1, device="cpu")
    flags = ["--epochs", "1", "--device", "cpu", "--output", "ref"]
    fit_command.main(["cells.h5ad", "--labels", "cell_type", "--model", "model", *flags])
    ref.annotate(ours := labelled(80, 1))
    fractal.load("ref", "cpu").annotate(theirs := labelled(80, 1))
    assert ours.obs["fractal_label"].astype(str).tolist() == theirs.obs["fractal_label"].astype(str).tolist()
