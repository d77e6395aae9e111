"""What an operator sets: options, environment, keys, rates, ports; and the command that takes them."""

from __future__ import annotations

import os
import queue
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from hart_infer.cli import main
from hart_infer.errors import ConfigError, InputError, OutputError
from hart_infer.server.keys import Allowance, Keys, add_key, digest
from hart_infer.server.run import bind
from hart_infer.server.settings import PREFIX, ServerSettings, make_settings


def test_the_default_is_this_machine_alone() -> None:
    settings = make_settings()
    assert (settings.host, settings.port, settings.is_local, settings.keep, settings.keys) == (
        "127.0.0.1",
        8000,
        True,
        None,
        None,
    )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_local_addresses(host: str) -> None:
    assert make_settings(host=host).is_local


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "pictures.example", ""])
def test_other_machines_need_keys_or_a_word(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wants API keys: make one with --keys FILE --new-key"):
        make_settings(host=host)
    assert not make_settings(host=host, insecure=True).is_local
    assert not make_settings(host=host, keys=tmp_path / "keys.txt").is_local


def test_the_environment_sets_what_the_command_line_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}MAX_QUEUE", "5")
    monkeypatch.setenv(f"{PREFIX}PORT", "1234")
    settings = make_settings(port=99, max_batch=None)
    assert (settings.max_queue, settings.port, settings.max_batch) == (5, 99, ServerSettings().max_batch)
    assert settings.limits.max_queue == 5


@pytest.mark.parametrize(("name", "value"), [("port", "x"), ("max_batch", "0"), ("timeout", "-1"), ("port", "70000")])
def test_wrong_values_are_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{PREFIX}{name.upper()}", value)
    with pytest.raises(ConfigError, match=rf"{name} \(or {PREFIX}{name.upper()}\) is wrong: .*\.$"):
        make_settings()


# Keys.


def test_only_hashes_are_stored_for_the_owner_s_eyes(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    keys = [add_key(path, name) for name in ("alice", "bob")]
    text = path.read_text()
    assert not any(key in text for key in keys)
    assert digest(keys[0]) in text
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    read = Keys.read(path)
    assert [read.name_of(key) for key in [*keys, "hart-x", "", "\udcff"]] == ["alice", "bob", None, None, None]


def test_comments_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"# of the team\n\nalice {digest('a')}  # until May\n")
    assert Keys.read(path).names == {digest("a"): "alice"}


@pytest.mark.parametrize("text", ["alice", "alice secret", f"al/ice {digest('a')}", f"alice {digest('a')} x", "\udcff"])
def test_files_that_are_no_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"keys\.txt"):
        Keys.read(path)


@pytest.mark.parametrize("text", ["", "# of the team", "# of the team\n", f"bob {digest('b')}", f"bob {digest('b')}\r\n"])
def test_a_key_is_added_to_what_a_file_has(tmp_path: Path, text: str) -> None:
    path, link = tmp_path / "keys.txt", tmp_path / "link.txt"
    path.write_bytes(text.encode())
    path.chmod(0o640)
    link.symlink_to(path)
    key = add_key(link, "alice")
    keys = Keys.read(path)
    assert keys.name_of(key) == "alice"
    assert keys.name_of("b") == ("bob" if "bob" in text else None)
    assert path.read_bytes().startswith(text.encode())
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert {each.name for each in tmp_path.iterdir()} == {"keys.txt", "link.txt"}


def test_a_key_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.txt"
    add_key(path, "alice")
    before = path.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="cannot be written: the disk is full"):
        add_key(path, "bob")
    assert path.read_text() == before
    assert [each.name for each in tmp_path.iterdir()] == ["keys.txt"]


def test_keys_that_cannot_be_made(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    add_key(path, "alice")
    with pytest.raises(InputError, match="has a key named alice already"):
        add_key(path, "alice")
    for name in ("", "a b", "a/b", "a" * 65, "#"):
        with pytest.raises(InputError, match="A key's name has up to 64"):
            add_key(path, name)
    with pytest.raises(OutputError, match="cannot be written"):
        add_key(tmp_path / "nowhere" / "keys.txt", "bob")
    with pytest.raises(ConfigError, match="has no key"):
        (tmp_path / "empty.txt").touch()
        Keys.read(tmp_path / "empty.txt")


def test_an_allowance_comes_back_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    allowance = Allowance(60)
    assert allowance.take("alice", 60) == 0
    assert allowance.take("alice", 5) == pytest.approx(5)
    assert allowance.take("bob", 5) == 0
    now += 5
    assert allowance.take("alice", 5) == 0
    assert allowance.take("alice", 1) > 0
    now += 1000
    assert allowance.take("alice", 60) == 0
    assert allowance.take("alice", 1) == pytest.approx(1)
    now += 1000
    assert allowance.take("alice", 100) == 0  # more than a minute's: when there is a minute's
    assert Allowance(0).take("alice", 10**9) == 0


# Ports.


def test_a_port_is_taken_once() -> None:
    with bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} of 127.0.0.1 is taken by another program"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["203.0.113.7", "no such name", "a..b"])
def test_an_address_that_is_not_here(host: str) -> None:
    with pytest.raises(ConfigError, match=f"Port 0 of {host} can't be opened: "):
        bind(host, 0)


# The command.


def test_a_new_key_goes_to_stdout_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys.txt"
    assert main(["serve", "--keys", str(path), "--new-key", "alice"]) == 0
    out, err = capsys.readouterr()
    assert Keys.read(path).name_of(out.strip()) == "alice"
    assert "shown this once" in err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--new-key", "alice"], 1, "--new-key needs --keys FILE"),
        (["--host", "0.0.0.0"], 1, "wants API keys"),
        (["--keys", "nowhere.txt", "--port", "0"], 1, "nowhere.txt cannot be read"),
        (["--max-batch", "0"], 2, "must be a whole number from 1"),
        (["--port", "x"], 2, "must be a whole number from 0"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err


@pytest.mark.parametrize("arguments", [[], ["--no-browser"]])
def test_the_page_is_for_this_machine_and_opens_a_browser(arguments: list[str], monkeypatch: Any, capsys: Any) -> None:
    import webbrowser

    from hart_infer.server.run import Server

    opened: queue.SimpleQueue[str] = queue.SimpleQueue()
    seen: list[Server] = []

    def run(self: Server, listening: socket.socket, announce: Any) -> None:
        seen.append(self)
        announce(f"http://127.0.0.1:{listening.getsockname()[1]}/v1")

    monkeypatch.setattr(Server, "run", run)
    monkeypatch.setattr(webbrowser, "open", opened.put)
    monkeypatch.setenv(f"{PREFIX}HOST", "0.0.0.0")
    assert main(["ui", "--port", "0", *arguments]) == 0
    assert seen[0].settings.is_local
    address = capsys.readouterr().err.strip().split(" the page is ")[1]
    assert address.startswith("http://127.0.0.1:") and address.endswith("/")
    if arguments:
        assert opened.empty()
    else:
        assert opened.get(timeout=5) == address


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import sys

    for name in [name for name in sys.modules if name.startswith("hart_infer.server.run")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert "pip install 'hart-infer[serve]'" in capsys.readouterr().err
