"""Kills: of the process that draws, of actors on Ray, of their driver. What is left, and where the next run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hart_infer.batch.cluster import Cluster
from hart_infer.batch.driver import run_batch
from hart_infer.batch.reading import read_table
from hart_infer.batch.worker import Model, WorkerOptions
from hart_infer.errors import InputError
from tests.batch import stand_in
from tests.golden.data import REPOSITORY

parquet = pytest.importorskip("pyarrow.parquet")
SLOWLY = """
import sys, time
from hart_infer.batch.driver import run_batch
from hart_infer.batch.reading import read_table
from hart_infer.batch.worker import Model, WorkerOptions
from tests.batch import stand_in

def draw(prompts, **arguments):
    time.sleep(0.02)
    return stand_in.draw(prompts, **arguments)

load = lambda: Model(draw, "stand-in", {}, {}, stand_in.subject, "0123")
rows = read_table(sys.argv[1]).rows
run_batch(rows, WorkerOptions(load, sys.argv[2], format=sys.argv[3]), chunk_size=4, described={})
"""


def wait_until(reached: Callable[[], bool], run: subprocess.Popen[Any], seconds: float = 300) -> None:
    """Wait for a run to get somewhere; fail if it ends before, or takes too long."""
    end = time.monotonic() + seconds
    while not reached():
        assert run.poll() is None, "the run has ended too soon"
        assert time.monotonic() < end, "the run does not get on"
        time.sleep(0.01)


def parts(out: Path) -> int:
    return len(list((out / "manifest").glob("*.parquet")))


def lines_of(out: Path) -> dict[str, dict[str, Any]]:
    lines = parquet.read_table(out / "manifest.parquet").to_pylist()
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def all_complete(out: Path) -> bool:
    """Whether every file with a name is whole; pictures are decoded."""
    for path in out.rglob("*.png"):
        with Image.open(path) as image:
            image.load()
    for path in out.rglob("*.parquet"):
        parquet.read_table(path)
    for path in out.rglob("*.json"):
        json.loads(path.read_bytes())
    return True


@pytest.mark.parametrize("kind", ["png", "webdataset"])
def test_killed_three_times_it_ends_as_if_it_had_not_been(tmp_path, kind):
    rows, out = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("".join(f"prompt {i}\n" for i in range(64)))
    command = [sys.executable, "-c", SLOWLY, str(rows), str(out), kind]
    finished = 0
    for kill in range(3):
        run = subprocess.Popen(command, cwd=REPOSITORY)
        wait_until(lambda: parts(out) >= 3 * (kill + 1), run)  # noqa: B023
        time.sleep(0.03)  # into the next chunk
        run.kill()
        assert run.wait() == -signal.SIGKILL
        assert all_complete(out)
        assert finished < parts(out) < 16
        finished = parts(out)
    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0
    load = lambda: Model(stand_in.draw, "stand-in", {}, {}, stand_in.subject, "0123")  # noqa: E731
    undisturbed = WorkerOptions(load, str(tmp_path / "whole"), format=kind)
    run_batch(read_table(str(rows)).rows, undisturbed, chunk_size=4, described={})
    assert digests(out) == digests(tmp_path / "whole")
    assert {i: line["sha256"] for i, line in lines_of(out).items()} == {
        i: line["sha256"] for i, line in lines_of(tmp_path / "whole").items()
    }


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
    rows, out = tmp_path / "rows.txt", tmp_path / "out"
    rows.write_text("a cat\na dog\n")
    for_ever = SLOWLY.replace("time.sleep(0.02)", "print('drawing', flush=True); time.sleep(600)")
    command = [sys.executable, "-c", for_ever, str(rows), str(out), "png"]
    asked = WorkerOptions(lambda: Model(stand_in.draw, "stand-in", {}, {}, stand_in.subject, "0123"), str(out))
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == b"drawing\n"
            half = out / "images" / ".hart-0123456789ab.part"
            half.parent.mkdir()
            half.write_bytes(b"half")
            with pytest.raises(InputError, match=rf"^Another run writes into {out}; wait for it, or give another folder\.$"):
                run_batch(read_table(str(rows)).rows, asked, chunk_size=4, described={})
            assert half.exists()
            assert parts(out) == 0
        finally:
            first.kill()
    assert (out / ".lock").exists()
    assert run_batch(read_table(str(rows)).rows, asked, chunk_size=4, described={}).drawn == 2
    assert not (out / ".lock").exists()


def digests(out: Path) -> dict[str, str]:
    """The hash of every picture and shard, by its name; nothing else may be there but the manifest and batch.json."""
    found = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    assert {found.pop("manifest.parquet").name, found.pop("batch.json").name}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A Ray cluster of one machine with two CPUs."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as RayCluster

    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.sample
def test_a_row_that_kills_its_worker_is_found_and_the_others_are_drawn(tmp_path, address):
    """By halving what the dead had in common; a device that failed counts as a death."""
    prompts = ["p0", "p1", "die", "p3", "break"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"id": str(i), "prompt": p}) for i, p in enumerate(prompts)))
    rows = read_table(str(tmp_path / "rows.jsonl")).rows
    out = tmp_path / "out"
    asked = WorkerOptions(stand_in.load, str(out), batch_size=2)
    end = run_batch(rows, asked, chunk_size=4, described={}, pool=Cluster(address, cpus_per_worker=1))
    lines = lines_of(out)
    assert (end.drawn, end.failed) == (3, 2)
    assert {i for i, line in lines.items() if line["error"] is not None} == {"2", "4"}
    assert lines["2"]["error"] == "the worker's process died while it drew this row"
    assert "illegal memory access" in lines["4"]["error"]
    for line in lines.values():
        if line["error"] is None:
            assert hashlib.sha256((out / line["file"]).read_bytes()).hexdigest() == line["sha256"]


@pytest.mark.slow
@pytest.mark.sample
@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ({"cpus_per_worker": 1}, r"^there is no such model\.$"),
        ({"gpus_per_worker": 1}, "A worker was to have 1 CPU and 1 GPU, and the cluster has 2 CPU and 0 GPU"),
        ({"cpus_per_worker": 3}, "A worker was to have 3 CPU, and the cluster has 2 CPU"),
    ],
)
def test_errors_on_ray_are_sentences(tmp_path, address, shares, told):
    (tmp_path / "rows.txt").write_text("a cat\n")
    rows = read_table(str(tmp_path / "rows.txt")).rows
    asked = WorkerOptions(fail_to_load, str(tmp_path / "out"))
    with pytest.raises(InputError, match=told):
        run_batch(rows, asked, chunk_size=1, described={}, pool=Cluster(address, **shares))


def fail_to_load() -> Any:
    raise InputError("there is no such model.")


def children(pid: int) -> list[int]:
    """The processes that a process has started and that still run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid:
                found.append(int(folder.name))
    return found


