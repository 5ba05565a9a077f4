"""Arrays and columns among the arguments of a model: taken where it is written for tensors, left where it is not."""

import numpy
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch

from laplace_amort import AutoLaplaceFamily, LogJoint, MarginalLaplace, ModelError, fit
from laplace_amort.model.arguments import as_tensors

NUM = 12
G = numpy.arange(NUM) % 4
X = numpy.linspace(-1.0, 1.0, NUM)
Y = (numpy.arange(NUM) % 3 == 0).astype(int)


def model(g, x, y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("units", 4):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=b * x + u[..., g]), obs=y)


def of_columns(data):
    model(data["g"], data["x"], data["y"])


TENSORS = torch.as_tensor(G), torch.as_tensor(X), torch.as_tensor(Y).double()
AWAY = numpy.arange(NUM)[::-1] * 7  # labels of rows that are no places


def series(values, **options):
    return pandas.Series(values, index=AWAY, **options)


TAKEN = {
    "arrays": (model, (G, X, Y)),
    "labels that are true or false": (model, (G, X, Y > 0)),
    "small integers and single precision": (model, (G.astype("uint16"), X, Y.astype("float32"))),
    "another byte order": (model, (G, X.astype(">f8"), Y)),
    "columns": (model, tuple(map(series, (G, X, Y)))),
    "an index alone": (model, (series(G), *TENSORS[1:])),
    "columns that know of missing values": (
        model,
        (series(G, dtype="Int64"), series(X, dtype="Float64"), series(Y > 0, dtype="boolean")),
    ),
    "a dictionary": (of_columns, ({"g": G, "x": series(X), "y": TENSORS[2], "name": numpy.array(["a"] * NUM)},)),
    "a list": (lambda data: model(*data), ([G, X, Y],)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_they_are_as_good_as_tensors(name):
    called, args = TAKEN[name]
    point = torch.linspace(-1.0, 1.0, 5)
    expected = LogJoint(model, *TENSORS)(point)
    log_joint = LogJoint(called, *args)
    log_joint.check_data()
    torch.testing.assert_close(log_joint(point), expected)
    torch.testing.assert_close(log_joint.given(*args)(point), expected)
    AutoLaplaceFamily(called)(*args)


def test_one_door_for_fits_predictions_and_new_units():
    result = fit(model, AutoLaplaceFamily(model), G, X, Y, objective=MarginalLaplace(), progress=False)
    pyro.clear_param_store()
    same = fit(model, AutoLaplaceFamily(model), *TENSORS, objective=MarginalLaplace(), progress=False)
    assert float(result.objective) == pytest.approx(float(same.objective))
    assert result.posterior.predictive(num_samples=3)(G, X, Y)["y"].shape == (3, NUM)
    new = result.posterior.posterior_for(G, series(X), Y)
    torch.testing.assert_close(new.mean()["u"], same.posterior.posterior_for(*TENSORS).mean()["u"])
    made = result.to_arviz(num_samples=4, prior_samples=3)
    assert numpy.array_equal(made["observed_data"]["y"].values, Y)
    assert numpy.array_equal(made["constant_data"]["x"].values, X)


def test_a_model_that_is_written_for_arrays_has_them():
    def for_arrays(x, y):
        assert isinstance(x, numpy.ndarray)
        model(torch.from_numpy(G), torch.from_numpy(x / x.std()), torch.from_numpy(y).double())

    expected = LogJoint(model, TENSORS[0], torch.as_tensor(X / X.std()), TENSORS[2])
    point = torch.linspace(-1.0, 1.0, 5)
    torch.testing.assert_close(LogJoint(for_arrays, X, Y)(point), expected(point))


def test_floating_point_numbers_have_the_default_dtype():
    torch.set_default_dtype(torch.float32)
    (x, g, flag), _ = as_tensors((X, G, Y > 0), {})
    assert (x.dtype, g.dtype, flag.dtype) == (torch.float32, torch.int64, torch.bool)


def test_a_change_of_an_array_afterwards_is_none_of_the_tensor():
    array = X.copy()
    (tensor,), _ = as_tensors((array,), {})
    array[0] = 100.0
    assert float(tensor[0]) == X[0]


def test_what_is_missing_in_a_column_is_named_as_in_a_tensor():
    column = series(Y, dtype="Int64")
    column.iloc[5] = pandas.NA
    with pytest.raises(ModelError, match=r"observed site 'y' .* the first nan at index \[5\]"):
        AutoLaplaceFamily(model)(G, X, column)


WORDS = numpy.array([f"school {number}" for number in G])
REFUSED = {
    "words": (model, (WORDS, X, Y), "argument g of the model has words or objects (the first is school 0)", "g"),
    "a column of words": (model, (series(WORDS), X, Y), "argument g of the model has", "g"),
    "categories": (model, (series(WORDS, dtype="category"), X, Y), "argument g of the model has", "g"),
    "words in a dictionary": (of_columns, ({"g": WORDS, "x": X, "y": Y},), "argument data['g'] of the model", "g"),
    "dates": (
        model,
        (G, numpy.arange(NUM).astype("datetime64[D]"), Y),
        "argument x of the model has datetime64[D]",
        "x",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_are_no_numbers_is_named_and_the_line_works(name):
    called, args, said, column = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        AutoLaplaceFamily(called)(*args)
    assert said in str(caught.value)
    assert "return_inverse=True)[1]" in str(caught.value)
    arguments = dict(args[0]) if called is of_columns else dict(zip("gxy", args, strict=True))
    arguments[column] = numpy.unique(arguments[column], return_inverse=True)[1]
    AutoLaplaceFamily(model)(*arguments.values())


def test_a_frame_is_named_and_the_line_works():
    data = pandas.DataFrame({"g": G, "x": X, "y": Y, "name": WORDS})
    with pytest.raises(ModelError) as caught:
        AutoLaplaceFamily(of_columns)(data)
    assert "argument data of the model is a DataFrame" in str(caught.value)
    assert "data = {column: data[column] for column in data}" in str(caught.value)
    AutoLaplaceFamily(of_columns)({column: data[column] for column in data})


def test_errors_of_a_model_with_arrays_are_its_own():
    def wrong(g, x, y):
        raise ZeroDivisionError("of the user")

    with pytest.raises(ZeroDivisionError, match="of the user"):
        LogJoint(wrong, G, X, Y)
