import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tools.families import Family
from tests.tools.merging import merge
from ties_ray.worker.messages import METRICS

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "ties_ray.json"


def exported(name: str) -> str:
    """Return what Ray calls a counter of ours towards Prometheus."""
    return f"ray_ties_ray_{name}_total"


def test_the_dashboard_shows_just_what_workers_count() -> None:
    panels = json.loads(DASHBOARD.read_bytes())["panels"]
    asked = {name for panel in panels for target in panel["targets"] for name in re.findall(r"ray_\w+", target["expr"])}
    assert asked == {exported(name) for name in METRICS}


def test_the_dashboard_tells_merges_apart_by_their_output() -> None:
    dashboard = json.loads(DASHBOARD.read_bytes())
    (variable,) = [each for each in dashboard["templating"]["list"] if each["name"] == "output"]
    assert variable["query"] == f"label_values({exported('bytes_read')}, output)"
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            assert 'output=~"$output"' in target["expr"]
            assert "{{output}}" in target["legendFormat"]


@pytest.mark.usefixtures("ray_cluster")
def test_prometheus_finds_the_counts_of_a_merge_at_rays_nodes(family_of: Callable[..., Family], tmp_path: Path) -> None:
    import ray

    before = scrape(ray.nodes()[0])
    result = merge(family_of(num_models=2), tmp_path / "out", "ties", run={"executor": "ray", "workers": 1})
    expected = before.get((exported("bytes_read"), ""), 0.0) + result.bytes_read
    deadline = time.monotonic() + 60
    while (values := scrape(ray.nodes()[0])).get((exported("bytes_read"), ""), 0.0) < expected:
        assert time.monotonic() < deadline, values
        time.sleep(1)
    assert values[exported("bytes_read"), ""] == expected
    done = exported("shards"), "done"
    assert values[done] - before.get(done, 0.0) == result.shards
    assert values[exported("requests"), ""] - before.get((exported("requests"), ""), 0.0) == result.requests
    assert {kind for name, kind in values if name == exported("seconds")} <= {"read", "write", "merge"}
    with urllib.request.urlopen(metrics_of(ray.nodes()[0]), timeout=10) as answer:
        (line,) = {
            line.rpartition(" ")[0]
            for line in answer.read().decode().splitlines()
            if line.startswith(exported("bytes_read")) and f'run="{result.run_id}"' in line
        }
    assert f'output="{tmp_path}/out"' in line


def metrics_of(node: dict[str, object]) -> str:
    return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"


def scrape(node: dict[str, object]) -> dict[tuple[str, str], float]:
    """Return the sums of our counters over all workers, by name and kind."""
    try:
        with urllib.request.urlopen(metrics_of(node), timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}  # the agent that answers starts after the node
    sums: dict[tuple[str, str], float] = {}
    for name, labels, value in re.findall(r"^(ray_ties_ray_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        kind = re.search(r'kind="(\w*)"', labels)
        key = name, kind[1] if kind else ""
        sums[key] = sums.get(key, 0.0) + float(value)
    return sums
