"""Every speed claim has a script, and every script runs; what it measures is for people to judge."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(script: str, *options: str) -> str:
    """Return what a script prints; it must end well."""
    command = [sys.executable, "-m", f"benchmarks.{script}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(output: str) -> list[dict[str, str]]:
    """Return the rows of the one table in an output, by the names of its columns."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_the_kernels_are_measured_for_every_dtype_and_for_factors() -> None:
    output = run("kernels", "--length", "70000", "--models", "2", "--repeats", "1", "--ranks", "8", "mixed")
    _, dense, factors = output.split("\n\n")
    assert [row["dtype"] for row in rows(dense)] == ["bfloat16", "float16", "float32"]
    assert all(float(row["rounds"]) > float(row["merge"]) > 0 for row in rows(dense))
    assert [row["rank"] for row in rows(factors)] == ["dense", "8", "mixed"] * 3
    assert all(float(row["merge"]) > 0 and float(row["fold"]) > 0 for row in rows(factors))


def test_comparisons_are_measured_beside_torch() -> None:
    told = rows(run("look", "--models", "3", "--hidden", "64", "--rank", "4", "--size", "1M"))
    assert [row["what"] for row in told] == ["compare, 1M", "inspect --compare, 3 adapters"]


@pytest.mark.parametrize("method", ["ties", "consensus"])
def test_a_worker_takes_less_memory_than_planned(method: str) -> None:
    options = ("--size", "20M", "--models", "2", "--executor", "local", "--workers", "1", "--method", method)
    (row,) = rows(run("memory", *options))
    planned, peak = float(row["planned MB"]), float(row["peak MB"])
    assert 20 < peak <= planned <= float(row["run.memory MB"])


def test_planning_sends_one_request_a_header(tmp_path: Path) -> None:
    disk, s3 = rows(run("planning", "--models", "3", "--files", "4"))
    lists, headers, texts = 1 + 4, 4 * 4, 4 * 3  # config, index and README of four inputs; the glob is one listing
    copied = 2  # what the output takes over: config and tokenizer
    named = 1  # is there a folder of the glob's own name?
    read = 2  # both small files: either might be a pointer instead
    assert s3["HTTP requests"] == str(lists + named + headers + texts + copied + read)
    calls = dict(reversed(call.split()) for call in disk["calls of the store"].split(", "))
    assert calls["list"] == str(lists)
    assert int(calls["head"]) >= headers + texts + copied


def test_a_small_adapter_in_a_bucket_takes_three_requests() -> None:
    text = run("small_adapters", "--models", "10")
    (merged,), stages = map(rows, text.strip().split("\n\n")[-2:])
    assert float(merged["requests an adapter"]) == 3
    assert merged["reads of weights"] == "10"
    by_stage = {stage["stage"]: float(stage["requests an adapter"]) for stage in stages}
    assert {name for name, requests in by_stage.items() if requests} == {"plan", "threshold, high bits"}
    assert by_stage["plan"] == 2, "config and header; all folders are one listing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_merges_on_a_gpu_are_not_measured_where_there_is_none_but_counted() -> None:
    output = run("gpu_merges", "--proxies", "--models 3 --checkpoints 2 --shrink 32 --size 1M")
    assert output.startswith("There is no GPU here")
    counted, host = (rows(part) for part in output.split("\n\n") if "|---|" in part)
    assert {row["round"] for row in counted} == {"threshold, high bits", "threshold, low bits", "merge"}
    assert all(int(row["launches"]) > 0 < int(row["waits"]) for row in counted)
    assert all(float(row["CPU s"]) > 0 for row in host)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_decompositions_are_measured_beside_a_product() -> None:
    told = rows(run("matrices", "--shrink", "64", "--models", "2", "--rank", "4"))
    assert [row["work"] for row in told][1:] == ["iso_c of a sum", "tsv of 2 models", "condense, rank 4"]
    assert float(told[0]["times the product"]) == 1


def test_planning_for_large_models_is_measured_from_a_catalog_that_is_made_up() -> None:
    found = rows(run("planning", "--large", "40"))
    assert [row["cut into files in"] for row in found] == ["1 ways", "10 ways", "40 ways"]
    assert {row["shards"] for row in found} == {str(2 * 2 * 2103 + 2120)}  # two groups of models, two counting rounds
    sizes = [float(row["stored MB"]) for row in found]
    assert sizes == sorted(sizes)


