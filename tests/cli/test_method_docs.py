from ties_ray import plugins
from ties_ray.cli.method_docs import method_doc
from ties_ray.methods import Method


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
