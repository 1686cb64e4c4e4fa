import os
import subprocess
from pathlib import Path

import psutil
import yaml

from tests.pipelines.conformance import ROOT, Conformance, python


class TestKubeflow(Conformance):
    engine = "kfp"

    def cancel(self, process: "subprocess.Popen[bytes]") -> None:
        """End the component's own process, as Kubernetes does; the local runner knows no cancellation."""
        found = [each for each in psutil.Process(process.pid).children(recursive=True) if _is_component(each)]
        assert found, "no component runs"
        for each in found:
            each.terminate()

    def test_the_nightly_pipeline_compiles_and_carries_its_code_along(self, tmp_path: Path) -> None:
        file = tmp_path / "nightly.yaml"
        code = "import sys; from kfp import compiler; from ties_ray_kfp.nightly import nightly; "
        code += "compiler.Compiler().compile(nightly, sys.argv[1])"
        secret = {"TIES_RAY_TOKEN_SECRET": "ray-token"}
        command = [python("kfp"), "-W", "ignore", "-c", code, str(file)]
        subprocess.run(command, cwd=ROOT, env=os.environ | secret, check=True)
        spec, platform = yaml.safe_load_all(file.read_text())
        assert list(spec["components"]["comp-merge"]["outputDefinitions"]["artifacts"]) == ["model"]
        assert spec["root"]["dag"]["tasks"]["promote"]["dependentTasks"] == ["merge"]
        assert not spec["root"]["dag"]["tasks"]["merge"].get("cachingOptions", {}).get("enableCache")
        container = spec["deploymentSpec"]["executors"]["exec-merge"]["container"]
        assert "from ties_ray_pipelines.step import" in " ".join(container["command"])
        tasks = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        for name in ("exec-merge", "exec-promote"):
            (token,) = tasks[name]["secretAsEnv"]
            assert token["secretName"] == "ray-token"
            assert token["keyToEnv"] == [{"envVar": "RAY_AUTH_TOKEN", "secretKey": "token"}]


def _is_component(process: psutil.Process) -> bool:
    words = process.cmdline()
    return bool(words) and words[0] == python("kfp") and "kfp.dsl.executor_main" in words
