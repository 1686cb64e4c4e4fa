from tests.pipelines.conformance import Conformance, Json


class TestDagster(Conformance):
    engine = "dagster"

    def test_an_evaluation_is_a_check_of_the_promoted_asset(self, told: Json) -> None:
        found = {night: told[night]["checks"] for night in ("first_night", "nothing_new", "rejected")}
        assert found == {"first_night": {"evaluation": True}, "nothing_new": {}, "rejected": {"evaluation": False}}

    def test_a_partition_has_a_recipe_and_a_pointer_of_its_own(self, told: Json) -> None:
        merge, promote = told["partitions"]
        assert merge.endswith("-- s3://recipes/blue.yaml")
        assert promote.endswith("-- /merged s3://merged/blue.json")

    def test_a_run_promotes_its_own_merge_though_another_came_after_it(self, told: Json) -> None:
        assert told["meanwhile"].endswith("-- /merged /pointer")
