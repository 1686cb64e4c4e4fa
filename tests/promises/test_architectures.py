"""Every architecture that transformers can build small: its names, its ties, and merges that its class loads."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from tests.tools.architectures import CLASSES, build, check, kinds, values
from tests.tools.conversions import TARGET, collected, text
from ties_ray.libraries.conversions import kinds_of
from ties_ray.libraries.naming import matched

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
REFUSED = (
    "Inkling", "Kimi_K25", "MistralLarge4", "PI0", "Step3p7", "Tipsv2",
    "GroundingDino", "MMGroundingDino", "Mask2Former", "OneFormer",
)  # fmt: skip
"""How classes begin whose layouts are not read from each other.

Most of their conversions move rows, and some names are unclear. The last four hold a Swin without its prefix."""


@pytest.mark.timeout(900)
def test_the_table_holds_what_transformers_says() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert text(collected()) == TARGET.read_text(), "python -m tests.tools.conversions writes it anew"


@pytest.mark.timeout(900)
def test_both_layouts_of_every_architecture_are_matched_and_never_wrongly() -> None:
    compared, refused = 0, set()
    for name, kind in kinds().items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = build(name, kind)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.copy_(torch.randn(parameter.shape))
                new = values(model)
                old = revert_weight_conversion(model, dict(new))
        except Exception:  # can't be built small, or without what is not installed
            continue
        if old.keys() == new.keys():
            continue
        compared += 1
        model.config.architectures = [name]
        for mine, base in ((old, new), (new, old)):
            shapes = ({one: tuple(tensor.shape) for one, tensor in side.items()} for side in (mine, base))
            match = matched(*shapes, kinds_of(model.config.to_dict()))
            for one, pieces in match.pieces.items():
                flat = [
                    mine[piece.name].flatten()[piece.start :][: torch.Size(piece.shape).numel()] for piece in pieces
                ]
                assert torch.equal(torch.cat(flat), base[one].flatten()), (name, one)
            if match.pieces.keys() != base.keys() or match.left:
                refused.add(name)
    assert compared >= 80
    assert [name for name in sorted(refused) if not name.startswith(REFUSED)] == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", CLASSES)
def test_two_fine_tunes_of_each_class_are_merged_and_load(group: str, tmp_path: Path) -> None:
    known = kinds()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in CLASSES[group].split():
            outcome = check(name, known[name], tmp_path / name)
            assert outcome.wrong == (), name
            assert f"| {name} | {outcome.kind} | tensors" in PAGE.read_text()


def test_the_page_names_all_classes() -> None:
    listed = re.findall(r"^\| (\w+) \| .* \| tensors", PAGE.read_text(), re.MULTILINE)
    assert listed == " ".join(CLASSES.values()).split()
