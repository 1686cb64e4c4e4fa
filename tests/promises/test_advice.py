"""Every remedy that stands in the code is followed by a test, or known to be none that a test can follow."""

from tests.promises.test_remedies import CASES
from tests.tools.advice import printed

UNFOLLOWED = {
    "another tool has to make the files anew": (
        "give the original", "give the unquantised", "save it ", "save each", "save the ", "merge it into its base",
        "merge-weights", "zero_to_fp32", "fuse it with its base", "export it for PEFT", "let torchtune save",
        "load it with PEFT where", "put it on its pipeline", "convert it to safetensors", "give the adapters that",
        "keep one of them", "name its tensors as", "store it as F32", "drop that tensor", "compute it ",
        "merge_and_unload", "init_lora_weights: true into", "add it: ", "add tokenizer.json", "with AutoTokenizer",
    ),
    "the files have to be fetched or uploaded anew": (
        "upload it", "upload the file", "complete the download", "finish the download", "in the clone fetches",
        "`hf download`", "/resolve/", "unpack it", "cache verify", "restore it and wait", "restore that version",
    ),
    "only its reader knows what was meant": (
        "give the folder that holds the run's", "write {} where the number stands", "change `from` or `to`",
        "or add coefficients",
        "check th", "are they of one base?", "name the model that", "name one of them", "name the bucket",
        "is it a fine-tune of this base? `ties-ray inspect`", "give the folder with", "do not trust", "choose another",
        "it may be one of those inside", "it holds no safetensors", "it is not a safetensors", "look for models",
        "move those aside", "rename ", "give the folders that hold", "narrow `exclude`", "repair or drop it",
        "drop the model", "a single file beside them", "remove it", "give the folder itself", "give the recipe's file",
        "give mergekit's file", "add `-o FOLDER`",
        "write that model into", "write to a local folder", "write to a shorter", "write s3://", "write hf://",
        "write file:///", "name the host", "known here", "at most {}", "levels, and no tags", "put it in quotes",
        "mend the YAML", "start from the example", "as in ", "a recipe has", "split it into", "see ", "give the plain",
        "remove the link", "remove them, and run", "put it back", "the configs of the inputs back", "modules.json",
        "name the base of both", "leave it out, where", "leave out either", "name another model",
        "without further tokens",
    ),
    "its reader writes the space of a search (tests/recipe/test_search.py has them)": (
        "`ties-ray search` does it", "give each pattern a range", "leave either of them out", "lower `",
        "take another sampler", "search numbers of the method", "write one of ", "write `",
        "take `grid`, `random` or `optuna`", "mend that first", "confirm on data that the search", "name a folder",
        "with a space", "forget this table", "leave them out",
    ),
    "somebody has to give a permission, room, credentials or a service": (
        "accept them at", "free s", "give the user", "credentials", "HF_TOKEN", "AWS_", "log in again", "anonymous",
        "KMS", "kms_key", "endpoint_url", "storage.s3", "set the clock", "make HF_HOME", "HF_HUB_OFFLINE", "SSE-C",
        "make one: head", "certificate", "use a service that does", "every worker needs it", "service refuses",
        "copy it to another store", "copy the files to a store", "this file system", "smaller files: output",
        "huggingface.co",
    ),
    "a cluster, its machines or their software have to change": (
        "pip install", "raise run.deadline", "RAY_", "lower run.", "wait for room", "give workers more memory",
        "a folder that all nodes share", "unset what asks", "use the version that merged", "a-z, 0-9",
        "Kubernetes", "put it into object storage", "put its models into", "ray status",
    ),
    "trying again is all that helps, or another writer has to end": (
        "run again", "run the command again", "run the same command", "the same command continues", "try again",
        "wait for it", "let that run finish", "merge later", "keep inputs unchanged", "find out who else writes",
        "promote", "the pointer is as it was", "merge first", "a defect of ties_ray", "clear the pool cache",
        "leave the hidden files", "delete it, and run the merge", "run the merge with --fresh",
        "merge again with --fresh", "leave --", "leave {} out", "bring the inputs back",
    ),
    "the models of an earlier merge have to be there": (
        "merge all models in one recipe, with", "name the output of one", "name {} as it was", "use its `{}`",
        "use its type of CPU or GPU",
    ),
    "only its reader knows which settings a sweep should have": (
        "name more models", "give it another output.path", "add the setting's name: ", "add `settings` for a sweep",
        "split them into several recipes", "`ties-ray sweep` does them all", "out of the settings",
        "leave fewer models out", "give the output of a search, or the folder above", "merge it in a recipe of its own",
        "{setting}", "allow more, or merge with", "save the candidate",
    ),
    "it is of a score and not of a merge; tests/evaluations follow what can be followed": (
        "scores what transformers can't load", "give a name such as", "name a folder that has one: `tokenizer`",
        "write `metric` with one of these", "return a number", "score it by an evaluation that fits",
        "store it as adapter_model.safetensors", "write `trust: true`", "write cpu", "write module:function",
        "write the fields as the guide has them", "name a file with examples", "split it, or cut it", "cut it to",
        "unpack it, or store it as Parquet", "write one example a line", "write one JSON object a line",
        "write it anew, with pyarrow", "write columns of texts", "cut the texts to", "write the model's own names",
        "write `padding: right`", "write `evaluate: [", "see what it printed", "see whether `lm_eval` alone",
        "mend it; --debug", "give one that runs both", "score that folder by its own name", "add --evaluate loss:DATA",
        "keep the data unchanged, where", "as one of the models",
        "give the folder of a model", "name it: `--base`", "copy the base here",
        "see what `ties-ray verify` says", "name a folder with a tokenizer.json",
    ),
    "only its reader knows which adapters need a control": (
        "leave this adapter out", "give the folder of an adapter", "randomise them in two calls",
    ),
    "only its reader knows which models a pool should have": (
        "`ties-ray pool ", "add a model to the pool", "drop it and add it", "drop it, and add it",
        "drop the model, and add", "pool's recipe file", "keep at least one result", "remove the pool's folder",
        "leave out `continues`", "or make another pool", "split it into several pools",
    ),
    "a matrix of many gigabytes provokes it": ("raise it by {} bytes",),
    "no remedy, or a part of one that is followed": (
        "checkpoint", "an output of kind",
        "holds no tensors", "{exclusion}",
        "{} failed", "(the name is not known)", "`exclude: {}` {}", "--bucket", "HTTPHeaders", "ResponseMetadata",
        "response", "x-amz-", "\\", "give the folder that holds it",
    ),
}  # fmt: skip
"""Parts of advice that no test follows, by the reason."""


def test_every_remedy_of_the_code_is_followed_or_known_to_be_none_to_follow() -> None:
    followed = [case.remedy for case in CASES]
    parts = [part for parts in UNFOLLOWED.values() for part in parts]
    texts = set(printed())
    new = [text for text in texts if not any(one in text or text in one for one in followed)]
    assert not sorted(text for text in new if not any(part in text for part in parts))
    assert not [part for part in parts if not any(part in text for text in texts)], "no longer in the code"