def actors(driver: int) -> list[int]:
    """The processes of a driver's actors on a cluster that it has started."""
    below = [grandchild for child in children(driver) for grandchild in children(child)]
    named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in below if Path(f"/proc/{pid}").exists()}
    return [pid for pid, command in named.items() if command.startswith(b"ray::RayWorker")]


def kill_an_actor(driver: subprocess.Popen[Any]) -> int:
    wait_until(lambda: len(actors(driver.pid)) == 2, driver)
    victim = actors(driver.pid)[0]
    os.kill(victim, signal.SIGKILL)
    return victim


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_500_prompts_on_two_actors_with_three_kills(tmp_path):
    """Two actors are killed on the way, then the driver, which is started again."""
    pytest.importorskip("ray")
    subjects = (REPOSITORY / "recipes/mini/vocabulary.txt").read_text().splitlines()
    rows = [{"id": f"row-{i}", "prompt": f"{subjects[i % len(subjects)]}, noto style"} for i in range(500)]
    prompts, out, whole = tmp_path / "rows.jsonl", tmp_path / "out", tmp_path / "whole"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    command = [sys.executable, "-m", "hart_infer", "batch", str(prompts), "--chunk-size", "5", "--quiet", "-o"]
    on_ray = [*command, str(out), "--ray", "local", "--workers", "2", "--cpus-per-worker", "1"]
    driver = subprocess.Popen(on_ray, cwd=REPOSITORY)
    wait_until(lambda: parts(out) >= 10, driver)
    first = kill_an_actor(driver)
    wait_until(lambda: parts(out) >= 25, driver)
    assert kill_an_actor(driver) != first
    wait_until(lambda: parts(out) >= 45, driver)
    driver.kill()
    driver.wait()
    assert all_complete(out)
    assert 45 <= parts(out) < 100
    assert subprocess.run(on_ray, cwd=REPOSITORY).returncode == 0
    assert subprocess.run([*command, str(whole)], cwd=REPOSITORY).returncode == 0
    lines, undisturbed = lines_of(out), lines_of(whole)
    assert len(digests(out)) == 500
    assert digests(out) == digests(whole)
    assert list(lines) == list(undisturbed) == [row["id"] for row in rows]
    for i, line in lines.items():
        assert {**line, "seconds": 0} == {**undisturbed[i], "seconds": 0}
        assert line["error"] is None
        assert hashlib.sha256((out / line["file"]).read_bytes()).hexdigest() == line["sha256"]
