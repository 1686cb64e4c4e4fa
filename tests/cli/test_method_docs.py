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
