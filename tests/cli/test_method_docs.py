from typing import ClassVar, Literal

import pytest

from ties_ray import plugins
from ties_ray.cli.method_docs import method_doc
from ties_ray.methods import Method, Round


def test_a_method_is_explained_by_its_field_docstrings() -> None:
    doc = method_doc("ties", plugins.load("methods", "ties", Method))
    assert (doc.scales, doc.has_density) == ("mean", True)
    assert doc.description.startswith("Keeps the largest values")
    by_name = {parameter.name: parameter for parameter in doc.parameters}
    assert by_name["density"].allowed == "number, > 0, <= 1"
    assert by_name["density"].default == "0.2"
    assert by_name["merge"].allowed == "mean | sum | max"
    assert by_name["lambda"].description == "Factor on the merged task vector."
    assert "name" not in by_name


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_each_method_says_what_it_works_on_and_when_it_goes_wrong(name: str) -> None:
    doc = method_doc(name, plugins.load("methods", name, Method))
    assert doc.works_on in ("elements", "rows", "matrices", "parameters")
    assert doc.caveat.endswith(".")
    assert all(len(sentence.split()) <= 25 for sentence in doc.caveat.split(". "))


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("average", ["Works on elements.", "Reads the models once."]),
        ("ties", ["Works on elements.", "Reads the models once, after one or two readings that count magnitudes."]),
        ("della", ["Works on whole rows."]),
        ("cabs", ["Works on whole parameters."]),
        ("model_stock", ["Reads the models 3 times."]),
        ("emr", ["Weights are refused."]),
        ("fisher", ["Reads the models twice.", "Each model brings fisher (`models[].with`)."]),
        ("tsv", ["Works on whole matrices.", "Its bytes are those of one build of LAPACK on one type of processor."]),
    ],
)
def test_the_facts_of_a_method_come_from_its_rounds_and_its_class(name: str, facts: list[str]) -> None:
    doc = method_doc(name, plugins.load("methods", name, Method))
    assert set(facts) <= set(doc.facts)


class Demanding(Method):
    name: Literal["demanding"] = "demanding"
    needed: int
    scales: ClassVar[Literal["sum", "mean"]] = "mean"
    paper: ClassVar[str] = "none"

    def rounds(self) -> tuple[Round, ...]:
        raise NotImplementedError


def test_a_method_without_defaults_says_less() -> None:
    doc = method_doc("demanding", Demanding)
    assert (doc.works_on, doc.caveat) == ("", "")
    assert [each.default for each in doc.parameters] == ["required"]


def test_it_is_said_whether_a_merge_takes_in_further_models() -> None:
    methods = ("opcm", "ties", "emr", "consensus")
    docs = {name: method_doc(name, plugins.load("methods", name, Method)) for name in methods}
    assert [docs[name].continues for name in methods] == [True, True, True, False]
    assert not docs["opcm"].all_at_once
    assert docs["ties"].all_at_once == ["denominator: union counts what any adapter changes"]
    assert docs["emr"].all_at_once == [
        "a part takes its model's signs from the finished vector",
        "masks: true compares each model with the finished vector",
    ]
    assert docs["consensus"].all_at_once == ["what it makes of a model depends on the others"]
