"""A connection of Airflow that names a Ray cluster: its dashboard is the host, its token the password."""

from typing import Any

from airflow.sdk import BaseHook, Connection

from ties_ray_pipelines.jobs import Jobs, JobsError

PORT = 8265
"""The port of Ray's dashboard."""


class TiesRayHook(BaseHook):
    """The jobs API of the Ray cluster that a connection names."""

    conn_name_attr = "conn_id"
    default_conn_name = "ties_ray_default"
    conn_type = "ties_ray"
    hook_name = "Ray cluster of ties_ray"

    def __init__(self, conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.conn_id = conn_id

    def get_conn(self) -> Jobs:
        """Return a client of the cluster."""
        return jobs_of(self.get_connection(self.conn_id))

    def test_connection(self) -> tuple[bool, str]:
        """Return whether the cluster answers, and its version of Ray or what is wrong."""
        try:
            return True, f"Ray {self.get_conn().version()}"
        except JobsError as error:
            return False, str(error)

    @classmethod
    def get_ui_field_behaviour(cls) -> dict[str, Any]:
        """Return which fields the form of a connection has, and what they are called."""
        return {
            "hidden_fields": ["login", "schema", "extra"],
            "relabeling": {"host": "Dashboard", "password": "Token"},
            "placeholders": {"host": "http://head:8265"},
        }


def jobs_of(connection: Connection) -> Jobs:
    """Return a client of the cluster that a connection names; the host is a URL, or a name with a port of its own."""
    host = connection.host or ""
    address = host if "://" in host else f"{connection.schema or 'http'}://{host}:{connection.port or PORT}"
    return Jobs(address, connection.password or None)
