"""What is scored: folders here and in buckets, adapters with their base, and candidates."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Bucket
from tests.tools import scored
from ties_ray.errors import InputError
from ties_ray.evaluations.loss import Loss
from ties_ray.operations.candidates import Candidates
from ties_ray.operations.subjects import CandidateSubject, FolderSubject
from ties_ray.stores import Stores

ROWS = [{"text": "the cat sat on a mat"}, {"prompt": "one two", "completion": " three four five"}]


def upload(folder: Path, uri: str, stores: Stores) -> None:
    for path in folder.iterdir():
        stores.writer(uri).put(f"{uri}/{path.name}", path.read_bytes())


def test_a_folder_in_a_bucket_has_the_score_of_the_same_folder_here(s3_bucket: Bucket, tmp_path: Path) -> None:
    scored.causal(tmp_path / "model")
    (tmp_path / "model" / "optimizer.pt").write_bytes(b"a pickle")
    stores, uri = Stores(s3_bucket.storage), f"{s3_bucket.uri}/model"
    upload(tmp_path / "model", uri, stores)
    evaluator = Loss(data=scored.lines(tmp_path / "d.jsonl", ROWS)).prepared(stores, 0)
    with FolderSubject(stores, uri) as remote, FolderSubject(stores, str(tmp_path / "model")) as local:
        assert evaluator.score(remote).value == evaluator.score(local).value
        fetched = Path(remote.folder())
        assert fetched != tmp_path / "model"
        assert not (fetched / "optimizer.pt").exists()
        assert local.folder() == str(tmp_path / "model")
        assert (remote.id, remote.record()) == (uri, {})
    assert not fetched.exists()


def test_a_folder_that_is_not_there_is_refused(s3_bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        FolderSubject(Stores({}), str(tmp_path / "none")).folder()
    with pytest.raises(InputError, match="there is no such folder, or it is empty"):
        FolderSubject(Stores(s3_bucket.storage), f"{s3_bucket.uri}/none").folder()


def test_an_output_that_was_changed_after_the_merge_is_refused(s3_bucket: Bucket, tmp_path: Path) -> None:
    from ties_ray import merge

    stores, uri = Stores(s3_bucket.storage), f"{s3_bucket.uri}/merged"
    result = merge({**scored.tuned(tmp_path), "output": uri, "storage": s3_bucket.storage})
    with FolderSubject(stores, uri) as subject:
        assert (Path(subject.folder()) / "config.json").exists()
        assert subject.record()["run_id"] == result.run_id
    name = result.files[0].name
    _, data = stores.of(uri).get(f"{uri}/{name}", 2**24)
    stores.writer(uri).put(f"{uri}/{name}", data[:-1] + bytes([data[-1] ^ 1]))
    with FolderSubject(stores, uri) as subject, pytest.raises(InputError, match=r"safetensors: is not what the merge"):
        subject.folder()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's use of it
def test_an_adapter_is_scored_on_its_base(tmp_path: Path) -> None:
    import peft

    base = scored.causal(tmp_path / "base")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(base, config)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "whole")
    data = scored.lines(tmp_path / "d.jsonl", ROWS)
    evaluator = Loss(data=data).prepared(Stores({}), 0)
    scored.tokenizer().save_pretrained(tmp_path / "whole")
    subjects = [FolderSubject(Stores({}), str(tmp_path / name)) for name in ("base", "adapter", "whole")]
    subjects[1] = FolderSubject(Stores({}), str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    alone, adapted, whole = (evaluator.score(subject).value for subject in subjects)
    assert adapted == pytest.approx(whole, rel=1e-6)
    assert abs(alone - whole) > 1e-3


def test_candidates_have_the_scores_of_their_merges_and_share_one_loaded_model(tmp_path: Path) -> None:
    from ties_ray import merge

    recipe = scored.tuned(tmp_path)
    evaluator = Loss(data=scored.lines(tmp_path / "d.jsonl", ROWS)).prepared(Stores({}), 0)
    with Candidates(recipe) as pool:
        for number, lambda_ in enumerate((0.3, 0.9)):
            method = {"name": "task_arithmetic", "lambda": lambda_}
            output = str(tmp_path / f"merged-{number}")
            merge({**recipe, "method": method, "output": output})
            candidate = pool.merge({"method.lambda": lambda_})
            with (
                FolderSubject(Stores({}), output) as merged,
                CandidateSubject(candidate, f"{lambda_}", "pool") as subject,
            ):
                assert evaluator.score(subject).value == evaluator.score(merged).value
    with CandidateSubject(pool.merge({"method.lambda": 0.5}), "a", "pool") as subject:
        model = evaluator._loader.model(subject, "AutoModelForCausalLM")  # type: ignore[attr-defined]
    with CandidateSubject(pool.merge({"method.lambda": 0.6}), "b", "pool") as subject:
        assert evaluator._loader.model(subject, "AutoModelForCausalLM") is model  # type: ignore[attr-defined]
        assert subject._written is None, "nothing was written for it"
