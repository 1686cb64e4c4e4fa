from tests.pipelines.conformance import Conformance


class TestAirflow(Conformance):
    engine = "airflow"
