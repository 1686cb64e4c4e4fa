"""Airflow 3: operators that merge, verify and promote, on a Ray cluster or by a command line of this machine.

Install this package where scheduler, workers and triggerer run. Parsing a DAG imports neither ties_ray, torch nor ray.
"""

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return what Airflow shows of this provider, and which of its classes it needs by name."""
    return {
        "package-name": "ties-ray-airflow",
        "name": "ties_ray",
        "description": "Merges of models on a Ray cluster.",
        "integrations": [{"integration-name": "ties_ray", "tags": ["software"]}],
        "operators": [{"integration-name": "ties_ray", "python-modules": ["ties_ray_airflow.operators"]}],
        "hooks": [{"integration-name": "ties_ray", "python-modules": ["ties_ray_airflow.hook"]}],
        "triggers": [{"integration-name": "ties_ray", "python-modules": ["ties_ray_airflow.trigger"]}],
        "connection-types": [
            {
                "connection-type": "ties_ray",
                "hook-class-name": "ties_ray_airflow.hook.TiesRayHook",
                "hook-name": "Ray cluster of ties_ray",
            }
        ],
        "extra-links": ["ties_ray_airflow.operators.DashboardLink"],
    }
