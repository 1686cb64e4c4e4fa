"""Model cards of all manners name their licence."""

import pytest

from ties_ray.inputs.licence import licence_of


@pytest.mark.parametrize(
    ("front", "licence"),
    [
        ("license: mit", "mit"),
        ("license: 'apache-2.0'  # as the base", "apache-2.0"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license:\n- mit\n- cc-by-4.0\ntags: [a]", "mit, cc-by-4.0"),
        ("license:\n  - mit", "mit"),
        ("license: >-\n  a long\n  name", "a long name"),
        ("tags: [x]\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE", "other llama3 LICENSE"),
        ("license:", ""),
        ("license: null", ""),
        ("license: {a: b}", ""),
        ("license: [mit", ""),
        ("license: &a [*a]", ""),
        ("license: !!python/object/apply:os.system [x]", ""),
        ("tags: [a]", ""),
    ],
)
def test_the_licence_of_a_front_matter_is_read_as_yaml(front: str, licence: str) -> None:
    assert licence_of(f"---\n{front}\n---\n# Card\nlicense: gpl\n".encode()) == licence


def test_a_card_without_front_matter_names_none() -> None:
    assert licence_of(b"# Card\nlicense: mit\n") == licence_of(b"") == ""
