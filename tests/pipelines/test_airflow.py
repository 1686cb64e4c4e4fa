from tests.pipelines.conformance import Conformance, Json


class TestAirflow(Conformance):
    engine = "airflow"

    def test_a_recipe_may_be_a_template_beside_the_dag(self, told: Json) -> None:
        assert told["reuse"]["record"]["output"] == told["success"]["record"]["output"], "`reuse` gets its recipe so"

    def test_the_output_of_a_merge_is_the_input_of_what_follows(self, told: Json) -> None:
        assert told["reuse"]["verified"] == "success"

    def test_airflow_knows_the_provider(self, told: Json) -> None:
        provider = told["provider"]
        assert (provider["version"], provider["hook"]) == ("0.1.0", "ties_ray_airflow.hook.TiesRayHook")
        assert "ties_ray_airflow.operators.DashboardLink" in provider["links"]
