"""The shipped data sets: their numbers, their references, and where they come from."""

import csv
import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest
import torch

from laplace_amort.examples import datasets, epil, radon

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the source copies lie beside the repository, not in it")


def columns_of(path):
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numbers = [name for name in rows[0] if not rows[0][name][:1].isalpha()]  # senc has names of places too
    return {name: torch.tensor([float(row[name]) for row in rows]) for name in numbers}


@needs_shared
@pytest.mark.parametrize("name", datasets.DATASETS)
def test_columns_equal_the_source_copy(name):
    source = columns_of(SHARED / f"{name}.csv")
    shipped = datasets.load(name)
    assert set(shipped) <= set(source)
    for column, values in shipped.items():
        assert torch.equal(values, source[column]), column


@needs_shared
def test_derived_columns_of_epil_equal_the_source_copy():
    source = {name: values.reshape(59, 4) for name, values in columns_of(SHARED / "epil.csv").items()}
    x, y = epil.data()
    assert torch.equal(y, source["y"])
    assert torch.equal(x[..., 5], source["v4"])
    assert torch.equal(x[..., 3], x[..., 1] * x[..., 2])
    for index, column in ((1, "log_base4_c"), (4, "log_age_c")):  # rounded to eight decimals in the copy
        torch.testing.assert_close(x[..., index], source[column], rtol=0, atol=5.1e-9)


@needs_shared
@pytest.mark.parametrize(
    ("name", "file"), [("multisite", "effects_errors_floor"), ("epil", "epil"), ("radon", "radon_mn")]
)
def test_references_equal_the_source_copy(name, file):
    source = json.loads((SHARED / "reference" / f"{file}.json").read_text())
    shipped = datasets.reference(name)
    assert shipped.log_evidence == source["log_evidence"]["value"]
    assert shipped.log_evidence_standard_error == source["log_evidence"]["standard_error"]
    assert set(shipped.variables) == set(source["variables"]) | set(source["derived"])
    for key, entry in {**source["variables"], **source["derived"]}.items():
        summary = shipped.variables[key]
        assert summary.role == entry.get("role", "derived")
        for field in ("mean", "sd", "q05", "q50", "q95", "mcse_mean", "mcse_sd"):
            assert torch.equal(getattr(summary, field), torch.tensor(entry[field])), (key, field)


def test_a_dozen_numbers_of_the_published_tables():
    sites = datasets.load("effects_errors")
    assert [len(values) for values in sites.values()] == [44, 44, 44]
    assert sites["effect"][[0, 22, 43]].tolist() == [0.063531585, 0.446862038, -0.033404855]
    assert sites["se"][[0, 22, 43]].tolist() == [0.170579154, 0.275593734, 0.074834503]
    patients = datasets.load("epil")
    assert list(patients) == ["subject", "period", "y", "trt", "base", "age"]
    assert patients["y"].sum() == 1948
    assert patients["y"].reshape(59, 4)[0].tolist() == [5, 3, 3, 3]
    assert patients["y"].max() == 102
    assert patients["trt"].reshape(59, 4)[:, 0].sum() == 31  # 31 on progabide, 28 on placebo
    x, _ = epil.data()
    assert x[0, 0].tolist() == pytest.approx([1, -0.75635379, 0, 0, 0.1142037, 0], abs=5e-9)
    county, floor, log_radon = radon.data()
    homes = county.bincount()
    assert (len(homes), int(homes.min()), int(homes.max()), len(county)) == (85, 1, 116, 919)
    assert floor.unique(return_counts=True)[1].tolist() == [766, 153]
    assert log_radon[[0, 1, 918]].tolist() == [0.09531, 0.832909, 1.335001]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_have_the_default_dtype(dtype):
    torch.set_default_dtype(dtype)
    assert datasets.load("epil")["subject"].dtype == dtype
    assert datasets.reference("epil").variables["u"].mean.dtype == dtype


def test_a_reference_has_the_shape_of_its_sites_and_cannot_be_changed():
    reference = datasets.reference("epil")
    assert {name: tuple(summary.mean.shape) for name, summary in reference.variables.items()} == {
        "beta": (6,),
        "sigma": (),
        "u": (59,),
        "log_sigma": (),
    }
    for summary in reference.variables.values():
        assert (summary.q05 < summary.q50).all()
        assert (summary.q50 < summary.q95).all()
        assert (summary.sd > 0).all()
    with pytest.raises(dataclasses.FrozenInstanceError):
        reference.log_evidence = 0.0
    with pytest.raises(TypeError):
        reference.variables["beta"] = None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (datasets.load, "there is no data set 'schools'; the names are: effects_errors, epil, radon_mn"),
        (datasets.reference, "there is no reference posterior 'schools'; the names are: multisite, epil, radon"),
    ],
)
def test_unknown_name_lists_the_known_ones(function, message):
    with pytest.raises(ValueError, match=message):
        function("schools")


def test_provenance_speaks_of_every_data_file():
    folder = resources.files(datasets)
    provenance = folder.joinpath("PROVENANCE.rst").read_text(encoding="utf-8")
    data_files = [entry.name for entry in folder.iterdir() if entry.name.endswith((".csv", ".json"))]
    assert len(data_files) == len(datasets.DATASETS) + len(datasets.REFERENCES)
    for name in data_files:
        assert f"``{name}``" in provenance
