from tests.pipelines.conformance import Conformance


class TestDagster(Conformance):
    engine = "dagster"
