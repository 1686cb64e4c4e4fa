from ties_ray import tables
from ties_ray.tables import Row, Tabular, html_table


class Two(Tabular):
    def _facts(self) -> Row:
        return {"name": "<script>", "size": 1234567, "share": 1 / 3, "none": None}

    def table(self) -> list[Row]:
        return [{"model": "a|b"}, {"model": "<img src=x>", "extra": True}]


def test_a_value_shows_itself_in_one_line_of_bounded_length() -> None:
    assert repr(Two()) == "Two(name='<script>', size=1234567, share=0.3333333333333333, none=None)"

    class Long(Two):
        def _facts(self) -> Row:
            return {"text": "x" * 5000}

    assert len(repr(Long())) < 320


def test_a_notebook_gets_tables_without_the_values_markup() -> None:
    shown = Two()._repr_html_()
    assert "<script>" not in shown
    assert "<img" not in shown
    assert "<th>size</th><td>1,234,567</td>" in shown
    assert "<td>0.333333</td>" in shown
    assert "<th>model</th><th>extra</th>" in shown


def test_a_long_table_tells_how_many_rows_it_leaves_out() -> None:
    assert "and 25 more" in html_table([{"n": number} for number in range(tables.MOST_ROWS + 25)])
    assert html_table([]) == ""