def test_the_driver_is_measured_and_its_schedule_simulated() -> None:
    options = ("--shards", "2000", "--workers", "16", "--models", "2", "--simulated", "400")
    cost, worlds = run("scale", *options).strip().split("\n\n")
    assert [row["shards"] for row in rows(cost)] == ["2000", "2000", str(2 * 2103 + 2120), "2000"]
    told = rows(worlds)
    assert {row["round"] for row in told} == {"counting", "merge"}
    assert all(0 < float(row["utilisation"]) <= 1 <= float(row["times ideal"]) for row in told)


def test_the_store_is_measured_beside_other_clients_and_the_least_that_python_can_do() -> None:
    output = run(
        "clients", "--client", "store", "--client", "botocore", "--total", "8", "--object", "9", "--threads", "2"
    )
    found = {(row["what"], row["client"]): row for row in rows(output)}
    kinds = ("read 8,192 KiB", "write 32,768 KiB")
    assert found.keys() == {(kind, client) for kind in kinds for client in ("floor", "store", "botocore")}
    assert all(float(row["CPU ms a request"]) > 0 for row in found.values())


def test_help_takes_neither_torch_nor_ray() -> None:
    found = {row["command"]: row["loads"] for row in rows(run("startup", "--runs", "1"))}
    assert found["ties-ray --help"] == "-"
    assert found["import ties_ray"] == "-"
    assert "torch" in found["import torch, numba"]
    assert sum("first byte read" in command for command in found) == 4


@pytest.mark.parametrize("more", [(), ("--bucket", "--rate", "200")])
def test_a_merge_is_measured_against_copying_its_bytes(more: tuple[str, ...]) -> None:
    output = run("merge", "--size", "1M", "--models", "2", "--run", "local/1", *more)
    assert [row["run"] for row in rows(output)] == ["copy", "ties_ray, local, 1 workers"]
    again = re.search(r"read \d+\.\d\d GB in all rounds, (\d+\.\d\d) of it again", output)
    assert again
    assert (float(again[1]) > 0) == ("--bucket" in more)


@pytest.mark.parametrize("kind", ["adapter", "checkpoint"])
def test_a_pool_of_adapters_is_merged_within_plan(kind: str) -> None:
    output = run("pool", "--models", "3", "--shrink", "32", "--rank", "8", "--kind", kind)
    _, merges, rounds = output.split("\n\n")
    (row,) = rows(merges)
    sent, planned = (int(number) for number in re.findall(r"\d+", row["requests (planned)"]))
    assert 0 < sent <= planned
    assert 0 < float(row["peak MB"]) <= float(row["planned MB"])
    found = {row["round"]: float(row["CPU s"]) for row in rows(rounds)}
    assert found["threshold, high bits"] > 0
    assert {"assemble" if kind == "adapter" else "merge", "publish"} <= found.keys()


def test_peft_is_measured_beside_a_pool() -> None:
    output = run("pool", "--models", "2", "--shrink", "32", "--rank", "8", "--modules", "q_proj", "--peft")
    *_, told, peft = output.split("\n\n")
    assert "PEFT, 8 adapters of rank 16, one matrix of 128 x 128" in told
    assert [row["PEFT"] for row in rows(peft)] == ["A and B, ties (something else)", "B @ A", "deltas, ties"]


def test_methods_are_priced_for_checkpoints_and_for_adapters() -> None:
    names = ("task_arithmetic", "iso_c", "slerp")
    options = ("--size", "1M", "--models", "3", "--adapters", "3", "--rank", "4", "--shrink", "64")
    family, pool = run("methods", *options, *(f"--method={name}" for name in names)).split("3 adapters of rank 4\n")
    for table in (rows(family), rows(pool)):
        assert [row["method"] for row in table] == list(names)
        assert [row["models"] for row in table] == ["3", "3", "2"]
        assert all(float(row["peak MB"]) < float(row["planned MB"]) for row in table)


def test_a_pool_that_grows_is_measured_beside_one_merge() -> None:
    told = {row["what"]: row for row in rows(run("growing", "--size", "1M", "--models", "4", "--method", "average"))}
    again = {name: int(row["models read again"]) for name, row in told.items()}
    assert (again["add a model"], again["drop the last"], again["drop the last but one"], again["drop the first"]) == (
        0, 0, 1, 2,
    )  # fmt: skip
    assert float(told["drop the last"]["GB read"]) == 0
