from tests.pipelines.conformance import Conformance


class TestKubeflow(Conformance):
    engine = "kfp"
